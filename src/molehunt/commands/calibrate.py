"""`molehunt calibrate`: score the bank's calibration part with every defense, and save the scores as one file."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.bank import ROOT, Folder, Most, Net
from molehunt.commands.exits import DONE, InputError, check_target, given
from molehunt.commands.interrupt import RESUMES, Interrupt
from molehunt.commands.options import Isolated, Metas, Seconds, TaskName, use_threads
from molehunt.commands.watch import watching
from molehunt.legible import legible

if TYPE_CHECKING:
    from molehunt.bank.scored import Scored
    from molehunt.calibration import Population


def calibrate(
    task: TaskName = "mnist5k",
    network: Net = None,
    defense: Annotated[
        list[str] | None,
        typer.Option(help="A defense by name; may be repeated. Default: all.", show_default=False),
    ] = None,
    partition: Annotated[
        str, typer.Option(help="calibrate; or evaluate, for the fresh models of a null check.")
    ] = "calibrate",
    most: Most = None,
    folder: Folder = ROOT,
    out: Annotated[
        Path | None, typer.Option(help="File of the scores. Default: TASK-NETWORK.json.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw, as PNG, how well probabilities hold on these models.", metavar="FILE", show_default=False
        ),
    ] = None,
    metas: Metas = None,
    seconds: Seconds = 600,
    isolated: Isolated = None,
    jobs: Annotated[int, typer.Option(help="Processes, each of which examines one model.", min=1)] = 1,
    threads: Annotated[
        int, typer.Option(help="Processor threads for each; results depend on their number.", min=1)
    ] = 1,
) -> int:
    """Score the calibration part of the model bank and save the scores.

    A scored model is on disk at once; a run that was stopped or killed goes on when the same command is given again,
    and models on which a defense failed are scored again. Equal threads give equal scores, whatever the number of jobs.
    The file is what `molehunt scan --references` takes.
    """
    console = consoles.messages()
    with Interrupt(console, RESUMES, gentle=True) as interrupt:
        from molehunt import bank, calibration, meta_files
        from molehunt.bank import scores
        from molehunt.bank.rows import folder_of
        from molehunt.commands.evaluation import Elsewhere, evaluations
        from molehunt.commands.fetching import ensure
        from molehunt.defenses import available
        from molehunt.engine import Processes
        from molehunt.tasks import get_task

        use_threads(threads)
        with given():
            network = network or get_task(task).network
            listed = bank.entries(task, network, partition, most=most)
            known = available()
        if unknown := sorted(set(defense or ()) - known.keys()):
            raise InputError(f"unknown defense {legible(unknown[0], 80)!r}; known: {', '.join(known)}")
        defenses = scores.with_finders({name: known[name]() for name in dict.fromkeys(defense or known)})
        # A place of its own, so that what all of them scored is not overwritten.
        place = f"scores-{'+'.join(sorted(defenses))}" if defenses.keys() != known.keys() else "scores"
        out = out or Path(f"{task}-{network}{'' if partition == 'calibrate' else f'-{partition}'}.json")
        check_target(out)
        check_target(picture)
        where = folder_of(folder, task, network)
        with given((ValueError, OSError)):
            asking = meta_files.chosen(metas, get_task(task), network)
            scores.rows_of(listed, where)  # before data are fetched and a sandbox is started for nothing
        silent = [n for n, d in defenses.items() if not scores.answerable(listed[0], d, asking)]
        if len(silent) == len(defenses):
            raise InputError(f"{', '.join(silent)}: no model of a bank comes with what is needed; see their pages")
        if silent:
            console.print(f"not asked, for no model comes with what they need: {', '.join(silent)}", soft_wrap=True)
        ensure(task, console)
        with watching(console) as watch, ExitStack() as stack:
            watch.stage(f"Scoring {len(listed)} models", len(listed))
            told: list[str] = []

            def say(text: str) -> None:
                told.append(text)
                console.print(text, soft_wrap=True)

            def tell(scored: "Scored") -> None:
                texts = [f"{n} {'no score' if s is None else format(s, '.3g')}" for n, s in scored.scores.items()]
                watch.done(scored.name, ", ".join([*texts, *(f"{n} failed" for n in scored.failed)]))
                interrupt.check()

            made = evaluations(isolated, seconds=seconds, interrupt=interrupt, watch=watch, say=say)
            inspecting = stack.enter_context(made)[0]
            engine = None
            if jobs > 1:
                # The sandbox here has shown whether isolation works, which each process need not find out again.
                stack.close()
                inspecting = Elsewhere(isolated=isolated is not False and not told, seconds=seconds)
                engine = Processes(jobs, threads)
            with given((ValueError, OSError)):
                found = scores.score(
                    listed, where, defenses, inspecting, engine=engine, report=tell, place=place, metas=asking
                )
                population = scores.population(listed, where, found)
                calibration.save(population, out)
                alt = None if picture is None else _draw(population, picture)
    shown = consoles.result()
    shown.print(f"{len(population.clean)} clean models and {len(population.planted)} whose backdoor works")
    for name, count in scores.failures(found).items():
        shown.print(
            f"{legible(name, 80)} failed on {count} of {len(listed)} models; the same command tries them again",
            soft_wrap=True,
        )
    shown.print(f"scores: {legible(str(out), 500)}", soft_wrap=True)
    if alt is not None:
        shown.print(f"{alt}\npicture: {legible(str(picture), 500)}", soft_wrap=True)
    return DONE


def _draw(population: "Population", path: Path) -> str:
    """Write the picture of what every model is told by the others, and return it in words."""
    from molehunt.figures import reliability_chart
    from molehunt.files import write_atomically
    from molehunt.reliability import holding

    chart = reliability_chart(holding(population))
    write_atomically(path, [chart.png])
    return chart.alt
