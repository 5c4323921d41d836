"""What a round is played on: a named classification problem, its public splits and its secret ones."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molehunt import datasets

Split: TypeAlias = Literal["train", "validation", "test"]
Augment: TypeAlias = Literal["none", "crop", "flip_crop"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DEFENDER = 1_000
"""Images that the defender gets; half of the test split where that has fewer than twice as many."""
VALIDATION = 5_000
"""Images that the validation split takes out of the training part of a set with a test part of its own."""


class Images(NamedTuple):
    """Labeled pictures.

    Attributes:
        x: float32 (N, C, H, W) in [0, 1].
        y: int64 (N,), classes from 0.
    """

    x: Tensor
    y: Tensor


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification problem that models are trained for and judged on.

    Attributes:
        name: the name it goes by, as `get_task` takes it.
        shape: (C, H, W) of a picture.
        classes: a readable name per class, in the order of the labels.
        augment: what training may do to a picture without changing its class: nothing, shift it, shift and mirror it.
        network: name of the network that is used when none is named.
        mean, std: per channel, in [0, 1], over the official training part; the first layer of a network normalizes
            with them.
    """

    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    augment: Augment
    network: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.classes)

    def load(self, split: Split) -> Images:
        """Return a public split, read at the first call and then kept for the life of the process.

        The splits are disjoint by index and the same everywhere. "test" is the official test part; "validation" is
        cut out of the official training part, class by class in proportion. Every caller gets the same tensors, so
        do not write to them.

        Raises:
            ValueError: unknown split.
            DataError: the data could not be had, or is not what it must be.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        return _load(self.name, split)

    def secret(self, seed: int) -> tuple[Images, Images]:
        """Return the defender's clean images and the referee's hidden ones.

        Both are drawn from the test split by the game's secret seed, disjoint by index, class by class in proportion.
        Together they are the whole test split. The order of the images is drawn too.

        Args:
            seed: the secret split seed of a game, from -2**63 to 2**64 - 1.

        Returns:
            The defender's `DEFENDER` images (half of the test split when that has fewer than twice as many), and all
            others.
        """
        test = self.load("test")
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(test.y), generator=rng).numpy()
        y = test.y.numpy()
        defender = _take(y, order, min(DEFENDER, len(y) // 2))
        # A second permutation: else the hidden images would begin with the classes whose share was used up first.
        again = torch.randperm(len(test.y), generator=rng).numpy()
        drawn = np.isin(again, defender)
        return _rows(test, again[drawn]), _rows(test, again[~drawn])


# Means and standard deviations are over the official training part (mnist5k: its training split), except gtsrb's, which
# are in general use; its data could not be had when this was written. They only set the scale of a network's input.
_KNOWN: tuple[tuple[str, Augment, str, tuple[float, ...], tuple[float, ...]], ...] = (
    ("mnist5k", "crop", "badnets_cnn", (0.1314,), (0.3086,)),
    ("mnist", "crop", "badnets_cnn", (0.1307,), (0.3081,)),
    ("fashion_mnist", "flip_crop", "badnets_cnn", (0.2860,), (0.3530,)),
    ("cifar10", "flip_crop", "fast_cifar", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ("gtsrb", "crop", "fast_cifar", (0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
)

TASKS: dict[str, Task] = {
    name: Task(
        name=name,
        shape=datasets.DATASETS[name].shape,
        classes=datasets.DATASETS[name].classes,
        augment=augment,
        network=network,
        mean=mean,
        std=std,
    )
    for name, augment, network, mean, std in _KNOWN
}


def get_task(name: str) -> Task:
    """Return the task of that name.

    Args:
        name: a key of `TASKS`, or "folder:PATH" for a folder with one folder of pictures per class, or
            "folder:PATH?size=HEIGHTxWIDTH" to have its pictures resized, or "npz:PATH" for a file of arrays
            (`datasets.read_npz`). Both are read here, once per process; of each class about a fifth becomes the test
            split and a tenth the validation split, by the SHA-256 of the pictures.

    Raises:
        ValueError: unknown name, or a folder or file that is none such.
    """
    if name in TASKS:
        return TASKS[name]
    if name.startswith("npz:"):
        return _npz_task(Path(name.removeprefix("npz:")).expanduser().resolve())
    if name.startswith("folder:"):
        path, size = _folder_name(name)
        return _folder_task(path.resolve(), size)
    raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}, folder:PATH, npz:PATH")


def _folder_name(name: str) -> tuple[Path, tuple[int, int] | None]:
    text, question, size = name.removeprefix("folder:").partition("?size=")
    if not question:
        return Path(text).expanduser(), None
    height, _, width = size.partition("x")
    if not (height.isdecimal() and width.isdecimal() and 1 <= int(height) <= 1024 and 1 <= int(width) <= 1024):
        raise ValueError(f"expected folder:PATH?size=HEIGHTxWIDTH with sides from 1 to 1024, got {name!r}")
    return Path(text).expanduser(), (int(height), int(width))


@functools.cache
def _folder_task(path: Path, size: tuple[int, int] | None) -> Task:
    # The absolute path, so that a process with another working folder finds the same pictures.
    name = f"folder:{path}" + (f"?size={size[0]}x{size[1]}" if size else "")
    read = _folder(path, size)
    for split, rows in _public(name).items():
        counts = np.bincount(read.arrays.y[rows], minlength=len(read.classes))
        if not counts.all():
            lacking = read.classes[int(counts.argmin())]
            raise ValueError(f"{path}: class {lacking!r} has too few different pictures, none is left for {split}")
    return _own_task(name, read, read.arrays.x[_public(name)["train"]], path)


@functools.cache
def _npz_task(path: Path) -> Task:
    read = _npz(path)
    # Over all pictures: they may be few, and no split of them has to have every class.
    return _own_task(f"npz:{path}", read, read.arrays.x, path)


def _own_task(name: str, read: datasets.Folder, x: NDArray[np.uint8], path: Path) -> Task:
    """A task of the user's own pictures, whose mean and deviation are those of x."""
    levels = np.stack([np.bincount(x[:, c].ravel(), minlength=256) for c in range(x.shape[1])]) / x[:, 0].size
    scale = np.arange(256) / 255
    mean = levels @ scale
    std = np.sqrt(np.maximum(levels @ scale**2 - mean**2, 0))
    if std.min() < 1e-4:
        raise ValueError(f"{path}: every training picture is the same flat color in channel {int(std.argmin())}")
    return Task(
        name=name,
        shape=(x.shape[1], x.shape[2], x.shape[3]),
        classes=read.classes,
        augment="crop",
        network="resnet18",
        mean=tuple(round(float(m), 4) for m in mean),
        std=tuple(round(float(s), 4) for s in std),
    )


