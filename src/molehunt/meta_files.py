"""Files of meta-classifiers: written once trained, read with suspicion, and those that come with the package."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from molehunt import strict_json
from molehunt.files import write_atomically
from molehunt.metas import Meta
from molehunt.tasks import Task

FORMAT = "molehunt meta-classifiers 1"
LARGEST = 2**26
"""Bytes of a file; ten queries of 64 x 64 in color and their layers are half a MiB."""
MOST = 100
"""Meta-classifiers in one file."""


def pack(metas: Sequence[Meta], about: Mapping[str, Any] | None = None) -> bytes:
    """Meta-classifiers as the bytes of a file; see `save`."""
    if not 1 <= len(metas) <= MOST:
        raise ValueError(f"a file holds 1 to {MOST} meta-classifiers, got {len(metas)}")
    told = {"format": FORMAT, "metas": [meta.to_json() for meta in metas], "about": dict(about or {})}
    tensors = {
        f"{place}.{name}": value.detach().cpu().contiguous()
        for place, meta in enumerate(metas)
        for name, value in meta.state_dict().items()
    }
    return to_bytes(tensors, {"about": json.dumps(told, sort_keys=True)})


def unpack(data: bytes) -> tuple[tuple[Meta, ...], dict[str, Any]]:
    """Make meta-classifiers again from `pack`, and what was said about them; the bytes may be a stranger's.

    Raises:
        ValueError: they are no such file, or something in them is missing, out of range or does not fit.
    """
    try:
        tensors: dict[str, Tensor] = from_bytes(data)
        # The library has read it, so the header is there, and as long as it says.
        header = strict_json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], limit=LARGEST)
        told = strict_json.loads(header["__metadata__"]["about"].encode())
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"no meta-classifiers: {error or type(error).__name__}") from error
    listed = told.get("metas") if isinstance(told, dict) and told.get("format") == FORMAT else None
    if not isinstance(listed, list) or not 1 <= len(listed) <= MOST or not all(isinstance(one, dict) for one in listed):
        raise ValueError(f"no meta-classifiers that this version can read: it wants {FORMAT!r}")
    found = []
    for place, one in enumerate(listed):
        prefix = f"{place}."
        mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        try:
            found.append(Meta.from_json(one, mine))
        except ValueError as error:
            raise ValueError(f"meta-classifier {place + 1}: {error}") from error
    about = told.get("about")
    return tuple(found), about if isinstance(about, dict) else {}


def save(metas: Sequence[Meta], path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write meta-classifiers as one file; either the whole new file is there afterwards or the old one.

    Args:
        metas: at least one.
        path: the file.
        about: what the shadow models were, as JSON values: `task` and `network`, which `chosen` compares, and more.

    Raises:
        ValueError: none, or more than `MOST`.
    """
    write_atomically(path, [pack(metas, about)])


def load(path: Path) -> tuple[tuple[Meta, ...], dict[str, Any]]:
    """Read what `save` wrote, and what was said about it; the file may be a stranger's.

    Raises:
        ValueError: it is no such file, is too large, or something in it is missing, out of range or does not fit.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path} has {size} bytes, a file of meta-classifiers at most {LARGEST}")
    try:
        return unpack(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def chosen(path: Path | None, task: Task, network: str) -> tuple[Meta, ...] | None:
    """Return the meta-classifiers of a file, if they are for these models; without a file those of the package, if any.

    Raises:
        ValueError: it is no such file, or they are for models of another task or network.
        OSError: it cannot be read.
    """
    if path is None:
        return shipped(task.name, network)
    metas, about = load(path)
    meant, wanted = (about.get("task"), about.get("network")), (task.name, network)
    if meant != wanted:
        raise ValueError(f"{path} is for {meant[1]} models of {meant[0]}, not for {network} models of {task.name}")
    shapes = {(tuple(meta.queries.shape[1:]), meta.classes) for meta in metas}
    if shapes != {(task.shape, task.num_classes)}:
        raise ValueError(f"{path} asks pictures and classes {sorted(shapes)}, {task.name} has {task.shape} and "
                         f"{task.num_classes}")  # fmt: skip
    return metas


@cache
def shipped(task: str, network: str) -> tuple[Meta, ...] | None:
    """Return the meta-classifiers that come with the package for a task and a network; None if there are none."""
    path = files("molehunt").joinpath("populations", f"{task}-{network}.safetensors".replace(":", "-"))
    return unpack(path.read_bytes())[0] if path.is_file() else None
