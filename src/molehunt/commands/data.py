"""`molehunt data`: which data sets there are, where they come from, whether they are intact."""

from pathlib import Path
from typing import Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.exits import DONE, given

app = typer.Typer(help="List, fetch and verify data sets.", rich_markup_mode="markdown")

Name = Annotated[str, typer.Argument(help="Name of a data set, as `molehunt data list` shows it.", show_default=False)]


@app.command("list")
def list_() -> int:
    """Show the data sets that can be had, and which of them are here."""
    from rich import box
    from rich.table import Table

    from molehunt.datasets import list_datasets

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("name", "pictures", "classes", "images", "size", "here"):
        table.add_column(title, justify="left" if title in {"name", "here"} else "right")
    for row in list_datasets():
        shape = "x".join(map(str, row.shape))
        here = "yes" if row.cached else f"no: molehunt data fetch {row.name}"
        table.add_row(row.name, shape, str(row.classes), f"{row.images:,}", f"{row.size / 2**20:,.0f} MiB", here)
    consoles.result().print(table)
    return DONE


@app.command()
def fetch(
    name: Name,
    folder: Annotated[
        Path | None,
        typer.Option(help="Read the files from this folder, and look nowhere else.", show_default=False),
    ] = None,
) -> int:
    """Fetch a data set, check it, and keep it in the cache.

    An interrupted download goes on where it stopped.
    """
    from molehunt import datasets
    from molehunt.commands.fetching import reporting

    with reporting(consoles.messages()) as report, given():
        datasets.fetch(name, folder=folder, progress=report)
    return verify(name)


@app.command()
def verify(name: Name) -> int:
    """Compare the data that are here with the SHA-256 that they must have."""
    from molehunt import datasets

    with given():
        sums = datasets.verify(name)
    for part, digest in sums.items():
        consoles.result().print(f"{name} {part} {digest}", soft_wrap=True)
    return DONE
