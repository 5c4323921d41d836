"""A data set of one's own: a folder with one folder of pictures per class."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from molehunt.datasets.decode import Arrays, readable

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".gif", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "GIF", "TIFF")
GRAY = frozenset({"1", "L", "LA"})
COLOR = frozenset({"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
FEWEST = 10
"""Pictures that every class must have, so that each split gets at least one of them."""
MOST_BYTES = 1 << 30
"""Bytes of the decoded pictures; as float32 they take four times as much memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Folder:
    """Pictures read from a folder.

    Attributes:
        classes: names of the class folders, sorted by code point (the order that torchvision's ImageFolder uses).
        arrays: the pictures; files with the same bytes have the same group, so that copies stay in one split.
    """

    classes: tuple[str, ...]
    arrays: Arrays


def read_folder(path: Path, *, size: tuple[int, int] | None = None) -> Folder:
    """Read a folder of pictures, one folder per class; folders inside a class folder are read too.

    Pictures of another size are resized (bilinear, without regard to proportions). There is one channel when
    every picture is gray, else three; transparency is dropped. Names that begin with a dot and files that are no
    pictures by their suffix are passed over.

    Args:
        path: the folder.
        size: (H, W) of the result; None takes the commonest size, the larger one of several.

    Raises:
        ValueError: no such folder, fewer than two classes, a class with fewer than `FEWEST` pictures, a file that is
            no picture of 8 bits per channel, more than `MOST_BYTES` bytes, or folders named like splits.
    """
    if not path.is_dir():
        raise ValueError(f"no folder {path}")
    folders = sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    classes = tuple(folder.name for folder in folders)
    if len(classes) < 2:
        raise ValueError(f"{path}: expected a folder per class, at least two, got {list(classes)}")
    if {name.lower() for name in classes} <= {"train", "training", "val", "valid", "validation", "test", "testing"}:
        raise ValueError(
            f"{path}: {list(classes)} look like splits, not classes; name one of them, or put the classes here"
        )
    files = [(file, label) for label, folder in enumerate(folders) for file in _pictures(folder)]
    found = Counter(label for _, label in files)
    for label, name in enumerate(classes):
        if found[label] < FEWEST:
            raise ValueError(f"{path}: class {name!r} has {found[label]} pictures, at least {FEWEST} are needed")
    shapes = [_shape(file) for file, _ in files]
    gray = all(channels == 1 for channels, _, _ in shapes)
    if size is None:
        counted = Counter((height, width) for _, height, width in shapes)
        size = max(counted, key=lambda s: (counted[s], s[0] * s[1], s))
    height, width = size
    shape = (len(files), 1 if gray else 3, height, width)
    if np.prod(shape, dtype=object) > MOST_BYTES:
        raise ValueError(f"{path}: pictures {shape} take more than {MOST_BYTES} bytes; name a smaller size")
    x = np.empty(shape, np.uint8)
    group = np.empty(len(files), np.int64)
    for row, (file, _) in enumerate(files):
        x[row] = _pixels(file, gray=gray, size=size)
        # 63 bits, to stay within int64; two different files in one group would do no harm.
        group[row] = int.from_bytes(hashlib.sha256(file.read_bytes()).digest()[:8], "big") >> 1
    return Folder(classes=classes, arrays=Arrays(x, np.asarray([label for _, label in files], np.int64), group))


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _shape(file: Path) -> tuple[int, int, int]:
    with readable(file), Image.open(file, formats=FORMATS) as image:
        if image.mode not in GRAY | COLOR:
            raise ValueError(f"{file}: expected 8 bits per channel, got Pillow mode {image.mode!r}")
        return (1 if image.mode in GRAY else 3), image.height, image.width


def _pixels(file: Path, *, gray: bool, size: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with readable(file), Image.open(file, formats=FORMATS) as image:
        # A palette with transparency needs the detour, else Pillow warns and guesses.
        plain = image.convert("L") if gray else image.convert("RGBA" if image.mode == "P" else "RGB").convert("RGB")
    height, width = size
    if plain.size != (width, height):
        plain = plain.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(plain)
    return pixels[None] if gray else pixels.transpose(2, 0, 1)
