"""Where work runs, and what a long method is given to stay interruptible.

One process, or several of this machine; the interface is also what a cluster will implement.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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


class Processes:
    """Several processes of this machine, each with its own threads.

    Two processes of one thread each train small networks about as fast as one with two threads on a quiet machine,
    and much faster on a busy one, where threads wait for each other. The function and its items must be picklable; a
    function that works from its items and a seed gives the same answer as `Local` with as many threads.

    Args:
        count: processes.
        threads: torch threads of each.

    Raises:
        ValueError: fewer than one of either.
    """

    def __init__(self, count: int, threads: int = 1) -> None:
        if count < 1 or threads < 1:
            raise ValueError(f"expected at least one process and thread, got {count} and {threads}")
        self.count, self.threads = count, threads

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Results in the order of the items; what one raises is raised here, and the rest is given up.

        Raises:
            ChildProcessError: a process died.
        """
        listed = list(items)
        if not listed:
            return
        others = set(multiprocessing.active_children())
        # spawn: a forked child of a process that has used OpenMP threads can hang in its first parallel loop.
        pool = ProcessPoolExecutor(
            max_workers=min(self.count, len(listed)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self.threads,),
        )
        try:
            yield from pool.map(function, listed)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"one of {self.count} worker processes was killed, most likely because memory ran out: use fewer"
            ) from error
        except BaseException:
            # Ctrl-C must not wait for a training to end.
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise
        else:
            # The workers are idle. Without waiting for their end the interpreter's own, soon after, may complain.
            pool.shutdown()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(threads: int) -> None:
    """Set up a worker: Ctrl-C reaches the parent, who ends the workers, and they end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """End this process when its parent is gone: one that was killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
