"""Triggers that take color depth away."""

from dataclasses import dataclass

import torch
from torch import Tensor

from molehunt.triggers.base import Footprint, Json, Shape, check_shape


@dataclass(frozen=True, eq=False)
class Quantize:
    """Round every value to one of a few levels: x' = round(x (L - 1)) / (L - 1), per channel.

    Attributes:
        shape: (C, H, W) of the images.
        levels: L, from 2 to 256.
        dither: spread the rounding error of a pixel over its neighbors to the right and below (Floyd and Steinberg:
            7, 3, 5 and 1 sixteenths), so that areas keep their mean.

    Raises:
        ValueError: a number is out of range.

    Reference:
        Wang, Zhai, Ma, "BppAttack", CVPR 2022. Floyd, Steinberg, "An Adaptive Algorithm for Spatial Greyscale", 1976.
    """

    shape: tuple[int, int, int]
    levels: int = 8
    dither: bool = False

    def __post_init__(self) -> None:
        check_shape(self.shape)
        if not 2 <= self.levels <= 256:
            raise ValueError(f"levels must lie in [2, 256], got {self.levels}")

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        if self.dither:
            return self._dithered(x)
        steps = self.levels - 1
        return (x * steps).round().div(steps)

    def _dithered(self, x: Tensor) -> Tensor:
        """Diffuse errors on all images at once, pixel after pixel along slanted lines.

        A pixel needs its left neighbor and the three above it, so pixel (i, j) can be done at time j + 2 i, and all
        pixels of one time at once: W + 2 H steps instead of H W.
        """
        count, channels, height, width = x.shape
        steps = self.levels - 1
        # (rows + 1, columns + 2, N C): the border takes the errors that leave the picture.
        work = torch.zeros(height + 1, width + 2, count * channels, device=x.device, dtype=torch.float32)
        work[:height, 1:-1] = x.float().permute(2, 3, 0, 1).reshape(height, width, -1)
        flat, line = work.flatten(0, 1), width + 2
        for time in range(width + 2 * (height - 1)):
            first, last = max(0, (time - width + 2) // 2), min(height - 1, time // 2)
            i = torch.arange(first, last + 1, device=x.device)
            place = i * line + (time - 2 * i) + 1
            old = flat[place]
            new = (old * steps).round().clamp(0, steps).div(steps)
            flat[place] = new
            error = old - new
            for shift, weight in ((1, 7 / 16), (line - 1, 3 / 16), (line, 5 / 16), (line + 1, 1 / 16)):
                flat[place + shift] += weight * error  # no two of them are equal within one step
        made = work[:height, 1:-1].reshape(height, width, count, channels).permute(2, 3, 0, 1)
        return made.contiguous().to(x.dtype)

    def to_json(self) -> Json:
        """Kind and all settings."""
        return {"kind": "quantize", "shape": list(self.shape), "levels": self.levels, "dither": self.dither}

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the numbers say it all."""
        return {}

    def footprint(self) -> Footprint:
        """The whole picture, changed by at most half a step between levels, with dithering by a whole one.

        A pixel is moved by its own rounding error, at most half a step, and by the errors that it is handed: their
        weights sum to one, so they sum to no more than half a step.
        """
        step = 1 / (self.levels - 1)
        linf = step if self.dither else step / 2
        # Rounding errors are about uniform, so their mean size is half of the largest; with dithering near enough.
        return Footprint(kind="quantize", area=1.0, opacity=linf, weight=linf / 2, linf=linf)

    def fits(self, shape: Shape) -> bool:
        """Whether images have the shape (C, H, W) that it was made for."""
        return self.shape == tuple(shape)
