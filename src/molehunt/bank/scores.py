"""What the defenses answer about the models of a bank: one file per scored model, and the calibration made of them."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import molehunt
from molehunt import strict_json
from molehunt.bank.code import digest
from molehunt.bank.roster import Entry
from molehunt.bank.rows import Row, backdoored, poisoned, read_rows, regrow
from molehunt.calibration import Population, Reference, recorded, settings, statistic
from molehunt.defenses import DEFENSES, REPAIRS, Defense
from molehunt.engine import Engine, Local
from molehunt.examination import Inspect, divide, examine, judges_candidates
from molehunt.files import write_atomically
from molehunt.findings import Abstention, Failure, Finding, Outcome
from molehunt.game.answers import accuracy, asr, measure
from molehunt.runner import configuration
from molehunt.suspect import Access, Suspect
from molehunt.tasks import get_task

Inspecting = Callable[[int], Inspect]
"""From the seed of a model to what runs defenses on it."""

FINDERS = ("abs", "neural_cleanse")
"""Built-in defenses that look for triggers; what they find others judge."""
REPAIRED = 10
"""So many clean and as many planted models of a partition are repaired: enough for the mean of a curve."""


GRANTED = frozenset({Access.CLEAN})
"""Evidence that every model of a bank comes with."""


def with_finders(defenses: Mapping[str, Defense]) -> dict[str, Defense]:
    """Add the built-in defenses that look for triggers, where one is asked that only judges what others found.

    Nothing is added where a defense is asked that may look for triggers itself. Those who look come first.
    """
    waiting = {name for name, defense in defenses.items() if judges_candidates(defense, GRANTED)}
    blind = DEFENSES.keys() - set(FINDERS)
    if not waiting or defenses.keys() - waiting - blind:
        return dict(defenses)
    return {**{name: DEFENSES[name]() for name in FINDERS}, **defenses}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the defenses answered about one model.

    Attributes:
        name: of the model.
        weights: SHA-256 of its weights.
        asked: by defense that was asked, its configuration.
        code: by defense that was asked, the SHA-256 of its code (`bank.code.digest`).
        scores: raw statistic by defense that answered; None for a pure repair.
        settings: by defense with a score, what must be equal for scores to be comparable.
        repairs: by defense that repaired the model, `accuracy` and, for a planted model, `asr`, on the public
            validation split: before and after, in [0, 1]; and `curve`, where the defense measured one: accuracy on its
            held-out images when 0, 1, 2 ... channels are pruned.
        abstained: by defense, why it had no opinion.
        failed: by defense, what went wrong. It is no score: such a model is scored again.
        costs: by defense that answered, seconds, images forward and backward, peak memory in bytes.
        dtype: number format of the matrix work; None where nothing answered.
        threads: torch threads.
        versions: of the programs.
    """

    name: str
    weights: str
    asked: dict[str, Any]
    code: dict[str, str]
    scores: dict[str, float | None]
    settings: dict[str, Any]
    repairs: dict[str, dict[str, list[float]]]
    abstained: dict[str, str]
    failed: dict[str, str]
    costs: dict[str, dict[str, Any]]
    dtype: str | None
    threads: int
    versions: dict[str, str]


