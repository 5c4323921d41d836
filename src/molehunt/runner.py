"""How a defense is run: seeded, timed, counted, checked, and never trusted to answer well.

`inspect` calls one defense on one suspect in this process. What it raises becomes a `Failure`, and so does an answer
that does not fit. `molehunt.isolation` does the same in a process of its own, for defenses and models of strangers.
"""

import dataclasses
import enum
import hashlib
import importlib
import math
import platform
import re
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import PydanticUserError, TypeAdapter
from torch import Tensor

import molehunt
from molehunt import metas, triggers
from molehunt.defenses import DEFENSES, Defense
from molehunt.engine import Cancelled, Engine, Local, OutOfTime, Run, never, silent
from molehunt.findings import Abstention, Failure, Finding, Outcome
from molehunt.meter import Meter
from molehunt.networks import MissingPart
from molehunt.suspect import Access, Suspect
from molehunt.triggers import Trigger
from molehunt.untouched import Untouched

WORDS: dict[Access, str] = {
    Access.CLEAN: "clean images",
    Access.TRAINING: "the training set",
    Access.INPUTS: "a stream of inputs",
    Access.CANDIDATES: "candidate triggers from other defenses",
    Access.REFERENCES: "reference models",
    Access.METAS: "trained meta-classifiers",
}
_TRACE = 20_000  # characters of a traceback that are kept: the end of it says most


def inspect(
    defense: Defense,
    suspect: Suspect,
    *,
    name: str | None = None,
    seed: int,
    seconds: float | None = None,
    report: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    scratch: Path | None = None,
    engine: Engine | None = None,
) -> Outcome:
    """Ask one defense about one suspect.

    The answer is a function of the defense, the suspect, the name and the seed.

    Args:
        defense: the configured method.
        suspect: the model and what is granted; it is the same afterwards, even if the defense was careless.
        name: the defense's name in the record; by default its name in `DEFENSES`, else its class name.
        seed: of the game; every defense gets a generator of its own made from the seed and its name.
        seconds: the defense must answer within them. Here it is trusted to look at the clock (`run.check()`); an
            answer that is late by more than `grace` is a failure.
        report: gets the defense's progress (done, total).
        cancelled: asked by the defense; once true it stops.
        scratch: a folder where the defense may keep partial results.
        engine: spreads independent pieces of work; this process by default.

    Returns:
        The finding with cost and record filled in and all tensors on the CPU; an abstention where the evidence that it
        needs was not granted or the model lacks a part that it needs; else a failure that says what happened.

    Raises:
        KeyboardInterrupt: Ctrl-C stops the whole program, not one defense.
        ValueError: the defense is not a dataclass.
    """
    name = name or name_of(defense)
    facts = record(defense, suspect, seed=seed, seconds=seconds)
    if (reason := missing(defense, suspect)) is not None:
        return Abstention(defense=name, reason=reason)
    meter = Meter(suspect.task.shape, suspect.classes, suspect.device)
    untouched = Untouched(suspect)

    def failed(kind: str, message: str, trace: str = "") -> Failure:
        cost = meter.cost()
        return Failure(defense=name, kind=kind, message=message, trace=trace[-_TRACE:], cost=cost, record=facts)

    outcome: Outcome
    try:
        with meter:
            run = Run(
                rng=generator(seed, name),
                deadline=None if seconds is None else time.monotonic() + seconds,
                report=report or silent,
                cancelled=cancelled or never,
                scratch=scratch,
                engine=engine or Local(),
            )
            finding = defense(suspect, run)
        late = -(run.remaining() or 0.0)
        if seconds is not None and late > grace(seconds):
            raise OutOfTime(f"answered {late:.1f} s after its deadline of {seconds:g} s")
        finding = check(finding, suspect)
    except MissingPart as error:
        outcome = Abstention(defense=name, reason=str(error))
    except (Exception, SystemExit) as error:
        outcome = failed(kind_of(error), f"{type(error).__name__}: {error}", traceback.format_exc())
    else:
        outcome = dataclasses.replace(finding, defense=name, cost=meter.cost(), record=facts)
    finally:
        damage = untouched.restore()
    if damage is not None and isinstance(outcome, Finding):
        outcome = failed("raised", f"it {damage}; a defense must leave its suspect as it is and work on a copy")
    return outcome


def grace(seconds: float) -> float:
    """Seconds by which an answer may be late: what lies between two looks at the clock."""
    return 1.0 + 0.1 * seconds


def missing(defense: Defense, suspect: Suspect) -> str | None:
    """Say what the defense needs and is not granted, for people; None if it can be asked."""
    if any(need <= suspect.grants for need in defense.needs):
        return None
    wanted = ", or ".join(listed(need) for need in defense.needs)
    return f"needs {wanted}; granted: {listed(suspect.grants)}"


def listed(evidence: frozenset[Access]) -> str:
    """Evidence in words, in the order in which `Access` lists it."""
    return " and ".join(WORDS[access] for access in Access if access in evidence) or "the weights alone"