@functools.cache
def _folder(path: Path, size: tuple[int, int] | None) -> datasets.Folder:
    return datasets.read_folder(path, size=size)


@functools.cache
def _npz(path: Path) -> datasets.Folder:
    return datasets.read_npz(path)


def _is_own(name: str) -> bool:
    """Whether the pictures are the user's, and cut into splits as one part."""
    return name.startswith(("folder:", "npz:"))


def _part(name: str, split: Split) -> datasets.Arrays:
    """Return the part of the data from which a split is cut; reads no other part."""
    if name.startswith("npz:"):
        return _npz(Path(name.removeprefix("npz:"))).arrays
    if name.startswith("folder:"):
        return _folder(*_folder_name(name)).arrays
    parts = datasets.DATASETS[name].rows
    if "test" in parts and split == "test":
        return datasets.load(name, "test")
    return datasets.load(name, "train" if "train" in parts else "all")


@functools.cache
def _public(name: str) -> dict[str, NDArray[np.int64]]:
    """Return the rows of the splits that are cut out of one part: training, validation and, where it has none, test."""
    arrays = _part(name, "train")
    count = len(arrays.y)
    own = _is_own(name)
    if not own and "test" in datasets.DATASETS[name].rows:
        sizes: tuple[int, ...] = (count - VALIDATION, VALIDATION)
    else:
        # Rounded up: a class of datasets.folder.FEWEST pictures then has at least one in each split.
        validation, test = -(-count // 10), -(-count // 5)
        sizes = (count - validation - test, validation, test)
    # A folder is cut by its files' content alone, so that it keeps its splits when it moves.
    rows = public_rows(arrays.y, sizes, name="folder" if own else name, group=arrays.group)
    return dict(zip(SPLITS, rows, strict=False))


@functools.cache
def _load(name: str, split: Split) -> Images:
    arrays = _part(name, split)
    # The official test part is the test split as it is; asking _public would read the training part.
    whole = split == "test" and not _is_own(name) and "test" in datasets.DATASETS[name].rows
    rows = np.arange(len(arrays.y)) if whole else _public(name)[split]
    # Indexing copies, so that nothing below writes to a cached, read-only map of a file.
    return Images(torch.from_numpy(arrays.x[rows]).to(torch.float32).div_(255), torch.from_numpy(arrays.y[rows]))


def public_rows(
    y: NDArray[np.int64], sizes: Sequence[int], *, name: str, group: NDArray[np.int64] | None = None
) -> list[NDArray[np.int64]]:
    """Cut the rows of a data set into splits by a fixed rule.

    Rows are put in the order of the SHA-256 of "NAME/ROW" ("NAME/GROUP" where rows have groups). Each split after
    the first takes rows from the front of each class, in proportion to the class; the first split takes what is left.
    Each split is then put in the order of the SHA-256 of "NAME/SPLIT/ROW", SPLIT counting from 0. The rule needs no
    random numbers, so it is the same in every version of every library.

    Args:
        y: int64 (N,), classes.
        sizes: number of rows for each split, with sum N.
        name: name of the data set, so that sets of equal size are cut differently.
        group: int64 (N,), rows of one group (which is all of one class) stay together, and a split may then be
            larger or smaller by part of a group per class.

    Returns:
        The row numbers of each split, disjoint, classes mixed.

    Raises:
        ValueError: the sizes do not sum to the number of rows.
    """
    if sum(sizes) != len(y):
        raise ValueError(f"expected sizes that sum to {len(y)} rows, got {tuple(sizes)}")
    unit = np.arange(len(y)) if group is None else group
    left = _by_hash(np.arange(len(y)), [f"{name}/{u}" for u in unit])
    splits: list[NDArray[np.int64]] = []
    for size in sizes[1:]:
        taken = _take(y, left, size, group)
        splits.append(taken)
        left = left[~np.isin(left, taken)]
    # The second order: else the rows left over would begin with those classes whose share was used up first.
    return [_by_hash(rows, [f"{name}/{k}/{row}" for row in rows]) for k, rows in enumerate([left, *splits])]


def _by_hash(rows: NDArray[np.int64], texts: Iterable[str]) -> NDArray[np.int64]:
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    return rows[np.asarray(sorted(range(len(rows)), key=lambda k: (digests[k], k)), np.int64)]


def _take(
    y: NDArray[np.int64], order: NDArray[np.int64], size: int, group: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Take `size` rows from the front of each class's part of `order`, in proportion; keeps the order."""
    classes = y[order]
    counts = np.bincount(classes)
    exact = counts * size / len(order)
    quota = np.floor(exact).astype(np.int64)
    # The largest remainders get what rounding down has left; ties go to the lower class.
    quota[np.argsort(quota - exact, kind="stable")[: size - quota.sum()]] += 1
    chosen = np.zeros(len(order), bool)
    for label, wanted in enumerate(quota):
        places = np.flatnonzero(classes == label)
        if group is not None and 0 < wanted < len(places):
            # Cut at the border of groups that is nearest.
            borders = np.flatnonzero(np.diff(group[order[places]], prepend=-1, append=-1))
            wanted = borders[np.argmin(np.abs(borders - wanted))]
        chosen[places[:wanted]] = True
    return order[chosen]


def _rows(images: Images, rows: NDArray[np.int64]) -> Images:
    index = torch.from_numpy(rows)
    return Images(images.x[index], images.y[index])
