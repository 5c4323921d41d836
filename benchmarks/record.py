"""How a benchmark keeps what it measured: rows that only grow, and one JSON file of figures."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number beside what was asked for.

    Attributes:
        value: the measurement; None when it was not made, which is never a pass.
        unit: its unit.
        goal: what was asked for, or None for a number that is only reported.
        better: which direction is better.
        spread: smallest and largest over the seeds, or a sentence.
        seeds: the seeds that it rests on.
        command: what regenerates it.
        note: what a reader must know, such as what else the machine was doing.
    """

    value: float | None
    unit: str
    goal: float | None
    better: Literal["higher", "lower"]
    spread: Any = None
    seeds: list[int] | None = None
    command: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or a value."""
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.better == "higher" else self.value <= self.goal


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = "unknown"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() == "flags":
                flags = value
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "avx512_bf16": "avx512_bf16" in flags,
        "amx": "amx_bf16" in flags,
        "mkldnn_bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
    }


def versions() -> dict[str, str]:
    """Versions that can change a number."""
    return {"python": platform.python_version(), **{n: version(n) for n in ("molehunt", "torch", "numpy")}}


def rows(name: str) -> list[dict[str, Any]]:
    """All finished rows of results/NAME.jsonl; a last line that was cut off by a kill is dropped."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append(name: str, row: dict[str, Any]) -> None:
    """Add one row to results/NAME.jsonl; it is on disk when this returns."""
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    # A kill may have left half a line; the new row must not be glued to it.
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def todo(name: str, keys: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those of the wanted keys that no finished row has yet."""
    done = rows(name)
    for key in keys:
        if not any(all(row.get(k) == v for k, v in key.items()) for row in done):
            yield key


def fill(name: str, keys: Iterable[dict[str, Any]], make: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Make the rows that no run has made yet, each from its key, and keep and print each at once."""
    for key in todo(name, keys):
        row = make(key)
        append(name, row)
        print({k: v for k, v in row.items() if k not in {"machine", "settings"}}, flush=True)


def write(name: str, figures: dict[str, Figure]) -> Path:
    """Write results/NAME.json, keeping the figures of earlier runs that this one did not measure."""
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text())["figures"] if path.exists() else {}
    new = {key: {k: v for k, v in asdict(f).items() if v not in (None, "")} for key, f in figures.items()}
    for key, figure in figures.items():
        new[key]["value"] = figure.value
    document = {"machine": machine(), "versions": versions(), "figures": {**old, **new}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def spread(values: Iterable[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    listed = list(values)
    return {"min": min(listed), "median": statistics.median(listed), "max": max(listed)}
