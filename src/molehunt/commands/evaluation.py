"""How a command has defenses run: in this process, or each in one of its own that sees nothing else."""

import atexit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console

from molehunt import runner
from molehunt.commands.exits import InputError
from molehunt.commands.interrupt import Interrupt
from molehunt.commands.watch import Lines, Watch
from molehunt.confinement import Unavailable
from molehunt.defenses import Defense
from molehunt.examination import Inspect
from molehunt.findings import Failure, Finding, Outcome
from molehunt.isolation import Sandbox
from molehunt.report.words import number
from molehunt.suspect import Suspect

Inspecting = Callable[[int], Inspect]
"""From a seed to what runs defenses with it."""


@contextmanager
def evaluation(
    isolated: bool | None,
    *,
    seed: int,
    seconds: float | Callable[[], float],
    interrupt: Interrupt,
    watch: Watch,
    say: Callable[[str], None],
    jobs: int = 1,
    hidden: tuple[Path, ...] = (),
) -> Iterator[list[Inspect]]:
    """Make what runs defenses with one seed: each of the list runs one at a time, all of them at once.

    Args:
        isolated: whether each defense runs in a process of its own; None does so where that is possible.
        seed: of all defenses.
        seconds: that each may take on one model; a function is asked before each.
        interrupt: stops a defense when the user asks to.
        watch: is told how far each defense is.
        say: gets a line when isolation was not asked for and is not possible.
        jobs: how many at once; see `evaluations`.
        hidden: paths that no isolated defense may see.

    Raises:
        InputError: isolation was asked for and is not possible.
    """
    with evaluations(
        isolated, seconds=seconds, interrupt=interrupt, watch=watch, say=say, jobs=jobs, hidden=hidden
    ) as made:
        yield [inspecting(seed) for inspecting in made]


@contextmanager
def evaluations(
    isolated: bool | None,
    *,
    seconds: float | Callable[[], float],
    interrupt: Interrupt,
    watch: Watch,
    say: Callable[[str], None],
    jobs: int = 1,
    hidden: tuple[Path, ...] = (),
    plugins: tuple[Path, ...] = (),
) -> Iterator[list[Inspecting]]:
    """Make what runs defenses with a seed for every model: each of the list one at a time, all of them at once.

    Args:
        isolated: whether each defense runs in a process of its own; None does so where that is possible.
        seconds: that each may take on one model; a function is asked before each.
        interrupt: stops a defense when the user asks to.
        watch: is told how far each defense is.
        say: gets a line when isolation was not asked for and is not possible.
        jobs: how many at once. In this process it is always one, since costs are counted for all of it.
        hidden: paths that no isolated defense may see.
        plugins: folders from which isolated defenses may import, beyond what is installed.

    Raises:
        InputError: isolation was asked for and is not possible.
    """
    with ExitStack() as stack:
        boxes: list[Sandbox] = []
        if isolated is not False:
            try:
                boxes = _sandboxes(stack, jobs, hidden, plugins)
            except (Unavailable, RuntimeError, ValueError) as error:
                if isolated:
                    raise InputError(f"cannot isolate defenses: {error}") from error
                say(f"Defenses run in this process, not isolated: {error}")

        def inspector(slot: int, box: Sandbox | None, seed: int) -> Inspect:
            def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
                outcome = (runner.inspect if box is None else box.inspect)(
                    defense,
                    suspect,
                    name=name,
                    seed=seed,
                    seconds=seconds() if callable(seconds) else seconds,
                    report=lambda done, total: watch.progress(name, done, total, slot),
                    cancelled=interrupt.cancelled,
                )
                # Else a defense that was stopped would be on record as one that failed.
                interrupt.check()
                return outcome

            return inspect

        yield [partial(inspector, slot, box) for slot, box in enumerate(boxes or [None])]


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Makes what runs defenses in whatever process it is called; it is picklable, and silent.

    A process makes its sandbox when the first model comes, and keeps it. Ctrl-C is the business of its parent.

    Attributes:
        isolated: whether each defense runs in a process of its own.
        seconds: that each may take on one model.
    """

    isolated: bool
    seconds: float

    def __call__(self, seed: int) -> Inspect:
        """Return what runs defenses with this seed.

        Raises:
            InputError: isolation was asked for and is not possible.
        """
        return _of_this_process(self)(seed)


@cache
def _of_this_process(settings: Elsewhere) -> Inspecting:
    console = Console(quiet=True)
    stack = ExitStack()
    atexit.register(stack.close)
    made = evaluations(
        settings.isolated,
        seconds=settings.seconds,
        interrupt=Interrupt(console, ""),
        watch=Lines(console),
        say=console.print,
    )
    return stack.enter_context(made)[0]


def telling(watch: Watch, inspect: Inspect) -> Inspect:
    """Tell what came of each defense."""

    def inspect_and_tell(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        outcome = inspect(name, defense, suspect)
        if isinstance(outcome, Finding):
            watch.done(name, "done" if outcome.score is None else f"score {number(outcome.score)}")
        else:
            watch.done(name, f"failed: {outcome.message}" if isinstance(outcome, Failure) else "no opinion")
        return outcome

    return inspect_and_tell


def _sandboxes(stack: ExitStack, count: int, hidden: tuple[Path, ...], plugins: tuple[Path, ...]) -> list[Sandbox]:
    """Make sandboxes. The first one starts now and shows whether isolation works; the others when they are needed."""
    if torch.cuda.is_available():
        raise Unavailable("isolated defenses run on the CPU, and models here go to the GPU")
    boxes = [Sandbox(hidden=hidden, plugins=plugins) for _ in range(count)]
    for box in boxes:
        stack.callback(box.close)
    stack.enter_context(boxes[0])
    return boxes
