"""`molehunt calibrate`: score the bank's calibration part with every defense, and save the scores as one file."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.bank import ROOT, Folder, Most, Net
from molehunt.commands.exits import DONE, InputError, check_target, given
from molehunt.commands.interrupt import RESUMES, Interrupt
from molehunt.commands.options import Isolated, Seconds, TaskName
from molehunt.commands.watch import watching
from molehunt.legible import legible


def calibrate(
    task: TaskName = "mnist5k",
    network: Net = None,
    defense: Annotated[
        list[str] | None,
        typer.Option(help="A defense by name; may be repeated. Default: all.", show_default=False),
    ] = None,
    most: Most = None,
    folder: Folder = ROOT,
    out: Annotated[
        Path | None, typer.Option(help="File of the scores. Default: TASK-NETWORK.json.", show_default=False)
    ] = None,
    seconds: Seconds = 600,
    isolated: Isolated = None,
) -> int:
    """Score the calibration part of the model bank and save the scores.

    A scored model is on disk at once; a run that was stopped or killed goes on when the same command is given again.
    The file is what `molehunt scan --references` takes.
    """
    console = consoles.messages()
    with Interrupt(console, RESUMES, gentle=True) as interrupt:
        from molehunt import bank, calibration
        from molehunt.bank.rows import folder_of
        from molehunt.bank.scores import calibrate as score
        from molehunt.commands.evaluation import evaluation
        from molehunt.commands.fetching import ensure
        from molehunt.defenses import available
        from molehunt.examination import Inspect
        from molehunt.tasks import get_task

        with given():
            network = network or get_task(task).network
            listed = bank.entries(task, network, "calibrate", most=most)
            known = available()
        if unknown := sorted(set(defense or ()) - known.keys()):
            raise InputError(f"unknown defense {legible(unknown[0], 80)!r}; known: {', '.join(known)}")
        defenses = {name: known[name]() for name in dict.fromkeys(defense or known)}
        out = out or Path(f"{task}-{network}.json")
        check_target(out)
        ensure(task, console)
        told: list[str] = []
        with watching(console) as watch:
            watch.stage(f"Scoring {len(listed)} models", len(listed))

            def say(text: str) -> None:
                if text not in told:
                    told.append(text)
                    console.print(text, soft_wrap=True)

            @contextmanager
            def inspecting(seed: int) -> Iterator[Inspect]:
                with evaluation(
                    isolated, seed=seed, seconds=seconds, interrupt=interrupt, watch=watch, say=say
                ) as made:
                    yield made[0]

            def tell(name: str, scores: Mapping[str, float | None]) -> None:
                texts = [f"{n} {'no score' if s is None else format(s, '.3g')}" for n, s in scores.items()]
                watch.done(name, ", ".join(texts))
                interrupt.check()

            with given((ValueError, OSError)):
                population = score(listed, folder_of(folder, task, network), defenses, inspecting, report=tell)
                calibration.save(population, out)
    shown = consoles.result()
    shown.print(f"{len(population.clean)} clean models and {len(population.planted)} whose backdoor works")
    shown.print(f"scores: {legible(str(out), 500)}", soft_wrap=True)
    return DONE
