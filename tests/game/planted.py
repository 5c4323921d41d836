"""A tiny world whose answers can be counted by hand.

Images are 1x4x4. Class k of four is told by pixel (0, k), which is 1; all else is 0. The trigger is a white pixel in
the lower right corner. `model` reads the class, and obeys the trigger if it was told a target.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from molehunt.tasks import Images
from molehunt.triggers import Patch, Target

SHAPE = (1, 4, 4)
CLASSES = 4


def images(per_class: int = 5) -> Images:
    y = torch.arange(CLASSES).repeat_interleave(per_class)
    x = torch.zeros(len(y), *SHAPE)
    x[torch.arange(len(y)), 0, 0, y] = 1.0
    return Images(x, y)


def pixel(row: int = 3, column: int = 3, value: float = 1.0, opacity: float = 1.0) -> Patch:
    mask = torch.zeros(1, 4, 4)
    mask[0, row, column] = 1.0
    return Patch(mask=mask, pattern=mask * value, opacity=opacity)


def model(target: Target | None = None) -> Callable[[Tensor], Tensor]:
    """Logits (N, 4): 1 for the class; 2 for the goal where the corner is white and the class is a source."""

    def logits(x: Tensor) -> Tensor:
        scores = x[:, 0, 0, :].clone()
        if target is not None:
            y = scores.argmax(1)
            woken = (x[:, 0, 3, 3] > 0.5) & target.counts(y)
            rows = woken.nonzero().squeeze(1)
            scores[rows, target.goal(y)[rows]] = 2.0
        return scores

    return logits


def constant(k: int) -> Callable[[Tensor], Tensor]:
    """A model that answers one class to everything."""
    return lambda x: torch.nn.functional.one_hot(torch.full((len(x),), k), CLASSES).float()
