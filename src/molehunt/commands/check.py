"""`molehunt check`: what the host's gates would say, on public data."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from molehunt.commands import consoles
from molehunt.commands.exits import MISSED, PASSED, given, reading
from molehunt.commands.interrupt import RESUMES, Interrupt
from molehunt.commands.options import Seconds, Threads, use_threads
from molehunt.commands.watch import watching
from molehunt.legible import legible

if TYPE_CHECKING:
    from molehunt.game.gate import Gate


def check(
    path: Annotated[Path, typer.Argument(help="A submission: its folder or its archive.", show_default=False)],
    task: Annotated[
        str | None,
        typer.Option(help="Insist on this task; needed for folder:PATH.", metavar="NAME", show_default=False),
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="Insist on this architecture.", metavar="NAME", show_default=False)
    ] = None,
    references: Annotated[
        int, typer.Option(help="Clean models to compare with; trained once and kept in the cache.", min=5)
    ] = 5,
    defend: Annotated[
        str | None,
        typer.Option(
            help="Also let the defenses of this round look (I, II, III, IV, final), and count the points.",
            metavar="ROUND",
            show_default=False,
        ),
    ] = None,
    seconds: Seconds = 600,
    threads: Threads = None,
) -> int:
    """Measure the host's gates on a submission, and rehearse a round.

    The public validation split stands in for the host's hidden images, and clean models trained here for the host's:
    leave a margin. Exit code 0: every gate passed, 1: a gate was missed, 3: the submission is refused.
    """
    console = consoles.messages()
    with Interrupt(console, RESUMES, gentle=True) as interrupt:
        from molehunt.commands.fetching import ensure
        from molehunt.game import check as home
        from molehunt.game.rules import get_round
        from molehunt.game.submission import read_submission
        from molehunt.tasks import get_task

        use_threads(threads)
        with given():
            problem = None if task is None else get_task(task)
            round_ = None if defend is None else get_round(defend)
        # Everything that the host refuses at upload is refused here, before anything is trained.
        with reading(path):
            contents = read_submission(path, task=problem, allowed_networks=None if network is None else [network])
        sealed, manifest, training = contents.open_seal(), contents.manifest, contents.training
        judged = None
        if training is not None:
            judged = home.Judged(task=contents.task, network=manifest.network, training=training)
        given_model = contents.model() if judged is None else None
        ensure(contents.task.name, console)
        kept = home.References(task=contents.task, network=manifest.network)
        missing = kept.missing(references)
        with watching(console) as watch:
            if judged is not None and judged.missing:
                watch.stage("Training the model that the host would train from the set, once", 1)
                judged.get(report=partial(watch.progress, "the judged model"), check=interrupt.check)
                watch.done("the judged model", "trained")
            if missing:
                watch.stage("Training clean models to compare with, once", len(missing))
            for number in missing:
                title = f"reference {number + 1}"
                kept.get(number, report=partial(watch.progress, title), check=interrupt.check)
                watch.done(title, "trained")
        interrupt.check()
        models = [kept.get(number) for number in range(references)]
        images = contents.task.load("validation")
        model = given_model if judged is None else judged.get()
        assert model is not None  # one of the two is there
        gates = home.check(model, sealed, models, images, shape=contents.task.shape)
        if training is not None:
            gates = (*gates, home.poison_budget(training, contents.task.load("train")))
        said = f"{manifest.team} · round {manifest.round} · {manifest.task} · {manifest.network}"
        consoles.result().print(legible(said, 300), soft_wrap=True)
        missed = _show(gates, len(images.y), refused=judged is not None and sealed.backdoored)
        if round_ is not None:
            from molehunt.commands.rehearsal import rehearse, show

            with watching(console) as watch:
                seen = None if judged is None else judged.seen
                done = rehearse(contents, model, seen, kept, references, round_, seconds, interrupt, watch)
            show(done, contents.task.classes, missed)
    return MISSED if missed else PASSED


def _show(gates: "tuple[Gate, ...]", images: int, *, refused: bool) -> list[str]:
    """Print what the gates say, measured on so many images, and return the names of those that were missed."""
    shown = consoles.result()
    shown.print(_table(gates))
    for gate in gates:
        shown.print(Text(f"· {gate.name}: {legible(gate.message, 400)}", style="dim"))
    missed = [gate.name for gate in gates if not gate.passed]
    if not missed:
        shown.print(f"Every gate passed, on {images} public validation images.", style="bold green")
        return missed
    shown.print(f"Missed: {', '.join(missed)}.", style="bold red")
    if refused:
        shown.print("The host refuses this set: it hides a trigger, and the model trained from it missed a gate.")
    return missed


def _table(gates: "tuple[Gate, ...]") -> Table:
    """Every gate with its measured value, limit and margin."""
    from molehunt.report import words

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("gate")
    for title in ("measured", "limit", "margin"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for gate in gates:
        share = gate.unit == "share"
        limit = f"{'≥' if gate.at_least else '≤'} {words.measure(gate.limit, share)}"
        measured = words.measure(gate.measured, share)
        said = Text("passed", style="green") if gate.passed else Text("missed", style="red")
        table.add_row(gate.name, measured, limit, words.margin(gate.margin, share), said)
    return table
