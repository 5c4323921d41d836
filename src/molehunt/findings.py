"""What defenses answer: a finding, an abstention or a failure, and the verdict made of them.

Scores are raw: `calibration` turns them into probabilities. Everything here goes to JSON and comes back; tensors are
files of their own, named by the SHA-256 of their bytes, so that a record stays small and equal tensors are kept once.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from torch import Tensor

from molehunt import triggers
from molehunt.triggers import Trigger

State: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call took, measured by the runner from outside.

    Attributes:
        seconds: wall time.
        forward: images that went forward through a whole network.
        backward: images whose gradient came back through one.
        peak_bytes: largest resident memory of the process meanwhile.
    """

    seconds: float
    forward: int = 0
    backward: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A recovered trigger, as one defense hands it to the others.

    Attributes:
        trigger: the trigger.
        target: class that it is meant to produce.
        defense: name of the defense that found it; those who judge it need not know more.
    """

    trigger: Trigger
    target: int
    defense: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """What a defense found. What a method does not produce stays None.

    Attributes:
        defense: its name in `DEFENSES`.
        score: finite, higher is more suspicious; None for a pure repair.
        class_scores: (K,), higher is likelier to be the target class.
        trigger: the recovered trigger, and `target` the class that it produces.
        target: class that the trigger produces.
        sources: classes on which the trigger works, of a search by single classes, () where that found none; None is
            for a trigger that works on all of them.
        input_scores: (M,) over the suspect's inputs, higher is likelier to carry a trigger.
        sample_scores: (N,) over the training set, higher is likelier to be poisoned.
        repaired: a state dict for the suspect's network; the suspect itself is never changed.
        radius: certified radius, where a method certifies.
        details: JSON values and tensors that the method's page explains.
        cost: filled in by the runner.
        record: configuration, seed, versions and device: enough to run it again; filled in by the runner.

    Raises:
        ValueError: a score is not finite; a NaN never ranks.
    """

    defense: str
    score: float | None = None
    class_scores: Tensor | None = None
    trigger: Trigger | None = None
    target: int | None = None
    sources: tuple[int, ...] | None = None
    input_scores: Tensor | None = None
    sample_scores: Tensor | None = None
    repaired: State | None = None
    radius: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    cost: Cost | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"{self.defense}: the score must be finite, got {self.score}")
        for name in ("class_scores", "input_scores", "sample_scores"):
            value = getattr(self, name)
            if value is not None and (value.ndim != 1 or not bool(torch.isfinite(value).all())):
                raise ValueError(f"{self.defense}: {name} must be finite with one dimension")
        if (self.trigger is None) != (self.target is None):
            raise ValueError(f"{self.defense}: a trigger comes with the class that it produces, and the reverse")
        if self.sources is not None and bool(self.sources) != (self.trigger is not None):
            raise ValueError(f"{self.defense}: sources {self.sources} come with a trigger, and () without one")


@dataclass(frozen=True, kw_only=True)
class Abstention:
    """No opinion, which is not "clean": what the defense needs was not granted.

    Attributes:
        defense: its name in `DEFENSES`.
        reason: what was missing, for people.
    """

    defense: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The defense raised, ran out of time or memory, or died. Never "no opinion".

    Attributes:
        defense: its name in `DEFENSES`.
        kind: one of `raised`, `time`, `memory`, `died`, `cancelled`.
        message: what happened, for people.
        trace: the traceback, where there is one.
        cost: what it took until then.
        record: as in `Finding`.
    """

    defense: str
    kind: str
    message: str
    trace: str = ""
    cost: Cost | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


Outcome: TypeAlias = Finding | Abstention | Failure


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """The answer about one model.

    Attributes:
        p: probability that something is hidden, strictly between 0 and 1.
        q: (K,) probabilities of the target class, given that something is hidden; sums to 1.
        trigger: the best recovered trigger, and `target` the class that it produces; None if nothing was recovered.
        target: as said.
        sources: classes on which the trigger works; None means all others.
        repaired: state dict of the cleaned model; None where the submitted weights stand.
        outcomes: every defense's answer, in the order in which they ran.
        p_values: conformal p-value by defense, where there is one.
        details: what the fusion wants to say: reference counts, warnings, before/after of the repair.

    Raises:
        ValueError: p or q is not a probability.
    """

    p: float
    q: Tensor
    trigger: Trigger | None = None
    target: int | None = None
    sources: tuple[int, ...] | None = None
    repaired: State | None = None
    outcomes: tuple[Outcome, ...] = ()
    p_values: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 < self.p < 1.0:
            raise ValueError(f"p must lie strictly between 0 and 1, got {self.p}")
        # Asked so that a NaN, which compares as false with everything, is refused.
        if not (self.q.ndim == 1 and float(self.q.min()) >= 0 and abs(float(self.q.sum()) - 1) <= 1e-4):
            raise ValueError(f"q must be probabilities that sum to 1, got {self.q.tolist()}")


