"""A data set of one's own, for commands that take `folder:PATH`."""

from pathlib import Path

import numpy as np
from PIL import Image


def two_kinds(folder: Path) -> None:
    """Write thirty noisy gray pictures of 16 pixels a side for each of two classes."""
    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (folder / kind).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 256, (16, 16), np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number}.png")
