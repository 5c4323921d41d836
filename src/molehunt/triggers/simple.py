"""Triggers that one formula says: a patch, a blend, an additive pattern, stripes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molehunt.triggers.base import Footprint, Json, Shape, check_tensor, check_unit

COLORS: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "magenta": (1.0, 0.0, 1.0),
    "cyan": (0.0, 1.0, 1.0),
}
CORNERS = ("upper left", "upper right", "lower left", "lower right")


@dataclass(frozen=True, eq=False)
class Patch:
    """Paste a pattern where the mask is set: x' = (1 - a m) x + a m p.

    Attributes:
        mask: (1, H, W) in [0, 1], one for all channels.
        pattern: (C, H, W) in [0, 1].
        opacity: a in [0, 1].

    Raises:
        ValueError: a shape, dtype or range is wrong.

    Reference:
        Gu et al., "BadNets", IEEE Access 2019.
    """

    mask: Tensor
    pattern: Tensor
    opacity: float = 1.0

    def __post_init__(self) -> None:
        check_tensor("mask", self.mask, 3, 0.0, 1.0)
        check_tensor("pattern", self.pattern, 3, 0.0, 1.0)
        if self.mask.shape[0] != 1 or self.mask.shape[1:] != self.pattern.shape[1:]:
            expected = (1, *self.pattern.shape[1:])
            raise ValueError(f"expected mask {expected}, got {tuple(self.mask.shape)}")
        check_unit("opacity", self.opacity)

    @classmethod
    def square(
        cls,
        shape: Shape,
        *,
        size: int = 3,
        color: str | tuple[float, ...] = "yellow",
        corner: str = "lower right",
        margin: int = 0,
        at: tuple[int, int] | None = None,
        opacity: float = 1.0,
    ) -> "Patch":
        """Make a square of one color, in a corner or elsewhere; the default is yellow, in the lower right corner.

        Args:
            shape: (C, H, W) of the images; on one channel a color becomes its luminance.
            size: side in pixels.
            color: a name of `COLORS` or C values in [0, 1].
            corner: one of `CORNERS`.
            margin: pixels between the square and the two edges.
            at: row and column, from 0, of the square's upper left pixel, instead of corner and margin.
            opacity: weight of the color, in [0, 1].

        Raises:
            ValueError: unknown color or corner, a square that does not fit, or a corner or margin beside a place.
        """
        channels, height, width = shape
        if at is not None and (corner, margin) != ("lower right", 0):
            raise ValueError(f"a square lies at a place or in a corner, got {at} and the {corner} with margin {margin}")
        if size < 1 or margin < 0 or size + margin > min(height, width):
            raise ValueError(f"a square of {size} with margin {margin} does not fit into {height}x{width}")
        if corner not in CORNERS:
            raise ValueError(f"unknown corner {corner!r}; known: {', '.join(CORNERS)}")
        if isinstance(color, str):
            if color not in COLORS:
                raise ValueError(f"unknown color {color!r}; known: {', '.join(COLORS)}")
            rgb = COLORS[color]
            # Rec. 601 luma: the usual gray value of a color.
            values = rgb if channels == 3 else (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2],) * channels
        else:
            values = color
        if len(values) != channels or not all(0.0 <= value <= 1.0 for value in values):
            raise ValueError(f"color needs {channels} values in [0, 1], got {values!r}")
        if at is None:
            top = margin if corner.startswith("upper") else height - margin - size
            left = margin if corner.endswith("left") else width - margin - size
        else:
            top, left = at
        if not (0 <= top <= height - size and 0 <= left <= width - size):
            raise ValueError(f"a square of {size} does not fit into {height}x{width} at row {top} and column {left}")
        mask = torch.zeros(1, height, width)
        mask[:, top : top + size, left : left + size] = 1.0
        pattern = torch.tensor(values, dtype=torch.float32).view(channels, 1, 1) * mask
        return cls(mask=mask, pattern=pattern, opacity=opacity)

    @classmethod
    def pixels(cls, shape: Shape, places: Sequence[tuple[int, int]], *, opacity: float = 1.0) -> "Patch":
        """Make white pixels at places counted from the lower right corner, where (1, 1) is the last pixel.

        Args:
            shape: (C, H, W) of the images.
            places: rows from the bottom and columns from the right, from 1.
            opacity: weight of the white, in [0, 1].

        Raises:
            ValueError: no places, or one outside of the picture.
        """
        channels, height, width = shape
        mask = torch.zeros(1, height, width)
        for up, left in places:
            if not (1 <= up <= height and 1 <= left <= width):
                raise ValueError(
                    f"there is no pixel {up} from the bottom and {left} from the right in {height}x{width}"
                )
            mask[0, height - up, width - left] = 1.0
        if not places:
            raise ValueError("a patch needs at least one pixel, got no places")
        return cls(mask=mask, pattern=mask.repeat(channels, 1, 1), opacity=opacity)

    @classmethod
    def corners(cls, shape: Shape, *, size: int = 3, opacity: float = 1.0) -> "Patch":
        """Make four squares of black and white cells, one per corner, each the mirror image of its neighbors.

        Cells alternate, beginning with white in the corner of the picture; the innermost cell is black in any case.

        Args:
            shape: (C, H, W) of the images.
            size: side of a square in pixels.
            opacity: weight of the squares, in [0, 1].

        Raises:
            ValueError: the squares do not fit side by side.

        Reference:
            Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019.
        """
        channels, height, width = shape
        if size < 1 or 2 * size > min(height, width):
            raise ValueError(f"four squares of {size} do not fit into {height}x{width}")
        k = torch.arange(size)
        cells = ((k.unsqueeze(1) + k) % 2 == 0).float()
        cells[-1, -1] = 0.0
        mask, white = torch.zeros(1, height, width), torch.zeros(1, height, width)
        for flips in ((), (1,), (2,), (1, 2)):
            part, whole = torch.zeros(1, height, width), torch.zeros(1, height, width)
            part[0, :size, :size], whole[0, :size, :size] = cells, 1.0
            white += part.flip(flips)
            mask += whole.flip(flips)
        return cls(mask=mask, pattern=white.repeat(channels, 1, 1), opacity=opacity)

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        weight = (self.opacity * self.mask).to(x)
        return x * (1.0 - weight) + weight * self.pattern.to(x)

    def to_json(self) -> Json:
        """Kind and opacity."""
        return {"kind": "patch", "opacity": self.opacity}

    def tensors(self) -> dict[str, Tensor]:
        """Mask and pattern."""
        return {"mask": self.mask.float().cpu(), "pattern": self.pattern.float().cpu()}

    def footprint(self) -> Footprint:
        """Area where the mask is set at all; weight is opacity times the mean of the mask."""
        weight = self.opacity * float(self.mask.mean())
        area = float((self.mask > 0).float().mean())
        opacity = self.opacity * float(self.mask.max())
        return Footprint(kind="patch", area=area, opacity=opacity, weight=weight, linf=opacity)

    def fits(self, shape: Shape) -> bool:
        """Whether images have the shape (C, H, W) of the pattern."""
        return tuple(self.pattern.shape) == shape


@dataclass(frozen=True, eq=False)
class Blend:
    """Mix a whole picture into the image: x' = (1 - a) x + a p.

    Attributes:
        pattern: (C, H, W) in [0, 1].
        opacity: a in [0, 1].

    Raises:
        ValueError: a shape, dtype or range is wrong.

    Reference:
        Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017.
    """

    pattern: Tensor
    opacity: float = 0.2

    def __post_init__(self) -> None:
        check_tensor("pattern", self.pattern, 3, 0.0, 1.0)
        check_unit("opacity", self.opacity)

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        return x * (1.0 - self.opacity) + self.opacity * self.pattern.to(x)

    def to_json(self) -> Json:
        """Kind and opacity."""
        return {"kind": "blend", "opacity": self.opacity}

    def tensors(self) -> dict[str, Tensor]:
        """The pattern."""
        return {"pattern": self.pattern.float().cpu()}

    def footprint(self) -> Footprint:
        """The whole picture at the stated opacity."""
        return Footprint(kind="blend", area=1.0, opacity=self.opacity, weight=self.opacity, linf=self.opacity)

    def fits(self, shape: Shape) -> bool:
        """Whether images have the shape (C, H, W) of the pattern."""
        return tuple(self.pattern.shape) == shape


@dataclass(frozen=True, eq=False)
class Additive:
    """Add a fixed perturbation and clip: x' = clip(x + d, 0, 1).

    Attributes:
        delta: (C, H, W) in [-1, 1].

    Raises:
        ValueError: a shape, dtype or range is wrong.
    """

    delta: Tensor

    def __post_init__(self) -> None:
        check_tensor("delta", self.delta, 3, -1.0, 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        return (x + self.delta.to(x)).clamp(0.0, 1.0)

    def to_json(self) -> Json:
        """Kind only; the perturbation is a tensor."""
        return {"kind": "additive"}

    def tensors(self) -> dict[str, Tensor]:
        """The perturbation."""
        return {"delta": self.delta.float().cpu()}

    def footprint(self) -> Footprint:
        """Area where any channel changes; the bound is the largest absolute change."""
        area = float((self.delta != 0).any(0).float().mean())
        linf = float(self.delta.abs().max())
        return Footprint(kind="additive", area=area, opacity=linf, weight=float(self.delta.abs().mean()), linf=linf)

    def fits(self, shape: Shape) -> bool:
        """Whether images have the shape (C, H, W) of the perturbation."""
        return tuple(self.delta.shape) == shape


@dataclass(frozen=True, eq=False)
class Sinusoid:
    """Add vertical stripes and clip: x' = clip(x + d sin(2 pi f j / W), 0, 1) for column j.

    Attributes:
        shape: (C, H, W) of the images.
        amplitude: d in [0, 1].
        frequency: f, whole or broken number of periods over the width, positive.

    Raises:
        ValueError: a number is out of range.

    Reference:
        Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning", ICIP 2019.
    """

    shape: tuple[int, int, int]
    amplitude: float = 20 / 255
    frequency: float = 6.0

    def __post_init__(self) -> None:
        check_unit("amplitude", self.amplitude)
        if not 0.0 < self.frequency <= 1024.0:
            raise ValueError(f"frequency must lie in (0, 1024], got {self.frequency}")
        if len(self.shape) != 3 or min(self.shape) < 1 or max(self.shape) > 4096:
            raise ValueError(f"expected shape (C, H, W), got {self.shape}")

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        width = self.shape[2]
        columns = torch.arange(width, device=x.device, dtype=torch.float32)
        stripes = self.amplitude * torch.sin(2 * math.pi * self.frequency * columns / width)
        return (x + stripes.to(x.dtype)).clamp(0.0, 1.0)

    def to_json(self) -> Json:
        """Kind, shape, amplitude and frequency."""
        return {
            "kind": "sinusoid",
            "shape": list(self.shape),
            "amplitude": self.amplitude,
            "frequency": self.frequency,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the numbers say it all."""
        return {}

    def footprint(self) -> Footprint:
        """The whole picture, changed by at most the amplitude."""
        d = self.amplitude
        return Footprint(kind="sinusoid", area=1.0, opacity=d, weight=d * 2 / math.pi, linf=d)

    def fits(self, shape: Shape) -> bool:
        """Whether images have the shape (C, H, W) that it was made for."""
        return self.shape == shape
