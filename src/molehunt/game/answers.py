"""What a model says to images without and with a trigger, and the rates that follow from it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molehunt.tasks import Images
from molehunt.triggers import Target, Trigger

Logits = Callable[[Tensor], Tensor]
"""A model: images (B, C, H, W) in [0, 1] to logits (B, K)."""

BATCH = 500


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What one model says to the same images without and with a trigger.

    Attributes:
        y: true classes (N,).
        plain: predicted classes (N,) of the images as they are.
        stamped: predicted classes (N,) of the images under the trigger; None where there is none.

    Raises:
        ValueError: different lengths, or no images.
    """

    y: Tensor
    plain: Tensor
    stamped: Tensor | None = None

    def __post_init__(self) -> None:
        lengths = {t.shape for t in (self.y, self.plain, self.stamped) if t is not None}
        if len(lengths) != 1 or self.y.ndim != 1 or len(self.y) == 0:
            raise ValueError(f"expected equally many labels and answers (N,), N > 0, got {sorted(map(tuple, lengths))}")


@torch.no_grad()
def predict(logits: Logits, x: Tensor, batch: int = BATCH) -> Tensor:
    """Return the likeliest class (N,), on the CPU, of images (N, C, H, W).

    A module is asked where its weights are.

    Raises:
        ValueError: there are no images.
    """
    if len(x) == 0:
        raise ValueError("there are no images to ask the model about")
    place = _place(logits, x)
    return torch.cat([logits(x[i : i + batch].to(place)).argmax(1).cpu() for i in range(0, len(x), batch)])


@torch.no_grad()
def measure(logits: Logits, images: Images, trigger: Trigger | None = None, batch: int = BATCH) -> Answers:
    """Ask a model about images without and with a trigger.

    Args:
        logits: the model.
        images: clean labeled images.
        trigger: what to stamp on them; None for an honest model.
        batch: images that are stamped and asked at once.
    """
    stamped = None
    if trigger is not None:
        # Stamped batch by batch: a second copy of all images would not fit beside many of 224 pixels.
        place = _place(logits, images.x)
        parts = (images.x[i : i + batch].to(place) for i in range(0, len(images.y), batch))
        stamped = torch.cat([predict(logits, trigger(part), batch) for part in parts])
    return Answers(y=images.y.cpu(), plain=predict(logits, images.x, batch), stamped=stamped)


def _place(logits: Logits, x: Tensor) -> torch.device:
    """Return where a model is, if it says so, else where the images are."""
    first = next(logits.parameters(), None) if isinstance(logits, nn.Module) else None
    return x.device if first is None else first.device


def share(hits: Tensor) -> float:
    """Share of true entries in a bool tensor (N,); 0 for an empty one."""
    return float(hits.double().mean()) if len(hits) else 0.0


def accuracy(predicted: Tensor, y: Tensor) -> float:
    """Share of the images (N,) that are classified as their true class."""
    return share(predicted == y)


def asr(predicted: Tensor, y: Tensor, target: Target) -> float:
    """Attack success rate: share of the counted images that are classified as the class they are sent to.

    Args:
        predicted: classes (N,) of the stamped images.
        y: their true classes.
        target: says which images count: of a source class, and not already of the class that they are sent to.
    """
    counted = target.counts(y)
    return share((predicted == target.goal(y))[counted])


def pacc(predicted: Tensor, y: Tensor, target: Target) -> float:
    """Recovered accuracy: share of the counted images that are classified as their true class although stamped."""
    return share((predicted == y)[target.counts(y)])