def generator(seed: int, name: str) -> torch.Generator:
    """Make the generator of one defense: independent of the others', equal for equal seed and name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def kind_of(error: BaseException) -> str:
    """Sort what was raised into the kinds of a `Failure`."""
    if isinstance(error, Cancelled):
        return "cancelled"
    if isinstance(error, OutOfTime):
        return "time"
    # The allocator of the CPU raises a plain RuntimeError.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "memory"
    return "raised"


def name_of(defense: Defense) -> str:
    """Name a defense as `DEFENSES` does, or by its class in the same spelling: MyOwn is my_own."""
    for name, kind in DEFENSES.items():
        if type(defense) is kind:
            return name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(defense).__name__).lower()


def configuration(defense: Defense) -> dict[str, Any]:
    """The fields of a defense as JSON values: enough to make it again.

    Raises:
        ValueError: the defense is not a dataclass, or a field has no JSON form.
    """
    if not dataclasses.is_dataclass(defense) or isinstance(defense, type):
        raise ValueError(f"a defense is a dataclass, whose fields are its configuration; got {defense!r}")
    return {field.name: _json(getattr(defense, field.name), field.name) for field in dataclasses.fields(defense)}


def record(defense: Defense, suspect: Suspect, *, seed: int, seconds: float | None) -> dict[str, Any]:
    """Write down what is needed to run this again: configuration, seed, versions, device."""
    kind = type(defense)
    by_metas = suspect.metas is not None and any(Access.METAS in need for need in defense.needs)
    return {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "configuration": configuration(defense),
        "seed": seed,
        "seconds": seconds,
        "granted": sorted(access.value for access in suspect.grants),
        # Scores by other meta-classifiers are not comparable.
        **({"metas": metas.digest(suspect.metas or ())} if by_metas else {}),
        "versions": {
            "molehunt": molehunt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": str(suspect.device),
        "dtype": str(suspect.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def remake(record: Mapping[str, Any]) -> Defense:
    """Make a defense again from its record.

    Args:
        record: with the `class` and the `configuration` that `record` wrote down.

    Raises:
        ImportError, AttributeError: there is no such class here.
        ValueError: a field has no such value.
    """
    module, _, path = record["class"].partition(":")
    kind: Any = importlib.import_module(module)
    for name in path.split("."):
        kind = getattr(kind, name)
    try:
        # The adapter turns lists into the tuples, and texts into the enumerations, that the fields are annotated with.
        defense: Defense = TypeAdapter(kind).validate_python(record["configuration"])
    except PydanticUserError:  # a field with a type of its own
        defense = kind(**record["configuration"])
    return defense


def check(finding: object, suspect: Suspect) -> Finding:
    """Hand back the finding with its tensors detached and on the CPU, if it fits the suspect.

    Raises:
        ValueError: it is no finding, a length or shape is wrong, or a value is not finite.
    """
    if not isinstance(finding, Finding):
        raise ValueError(f"expected a Finding, got {type(finding).__name__}")
    lengths = {
        "class_scores": suspect.classes,
        "input_scores": None if suspect.inputs is None else len(suspect.inputs),
        "sample_scores": None if suspect.training is None else len(suspect.training.x),
    }
    changes: dict[str, Any] = {"score": None if finding.score is None else float(finding.score)}
    for field, length in lengths.items():
        value = getattr(finding, field)
        if value is None:
            continue
        if tuple(value.shape) != (length,):
            expected = "None, for that evidence was not granted" if length is None else f"shape ({length},)"
            raise ValueError(f"{field}: expected {expected}, got shape {tuple(value.shape)}")
        if value.is_complex():
            raise ValueError(f"{field}: expected real numbers, got {value.dtype}")
        changes[field] = _settled(value)
        if not bool(torch.isfinite(changes[field]).all()):  # again: it may have been written to since it was made
            raise ValueError(f"{field}: not all values are finite")
    if finding.trigger is not None:
        if not triggers.fits(finding.trigger, suspect.task.shape):
            raise ValueError(f"trigger: does not fit pictures of shape {suspect.task.shape}")
        if type(finding.target) is not int or not 0 <= finding.target < suspect.classes:
            raise ValueError(f"target: expected a class from 0 to {suspect.classes - 1}, got {finding.target!r}")
    for source in finding.sources or ():
        if type(source) is not int or not 0 <= source < suspect.classes or source == finding.target:
            raise ValueError(f"sources: expected classes other than the target {finding.target}, got {source!r}")
    if finding.radius is not None and not (math.isfinite(finding.radius) and finding.radius >= 0):
        raise ValueError(f"radius: expected a finite number, 0 or more, got {finding.radius}")
    if finding.repaired is not None:
        changes["repaired"] = _repaired(finding.repaired, suspect)
    changes["details"] = _json(finding.details, "details")
    return dataclasses.replace(finding, **changes)


def _repaired(state: Mapping[str, Tensor], suspect: Suspect) -> dict[str, Tensor]:
    """The state dict, detached and on the CPU, if it has exactly the suspect's keys, shapes and dtypes."""
    expected = suspect.model.state_dict()
    if state.keys() != expected.keys():
        odd = sorted(state.keys() ^ expected.keys())
        raise ValueError(f"repaired: expected the keys of the suspect's state dict, differs in {', '.join(odd[:5])}")
    for key, value in state.items():
        like = expected[key]
        if value.shape != like.shape or value.dtype != like.dtype:
            got, want = (f"{t.dtype} {tuple(t.shape)}" for t in (value, like))
            raise ValueError(f"repaired: {key} should be {want}, got {got}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"repaired: {key} has values that are not finite")
    return {key: _settled(value) for key, value in state.items()}


def _settled(tensor: Tensor) -> Tensor:
    """A copy on the CPU without history, so that a finding does not keep a graph or somebody's buffer alive."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _json(value: Any, where: str) -> Any:
    """A value as JSON and tensors, or an error that says where it is not."""
    match value:
        case enum.Enum():
            return _json(value.value, where)
        case None | bool() | int() | str():
            return value
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{where}: expected a finite number, got {value}")
            return value
        case Tensor():
            return _settled(value)
        case Path():
            return str(value)
        case Trigger():
            return value
        case Mapping():
            return {str(k): _json(v, f"{where}.{k}") for k, v in value.items()}
        case list() | tuple():
            return [_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
        case set() | frozenset():
            return sorted(_json(v, where) for v in value)
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: _json(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
        case _:
            raise ValueError(f"{where}: expected JSON values and tensors, got {type(value).__name__}")
