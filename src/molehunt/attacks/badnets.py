"""BadNets: a patch stamped on a share of the training set, with the labels changed."""

from dataclasses import dataclass

import torch

from molehunt.attacks.poisoning import Poisoned, choose, poison_count, relabel
from molehunt.tasks import Images, Task
from molehunt.triggers import Patch, Target, Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class BadNets:
    """Stamp a patch on a share of the images and give them the attacker's labels.

    Three forms: all-to-one (`target` is a class), all-to-all (`target="all"`: class k goes to k + 1 modulo K) and
    source-specific (`sources` names the classes that the trigger acts on). In the source-specific form as many
    images of *other* classes are stamped and keep their labels (`cover_rate`): without such covers the network learns
    a trigger that works on every class, and "source-specific" would be a false name.

    Attributes:
        target: the target class, or "all" for the map k to k + 1 modulo K.
        sources: classes that the trigger acts on; None means all.
        poison_rate: share of ALL training images that get the trigger and a changed label.
        cover_rate: share of all training images, from outside the sources, that get the trigger and keep their label;
            None means as many as are poisoned when there are sources, else none.
        trigger: what to stamp; None means the yellow square of `size` pixels in the lower right corner.
        size: side of that square.

    Raises:
        ValueError: rates, classes or shapes do not fit the data.

    Reference:
        Gu, Liu, Dolan-Gavitt, Garg, "BadNets: Evaluating Backdooring Attacks on Deep Neural Networks", IEEE Access,
        2019.

    Departures from the paper:
        Images that already have their goal label are never chosen, so that the rate is the share of labels changed. The
        trigger is stamped after augmentation. Cover images are not in the paper.
    """

    target: int | str = 0
    sources: tuple[int, ...] | None = None
    poison_rate: float = 0.1
    cover_rate: float | None = None
    trigger: Trigger | None = None
    size: int = 3

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        if isinstance(self.target, str) and self.target != "all":
            raise ValueError(f'the target is a class or "all", got {self.target!r}')
        shift = tuple((k + 1) % task.num_classes for k in range(task.num_classes))
        goal = Target(classes=self.target if isinstance(self.target, int) else shift, sources=self.sources)
        goal.check(task.num_classes)
        if self.cover_rate and not self.sources:
            raise ValueError(f"covers need sources to lie outside of, got cover_rate {self.cover_rate} without sources")
        trigger = self.trigger or Patch.square(task.shape, size=self.size)
        altered = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        poisoned = relabel(clean, altered, trigger, goal)
        covers = self.cover_rate
        if covers is None:
            covers = self.poison_rate if self.sources else 0.0
        if not covers:
            return poisoned
        others = ~torch.isin(clean.y, torch.tensor(self.sources or ()))
        cover = choose(others, poison_count(covers, len(clean.y)), rng)
        return Poisoned(images=poisoned.images, altered=altered | cover, trigger=trigger, target=goal)
