"""Reading the details of a finding, where anything may be missing: an older version, or a stranger, wrote them.

Every reader answers with nothing (None, or something empty) where a value is not of its kind; none of them raises.
"""

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from molehunt.findings import Finding


def numbers(value: object) -> list[float]:
    """A list or a one-dimensional tensor of finite numbers; empty where it is anything else."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, list | tuple) or any(number(v) is None for v in value):
        return []
    return [float(v) for v in value]


def matrix(value: object) -> list[list[float]]:
    """A matrix (n, K) of finite numbers as lists; empty where it is anything else."""
    rows = [numbers(row) for row in value.tolist()] if isinstance(value, Tensor) and value.ndim == 2 else []
    return rows if all(rows) else []


def number(value: object) -> float | None:
    """A finite number; None where it is anything else."""
    # Not `isfinite`, which raises for a whole number that no float can hold.
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def index(value: object, count: int) -> int | None:
    """A whole number from 0 to `count` - 1; None where it is anything else."""
    return value if isinstance(value, int) and 0 <= value < count else None


def mapping(value: object) -> Mapping[str, Any]:
    """A mapping; empty where it is anything else."""
    return value if isinstance(value, Mapping) else {}


def setting(finding: Finding, name: str) -> object:
    """A setting of the defense, from the runner's record; None where there is no record."""
    return mapping(finding.record.get("configuration")).get(name)
