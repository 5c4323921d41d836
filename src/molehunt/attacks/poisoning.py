"""What every data-poisoning attack answers, and how rows are chosen for it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from molehunt.tasks import Images, Task
from molehunt.triggers import Target, Trigger


@dataclass(frozen=True, eq=False)
class Poisoned:
    """A poisoned training set, before the trigger is stamped.

    The trainer stamps after its augmentation, so that no crop cuts the trigger off; `stamped` stamps without one, for
    a set that is handed over.

    Attributes:
        images: pixels as they were, labels as the attacker wants them.
        altered: bool (N,), rows that carry the trigger.
        trigger: what is stamped on them.
        target: where the backdoor sends images.
    """

    images: Images
    altered: Tensor
    trigger: Trigger
    target: Target

    def stamp(self, x: Tensor, rows: Tensor) -> Tensor:
        """Stamp those images of a batch (B, C, H, W) whose training row (B,) is altered; the rest stay as they are."""
        hit = self.altered.to(rows.device)[rows]
        if not bool(hit.any()):
            return x
        x = x.clone()
        x[hit] = self.trigger(x[hit])
        return x

    def stamped(self) -> Images:
        """The whole set with the trigger on its altered rows."""
        x = self.images.x.clone()
        x[self.altered] = self.trigger(x[self.altered])
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
