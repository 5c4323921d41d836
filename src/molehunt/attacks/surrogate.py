"""A small network of the attacker's own, on which triggers are made before any victim is trained."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.tasks import Images, Task

PASSES = 5
"""No image is seen more often than this while a trigger is made: a small set gets fewer steps."""


class Centered(nn.Module):
    """Bring pixels from [0, 1] to [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 2 x - 1, same shape (B, C, H, W)."""
        return 2.0 * x - 1.0


def small_network(
    inputs: int, outputs: int, shape: tuple[int, int], rng: torch.Generator, width: int = 32
) -> nn.Module:
    """Build an untrained network: three 3x3 convolutions, each at half the size of the one before, and a linear layer.

    Args:
        inputs: channels of an image.
        outputs: numbers that come out.
        shape: (H, W) of an image.
        rng: draws the weights.
        width: channels of the first convolution; the others have twice as many.

    Returns:
        A float32 module from (B, C, H, W) in [0, 1] to (B, outputs).
    """
    height, side = (-(-size // 8) for size in shape)
    # Without storage first, so that no layer draws weights from the global generator.
    with torch.device("meta"):
        model = nn.Sequential(
            Centered(),
            nn.Conv2d(inputs, width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * height * side, outputs),
        )
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                parameter.normal_(0.0, (2 / parameter[0].numel()) ** 0.5, generator=rng)
    return model


def batches(images: Images, steps: int, batch: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Draw rows (B,) without replacement, pass after pass, for so many steps, but for `PASSES` passes at most.

    Raises:
        ValueError: fewer than one step, or no images.
    """
    count = len(images.y)
    if steps < 1 or count == 0:
        raise ValueError(f"a trigger is made in at least one step on at least one image, got {steps} and {count}")
    size, left = min(batch, count), steps
    for _ in range(PASSES):
        order = torch.randperm(count, generator=rng)
        for start in range(0, count - size + 1, size):
            if left == 0:
                return
            left -= 1
            yield order[start : start + size]


def quickly_trained(images: Images, task: Task, rng: torch.Generator, steps: int = 400, batch: int = 100) -> nn.Module:
    """Train a small classifier on clean images, in a few seconds.

    Args:
        images: what to train on.
        task: says how many classes there are.
        rng: draws the weights and the order of the images.
        steps: of the optimizer, at most; see `batches`.
        batch: images per step.

    Returns:
        The classifier with frozen weights.
    """
    _, channels, height, width = images.x.shape
    model = small_network(channels, task.num_classes, (height, width), rng)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for rows in batches(images, steps, batch, rng):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images.x[rows]), images.y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.requires_grad_(False)
