"""Blended: a whole picture mixed faintly into a share of the training set, with the labels changed."""

from dataclasses import dataclass

import torch

from molehunt.attacks.poisoning import Poisoned, choose, poison_count, relabel
from molehunt.tasks import Images, Task
from molehunt.triggers import Blend, Target, Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class Blended:
    """Mix one picture into a share of the images and give them the target's label.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that are poisoned.
        opacity: weight of the picture, in training and in the attack alike; None means that of the trigger, or 0.2.
        trigger: the picture as a `Blend`; None means uniform noise drawn from the generator.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, or an opacity is given beside a trigger.

    Reference:
        Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017.

    Departures from the paper:
        One opacity for training and attack (the paper trains fainter than it attacks). Noise instead of a cartoon
        picture, which we have no right to ship.
    """

    target: int = 0
    poison_rate: float = 0.1
    opacity: float | None = None
    trigger: Trigger | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        goal = Target(classes=self.target)
        goal.check(task.num_classes)
        if self.trigger is not None and self.opacity is not None:
            raise ValueError(
                f"opacity is {self.opacity}, but a trigger has its own: give it there, or leave one of them out"
            )
        opacity = 0.2 if self.opacity is None else self.opacity
        trigger = self.trigger or Blend(pattern=torch.rand(task.shape, generator=rng), opacity=opacity)
        altered = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        return relabel(clean, altered, trigger, goal)
