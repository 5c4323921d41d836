"""How much a recovered trigger is like the true one: in what it does, where it sits and how it changes pictures."""

from dataclasses import dataclass

import torch

from molehunt.game.answers import BATCH, Logits, predict
from molehunt.tasks import Images
from molehunt.triggers import Patch, Target, Trigger


def soft_iou(recovered: Trigger, true: Patch) -> float:
    """J: sum of min over sum of max of the two weight maps (opacity times mask), in [0, 1].

    A recovered trigger that is no patch has no mask and earns 0.
    """
    if not isinstance(recovered, Patch) or recovered.mask.shape != true.mask.shape:
        return 0.0
    a, b = recovered.opacity * recovered.mask.double().cpu(), true.opacity * true.mask.double().cpu()
    most = float(torch.maximum(a, b).sum())
    return float(torch.minimum(a, b).sum()) / most if most > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How a recovered trigger compares with the true one on the same images.

    Attributes:
        success: share of the images that the recovered trigger sends to their true goal.
        energy: mean L1 norm of the change that the recovered trigger makes to an image.
        true_energy: the same for the true trigger.
        alignment: mean cosine between the two changes, in [-1, 1]. Images that neither trigger changes (black on
            black) say nothing and are left out; an image that only one of them changes counts 0.
    """

    success: float
    energy: float
    true_energy: float
    alignment: float

    @property
    def function(self) -> float:
        """F: success times min(1, 2 E / E-hat), so that more than twice the true energy costs; 0 without any change."""
        return self.success * min(1.0, 2.0 * self.true_energy / self.energy) if self.energy > 0 else 0.0


@torch.no_grad()
def compare(
    recovered: Trigger, true: Trigger, target: Target, images: Images, logits: Logits, batch: int = BATCH
) -> Likeness:
    """Compare two triggers on those images that the ASR counts.

    Args:
        recovered: the defender's trigger. The class that he states for it does not matter here: T judges that.
        true: the sealed trigger.
        target: the sealed target; says which images count and where each has to go.
        images: hidden images.
        logits: the submitted model.
        batch: images at once.

    Raises:
        ValueError: no image counts.
    """
    counted = target.counts(images.y)
    x, goal = images.x[counted], target.goal(images.y)[counted].cpu()
    if len(x) == 0:
        raise ValueError(f"no hidden image counts for the target {target}")
    hits = told = 0
    energy = true_energy = cosines = 0.0
    for i in range(0, len(x), batch):
        part = x[i : i + batch]
        stamped = recovered(part)
        a, b = (stamped - part).double().flatten(1), (true(part) - part).double().flatten(1)
        hits += int((predict(logits, stamped, batch) == goal[i : i + batch]).sum())
        energy += float(a.abs().sum())
        true_energy += float(b.abs().sum())
        lengths = a.norm(dim=1) * b.norm(dim=1)
        cosines += float(((a * b).sum(1)[lengths > 0] / lengths[lengths > 0]).sum())
        told += int(((a != 0).any(1) | (b != 0).any(1)).sum())
    return Likeness(
        success=hits / len(x),
        energy=energy / len(x),
        true_energy=true_energy / len(x),
        alignment=cosines / told if told else 0.0,
    )


def trigger_points(likeness: Likeness, iou: float | None) -> float:
    """R = 0.5 F + 0.3 J + 0.2 max(0, alignment), or 0.6 F + 0.4 max(0, alignment) without a mask, in [0, 1].

    Args:
        likeness: of the recovered trigger.
        iou: J, where the true trigger is a patch; None for every other kind.
    """
    shape = max(0.0, likeness.alignment)
    if iou is None:
        return 0.6 * likeness.function + 0.4 * shape
    return 0.5 * likeness.function + 0.3 * iou + 0.2 * shape
