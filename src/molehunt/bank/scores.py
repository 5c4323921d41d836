"""What the defenses answer about the models of a bank: one file per scored model, and the calibration made of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from molehunt import strict_json
from molehunt.bank.roster import Entry
from molehunt.bank.rows import Row, read_rows, regrow
from molehunt.calibration import Population, Reference, settings, statistic
from molehunt.defenses import Defense
from molehunt.examination import Inspect, divide, examine
from molehunt.files import write_atomically
from molehunt.findings import Finding, Outcome
from molehunt.runner import configuration
from molehunt.suspect import Suspect
from molehunt.tasks import get_task

Inspecting = Callable[[int], AbstractContextManager[Inspect]]
"""From the seed of a model to what runs defenses on it."""

FIELDS = {"name", "weights", "asked", "scores", "settings", "versions", "dtype", "failed", "seconds"}


def calibrate(
    listed: Sequence[Entry],
    folder: Path,
    defenses: Mapping[str, Defense],
    inspecting: Inspecting,
    *,
    report: Callable[[str, Mapping[str, float | None]], None] | None = None,
    place: str = "scores",
) -> Population:
    """Let defenses score the models of a bank that they have not scored yet, and collect all scores.

    A scored model is on disk before the next is looked at, below `place` in the folder; a row that other settings or
    other weights led to is made again. Planted models whose backdoor does not work are left out of the answer.

    Args:
        listed: the models, of one task and network.
        folder: of this bank, with a row for every one of them.
        defenses: which to ask, by name. Their scores on a model depend on who else is asked: some judge the triggers
            that others find.
        inspecting: makes what runs them.
        report: called after every model with (name, scores).
        place: folder of the scored models, below that of the bank.

    Raises:
        ValueError: no models, a model is not trained yet, no defense gave a score, a file is no row, or defenses
            answered in different settings or number formats.
    """
    if not listed:
        raise ValueError("there are no models to score: this bank has none in that partition")
    rows = {row.name: row for row in read_rows(listed, folder)}
    if lacking := [entry.name for entry in listed if entry.name not in rows]:
        raise ValueError(f"{len(lacking)} models are not trained yet, {lacking[0]} first: run molehunt bank build")
    (folder / place).mkdir(exist_ok=True)
    asked = {name: configuration(defense) for name, defense in defenses.items()}
    found = []
    for entry in listed:
        scored = _read(folder / place, rows[entry.name], asked)
        if scored is None:
            with inspecting(entry.seed) as inspect:
                scored = _score(entry, rows[entry.name], asked, defenses, inspect)
            path = folder / place / f"{entry.name}.json"
            write_atomically(path, [json.dumps(scored, indent=1, allow_nan=False).encode()])
            if report:
                report(entry.name, scored["scores"])
        found.append(scored)
    return _collect(listed, [rows[entry.name] for entry in listed], found)


def _read(folder: Path, row: Row, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scores of a model if they are there and still hold."""
    path = folder / f"{row.name}.json"
    if not path.exists():
        return None
    kept = strict_json.loads(path.read_bytes())
    if not isinstance(kept, dict) or kept.keys() != FIELDS:
        raise ValueError(f"{path} holds no scores of a model; delete it to score the model again")
    # Through JSON, as the file went: a tuple comes back as a list.
    same = kept["asked"] == json.loads(json.dumps(asked)) and kept["weights"] == row.weights
    return kept if same else None


def _score(
    entry: Entry, row: Row, asked: Mapping[str, Any], defenses: Mapping[str, Defense], inspect: Inspect
) -> dict[str, Any]:
    task = get_task(entry.task)
    clean, _ = task.secret(entry.seed)
    suspect = Suspect.of(regrow(entry, threads=row.threads), task, clean=divide(clean)[0])
    outcomes: dict[str, Outcome] = dict(examine(suspect, defenses, inspect))
    found = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Finding)}
    versions: dict[str, str] = {}
    for finding in found.values():
        versions.update(finding.record.get("versions", {}))
    return {
        "name": entry.name,
        "weights": row.weights,
        "asked": dict(asked),
        "scores": {name: statistic(finding) for name, finding in found.items()},
        "settings": {name: settings(finding) for name, finding in found.items() if statistic(finding) is not None},
        "versions": versions,
        "dtype": next((f.record.get("dtype", "float32") for f in found.values()), None),
        "failed": {name: str(outcome)[:500] for name, outcome in outcomes.items() if name not in found},
        "seconds": {name: None if f.cost is None else f.cost.seconds for name, f in found.items()},
    }


def _collect(listed: Sequence[Entry], rows: Sequence[Row], found: Sequence[Mapping[str, Any]]) -> Population:
    together: dict[str, Any] = {}
    for scored in found:
        for name, used in scored["settings"].items():
            if together.setdefault(name, used) != used:
                raise ValueError(f"{name} scored the models in different settings; delete the scores to start again")
    if not together:
        failed = next((f"{n}: {text}" for s in found for n, text in s["failed"].items()), "pure repairs have none")
        raise ValueError(f"no defense gave a score ({failed})")
    dtypes = {scored["dtype"] for scored in found} - {None}
    if len(dtypes) > 1:
        raise ValueError(f"the models were scored in different number formats: {sorted(dtypes)}; delete the scores")
    versions = {name: text for scored in found for name, text in scored["versions"].items()}
    return Population(
        task=listed[0].task,
        network=listed[0].network,
        recipe=listed[0].network,
        models=tuple(
            Reference(
                seed=entry.seed,
                scores={name: scored["scores"].get(name) for name in together},
                accuracy=row.accuracy,
                attack=row.kind if row.planted else None,
            )
            for entry, row, scored in zip(listed, rows, found, strict=True)
            if row.backdoored or not row.planted
        ),
        defenses=together,
        versions={**versions, "block": "1"},
        dtype=dtypes.pop(),
    )
