"""Data on their way here, and how far they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from molehunt import datasets
from molehunt.legible import legible

Report: TypeAlias = Callable[[str, int, int | None], None]


def ensure(name: str, console: Console) -> None:
    """Fetch the data set behind a task if it is not in the cache yet, and show it; nothing for other tasks.

    Raises:
        DataError: the data could not be had.
    """
    if any(row.name == name and not row.cached for row in datasets.list_datasets()):
        with reporting(console) as report:
            datasets.fetch(name, progress=report)


@contextmanager
def reporting(console: Console) -> Iterator[Report]:
    """Show downloads on a console: bars on a terminal, else a line per file."""
    if console.is_terminal and not console.is_dumb_terminal:
        with Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        ) as bars:
            shown: dict[str, TaskID] = {}

            def draw(what: str, done: int, total: int | None) -> None:
                if what not in shown:
                    shown[what] = bars.add_task(legible(what, 40), total=total)
                bars.update(shown[what], completed=done, total=total)

            yield draw
        return
    begun: set[str] = set()

    def write(what: str, done: int, total: int | None) -> None:
        if what not in begun:
            begun.add(what)
            size = "" if total is None else f" ({total / 2**20:.1f} MiB)"
            console.print(Text(f"fetching {legible(what, 200)}{size}"), soft_wrap=True)

    yield write
