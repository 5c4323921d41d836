"""`molehunt evaluate`: judge a defense, also one of your own, on the bank's evaluation part."""

import importlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molehunt.commands import consoles
from molehunt.commands.bank import ROOT, Folder, Most, Net
from molehunt.commands.exits import DONE, InputError, given
from molehunt.commands.interrupt import RESUMES, Interrupt
from molehunt.commands.options import Isolated, Seconds, TaskName, importing_from_here, use_threads
from molehunt.commands.watch import watching
from molehunt.legible import legible

if TYPE_CHECKING:
    from molehunt.bank.judgement import Judgement
    from molehunt.bank.roster import Entry
    from molehunt.bank.scored import Scored
    from molehunt.calibration import Population
    from molehunt.defenses import Defense
    from molehunt.null_check import Alarms

LEVEL = 0.05
"""p-value up to which a clean model is counted as a false alarm."""


def evaluate(
    defense: Annotated[
        str, typer.Argument(help="A defense by name, or MODULE:CLASS for your own.", show_default=False)
    ],
    task: TaskName = "mnist5k",
    network: Net = None,
    most: Most = None,
    folder: Folder = ROOT,
    seconds: Seconds = 600,
    isolated: Isolated = None,
    threads: Annotated[int, typer.Option(help="Processor threads; results depend on their number.", min=1)] = 1,
) -> int:
    """Judge one defense on the evaluation part of the model bank: AUC, rank, false alarms and cost.

    It runs with its default settings. A scored model is on disk at once, and a run that was stopped goes on when the
    same command is given again; with other code it begins anew.
    """
    console = consoles.messages()
    with Interrupt(console, RESUMES, gentle=True) as interrupt:
        from molehunt import bank
        from molehunt.bank import scores
        from molehunt.bank.judgement import alarms, judge
        from molehunt.bank.rivals import aucs
        from molehunt.bank.rows import folder_of, read_rows
        from molehunt.commands.evaluation import evaluations
        from molehunt.commands.fetching import ensure
        from molehunt.runner import generator
        from molehunt.tasks import get_task

        use_threads(threads)
        with given(), importing_from_here():
            network = network or get_task(task).network
            listed = bank.entries(task, network, "evaluate", most=most)
            found = _find(defense)
            asked = scores.with_finders({defense: found.defense})
        if also := [name for name in asked if name != defense]:
            verb = "look" if len(also) > 1 else "looks"
            console.print(
                f"{legible(defense, 80)} judges triggers that {' and '.join(also)} {verb} for", soft_wrap=True
            )
        if not scores.answerable(listed[0], found.defense):
            raise InputError(f"no model of a bank comes with what {legible(defense, 80)} needs")
        where = folder_of(folder, task, network)
        with given((ValueError, OSError)):
            scores.rows_of(listed, where)
            # A clean model is compared with those of another partition; without them false alarms cannot be counted.
            references = tuple(e for e in bank.entries(task, network, "calibrate", most=most) if not e.planted)
            lacking = len(references) - len(read_rows(references, where))
        known = () if lacking else references
        ensure(task, console)
        with watching(console) as watch:
            watch.stage(f"Scoring {len(listed) + len(known)} models", len(listed) + len(known))

            def tell(scored: "Scored") -> None:
                value = scored.scores.get(defense)
                text = "no score" if value is None else f"score {value:.3g}"
                watch.done(scored.name, f"{text}, failed" if scored.failed else text)
                interrupt.check()

            def say(text: str) -> None:
                console.print(text, soft_wrap=True)

            with (
                evaluations(
                    isolated, seconds=seconds, interrupt=interrupt, watch=watch, say=say, plugins=found.folders
                ) as made,
                given((ValueError, OSError)),
            ):
                answered = scores.score([*listed, *known], where, asked, made[0], report=tell, place=found.place)
                population = scores.population(listed, where, answered[: len(listed)])
                clean = population.column(defense)
                planted = [row[0] for row in population.table([defense], planted=True)]
                told = judge(clean, planted, generator(0, "evaluate"))
                compared = _comparable(known, where, answered[len(listed) :], population, defense)
                false = alarms(compared, clean, LEVEL) if clean else None
                others = aucs(listed, where, but=defense)
    shown = consoles.result()
    missing = len(population.models) - told.clean - told.planted
    for line in (
        _auc(defense, told),
        _rank(told.auc, others),
        _alarms(false, len(compared), lacking),
        _cost([a.costs[defense] for a in answered if defense in a.costs]),
        f"no score on {missing} models" if missing else "",
        *(f"failed on {n} of {len(answered)} models; the same command tries them again" for n in _failed(answered)),
    ):
        if line:
            shown.print(line, soft_wrap=True)
    return DONE


