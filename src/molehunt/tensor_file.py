"""The safetensors format, read strictly and written in one spelling.

The layout is eight bytes of length, a JSON header of that length, and the numbers. We read and write it
ourselves because the name of a submission is the hash of the bytes that are written here, which must not change with
the version of a library, and because a header is checked for more than a library checks.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from molehunt import strict_json
from molehunt.files import Refused, exactly
from molehunt.strict_json import show

WRITTEN: dict[str, tuple[torch.dtype, str]] = {
    "F32": (torch.float32, "<f4"),
    "I32": (torch.int32, "<i4"),
    "U8": (torch.uint8, "|u1"),
}
"""What is ever written or read as numbers: weights in float32, handed-over training sets in 8 bits with their rows."""

# What the format can name and a torch module can hold; larger floats, complex and 8-bit floats are not read at all.
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NAME = re.compile(r"[A-Za-z0-9_.:/\-]+")


class CheckpointError(Refused):
    """Weights are refused; the message says what is wrong with them and, where it helps, what to do."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may ask for before it is refused unread.

    Attributes:
        file: largest file, in bytes.
        header: largest header, in bytes.
        tensors: largest number of tensors.
        name: longest name of a tensor, in characters.
        rank: largest number of dimensions.
    """

    file: int = 512 * 2**20
    header: int = 2**20
    tensors: int = 4096
    name: int = 256
    rank: int = 8


LIMITS = Limits()


class Entry(NamedTuple):
    """One line of a header: a tensor that the file claims to hold; offsets count from the first byte after it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(stream: BinaryIO, size: int, *, limits: Limits = LIMITS) -> tuple[dict[str, Entry], int]:
    """Read and check the header, and nothing behind it.

    Args:
        stream: positioned at the first byte.
        size: length of the file in bytes.
        limits: what to refuse unread.

    Returns:
        The entries by name, and the offset of the first byte after the header.

    Raises:
        CheckpointError: it is another kind of file, or the header is too long, malformed, or does not describe
            exactly the bytes that follow it.
    """
    if size > limits.file:
        raise CheckpointError(f"the file has {size} bytes; at most {limits.file} are read")
    start = bytes(exactly(stream, min(size, 9), CheckpointError))
    length = int.from_bytes(start[:8], "little")
    # A header of 640 bytes begins with the two bytes of a pickle, so other kinds are only guessed at when this cannot
    # be the beginning of a safetensors file.
    if len(start) < 9 or start[8:] != b"{" or not 2 <= length <= size - 8:
        raise CheckpointError(_other_kind(start, size))
    if length > limits.header:
        raise CheckpointError(f"the header claims {length} bytes; at most {limits.header} are read")
    text = b"{" + bytes(exactly(stream, length - 1, CheckpointError))
    try:
        # What begins with a brace is an object or no JSON.
        header: dict[str, Any] = strict_json.loads(text, limit=limits.header, depth=3)
    except strict_json.JSONError as error:
        raise CheckpointError(f"header: {error}") from None
    _check_metadata(header.pop("__metadata__", {}))
    if not 0 < len(header) <= limits.tensors:
        raise CheckpointError(f"the file lists {len(header)} tensors; 1 to {limits.tensors} are read")
    entries = {name: _entry(name, claim, limits) for name, claim in header.items()}
    _check_cover(entries, size - 8 - length)
    return entries, 8 + length


def read_entry(stream: BinaryIO, begin: int, name: str, entry: Entry, dtype: str = "F32") -> Tensor:
    """Read one tensor, float32 unless said otherwise.

    Args:
        stream: the file.
        begin: offset of the first byte after the header.
        name: the tensor's name, for the message.
        entry: its line in the header, as checked by `read_header`.
        dtype: a key of `WRITTEN`: what it must be.

    Raises:
        CheckpointError: its dtype is another.
    """
    if entry.dtype != dtype:
        advice = "; save the model in float32" if dtype == "F32" else ""
        raise CheckpointError(f"{show(name)} has dtype {entry.dtype}, expected {dtype}{advice}")
    stream.seek(begin + entry.start)
    data = exactly(stream, entry.stop - entry.start, CheckpointError)
    values = np.frombuffer(data, dtype=WRITTEN[dtype][1])
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False)).reshape(entry.shape)


