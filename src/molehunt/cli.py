"""The program `molehunt`: its commands, and how each ends.

Exit codes are answers only from `scan` (0 clear, 1 found, 2 could not tell) and `check` (0 passed, 1 missed). Every
error has one of its own, so that no failure can be taken for a verdict: 3 for wrong usage and refused input, 70 for a
mistake of the program, 130 for Ctrl-C, 141 if nobody reads the output.
"""

import os
import platform
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any

import typer
import typer.main

import molehunt
from molehunt.commands import (
    bank,
    calibrate,
    check,
    consoles,
    convert,
    data,
    evaluate,
    matrix,
    play,
    scan,
    shadows,
    starter,
    train,
)
from molehunt.commands.exits import DONE, INTERNAL, REFUSED, STOPPED, UNREAD, InputError
from molehunt.legible import legible

SPINS = "3000"
"""How long a thread of torch waits busily for the others before it sleeps. By default it is a hundred times longer, and
where another program holds a core, all threads wait for the one that lost it: a training of 4 seconds took 125, with
this 13. On a machine with nothing else to do it costs 8 %."""
# Read when torch is loaded, which no import above does. Whoever has set either knows better.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)

LONGEST = 4000
"""Characters of an error that are shown: a refusal by every source of a data set is long."""

# Typer brings its own copy of click since 0.26 and has no public name for the base of all usage errors.
UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    help="A security game about backdoored neural networks, and the tools for both of its sides.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(play.play)
app.command()(starter.starter)
app.command()(train.train)
app.command()(check.check)
app.command()(convert.convert)
app.command()(scan.scan)
app.command()(calibrate.calibrate)
app.command()(evaluate.evaluate)
app.command()(shadows.shadows)
app.command()(matrix.matrix)
app.add_typer(bank.app, name="bank")
app.add_typer(data.app, name="data")


@dataclass
class State:
    """What the whole program was told.

    Attributes:
        debug: show tracebacks.
    """

    debug: bool


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. Or: MOLEHUNT_DEBUG=1.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """A security game about backdoored neural networks, and the tools for both of its sides.

    Begin with `molehunt play`: a whole small game, and a report to look at. `molehunt COMMAND --help` tells the rest.
    """
    context.obj.debug |= debug
    if version:
        raise typer.Exit(_show_versions())
    if context.invoked_subcommand is None:
        # Not 0, which is an answer: a script whose command got lost must notice.
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(REFUSED)


@app.command("version")
def _show_versions() -> int:
    """Show the versions of Molehunt and of what it stands on."""
    out = consoles.result()
    out.print(f"molehunt {molehunt.__version__}")
    out.print(f"torch {metadata.version('torch')}, Python {platform.python_version()}")
    return DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: what follows the name of the program; `sys.argv` by default.
    """
    state = State(debug=os.environ.get("MOLEHUNT_DEBUG", "") not in {"", "0"})
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a sign gets a question mark, not an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments), state)
    except KeyboardInterrupt:
        return STOPPED
    except SystemExit:
        # No command exits by itself: this is how typer and rich give up when a pipe was closed.
        _drop_output()
        return UNREAD
    except BaseException as error:
        return _fail(error, state)


def _run(arguments: list[str], state: State) -> int:
    command = typer.main.get_command(app)
    # Not standalone: else typer would end the program itself, with 1 or 2 for errors.
    code: Any = command.main(arguments, prog_name="molehunt", standalone_mode=False, obj=state)
    if not isinstance(code, int):
        raise TypeError(f"a command returned {code!r} in place of an exit code")
    return code


def _fail(error: BaseException, state: State) -> int:
    """Say what went wrong and return the code for it."""
    if state.debug:
        traceback.print_exception(error)
    console = consoles.messages()
    if isinstance(error, UsageError):
        context = getattr(error, "ctx", None)
        name = "molehunt" if context is None else context.command_path
        console.print(f"error: {legible(error.format_message(), LONGEST)}", soft_wrap=True)
        console.print(f"see: {name} --help", soft_wrap=True)
        return REFUSED
    text = legible(str(error), LONGEST) if str(error) else type(error).__name__
    if _is_refusal(error):
        console.print(f"error: {text}", soft_wrap=True)
        return REFUSED
    console.print(f"internal error: {type(error).__name__}: {text}", soft_wrap=True)
    if not state.debug:
        console.print("This is a mistake in Molehunt. MOLEHUNT_DEBUG=1 shows where; please report it.")
    return INTERNAL


def _is_refusal(error: BaseException) -> bool:
    """Whether an error lies in what the program was given."""
    from molehunt.files import Refused

    if isinstance(error, InputError | Refused):
        return True
    # Not imported for this: it can only have been raised if it was imported.
    cache = sys.modules.get("molehunt.datasets.cache")
    return cache is not None and isinstance(error, cache.DataError)


def _drop_output() -> None:
    """Let what is still in the buffers go nowhere: flushing it at the end would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


if __name__ == "__main__":
    # Without this `python -m molehunt.cli scan ...` would do nothing and exit with 0, which means "clear".
    raise SystemExit(main())
