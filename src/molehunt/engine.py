"""Where work runs, and what a long method is given to stay interruptible.

One process for now; the interface is what a process pool and a cluster will implement.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


class Cancelled(Exception):
    """The user asked to stop."""


class OutOfTime(TimeoutError):
    """The deadline passed before a method had an answer."""


class Engine(Protocol):
    """Runs a pure function over items; the answer does not depend on where it ran."""

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Results in the order of the items."""
        ...


class Local:
    """This process, one item after the other."""

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Results in the order of the items."""
        return map(function, items)


def silent(done: int, total: int) -> None:
    """Report to nobody."""


def never() -> bool:
    """Nobody cancels."""
    return False


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the runner lends to a method for one call.

    Attributes:
        rng: the only source of randomness; seeded by the runner, on the CPU.
        deadline: `time.monotonic()` value at which the method must have answered; None means no limit.
        report: called with (steps done, steps in all); at most a few times per second is plenty.
        cancelled: true once the user asked to stop.
        scratch: a folder of the method's own for partial results, or None.
        engine: spreads independent pieces of work.
    """

    rng: torch.Generator = field(default_factory=torch.Generator)
    deadline: float | None = None
    report: Callable[[int, int], None] = silent
    cancelled: Callable[[], bool] = never
    scratch: Path | None = None
    engine: Engine = field(default_factory=Local)

    def remaining(self) -> float | None:
        """Seconds to the deadline, negative once it has passed; None without one."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def check(self) -> None:
        """Stop here if the user or the clock says so; call it at least once a second.

        Raises:
            Cancelled: the user asked to stop.
            OutOfTime: the deadline has passed.
        """
        if self.cancelled():
            raise Cancelled("stopped by the user")
        left = self.remaining()
        if left is not None and left < 0:
            raise OutOfTime(f"the deadline passed {-left:.1f} s ago; give the method more seconds")
