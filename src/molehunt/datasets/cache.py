"""The cache of decoded data sets: one memory-mappable file per part, written at once or not at all, with its sum."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import platformdirs
import safetensors
import safetensors.numpy

from molehunt.datasets.decode import Arrays


class DataError(RuntimeError):
    """A data set could not be had, or what was found is not it."""


class ChecksumError(DataError):
    """Data with another SHA-256 than it must have.

    Attributes:
        expected, found: the two sums, 64 hexadecimal digits each.
    """

    def __init__(self, what: str, expected: str, found: str, advice: str) -> None:
        super().__init__(f"{what}: expected SHA-256 {expected}, got {found}; {advice}")
        self.expected = expected
        self.found = found


def root() -> Path:
    """Return the cache folder: `MOLEHUNT_CACHE`, else the user's cache folder. It need not exist."""
    named = os.environ.get("MOLEHUNT_CACHE")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("molehunt")


def path(name: str, part: str) -> Path:
    """Return where a part of a data set lies, or would lie."""
    return root() / name / f"{part}.safetensors"


def sha256(arrays: Arrays) -> str:
    """Return the SHA-256, in hexadecimal, over dtype, shape and bytes of x, y and (where there is one) group."""
    digest = hashlib.sha256()
    for array in arrays:
        if array is not None:
            # Little-endian by definition, so that the sum does not depend on the machine.
            plain = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
            digest.update(f"{array.dtype.name} {array.shape}\n".encode())
            digest.update(plain.data)
    return digest.hexdigest()


def write(name: str, part: str, arrays: Arrays) -> Path:
    """Put a part into the cache: a temporary file, flushed to disk, then renamed, so never half a file."""
    tensors = {key: np.ascontiguousarray(array) for key, array in arrays._asdict().items() if array is not None}
    target = path(name, part)
    _replace(target, safetensors.numpy.save(tensors))
    return target


def read(name: str, part: str) -> Arrays | None:
    """Return a cached part as maps of its file, or None when it is not there. Do not write to the arrays.

    Raises:
        DataError: the file is there but is not a cache file.
    """
    at = path(name, part)
    if not at.exists():
        return None
    try:
        # As torch tensors these are maps of the file, as NumPy arrays they would be copies.
        with safetensors.safe_open(at, framework="pt") as file:
            tensors = {key: file.get_tensor(key).numpy() for key in file.keys()}  # noqa: SIM118 - it is no mapping
        arrays = Arrays(tensors["x"], tensors["y"], tensors.get("group"))
    except (safetensors.SafetensorError, KeyError, OSError) as error:
        raise DataError(f"{at} is damaged ({error}); run: molehunt data fetch {name}") from error
    return arrays


def recorded(name: str) -> dict[str, str]:
    """Return the sums that were written down at the first use of a data set, by part; empty before that."""
    at = root() / name / "sums.json"
    if not at.exists():
        return {}
    sums = json.loads(at.read_text())
    if not isinstance(sums, dict):
        raise DataError(f"{at}: expected an object of sums, got {type(sums).__name__}; delete it to record anew")
    return {str(part): str(value) for part, value in sums.items()}


def record(name: str, sums: dict[str, str]) -> None:
    """Write down the sums of a data set for which none is pinned."""
    _replace(root() / name / "sums.json", json.dumps(sums, indent=1, sort_keys=True).encode())


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Let one process at a time fetch a data set; the others wait and then find it in the cache.

    Raises:
        DataError: the cache folder cannot be made or written to.
    """
    try:
        root().mkdir(parents=True, exist_ok=True)
        file = (root() / f"{name}.lock").open("wb")
    except OSError as error:
        raise DataError(f"cannot write to the cache folder {root()}: {error}; set MOLEHUNT_CACHE to another") from error
    with file:
        try:
            import fcntl
        except ImportError:  # Windows: two processes then do the same work twice, and the last rename wins
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp lets only the owner read; the data are public, and a class may share one cache.
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
