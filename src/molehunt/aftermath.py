"""What an isolated evaluation left behind, read as from a stranger: an answer, or the reason why there is none."""

import contextlib
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

from molehunt import findings, runner, strict_json
from molehunt.findings import Cost, Failure, Finding
from molehunt.suspect import Suspect

TEXT = 2**24  # bytes of an answer without its tensors
ANSWER = 2**29  # bytes of tensors that an answer may mention; a tensor that is mentioned twice is read twice


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code; a signal that killed it is negative.
        seconds: since it asked the defense.
        peak_bytes: its largest resident memory.
        why: the failure that made us kill it, if we did.
    """

    code: int
    seconds: float
    peak_bytes: int
    why: Failure | None


def answer(work: Path, ended: Ended, suspect: Suspect) -> Finding | Failure:
    """Read what the child left, as from a stranger."""
    output = last_words(work / "output.txt")
    if ended.why is not None:
        return dataclasses.replace(ended.why, trace=output)
    if ended.code:
        return death(ended.code, output)
    try:
        if any(not p.is_file() or p.is_symlink() for p in (work / "result").rglob("*") if p.name != "tensors"):
            raise ValueError("there is something other than files in the folder of its result")
        path = work / "result" / "outcome.json"
        if (size := path.stat().st_size) > TEXT:
            raise ValueError(f"its answer has {size} bytes of text, at most {TEXT} are read")
        document = strict_json.loads(path.read_bytes(), limit=TEXT, depth=50)
        if (size := mentioned(document, path.parent / "tensors")) > ANSWER:
            raise ValueError(f"its answer mentions tensors of {size} bytes, at most {ANSWER} are read")
        outcome = findings.load(path)
        if isinstance(outcome, Finding):
            return runner.check(outcome, suspect)
        if isinstance(outcome, Failure) and outcome.kind in {"raised", "time", "memory", "cancelled"}:
            return failure(outcome.kind, str(outcome.message)[:2000], str(outcome.trace)[-20_000:], outcome.cost)
        raise ValueError(f"a defense does not answer with a {type(outcome).__name__}")
    except Exception as error:  # whatever a stranger's file can make a reader raise
        return failure("raised", f"its answer does not hold: {type(error).__name__}: {error}"[:2000], output)


def failure(kind: str, message: str, trace: str = "", cost: Cost | None = None) -> Failure:
    """A failure without name and record, which the caller knows."""
    return Failure(defense="", kind=kind, message=message, trace=trace, cost=cost)


def death(code: int, output: str) -> Failure:
    """Say why a child ended that nobody here killed."""
    last = output.strip().splitlines()[-1] if output.strip() else "no message"
    if "MemoryError" in last or "can't allocate memory" in last or "bad_alloc" in output:
        return failure("memory", f"ran out of memory: {last}", output)
    if code > 0:
        return failure("raised", f"ended before it could answer: {last}", output)
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if -code == signal.SIGXCPU:
        return failure("time", "killed by the system: its processor time is used up", output)
    if -code == signal.SIGKILL:
        return failure("memory", "killed by the system, most likely because memory ran out", output)
    return failure("died", f"died of {name}", output)


def bytes_below(folder: Path) -> int:
    """Bytes in all files below a folder, as far as they can be seen."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(Path(place) / name).st_size
    return total


def mentioned(document: Any, folder: Path) -> int:
    """Bytes that would be read if every mention of a tensor were followed."""
    if isinstance(document, list):
        return sum(mentioned(value, folder) for value in document)
    if not isinstance(document, dict):
        return 0
    if document.keys() == {"tensor"} and isinstance(document["tensor"], str):
        # A name that is a path counts as nothing here and is refused by the reader.
        path = folder / f"{Path(document['tensor']).name}.safetensors"
        return path.stat().st_size if path.exists() else 0
    return sum(mentioned(value, folder) for value in document.values())


def last_words(path: Path, length: int = 20_000) -> str:
    """The end of a text file that may hold anything."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - length))
            return stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
