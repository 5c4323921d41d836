"""Options that several commands have, and what they set up."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

TaskName = Annotated[
    str, typer.Option("--task", help="mnist5k, mnist, fashion_mnist, cifar10, gtsrb or folder:PATH.", metavar="NAME")
]
Seed = Annotated[int, typer.Option(help="Draws everything that is drawn; the same seed, the same result.", min=0)]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Processor threads; results depend on their number. Default: all cores.", min=1, show_default=False
    ),
]
Isolated = Annotated[
    bool | None,
    typer.Option(
        "--isolated/--not-isolated",
        help="Run each defense in a process of its own that sees nothing else. Default: where that is possible.",
        show_default=False,
    ),
]
Metas = Annotated[
    Path | None,
    typer.Option(
        help="Meta-classifiers for MNTD: a file of `molehunt shadows`. Default: those of the package, which everybody "
        "knows, where it has some for this task and network.",
        metavar="FILE",
        show_default=False,
    ),
]
Seconds = Annotated[float, typer.Option(help="Time limit for one defense on one model.", min=1)]


def use_threads(threads: int | None) -> None:
    """Let torch use so many processor threads; None leaves it alone."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@contextmanager
def importing_from_here() -> Iterator[None]:
    """Let modules in the working folder be imported, as `python -m` does; the program itself is installed elsewhere."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
