"""What every data-poisoning attack answers, and how rows are chosen for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from molehunt.tasks import Images, Task
from molehunt.triggers import Target, Trigger


@dataclass(frozen=True, eq=False)
class Mark:
    """Some rows of a training set and what is put on them.

    Attributes:
        rows: bool (N,).
        stamp: (x (B, C, H, W), rows int64 (B,)) to x'; a function of its arguments alone, so that an image looks the
            same in every pass and a resumed training sees what an uninterrupted one does.
    """

    rows: Tensor
    stamp: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Poisoned:
    """A poisoned training set, before the trigger is stamped.

    The trainer stamps after its augmentation, so that no crop cuts the trigger off; `stamped` stamps without one, for
    a set that is handed over.

    Attributes:
        images: labels as the attacker wants them; pixels as they were, except where an attack prepares them beforehand
            (label-consistent).
        altered: bool (N,), rows that differ from the clean set in label or pixels once everything is stamped.
        trigger: what wakes the backdoor: what the seal holds and the gates measure.
        target: where the backdoor sends images.
        marks: what is put on which rows in training, in this order; empty means the trigger on all altered rows.
            Others than that: covers with another transformation, one of several triggers, a fainter trigger.
        further: backdoors beside the sealed one, each with its trigger and target: no gate measures them, but labels
            may go where they send them.
    """

    images: Images
    altered: Tensor
    trigger: Trigger
    target: Target
    marks: tuple[Mark, ...] = ()
    further: tuple[tuple[Trigger, Target], ...] = ()

    def stamp(self, x: Tensor, rows: Tensor) -> Tensor:
        """Put the marks on the images of a batch (B, C, H, W), given their training rows (B,); the rest stay."""
        marks = self.marks or (Mark(self.altered, lambda picked, _: self.trigger(picked)),)
        copied = False
        for mark in marks:
            hit = mark.rows.to(rows.device)[rows]
            if not bool(hit.any()):
                continue
            if not copied:
                x, copied = x.clone(), True
            x[hit] = mark.stamp(x[hit], rows[hit])
        return x

    def stamped(self, batch: int = 4096) -> Images:
        """The whole set with the marks on its rows, in a copy."""
        x = self.images.x.clone()
        rows = self.altered.nonzero().squeeze(1)
        for some in torch.split(rows, batch):
            x[some] = self.stamp(x[some], some)
        return Images(x, self.images.y)


class Attack(Protocol):
    """A frozen dataclass whose call poisons a clean training set; it never changes what it is given."""

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Choose the rows, the trigger and the labels, from the generator alone."""
        ...


def choose(candidates: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Bool (N,) with `count` of the candidate rows (bool (N,)) set, drawn without replacement.

    Raises:
        ValueError: there are fewer candidates than that.
    """
    rows = candidates.nonzero().squeeze(1)
    if count > len(rows):
        raise ValueError(f"only {len(rows)} images can be poisoned, {count} were asked for: lower the poison rate")
    chosen = torch.zeros_like(candidates)
    chosen[rows[torch.randperm(len(rows), generator=rng)[:count]]] = True
    return chosen


def relabel(clean: Images, altered: Tensor, trigger: Trigger, target: Target) -> Poisoned:
    """Send the altered rows to their goal class, labels included."""
    y = torch.where(altered, target.goal(clean.y), clean.y)
    return Poisoned(images=Images(clean.x, y), altered=altered, trigger=trigger, target=target)


def poison_count(rate: float, rows: int) -> int:
    """Poisoned rows for a rate over ALL training rows, at least one.

    Raises:
        ValueError: the rate is not in (0, 1].
    """
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"the poison rate must lie in (0, 1], got {rate}")
    return max(1, round(rate * rows))