def score(
    listed: Sequence[Entry],
    folder: Path,
    defenses: Mapping[str, Defense],
    inspecting: Inspecting,
    *,
    engine: Engine | None = None,
    report: Callable[[Scored], None] | None = None,
    place: str = "scores",
) -> tuple[Scored, ...]:
    """Let defenses score the models of a bank that they have not scored yet.

    A scored model is on disk before the next is looked at, below `place` in the folder. It is scored again if other
    settings, other code of a defense, another number of threads or other weights led to what is there, or if a defense
    failed. What is scored depends on the model alone, so neither the engine nor an interruption changes it.

    Args:
        listed: the models.
        folder: of this bank, with a row for every one of them.
        defenses: which to ask, by name. Their scores on a model depend on who else is asked: some judge the triggers
            that others find. `REPAIRS` are asked about the first `REPAIRED` models of each kind alone.
        inspecting: makes what runs them; picklable where the engine has processes of its own.
        engine: spreads the models; this process by default.
        report: called after every model that was scored now.
        place: folder of the scored models, below that of the bank.

    Returns:
        What is known of every model, in the order of the entries.

    Raises:
        ValueError: no models, a model is not trained yet or cannot be made again, or a file is no row.
    """
    rows = rows_of(listed, folder)
    (folder / place).mkdir(exist_ok=True)
    found = kept(listed, folder, defenses, place=place)
    missing = [(entry, row) for entry, row in zip(listed, rows, strict=True) if entry.name not in found]
    fresh = (engine or Local()).map(partial(_finish, folder / place, dict(defenses), inspecting), missing)
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
    listed: Sequence[Entry], folder: Path, defenses: Mapping[str, Defense], *, place: str = "scores"
) -> dict[str, Scored]:
    """Return by name what is on disk about the models and would not be scored again; see `score`.

    Raises:
        ValueError: no models, a model is not trained yet, or a file is no row.
    """
    found = {}
    for entry, row in zip(listed, rows_of(listed, folder), strict=True):
        scored = read_scored(folder / place / f"{entry.name}.json")
        if scored is not None and not scored.failed and _still_holds(scored, row, _for(entry, defenses)):
            found[entry.name] = scored
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


def read_scored(path: Path) -> Scored | None:
    """Return what was answered about one model; None if there is no file, or one of an older format.

    Raises:
        ValueError: the file holds no scores.
    """
    if not path.exists():
        return None
    kept = strict_json.loads(path.read_bytes())
    if not isinstance(kept, dict) or not {"name", "weights", "scores"} <= kept.keys():
        raise ValueError(f"{path} holds no scores of a model; delete it to score the model again")
    return Scored(**kept) if kept.keys() == {f.name for f in fields(Scored)} else None


def _for(entry: Entry, defenses: Mapping[str, Defense]) -> dict[str, Defense]:
    """Return who is asked about a model: who can have an opinion, and repairs where the model is to be repaired."""
    evidence = GRANTED | {Access.CANDIDATES}
    able = {n: d for n, d in defenses.items() if any(need <= evidence for need in d.needs)} or dict(defenses)
    return {n: d for n, d in able.items() if n not in REPAIRS or entry.number < REPAIRED}


def _code(defenses: Mapping[str, Defense]) -> dict[str, str]:
    return {name: digest(type(defense)) for name, defense in defenses.items()}


def _still_holds(kept: Scored, row: Row, asked: Mapping[str, Defense]) -> bool:
    # Through JSON, as the file went: a tuple comes back as a list.
    told = json.loads(json.dumps({name: configuration(defense) for name, defense in asked.items()}))
    # Who had no opinion then and is not asked now changes nothing.
    counted = {name for name in kept.asked if name in told or name not in kept.abstained}
    same = {name: kept.asked[name] for name in counted} == told
    same = same and {name: kept.code[name] for name in counted} == _code(asked)
    same = same and kept.threads == torch.get_num_threads()
    # Another release may score otherwise, and a file of scores has one number for each program.
    today = {"molehunt": molehunt.__version__, "torch": torch.__version__}
    same = same and all(kept.versions.get(name, text) == text for name, text in today.items())
    return same and kept.weights == row.weights


def _finish(folder: Path, defenses: Mapping[str, Defense], inspecting: Inspecting, item: tuple[Entry, Row]) -> Scored:
    """Score one model and put what came of it on disk."""
    entry, row = item
    scored = _score(entry, row, _for(entry, defenses), inspecting(entry.seed))
    write_atomically(folder / f"{entry.name}.json", [json.dumps(asdict(scored), indent=1, allow_nan=False).encode()])
    return scored


def _score(entry: Entry, row: Row, defenses: Mapping[str, Defense], inspect: Inspect) -> Scored:
    task = get_task(entry.task)
    clean, _ = task.secret(entry.seed)
    suspect = Suspect.of(regrow(entry, row), task, clean=divide(clean)[0])
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
        code=_code(defenses),
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