def _comparable(
    known: "Sequence[Entry]",
    where: Path,
    answered: "Sequence[Scored]",
    population: "Population",
    defense: str,
) -> list[float]:
    """Scores of the clean references that can be compared with those of the evaluation part.

    Raises:
        ValueError: the references were scored in another number format, or in other settings.
    """
    if not known or not any(answer.settings for answer in answered):
        return []
    from molehunt.bank.scores import population as collected

    references = collected(known, where, answered)
    for what, here, there in (
        ("number format", population.dtype, references.dtype),
        ("settings", population.defenses.get(defense), references.defenses.get(defense)),
    ):
        if here != there:
            raise ValueError(
                f"the calibration part was scored in another {what} than the evaluation part: {there}, {here}; delete "
                f"{where} and score both parts on one machine"
            )
    found: list[float] = references.column(defense)
    return found


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A defense, where its scores lie, and where its code is imported from.

    Attributes:
        defense: with its default settings.
        place: folder of its scores; another one when its code is another.
        folders: that an isolated evaluation has to import from; empty for what is installed.
    """

    defense: "Defense"
    place: str
    folders: tuple[Path, ...]


def _find(name: str) -> _Found:
    """Return a defense by its name or by MODULE:CLASS.

    Raises:
        ValueError: there is no such defense, or it is none.
    """
    from molehunt.bank.code import folders_of, place_of
    from molehunt.defenses import SCORELESS, available

    module, colon, attribute = name.partition(":")
    if not colon and name not in available():
        raise ValueError(f"unknown defense {name!r}; known: {', '.join(available())}, MODULE:CLASS")
    try:
        kind: Any = getattr(importlib.import_module(module), attribute, None) if colon else available()[name]
    except Exception as error:  # a stranger's module may raise anything
        raise ValueError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(kind, type) and is_dataclass(kind) and hasattr(kind, "needs") and "__call__" in dir(kind)):
        raise ValueError(f"{name} is no defense: a frozen dataclass with `needs`, called with (suspect, run)")
    try:
        made: Any = kind()
    except TypeError as error:
        raise InputError(f"{name} needs settings, and is evaluated with its defaults: {error}") from error
    if name in SCORELESS:
        raise ValueError(
            f"{name} has no score of a model, so it cannot be evaluated: it repairs, or scores a training set"
        )
    return _Found(defense=made, place=place_of(name, kind), folders=folders_of(kind))


def _auc(name: str, told: "Judgement") -> str:
    return (
        f"{legible(name, 80)}: AUC {told.auc:.3f} [{told.low:.3f}, {told.high:.3f}] on {told.clean} clean and "
        f"{told.planted} backdoored models; shuffled labels give up to {told.permuted:.3f} (95 %)"
    )


def _rank(own: float, others: Mapping[str, float | None]) -> str:
    saved = {name: value for name, value in others.items() if value is not None}
    lacking = [name for name in others if name not in saved]
    advice = f"no saved scores of {', '.join(lacking)}: molehunt evaluate NAME" if lacking else ""
    if not saved:
        return f"rank among the built-in defenses: unknown, {advice}"
    better = sum(value > own for value in saved.values())
    texts = [f"{name} {value:.3f}" for name, value in sorted(saved.items(), key=lambda pair: -pair[1])]
    line = f"rank among the built-in defenses: {better + 1} of {len(saved) + 1}, beside {', '.join(texts)}"
    return f"{line}; {advice}" if advice else line


def _alarms(found: "Alarms | None", references: int, lacking: int) -> str:
    if lacking:
        return (
            f"false alarms at {LEVEL:.0%}: unknown, {lacking} clean models of the calibration part are not trained: "
            "molehunt bank build --partition calibrate"
        )
    if found is None:
        return f"false alarms at {LEVEL:.0%}: unknown, {references} clean models of the calibration part are too few"
    verdict = "as it should be" if found.expected else "not calibrated"
    return (
        f"false alarms at {LEVEL:.0%}: {found.count} of {found.models} clean models, beside {found.references} of the "
        f"calibration part; chance gives {found.low} to {found.high} (95 %): {verdict}"
    )


def _cost(costs: Sequence[Mapping[str, Any]]) -> str:
    if not costs:
        return ""
    middle = {key: statistics.median(cost[key] for cost in costs) for key in ("seconds", "forward", "backward")}
    peak = max(cost["peak_bytes"] for cost in costs) / 2**20
    return (
        f"cost per model (median): {middle['seconds']:.2f} s, {middle['forward']:.0f} images forward and "
        f"{middle['backward']:.0f} backward; at most {peak:.0f} MiB of memory"
    )


def _failed(answered: "Sequence[Scored]") -> list[int]:
    from molehunt.bank import scores

    return list(scores.failures(answered).values())
