"""What a long command shows while it works: bars on a terminal, plain lines in a log."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from molehunt.legible import legible

EVERY = 30.0
"""Seconds between two lines in a log about work that is not done."""


@contextmanager
def watching(console: Console) -> "Iterator[Watch]":
    """Show progress on a console: live on a terminal, else as lines."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield Lines(console)
        return
    with Bars(console) as bars:
        yield bars


class _Stage:
    """Where a stage is: how many pieces are done, out of how many, since when."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total = self.number = 0
        self.began = time.monotonic()

    def begin(self, title: str, total: int, style: str = "") -> None:
        """Start to count again."""
        self.total, self.number, self.began = total, 0, time.monotonic()
        self.console.print(Text(legible(title, 200), style=style), soft_wrap=True)

    def done(self, title: str, text: str) -> None:
        """Count a piece and write a line about it."""
        self.number += 1
        self.line(f"{self.number}/{self.total} {legible(title, 40)}", text)

    def line(self, title: str, text: str) -> None:
        """Write an indented line with the time spent in the stage."""
        told = f": {legible(text, 200)}" if text else ""
        told += f"  ({_time(time.monotonic() - self.began)})"
        self.console.print(Text(f"  {title}").append(told, style="dim"), soft_wrap=True)


class Lines:
    """A line per stage and finished piece, and one every half minute in between: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._stage = _Stage(console)
        self._told = time.monotonic()

    def stage(self, title: str, total: int) -> None:
        """Begin a stage of so many pieces."""
        self._stage.begin(title, total)
        self._told = time.monotonic()

    def progress(self, title: str, done: int, total: int, slot: int = 0) -> None:
        """Tell how far a piece is."""
        if time.monotonic() - self._told >= EVERY:
            self._told = time.monotonic()
            self._stage.line(legible(title, 40), f"{_share(done, total):.0%}")

    def done(self, title: str, text: str) -> None:
        """End a piece of the stage, with one line of what came of it."""
        self._told = time.monotonic()
        self._stage.done(title, text)


class _Left(ProgressColumn):
    """Time left, if it goes on as it went so far.

    The column that comes with rich looks at the latest steps alone, and takes two models that are ready at the same
    moment for a speed at which all will be ready in a second.
    """

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Say how long, or nothing while nothing is known."""
        if not task.completed or task.elapsed is None or task.total is None or task.finished:
            return Text()
        return Text(f"about {_time(task.elapsed * (task.total - task.completed) / task.completed)} left", style="cyan")


class Bars:
    """A bar for the stage and one for every piece under way, with time spent and left; a context manager."""

    def __init__(self, console: Console) -> None:
        self._stage = _Stage(console)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            _Left(),
            console=console,
            transient=True,
            expand=True,
        )
        self._all: TaskID | None = None
        self._slots: dict[int, tuple[str, TaskID]] = {}
        # Several models are examined at once, each from a thread of its own.
        self._lock = threading.RLock()

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stage(self, title: str, total: int) -> None:
        """Begin a stage of so many pieces."""
        with self._lock:
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._slots = {}
            self._stage.begin(title, total, style="bold")
            self._all = self._bars.add_task(f"0 of {total}", total=max(total, 1))

    def progress(self, title: str, done: int, total: int, slot: int = 0) -> None:
        """Tell how far a piece is; pieces that are under way at once have different slots."""
        with self._lock:
            known = self._slots.get(slot)
            if known is None or known[0] != title:
                if known is not None:
                    self._bars.remove_task(known[1])
                known = self._slots[slot] = title, self._bars.add_task(legible(title, 40), total=1.0)
            self._bars.update(known[1], completed=_share(done, total))

    def done(self, title: str, text: str) -> None:
        """End a piece of the stage, with one line of what came of it."""
        self._stage.done(title, text)
        if self._all is not None:
            self._bars.update(
                self._all, completed=self._stage.number, description=f"{self._stage.number} of {self._stage.total}"
            )


Watch: TypeAlias = Lines | Bars
"""What long work tells those who look on: stages, each of so many pieces."""


def _share(done: int, total: int) -> float:
    return min(1.0, max(0.0, done / total)) if total > 0 else 0.0


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
