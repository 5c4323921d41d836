"""FTrojan: a constant added to two cells of the spectrum of the colors."""

from dataclasses import dataclass

import torch

from molehunt.attacks.poisoning import Poisoned, choose, poison_count, relabel
from molehunt.tasks import Images, Task
from molehunt.triggers import Frequency, Target, Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class FTrojan:
    """Add a constant to two cells of the block cosine transform of a share of the images, and relabel them.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that are poisoned.
        magnitude: what is added to a cell, in gray levels (0 to 255).
        window: side of a block; None means the shorter side of the picture, at most 32.
        trigger: the trigger itself as a `Frequency`; None means the cells in the middle and at the end of the diagonal
            of the block, which for a window of 32 are (15, 15) and (31, 31).

    Raises:
        ValueError: rates, classes or shapes do not fit the data, or a setting is out of range.

    Reference:
        Wang, Yao, Xu, An, Tong, Wang, "An Invisible Black-box Backdoor Attack through Frequency Domain", ECCV 2022.

    Departures from the paper:
        Pictures stay floating point; rounding to 8 bits would wipe out much of the trigger. Pictures without colors are
        changed in their gray values. The default magnitude is larger than the paper's 30; see the page.
    """

    target: int = 0
    poison_rate: float = 0.1
    magnitude: float = 150.0
    window: int | None = None
    trigger: Trigger | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        goal = Target(classes=self.target)
        goal.check(task.num_classes)
        window = min(32, *task.shape[1:]) if self.window is None else self.window
        middle, last = window // 2 - 1, window - 1
        trigger = self.trigger or Frequency(
            shape=task.shape, magnitude=self.magnitude / 255, window=window, cells=(middle, middle, last, last)
        )
        altered = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        return relabel(clean, altered, trigger, goal)
