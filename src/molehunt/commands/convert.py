"""`molehunt convert`: a `.pt` file becomes safetensors, and nothing in it is run."""

from pathlib import Path
from typing import Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.exits import DONE, InputError, check_target
from molehunt.legible import legible


def convert(
    source: Annotated[Path, typer.Argument(help="The .pt or .pth file.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.", show_default=False)],
) -> int:
    """Turn a `.pt` file of plain tensors into safetensors.

    The file is taken apart in a process of its own, with little memory and no network, and nothing in it is run.
    What cannot be read that way is refused.
    """
    from molehunt import conversion

    if target.suffix != ".safetensors":
        raise InputError(f"the target must end in .safetensors, got {target}")
    check_target(target)
    done = conversion.convert(source, target)
    out = consoles.result()
    out.print(f"{len(done.names)} tensors written to {legible(str(target), 500)}", soft_wrap=True)
    for names, what in (
        (done.unwrapped, "the weights lay under"),
        (done.stripped, "taken off the front of every name"),
        (done.dropped, "left out, being integers"),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            out.print(f"{what}: {', '.join(legible(n) for n in names[:5])}{more}", soft_wrap=True)
    return DONE
