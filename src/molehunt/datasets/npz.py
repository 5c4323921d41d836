"""Pictures and labels of one's own in one `.npz` file, read without pickle and by its headers first."""

import hashlib
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molehunt.datasets.decode import Arrays, readable
from molehunt.datasets.folder import MOST_BYTES, Folder

KEYS = frozenset({"x", "y", "classes"})
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
WANTED = "expected arrays x (pictures), y (classes from 0) and, if you like, classes (names)"


def read_npz(path: Path) -> Folder:
    """Read pictures that `numpy.savez` wrote.

    Args:
        path: a file with arrays `x`: uint8 in 0..255 or floats in [0, 1], of shape (N, H, W), (N, H, W, C) or
            (N, C, H, W) with one or three channels; `y`: integers (N,), classes from 0; and perhaps `classes`: text
            (K,), their names. Without names K is the largest class plus one. Floats are rounded to 8 bits.

    Returns:
        The pictures as a folder has them; equal pictures have the same group.

    Raises:
        ValueError: no such file, other arrays, objects that would need pickle, shapes or values that are not these, a
            class without a picture, or more than `MOST_BYTES` bytes.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}")
    arrays = _arrays(path)
    if not {"x", "y"} <= arrays.keys() <= KEYS:
        raise ValueError(f"{path} has {', '.join(sorted(arrays)) or 'no arrays'}; {WANTED}")
    x = _pictures(arrays["x"], path)
    y = arrays["y"]
    if y.dtype.kind not in "iu" or y.shape != (len(x),):
        raise ValueError(f"{path}: y must be {len(x)} whole numbers, got {y.dtype} {y.shape}")
    if not len(y) or int(y.min()) < 0:
        raise ValueError(f"{path}: y must be classes from 0, got {'none' if not len(y) else int(y.min())}")
    names = _names(arrays.get("classes"), int(y.max()) + 1, path)
    counts = np.bincount(y.astype(np.int64), minlength=len(names))
    if len(names) < 2 or not counts.all():
        lacking = int(counts.argmin())
        raise ValueError(
            f"{path}: class {lacking} ({names[lacking]!r}) has no picture; at least two classes, each with one"
        )
    group = [int.from_bytes(hashlib.sha256(picture.tobytes()).digest()[:8], "big") >> 1 for picture in x]
    return Folder(classes=names, arrays=Arrays(x, y.astype(np.int64), np.asarray(group, np.int64)))


def _arrays(path: Path) -> Mapping[str, NDArray[Any]]:
    """The arrays of a file, whose sizes are compared with their headers before anything is allocated."""
    found = {}
    with readable(path), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as stream:
                try:
                    shape, _, dtype = HEADERS[np.lib.format.read_magic(stream)](stream)
                except (ValueError, KeyError) as error:
                    raise ValueError(f"{path}: {name!r} is no array of numpy: {error}") from None
                if dtype.hasobject:
                    raise ValueError(f"{path}: {name!r} holds Python objects, which only pickle could read; {WANTED}")
                size = math.prod(shape) * dtype.itemsize
                if size > 8 * MOST_BYTES or not 0 <= member.file_size - size <= 2**16:
                    raise ValueError(f"{path}: {name!r} claims {size} bytes, which it does not have or is too much")
            with archive.open(member) as stream:
                found[name] = np.lib.format.read_array(stream, allow_pickle=False)
    return found


def _pictures(x: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    """Pictures as uint8 (N, C, H, W)."""
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4:
        raise ValueError(f"{path}: x must be (N, H, W), (N, H, W, C) or (N, C, H, W), got {x.shape}")
    first, last = x.shape[1] in {1, 3}, x.shape[3] in {1, 3}
    if first == last:
        why = "both could be the channels" if first else "neither is 1 or 3"
        raise ValueError(f"{path}: cannot tell the channels of x {x.shape} from its sides: {why}")
    x = x if first else x.transpose(0, 3, 1, 2)
    if x.size > MOST_BYTES:
        raise ValueError(f"{path}: pictures {x.shape} take more than {MOST_BYTES} bytes; hand over fewer")
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x)
    if x.dtype.kind != "f":
        raise ValueError(f"{path}: x must be uint8 in 0..255 or floats in [0, 1], got {x.dtype}")
    low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
    if not (low >= 0.0 and high <= 1.0):  # asked so that a NaN is refused
        raise ValueError(f"{path}: floats in x must lie in [0, 1], before any normalization, got [{low:g}, {high:g}]")
    return np.ascontiguousarray(np.rint(x.astype(np.float64) * 255).astype(np.uint8))


def _names(given: NDArray[Any] | None, count: int, path: Path) -> tuple[str, ...]:
    if given is None:
        return tuple(str(k) for k in range(count))
    if given.dtype.kind != "U" or given.ndim != 1 or len(given) < count:
        raise ValueError(f"{path}: classes must be {count} or more texts (K,), got {given.dtype} {given.shape}")
    return tuple(str(name) for name in given)
