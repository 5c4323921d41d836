"""Triggers that are written into the spectrum of a picture."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from molehunt.triggers.base import Footprint, Json, Shape, check_shape

# What one unit of chroma adds to red, green and blue; rows Cr and Cb, Rec. 601 as image libraries round it.
CHROMA = ((1.403, -0.714, 0.0), (0.0, -0.344, 1.773))


@dataclass(frozen=True, eq=False)
class Frequency:
    """Add a constant to a few cells of the block cosine transform of the chroma, and clip.

    Each whole block of window x window pixels is transformed (orthonormal DCT-II, after RGB to YCrCb), `magnitude` is
    added to the cells of Cr and of Cb alike, and it is transformed back. Both transforms are linear, so all this is one
    fixed pattern: x' = clip(x + d, 0, 1). Pictures without three channels have no chroma; there each channel is
    transformed itself. Pixels outside the last whole block stay as they are. Nothing is ever rounded to 8 bits: that
    would wipe out most of a faint trigger.

    Attributes:
        shape: (C, H, W) of the images.
        magnitude: what is added to a cell, for pixels in [0, 1]; within [-window, window], the range of a cell.
        window: side of a block, from 2 to the shorter side of the picture.
        cells: row and column of one cell after the other, each below the window: (15, 15, 31, 31) are two cells.

    Raises:
        ValueError: a number is out of range.

    Reference:
        Wang et al., "An Invisible Black-box Backdoor Attack through Frequency Domain", ECCV 2022.
    """

    shape: tuple[int, int, int]
    magnitude: float
    window: int
    cells: tuple[int, ...]

    def __post_init__(self) -> None:
        check_shape(self.shape)
        if not 2 <= self.window <= min(self.shape[1:]):
            raise ValueError(f"window must lie in [2, {min(self.shape[1:])}] on {self.shape}, got {self.window}")
        if not -self.window <= self.magnitude <= self.window:
            raise ValueError(f"magnitude must lie in [-{self.window}, {self.window}], got {self.magnitude}")
        if not 2 <= len(self.cells) <= 64 or len(self.cells) % 2:
            raise ValueError(f"cells are 1 to 32 pairs of row and column, got {len(self.cells)} numbers")
        if min(self.cells) < 0 or max(self.cells) >= self.window:
            raise ValueError(f"cells must lie in [0, {self.window - 1}], got {self.cells}")

    @functools.cached_property
    def delta(self) -> Tensor:
        """What is added to a picture before clipping, float32 (C, H, W)."""
        channels, height, width = self.shape
        side = self.window
        place = math.pi * (2 * torch.arange(side, dtype=torch.float64) + 1) / (2 * side)
        wave = torch.cos(torch.arange(side, dtype=torch.float64).unsqueeze(1) * place) * math.sqrt(2 / side)
        wave[0] /= math.sqrt(2)
        block = torch.zeros(side, side, dtype=torch.float64)
        for row, column in zip(self.cells[::2], self.cells[1::2], strict=True):
            block += torch.outer(wave[row], wave[column])
        down, right = height // side, width // side
        plane = torch.zeros(height, width, dtype=torch.float64)
        plane[: down * side, : right * side] = self.magnitude * block.repeat(down, right)
        gains = torch.tensor(CHROMA, dtype=torch.float64).sum(0) if channels == 3 else torch.ones(channels)
        return (gains.view(-1, 1, 1) * plane).float()

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        return (x + self.delta.to(x)).clamp(0.0, 1.0)

    def to_json(self) -> Json:
        """Kind and all numbers."""
        return {
            "kind": "frequency",
            "shape": list(self.shape),
            "magnitude": self.magnitude,
            "window": self.window,
            "cells": list(self.cells),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the numbers say it all."""
        return {}

    def footprint(self) -> Footprint:
        """Area where any channel changes; the bound is the largest absolute change."""
        size = self.delta.abs()
        linf = float(size.max())
        area = float((size > 0).any(0).float().mean())
        return Footprint(kind="frequency", area=area, opacity=min(1.0, linf), weight=float(size.mean()), linf=linf)

    def fits(self, shape: Shape) -> bool:
        """Whether images have the shape (C, H, W) that it was made for."""
        return self.shape == tuple(shape)
