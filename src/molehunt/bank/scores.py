"""What the defenses answer about the models of a bank: one file per scored model, and the calibration made of them."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molehunt import meta_files
from molehunt.bank.roster import Entry
from molehunt.bank.rows import Row, backdoored, poisoned, read_rows, regrow
from molehunt.bank.scored import FINDERS, Scored, codes, judges, lacking, may_search, read_scored, renewed, restricted
from molehunt.calibration import Population, Reference, recorded, settings, statistic
from molehunt.defenses import DEFENSES, REPAIRS, Defense
from molehunt.engine import Engine, Local
from molehunt.examination import Inspect, divide, examine, judges_candidates
from molehunt.files import write_atomically
from molehunt.findings import Abstention, Failure, Finding, Outcome
from molehunt.game.answers import accuracy, asr, measure
from molehunt.metas import Meta
from molehunt.metas import digest as digest_of
from molehunt.runner import configuration
from molehunt.suspect import Access, Suspect
from molehunt.tasks import get_task

Inspecting = Callable[[int], Inspect]
"""From the seed of a model to what runs defenses on it."""

REPAIRED = 10
"""So many clean and as many planted models of a partition are repaired: enough for the mean of a curve."""

GRANTED = frozenset({Access.CLEAN})
"""Evidence that every model of a bank comes with; where there are meta-classifiers, they are granted too."""


def with_finders(defenses: Mapping[str, Defense]) -> dict[str, Defense]:
    """Add the built-in defenses that look for triggers, where one is asked that only judges what others found.

    Nothing is added where a defense is asked that may look for triggers itself. Those who look come first.
    """
    waiting = {name for name, defense in defenses.items() if judges_candidates(defense, GRANTED)}
    if not waiting or may_search(defenses) - waiting:
        return dict(defenses)
    return {**{name: DEFENSES[name]() for name in FINDERS}, **defenses}


def score(
    listed: Sequence[Entry],
    folder: Path,
    defenses: Mapping[str, Defense],
    inspecting: Inspecting,
    *,
    engine: Engine | None = None,
    report: Callable[[Scored], None] | None = None,
    place: str = "scores",
    metas: Sequence[Meta] | None = None,
) -> tuple[Scored, ...]:
    """Let defenses score the models of a bank that they have not scored yet.

    A scored model is on disk before the next is looked at, below `place` in the folder. A defense is asked again if
    other settings, other code of it, other meta-classifiers, another number of threads or other weights led to what is
    there, or if it failed; what the others said stands (`bank.scored.lacking`). What is scored depends on the model
    alone, so neither the engine nor an interruption changes it.

    Args:
        listed: the models.
        folder: of this bank, with a row for every one of them.
        defenses: which to ask, by name. Their scores on a model depend on who else is asked: some judge the triggers
            that others find. `REPAIRS` are asked about the first `REPAIRED` models of each kind alone.
        inspecting: makes what runs them; picklable where the engine has processes of its own.
        engine: spreads the models; this process by default.
        report: called after every model that was scored now.
        place: folder of the scored models, below that of the bank.
        metas: meta-classifiers that are granted; None for those that come with the package for the models' task and
            network, if there are any.

    Returns:
        What is known of every model, in the order of the entries.

    Raises:
        ValueError: no models, a model is not trained yet or cannot be made again, or a file is no row.
    """
    rows = rows_of(listed, folder)
    (folder / place).mkdir(exist_ok=True)
    metas = _metas(listed[0], metas)
    found = kept(listed, folder, defenses, place=place, metas=metas)
    missing = [(entry, row) for entry, row in zip(listed, rows, strict=True) if entry.name not in found]
    # As bytes: every tensor in what another process is sent is an open file, for each model that waits.
    packed = meta_files.pack(metas) if metas else None
    fresh = (engine or Local()).map(partial(_finish, folder / place, dict(defenses), inspecting, packed), missing)
    try:
        for scored in fresh:
            found[scored.name] = scored
            if report:
                report(scored)
    finally:
        # Not when the garbage is collected: what still runs in other processes must end now.
        if isinstance(fresh, Generator):
            fresh.close()
    return tuple(found[entry.name] for entry in listed)


def kept(
    listed: Sequence[Entry],
    folder: Path,
    defenses: Mapping[str, Defense],
    *,
    place: str = "scores",
    metas: Sequence[Meta] | None = None,
) -> dict[str, Scored]:
    """Return by name what is on disk about the models and would not be scored again; see `score`.

    What others said than those that are asked is left out.

    Raises:
        ValueError: no models, a model is not trained yet, or a file is no row.
    """
    found = {}
    for entry, row in zip(listed, rows_of(listed, folder), strict=True):
        granted = _metas(entry, metas)
        asked = _for(entry, defenses, granted)
        scored = read_scored(folder / place / f"{entry.name}.json")
        if scored is not None and not lacking(scored, row, asked, _told(granted)):
            found[entry.name] = restricted(scored, asked)
    return found


def population(listed: Sequence[Entry], folder: Path, found: Sequence[Scored]) -> Population:
    """Collect scores as reference population. Planted models that a referee would not pass are left out.

    Where a defense failed on a model, those that judge the triggers that it finds have seen fewer: such a score is left
    out like one that is missing.

    Args:
        listed: the models, of one task and network.
        folder: of this bank.
        found: what `score` answered about them, in their order.

    Raises:
        ValueError: no defense gave a score, or defenses answered in different settings or number formats.
    """
    rows = rows_of(listed, folder)
    together: dict[str, Any] = {}
    for scored in sorted(found, key=lambda scored: len(scored.failed)):
        for name, used in scored.settings.items():
            if together.setdefault(name, used) != used and not scored.failed:
                raise ValueError(f"{name} scored the models in different settings; delete the scores to start again")
    if not together:
        silent = [f"{n}: {text}" for s in found for n, text in [*s.failed.items(), *s.abstained.items()]]
        failed = silent[0] if silent else "pure repairs have none"
        raise ValueError(f"no defense gave a score ({failed})")
    dtypes = {scored.dtype for scored in found if scored.dtype is not None}
    if len(dtypes) > 1:
        raise ValueError(f"the models were scored in different number formats: {sorted(dtypes)}; delete the scores")
    versions = {name: text for scored in found for name, text in scored.versions.items()}
    works = backdoored(rows)
    return Population(
        task=listed[0].task,
        network=listed[0].network,
        recipe=recorded(listed[0].network, get_task(listed[0].task)),
        models=tuple(
            Reference(
                seed=entry.seed,
                scores={
                    name: scored.scores.get(name) if scored.settings.get(name) == used else None
                    for name, used in together.items()
                },
                accuracy=row.accuracy,
                attack=row.kind if row.planted else None,
            )
            for entry, row, scored in zip(listed, rows, found, strict=True)
            if not row.planted or row.name in works
        ),
        defenses=together,
        versions={**versions, "block": "1"},
        dtype=dtypes.pop(),
    )


def failures(found: Iterable[Scored]) -> dict[str, int]:
    """Count on how many models each defense failed; defenses that never did are left out."""
    return dict(Counter(name for scored in found for name in scored.failed))


def rows_of(listed: Sequence[Entry], folder: Path) -> tuple[Row, ...]:
    """Return the rows of all models.

    Raises:
        ValueError: no models, a model is not trained yet, or a file is no row.
    """
    if not listed:
        raise ValueError("there are no models to score: this bank has none in that partition")
    rows = read_rows(listed, folder)
    known = {row.name for row in rows}
    if lacking := [entry.name for entry in listed if entry.name not in known]:
        raise ValueError(f"{len(lacking)} models are not trained yet, {lacking[0]} first: run molehunt bank build")
    return rows


def _metas(entry: Entry, metas: Sequence[Meta] | None) -> tuple[Meta, ...]:
    """Meta-classifiers that are granted with a model: those that were named, else those of the package; maybe none."""
    if metas is not None:
        return tuple(metas)
    return meta_files.shipped(entry.task, entry.network) or ()


def _told(metas: Sequence[Meta]) -> str | None:
    return digest_of(metas) if metas else None


def answerable(entry: Entry, defense: Defense, metas: Sequence[Meta] | None = None) -> bool:
    """Whether a model of a bank comes with what a defense needs; metas as in `score`."""
    evidence = GRANTED | {Access.CANDIDATES} | ({Access.METAS} if _metas(entry, metas) else set())
    return any(need <= evidence for need in defense.needs)


def _for(entry: Entry, defenses: Mapping[str, Defense], metas: Sequence[Meta]) -> dict[str, Defense]:
    """Return who is asked about a model: who can have an opinion, and repairs where the model is to be repaired."""
    able = {n: d for n, d in defenses.items() if answerable(entry, d, metas)} or dict(defenses)
    return {n: d for n, d in able.items() if n not in REPAIRS or entry.number < REPAIRED}


def _finish(
    folder: Path,
    defenses: Mapping[str, Defense],
    inspecting: Inspecting,
    packed: bytes | None,
    item: tuple[Entry, Row],
) -> Scored:
    """Let those answer about one model whose answer is not there, and put what came of it on disk."""
    entry, row = item
    metas = meta_files.unpack(packed)[0] if packed else ()
    path = folder / f"{entry.name}.json"
    before, asked = read_scored(path), _for(entry, defenses, metas)
    missing = lacking(before, row, asked, _told(metas))
    if any(judges(asked[name]) for name in missing):
        # They judge what is found, and triggers are not kept.
        missing |= may_search(asked)
    some = {name: defense for name, defense in asked.items() if name in missing}
    scored = renewed(before, _score(entry, row, some, inspecting(entry.seed), metas), asked)
    write_atomically(path, [json.dumps(asdict(scored), indent=1, allow_nan=False).encode()])
    return scored


def _score(
    entry: Entry, row: Row, defenses: Mapping[str, Defense], inspect: Inspect, metas: tuple[Meta, ...]
) -> Scored:
    task = get_task(entry.task)
    clean, _ = task.secret(entry.seed)
    suspect = Suspect.of(regrow(entry, row), task, clean=divide(clean)[0], metas=metas or None)
    outcomes: dict[str, Outcome] = dict(examine(suspect, defenses, inspect)) if defenses else {}
    found = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Finding)}
    failed = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Failure)}
    versions: dict[str, str] = {}
    for finding in found.values():
        versions.update(finding.record.get("versions", {}))
    return Scored(
        name=entry.name,
        weights=row.weights,
        asked={name: configuration(defense) for name, defense in defenses.items()},
        code=codes(defenses),
        scores={name: statistic(finding) for name, finding in found.items()},
        settings={name: settings(finding) for name, finding in found.items() if statistic(finding) is not None},
        repairs=_repairs(entry, suspect.model, found),
        abstained={name: outcome.reason for name, outcome in outcomes.items() if isinstance(outcome, Abstention)},
        failed={name: f"{failure.kind}: {failure.message}"[:500] for name, failure in failed.items()},
        costs={name: asdict(f.cost) for name, f in found.items() if f.cost is not None},
        dtype=next((f.record.get("dtype", "float32") for f in found.values()), None),
        threads=torch.get_num_threads(),
        versions=versions,
    )


def _repairs(entry: Entry, model: nn.Module, found: Mapping[str, Finding]) -> dict[str, dict[str, list[float]]]:
    """Measure every repaired model beside what it was made of."""
    repaired = {name: finding for name, finding in found.items() if finding.repaired is not None}
    if not repaired:
        return {}
    images, made = get_task(entry.task).load("validation"), poisoned(entry)

    def measured(network: nn.Module) -> tuple[float, float | None]:
        answers = measure(network, images, None if made is None else made.trigger)
        if made is None or answers.stamped is None:
            return accuracy(answers.plain, answers.y), None
        return accuracy(answers.plain, answers.y), asr(answers.stamped, answers.y, made.target)

    before = measured(model)
    rates: dict[str, dict[str, list[float]]] = {}
    for name, finding in repaired.items():
        other = copy.deepcopy(model)
        other.load_state_dict(dict(finding.repaired or {}))
        after = measured(other)
        rates[name] = {"accuracy": [before[0], after[0]]}
        curve = finding.details.get("curve")
        if isinstance(curve, Tensor):
            rates[name]["curve"] = [round(float(share), 6) for share in curve]
        if before[1] is not None and after[1] is not None:
            rates[name]["asr"] = [before[1], after[1]]
    return rates
