"""What every trigger is, and the checks that all kinds share."""

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Json = dict[str, Any]
Shape: TypeAlias = tuple[int, int, int]
"""(C, H, W) of a picture."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """How much of a picture a trigger may change: what the budget gate reads.

    Attributes:
        kind: the trigger's kind, a key of `TRIGGERS`.
        area: share of the pixels that can change, in [0, 1].
        opacity: largest weight of the foreign pattern in any pixel, in [0, 1].
        weight: mean over all pixels of that weight (opacity times mask), in [0, 1].
        linf: bound of the change of any value, in [0, 1]; 1 where only opacity bounds it.
        displacement: largest distance that a pixel moves, in pixels; 0 for all but warps.
        parts: footprints of the triggers of which a picture gets one; empty for all but several.
    """

    kind: str
    area: float
    opacity: float
    weight: float
    linf: float
    displacement: float = 0.0
    parts: tuple["Footprint", ...] = ()


@runtime_checkable
class Trigger(Protocol):
    """A function from images to images of the same shape and dtype, within [0, 1], that can be written down."""

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp float images (N, C, H, W) in [0, 1]."""
        ...

    def to_json(self) -> Json:
        """Kind and numbers; together with `tensors` enough to make the trigger again."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The arrays of the trigger by field name, float32 on the CPU."""
        ...

    def footprint(self) -> Footprint:
        """How much of the picture the trigger may change."""
        ...

    def fits(self, shape: Shape) -> bool:
        """Whether it can be stamped on images of this shape (C, H, W)."""
        ...


def check_tensor(name: str, value: Tensor, dims: int, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse a tensor of a wrong rank, dtype or range, by name and value."""
    if value.ndim != dims or value.numel() == 0:
        raise ValueError(f"{name} needs {dims} non-empty dimensions, got shape {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {value.dtype}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} has values that are not finite")
    least, most = float(value.min()), float(value.max())
    if least < low or most > high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got [{least}, {most}]")


def check_unit(name: str, value: float) -> None:
    """Refuse a number outside [0, 1], and anything that is not a number."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse what is no (C, H, W) of a picture of up to 4096 pixels a side."""
    if len(shape) != 3 or min(shape) < 1 or max(shape) > 4096:
        raise ValueError(f"expected shape (C, H, W), got {shape}")
