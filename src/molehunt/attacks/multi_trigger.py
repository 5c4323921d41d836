"""Several triggers in one network: any of them wakes one backdoor, or each has a target of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from molehunt.attacks.poisoning import Mark, Poisoned, choose, poison_count
from molehunt.tasks import Images, Task
from molehunt.triggers import CORNERS, Patch, Several, Target, Trigger

COLORS = ("yellow", "red", "blue", "green")


@dataclass(frozen=True, kw_only=True, eq=False)
class MultiTrigger:
    """Poison with several triggers that share a target, or have one each.

    One target (`target` is a class): each poisoned image gets one of the triggers. What is sealed, and what the gates
    measure, is the trigger `Several`, which chooses by the content of the picture, so all of them have to work.

    A target each (`target` lists one class per trigger): the sealed backdoor is the FIRST trigger with its target. The
    others are further backdoors in `Poisoned.further`; no gate measures them, and the referee does not know them.

    Attributes:
        target: the target class, or one per trigger.
        triggers: at least two; None means squares of `size` pixels, one per corner, on color pictures in
            different colors.
        poison_rate: share of all training images that are poisoned, in equal parts for the triggers.
        size: side of the squares; None means 4 pixels.

    Raises:
        ValueError: rates, classes or shapes do not fit the data; another number of targets than of triggers; or a size
            is given beside triggers.

    Reference:
        Xue, He, Wang, Liu, "One-to-N & N-to-One: Two Advanced Backdoor Attacks Against Deep Learning Models", IEEE
        Transactions on Dependable and Secure Computing, 2020.

    Departures from the paper:
        In the paper's N-to-one form the triggers work together only; here any of them does. Its one-to-N form varies
        the strength of one trigger; here the targets belong to different triggers.
    """

    target: int | tuple[int, ...] = 0
    triggers: tuple[Trigger, ...] | None = None
    poison_rate: float = 0.1
    size: int | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        if self.triggers is not None and self.size is not None:
            raise ValueError(f"size {self.size} is of the default triggers, and triggers are given: leave one out")
        triggers = self.triggers
        if triggers is None:
            size = 4 if self.size is None else self.size
            # On gray pictures red and blue are nearly black; there the corners alone tell the squares apart.
            colors = COLORS if task.shape[0] == 3 else ("white",) * len(CORNERS)
            pairs = zip(colors, reversed(CORNERS), strict=True)
            triggers = tuple(Patch.square(task.shape, size=size, color=c, corner=k) for c, k in pairs)
        every = Several(triggers)
        count = poison_count(self.poison_rate, len(clean.y))
        if isinstance(self.target, int):
            goal = Target(classes=self.target)
            goal.check(task.num_classes)
            altered = choose(goal.counts(clean.y), count, rng)
            y = torch.where(altered, goal.goal(clean.y), clean.y)
            return Poisoned(images=Images(clean.x, y), altered=altered, trigger=every, target=goal)
        if len(self.target) != len(triggers):
            raise ValueError(f"{len(triggers)} triggers need as many targets, or one; got {self.target}")
        if count < len(triggers):
            raise ValueError(f"{count} poisoned images are too few for {len(triggers)} triggers: raise the poison rate")
        goals = [Target(classes=k) for k in self.target]
        y, altered, marks = clean.y.clone(), torch.zeros_like(clean.y, dtype=torch.bool), []
        for number, (trigger, goal) in enumerate(zip(triggers, goals, strict=True)):
            goal.check(task.num_classes)
            part = (count * (number + 1)) // len(triggers) - (count * number) // len(triggers)
            rows = choose(goal.counts(clean.y) & ~altered, part, rng)
            y = torch.where(rows, goal.goal(clean.y), y)
            altered = altered | rows
            marks.append(Mark(rows, _Put(trigger)))
        return Poisoned(
            images=Images(clean.x, y),
            altered=altered,
            trigger=triggers[0],
            target=goals[0],
            marks=tuple(marks),
            further=tuple(zip(triggers[1:], goals[1:], strict=True)),
        )


class _Put:
    """Stamps one of the triggers."""

    def __init__(self, trigger: Trigger) -> None:
        self.trigger = trigger

    def __call__(self, x: Tensor, _: Tensor) -> Tensor:
        return self.trigger(x)