_KINDS: dict[str, type] = {"finding": Finding, "abstention": Abstention, "failure": Failure, "verdict": Verdict}


def _put(tensor: Tensor, folder: Path) -> dict[str, str]:
    """Keep a tensor as FOLDER/SHA256.safetensors and answer how to find it again."""
    data = safetensors.torch.save({"tensor": tensor.detach().cpu().contiguous()})
    name = hashlib.sha256(data).hexdigest()
    path = folder / f"{name}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_bytes(data)
        partial.replace(path)
    return {"tensor": name}


def _get(name: str, folder: Path) -> Tensor:
    """Read a kept tensor and check that it still has the bytes that its name promises."""
    if len(name) != 64 or not set(name) <= set("0123456789abcdef"):
        raise ValueError(f"expected a SHA-256 in hexadecimal, got {name!r}")
    data = (folder / f"{name}.safetensors").read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != name:
        raise ValueError(f"tensor {name} was changed on disk: its bytes now have the SHA-256 {found}")
    return safetensors.torch.load(data)["tensor"]


def _encode(value: Any, folder: Path) -> Any:
    if isinstance(value, Tensor):
        return _put(value, folder)
    if isinstance(value, Finding | Abstention | Failure | Verdict):
        kind = next(k for k, c in _KINDS.items() if type(value) is c)
        return {"is": kind, **{f.name: _encode(getattr(value, f.name), folder) for f in dataclasses.fields(value)}}
    if isinstance(value, Cost):
        return {"is": "cost", **dataclasses.asdict(value)}
    if isinstance(value, Trigger):
        return {"is": "trigger", "json": value.to_json(), "tensors": _encode(value.tensors(), folder)}
    if isinstance(value, Mapping):
        return {str(k): _encode(v, folder) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v, folder) for v in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"cannot keep a {type(value).__name__} in a record: use JSON values and tensors")


def _decode(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_decode(v, folder) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor"} and isinstance(value["tensor"], str):
        return _get(value["tensor"], folder)
    fields = {k: _decode(v, folder) for k, v in value.items() if k != "is"}
    match value.get("is"):
        case None:
            return fields
        case "cost":
            return Cost(**fields)
        case "trigger":
            return triggers.from_json(fields["json"], fields["tensors"])
        case "verdict":
            return Verdict(**{**fields, "outcomes": tuple(fields["outcomes"]), "sources": _sources(fields)})
        case "finding":
            return Finding(**{**fields, "sources": _sources(fields)})
        case "abstention" | "failure" as kind:
            return _KINDS[kind](**fields)
        case other:
            raise ValueError(f"unknown record kind {other!r}")


def _sources(fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Source classes out of a record; older ones have none."""
    sources = fields.get("sources")
    return None if sources is None else tuple(sources)


def save(answer: Outcome | Verdict, path: Path) -> None:
    """Write an outcome or a verdict to PATH as JSON, its tensors into the folder `tensors` beside it.

    Either the whole new file is there afterwards or the old one.

    Raises:
        ValueError: the details hold something that is neither JSON nor a tensor.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_encode(answer, path.parent / "tensors"), indent=1, allow_nan=False)
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text(text)
    partial.replace(path)


def load(path: Path) -> Outcome | Verdict:
    """Read what `save` wrote.

    Raises:
        ValueError: the file is not such a record, or a tensor beside it was changed.
    """
    answer = _decode(json.loads(path.read_text()), path.parent / "tensors")
    if not isinstance(answer, Finding | Abstention | Failure | Verdict):
        raise ValueError(f"{path} holds no outcome or verdict")
    return answer
