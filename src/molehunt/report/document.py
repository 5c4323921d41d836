"""A scan as one JSON document, for other programs."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from molehunt.findings import Abstention, Cost, Failure, Finding, Outcome
from molehunt.report.views import Change, ScanReport
from molehunt.report.words import answer
from molehunt.triggers import Trigger

FORMAT = "molehunt-scan-1"


def scan_json(report: ScanReport) -> dict[str, Any]:
    """Turn a scan into JSON values.

    Tensors are left out but for class scores and q: the document is for decisions, and the record of findings
    (`findings.save`) keeps the rest. Texts are as they came, not made legible: a program reads them.

    Returns:
        `answer` ("found", "clear" or "unsure"), `p`, `q` by class, `target` (number and name), `sources` (the same, or
        null for all classes) and `trigger` (or null), `repaired`, before and after, and one entry per defense with its
        outcome ("finding", "abstention", "failure"), p-value and cost. `power` (or null) has, by family of attacks, how
        many known backdoors these defenses catch at its `level` of false alarms, and the interval of that share.
        `details` are those of the verdict (`Verdict.details`).
    """
    verdict = report.verdict
    return {
        "format": FORMAT,
        "name": report.name,
        "task": report.task,
        "network": report.network,
        "when": report.when,
        "answer": answer(verdict, report.found_at, report.clear_at),
        "found_at": report.found_at,
        "clear_at": report.clear_at,
        "p": verdict.p,
        "classes": list(report.classes),
        "q": [float(v) for v in verdict.q],
        "power": None if report.power is None else dataclasses.asdict(report.power),
        "target": None if verdict.target is None else _class(verdict.target, report.classes),
        "sources": None if verdict.sources is None else [_class(k, report.classes) for k in verdict.sources],
        "trigger": None if verdict.trigger is None else _trigger(verdict.trigger),
        "repaired": verdict.repaired is not None,
        "accuracy": _change(report.accuracy),
        "attack_success": _change(report.asr),
        "defenses": [_outcome(o, verdict.p_values.get(o.defense), report.classes) for o in verdict.outcomes],
        "details": _plain(verdict.details),
        "notes": list(report.notes),
        "command": report.command,
        "versions": dict(report.versions),
        "model_sha256": report.model_sha256 or None,
        "references_sha256": report.references_sha256 or None,
    }


def _class(index: int, classes: tuple[str, ...]) -> dict[str, Any]:
    return {"class": index, "name": classes[index] if 0 <= index < len(classes) else None}


def _trigger(trigger: Trigger) -> dict[str, Any]:
    footprint = trigger.footprint()
    return {
        "kind": footprint.kind,
        "area": footprint.area,
        "opacity": footprint.opacity,
        "weight": footprint.weight,
        "linf": footprint.linf,
        "displacement": footprint.displacement,
    }


def _change(change: Change | None) -> dict[str, float | None] | None:
    return None if change is None else {"before": change.before, "after": change.after}


def _cost(cost: Cost | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    return {
        "seconds": cost.seconds,
        "forward": cost.forward,
        "backward": cost.backward,
        "peak_bytes": cost.peak_bytes,
    }


def _outcome(outcome: Outcome, p_value: float | None, classes: tuple[str, ...]) -> dict[str, Any]:
    match outcome:
        case Abstention():
            return {"defense": outcome.defense, "outcome": "abstention", "reason": outcome.reason}
        case Failure():
            return {
                "defense": outcome.defense,
                "outcome": "failure",
                "kind": outcome.kind,
                "message": outcome.message,
                "cost": _cost(outcome.cost),
            }
        case Finding():
            return {
                "defense": outcome.defense,
                "outcome": "finding",
                "score": outcome.score,
                "p_value": p_value,
                "class_scores": _numbers(outcome.class_scores),
                "target": None if outcome.target is None else _class(outcome.target, classes),
                "sources": None if outcome.sources is None else [_class(k, classes) for k in outcome.sources],
                "trigger": None if outcome.trigger is None else _trigger(outcome.trigger),
                "repaired": outcome.repaired is not None,
                "cost": _cost(outcome.cost),
            }


def _plain(value: Any) -> Any:
    """Turn details into JSON: a tensor becomes its shape, a number that is not finite becomes null."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _numbers(values: Tensor | None) -> list[float] | None:
    return None if values is None else [float(v) for v in values]