def encode(state: Mapping[str, Tensor]) -> Iterator[bytes]:
    """Write tensors on the CPU of a dtype in `WRITTEN`, in the order of their names, piece by piece.

    Yields:
        Pieces of the file in order.
    """
    names = {kind: name for name, (kind, _) in WRITTEN.items()}
    header: dict[str, Any] = {}
    offset = 0
    for name, value in sorted(state.items()):
        dtype = names[value.dtype]
        stop = offset + DTYPE_BYTES[dtype] * value.numel()
        header[name] = {"data_offsets": [offset, stop], "dtype": dtype, "shape": list(value.shape)}
        offset = stop
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, value in sorted(state.items()):
        yield value.contiguous().numpy().astype(WRITTEN[names[value.dtype]][1], copy=False).tobytes()


def _other_kind(start: bytes, size: int) -> str:
    """Say what a file that is not safetensors probably is."""
    if start.startswith(b"PK\x03\x04"):
        return "this is a zip, such as a .pt file with another name, not safetensors; use `molehunt convert`"
    if start[:1] == b"\x80" and start[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}:
        return "this is a pickle with another name, not safetensors; pickles can run code and are never read"
    if start.startswith(b"\x89HDF"):
        return "this is an HDF5 file, not safetensors"
    if start.startswith(b"\x1f\x8b"):
        return "this is a gzip file, not safetensors"
    if len(start) < 9:
        return f"the file has {size} bytes and is too short for safetensors"
    length = int.from_bytes(start[:8], "little")
    if start[8:] == b"{":
        return f"the header claims {length} bytes, of which {size - 8} follow"
    return "this is not safetensors: no JSON header follows the first eight bytes"


def _check_metadata(metadata: object) -> None:
    """Accept the free text that other writers add; it is dropped, but it must be what the format says."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("header: __metadata__ must map text to text")


def _entry(name: str, claim: object, limits: Limits) -> Entry:
    if len(name) > limits.name or not NAME.fullmatch(name):
        raise CheckpointError(f"header: {show(name)} is not the name of a tensor")
    if not isinstance(claim, dict) or claim.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"header: {show(name)} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{show(name)} has dtype {show(dtype)}, which is not read")
    if not isinstance(shape, list) or len(shape) > limits.rank or not all(type(n) is int and n >= 1 for n in shape):
        # Also refuses empty tensors: [0, 10**18] costs no bytes and nobody's code expects it.
        raise CheckpointError(f"{show(name)} has shape {show(shape)}; at most {limits.rank} positive numbers are read")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise CheckpointError(f"{show(name)} has data_offsets {show(offsets)}, expected [begin, end]")
    start, stop = offsets
    needed = math.prod(shape) * DTYPE_BYTES[dtype]  # Python integers do not overflow
    if stop - start != needed:
        raise CheckpointError(
            f"{show(name)} of shape {show(shape)} and dtype {dtype} needs {needed} bytes, but claims {stop - start}"
        )
    return Entry(dtype, tuple(shape), start, stop)


def _check_cover(entries: Mapping[str, Entry], size: int) -> None:
    """Refuse tensors that overlap, bytes that belong to none, and tensors that lie outside the file."""
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != expected:
            kind = "overlaps another tensor" if entry.start < expected else "leaves bytes before it that belong to none"
            raise CheckpointError(f"{show(name)} {kind}: it begins at {entry.start}, expected {expected}")
        expected = entry.stop
    if expected != size:
        kind = "the file is cut short" if expected > size else "bytes follow the last tensor"
        raise CheckpointError(f"{kind}: the header describes {expected} bytes, the file has {size}")
