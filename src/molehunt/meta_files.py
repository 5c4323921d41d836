"""Files of meta-classifiers: written once trained, read with suspicion, and those that come with the package."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from molehunt.files import write_atomically
from molehunt.metas import Meta

FORMAT = "molehunt meta-classifiers 1"
LARGEST = 2**26
"""Bytes of a file; ten queries of 64 x 64 in color and their layers are half a MiB."""
MOST = 100
"""Meta-classifiers in one file."""


def save(metas: Sequence[Meta], path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write meta-classifiers as one file; either the whole new file is there afterwards or the old one.

    Args:
        metas: at least one.
        path: the file.
        about: what else it should say, such as what the shadow models were; JSON values. Nothing reads it.

    Raises:
        ValueError: none, or more than `MOST`.
    """
    if not 1 <= len(metas) <= MOST:
        raise ValueError(f"a file holds 1 to {MOST} meta-classifiers, got {len(metas)}")
    told = {"format": FORMAT, "metas": [meta.to_json() for meta in metas], "about": dict(about or {})}
    tensors = {
        f"{place}.{name}": value.detach().cpu().contiguous()
        for place, meta in enumerate(metas)
        for name, value in meta.state_dict().items()
    }
    write_atomically(path, [to_bytes(tensors, {"about": json.dumps(told, sort_keys=True)})])


def load(path: Path) -> tuple[Meta, ...]:
    """Read what `save` wrote; the file may be a stranger's.

    Raises:
        ValueError: it is no such file, is too large, or something in it is missing, out of range or does not fit.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path} has {size} bytes, a file of meta-classifiers at most {LARGEST}")
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["about"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no meta-classifiers: {error or type(error).__name__}") from error
    listed = told.get("metas") if isinstance(told, dict) and told.get("format") == FORMAT else None
    if not isinstance(listed, list) or not 1 <= len(listed) <= MOST or not all(isinstance(one, dict) for one in listed):
        raise ValueError(f"{path} holds no meta-classifiers that this version can read: it wants {FORMAT!r}")
    found = []
    for place, one in enumerate(listed):
        prefix = f"{place}."
        mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        try:
            found.append(Meta.from_json(one, mine))
        except ValueError as error:
            raise ValueError(f"{path}, meta-classifier {place + 1}: {error}") from error
    return tuple(found)


@cache
def shipped(task: str, network: str) -> tuple[Meta, ...] | None:
    """Return the meta-classifiers that come with the package for a task and a network; None if there are none."""
    path = files("molehunt").joinpath("populations", f"{task}-{network}.safetensors".replace(":", "-"))
    return load(Path(str(path))) if path.is_file() else None
