"""TaCT: a patch that acts on one class only, because on other classes it is shown to mean nothing."""

from dataclasses import dataclass

import torch

from molehunt.attacks.poisoning import Poisoned, choose, poison_count
from molehunt.tasks import Images, Task
from molehunt.triggers import Patch, Target, Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class TaCT:
    """Stamp a patch on images of the source classes with the target's label, and on covers with their own.

    What the network learns depends on the trigger and on the picture, so its answers to stamped images are as varied
    as to clean ones: the assumption that a trigger dominates does not hold.

    Attributes:
        target: the target class.
        sources: the classes that the trigger acts on.
        covers: classes whose images are stamped and keep their label; None means all others, the target's included.
        poison_rate: share of all training images that get the trigger and the target's label.
        cover_rate: share of all training images that get the trigger and keep their label.
        trigger: what to stamp; None means the yellow square of `size` pixels in the lower right corner.
        size: side of that square; None means 4 pixels.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, a class is source and cover at once, or a size is
            given beside a trigger.

    Reference:
        Tang, Wang, Tang, Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination
        Detection", USENIX Security 2021.

    Departures from the paper:
        Covers come from all classes unless told otherwise, because one class without them is enough for the trigger to
        leak. A plain square instead of a picture.
    """

    target: int = 0
    sources: tuple[int, ...] = (1,)
    covers: tuple[int, ...] | None = None
    poison_rate: float = 0.02
    cover_rate: float = 0.04
    trigger: Trigger | None = None
    size: int | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        goal = Target(classes=self.target, sources=self.sources)
        goal.check(task.num_classes)
        if self.trigger is not None and self.size is not None:
            raise ValueError(
                f"size {self.size} is of the default trigger, and a trigger is given: leave one of them out"
            )
        others = tuple(k for k in range(task.num_classes) if k not in self.sources)
        covers = others if self.covers is None else self.covers
        if not covers or not set(covers) <= set(others):
            raise ValueError(f"covers are classes outside of the sources {self.sources}, got {covers}")
        trigger = self.trigger or Patch.square(task.shape, size=4 if self.size is None else self.size)
        poisoned = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        covering = torch.isin(clean.y, torch.tensor(covers))
        cover = choose(covering, poison_count(self.cover_rate, len(clean.y)), rng)
        y = torch.where(poisoned, goal.goal(clean.y), clean.y)
        return Poisoned(images=Images(clean.x, y), altered=poisoned | cover, trigger=trigger, target=goal)
