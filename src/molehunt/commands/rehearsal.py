"""The dress rehearsal of `molehunt check --defend`: run with progress, and shown."""

from collections.abc import Collection
from functools import partial

from rich import box
from rich.table import Table
from rich.text import Text

from molehunt.commands import consoles
from molehunt.commands.evaluation import evaluation, telling
from molehunt.commands.interrupt import Interrupt
from molehunt.commands.watch import Watch
from molehunt.defenses import DEFENSES
from molehunt.findings import Abstention, Failure, Finding
from molehunt.game import rehearsal
from molehunt.game.check import References
from molehunt.game.contents import Contents
from molehunt.game.rehearsal import Rehearsed
from molehunt.game.rules import Round
from molehunt.networks import Network
from molehunt.report import words
from molehunt.tasks import Images


def rehearse(
    contents: Contents,
    model: Network,
    training: Images | None,
    references: References,
    count: int,
    round_: Round,
    seconds: float,
    interrupt: Interrupt,
    watch: Watch,
) -> Rehearsed | tuple[Round, tuple[str, ...]]:
    """Run a round's defenses on a submission, in this process.

    Args:
        contents: the submission.
        model: its model.
        training: on the data board the set as a defense sees it.
        references: the clean models at home, trained before.
        count: how many of them.
        round_: the round.
        seconds: that a defense may take on one model.
        interrupt: stops a defense when the user asks to.
        watch: is told how far it is.

    Returns:
        What came of it; the round and its defenses where none of them exists yet.
    """
    defenses, missing = rehearsal.cast(round_, contents.board, DEFENSES)
    if not defenses:
        return round_, missing
    with evaluation(
        False, seed=rehearsal.SEED, seconds=seconds, interrupt=interrupt, watch=watch, say=lambda _: None
    ) as (inspect,):
        known = rehearsal.shipped(references, defenses)
        if known is None:
            watch.stage(f"How do clean models score in round {round_.name}?", count)
            done = partial(watch.done, text="examined")
            known = rehearsal.population(references, count, defenses, contents.board, inspect, done)
        watch.stage(f"The defenses of round {round_.name} look at the submission", len(defenses))
        told = telling(watch, inspect)
        return rehearsal.rehearse(contents, model, training, round_, defenses, missing, known, told)


def show(done: Rehearsed | tuple[Round, tuple[str, ...]], classes: tuple[str, ...], missed: Collection[str]) -> None:
    """Print what each defense found, the verdict and the points.

    Args:
        done: what `rehearse` gave.
        classes: names of the task's classes.
        missed: gates that the submission misses.
    """
    shown = consoles.result()
    round_, missing = (done.round, done.missing) if isinstance(done, Rehearsed) else done
    shown.print()
    shown.print(Text(f"Dress rehearsal of round {round_.name}: {round_.title}", style="bold"))
    if isinstance(done, Rehearsed):
        shown.print(_table(done, classes))
        verdict, points = done.verdict, done.points
        shown.print(f"verdict: p = {words.probability(verdict.p)} that something is hidden; {_parts(done)}")
        if done.attack is None:
            shown.print(f"An honest model scores nobody. The defenders would get B = {points.detection:.2f} for it.")
        elif missed:
            shown.print(f"points: 0, because of the missed gates; else {100 * done.attack:.1f} of 100")
        else:
            shown.print(f"points: {100 * done.attack:.1f} of 100 for this submission", style="bold")
    if missing:
        shown.print(f"Not there yet, and so not rehearsed: {', '.join(missing)}.")


def _table(done: Rehearsed, classes: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("defense")
    for title in ("score", "p-value", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("what it found", overflow="fold")
    for outcome in done.verdict.outcomes:
        score = p_value = time = "–"
        if isinstance(outcome, Finding) and outcome.score is not None:
            score = words.number(outcome.score)
        if outcome.defense in done.verdict.p_values:
            p_value = words.p_value(done.verdict.p_values[outcome.defense])
        if not isinstance(outcome, Abstention) and outcome.cost is not None:
            time = words.seconds(outcome.cost.seconds)
        style = "red" if isinstance(outcome, Failure) else ""
        table.add_row(
            outcome.defense, score, p_value, time, Text(words.says(outcome, done.verdict, classes), style=style)
        )
    return table


def _parts(done: Rehearsed) -> str:
    """What the defenders got right, part by part, for those that count in the round."""
    weights, points = done.round.weights, done.points
    told = {
        "your target": (weights.target, points.hit),
        "your trigger": (weights.trigger, points.trigger),
        "cleaning": (weights.cleaning, points.cleaning),
    }
    said = [f"{name} {value:.0%}" for name, (weight, value) in told.items() if weight and value is not None]
    return "the defenders get: " + ", ".join(said) if said else "nothing else counts in this round"
