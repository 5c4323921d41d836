"""`molehunt starter`: the files with which a student begins."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.exits import DONE, given
from molehunt.commands.options import TaskName
from molehunt.legible import legible


def starter(
    task: TaskName = "mnist5k",
    out: Annotated[Path, typer.Option(help="Folder of the kit; made if need be.")] = Path("starter"),
) -> int:
    """Write the starter kit: a script, a notebook, the rules, and a template for an attack of your own.

    Files that are there already are never replaced.
    """
    from molehunt.starter import write
    from molehunt.tasks import get_task

    with given((ValueError, OSError)):
        written = write(get_task(task), out)
    shown = consoles.result()
    for path in written:
        shown.print(legible(str(path), 500), soft_wrap=True)
    shown.print(f"next: cd {legible(shlex.quote(str(out)), 500)} and read README.md", soft_wrap=True)
    return DONE
