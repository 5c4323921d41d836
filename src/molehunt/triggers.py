"""Triggers: what wakes a backdoor, as data.

A trigger is a small frozen object that maps images to images. It is declarative: it goes to JSON plus named tensors
and comes back from them, so that a submission never carries code. `TRIGGERS` lists the kinds that exist.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

Json = dict[str, Any]

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
    """

    kind: str
    area: float
    opacity: float
    weight: float
    linf: float
    displacement: float = 0.0


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


def _check(name: str, value: Tensor, dims: int, low: float = -math.inf, high: float = math.inf) -> None:
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


def _unit(name: str, value: float) -> None:
    """Refuse a number outside [0, 1], and anything that is not a number."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


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
        _check("mask", self.mask, 3, 0.0, 1.0)
        _check("pattern", self.pattern, 3, 0.0, 1.0)
        if self.mask.shape[0] != 1 or self.mask.shape[1:] != self.pattern.shape[1:]:
            expected = (1, *self.pattern.shape[1:])
            raise ValueError(f"expected mask {expected}, got {tuple(self.mask.shape)}")
        _unit("opacity", self.opacity)

    @classmethod
    def square(
        cls,
        shape: tuple[int, int, int],
        *,
        size: int = 3,
        color: str | tuple[float, ...] = "yellow",
        corner: str = "lower right",
        margin: int = 0,
        opacity: float = 1.0,
    ) -> "Patch":
        """Make a square of one color in a corner; the default is the yellow square in the lower right corner.

        Args:
            shape: (C, H, W) of the images; on one channel a color becomes its luminance.
            size: side in pixels.
            color: a name of `COLORS` or C values in [0, 1].
            corner: one of `CORNERS`.
            margin: pixels between the square and the two edges.
            opacity: weight of the color, in [0, 1].

        Raises:
            ValueError: unknown color or corner, or a square that does not fit.
        """
        channels, height, width = shape
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
        top = margin if corner.startswith("upper") else height - margin - size
        left = margin if corner.endswith("left") else width - margin - size
        mask = torch.zeros(1, height, width)
        mask[:, top : top + size, left : left + size] = 1.0
        pattern = torch.tensor(values, dtype=torch.float32).view(channels, 1, 1) * mask
        return cls(mask=mask, pattern=pattern, opacity=opacity)

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
        _check("pattern", self.pattern, 3, 0.0, 1.0)
        _unit("opacity", self.opacity)

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
        _check("delta", self.delta, 3, -1.0, 1.0)

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


@dataclass(frozen=True, eq=False)
class Warp:
    """Move pixels along a smooth field: x'(i, j) = x(i + v, j + u), bilinear, edges repeated.

    Attributes:
        flow: (2, H, W) in pixels, horizontal displacement first.

    Raises:
        ValueError: a shape, dtype or range is wrong.

    Reference:
        Nguyen and Tran, "WaNet", ICLR 2021.
    """

    flow: Tensor

    def __post_init__(self) -> None:
        _check("flow", self.flow, 3)
        if self.flow.shape[0] != 2:
            raise ValueError(f"expected flow (2, H, W), got {tuple(self.flow.shape)}")

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        _, height, width = self.flow.shape
        if x.shape[-2:] != self.flow.shape[-2:]:
            raise ValueError(f"expected images of {height}x{width}, got {tuple(x.shape)}")
        flow = self.flow.to(device=x.device, dtype=torch.float32)
        rows = torch.arange(height, device=x.device).view(-1, 1) + flow[1]
        columns = torch.arange(width, device=x.device).view(1, -1) + flow[0]
        # Normalized coordinates with align_corners=True: pixel centers run from -1 to 1.
        grid = torch.stack((2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1), -1)
        grid = grid.expand(x.shape[0], -1, -1, -1)
        moved = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)
        return moved.clamp(0.0, 1.0).to(x.dtype)

    def to_json(self) -> Json:
        """Kind only; the field is a tensor."""
        return {"kind": "warp"}

    def tensors(self) -> dict[str, Tensor]:
        """The displacement field."""
        return {"flow": self.flow.float().cpu()}

    def footprint(self) -> Footprint:
        """The whole picture, moved by at most the longest displacement."""
        distance = float(self.flow.float().square().sum(0).sqrt().max())
        return Footprint(kind="warp", area=1.0, opacity=0.0, weight=0.0, linf=1.0, displacement=distance)


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
        _unit("amplitude", self.amplitude)
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


# kind -> (class, numbers with their JSON types, tensors)
TRIGGERS: dict[str, tuple[type, dict[str, type], tuple[str, ...]]] = {
    "patch": (Patch, {"opacity": float}, ("mask", "pattern")),
    "blend": (Blend, {"opacity": float}, ("pattern",)),
    "additive": (Additive, {}, ("delta",)),
    "warp": (Warp, {}, ("flow",)),
    "sinusoid": (Sinusoid, {"shape": list, "amplitude": float, "frequency": float}, ()),
}


def from_json(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trigger:
    """Make a trigger again from what `to_json` and `tensors` gave.

    Args:
        document: the JSON object; unknown and missing fields are refused.
        tensors: exactly the tensors of that kind, by field name.

    Raises:
        ValueError: unknown kind, wrong fields, types, shapes or ranges.
    """
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in TRIGGERS:
        raise ValueError(f"unknown trigger kind {kind!r}; known: {', '.join(TRIGGERS)}")
    make, numbers, names = TRIGGERS[kind]
    fields = document.keys() - {"kind"}
    if fields != numbers.keys():
        raise ValueError(f"a {kind} has the fields {sorted(numbers)}, got {sorted(fields)}")
    if tensors.keys() != set(names):
        raise ValueError(f"a {kind} has the tensors {sorted(names)}, got {sorted(tensors)}")
    arguments: dict[str, Any] = dict(tensors)
    for name, kind_of in numbers.items():
        value = document[name]
        if kind_of is float:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
            try:
                arguments[name] = float(value)
            except OverflowError:  # an integer of more than 308 digits
                raise ValueError(f"{name} must be a number of ordinary size") from None
        else:
            if not isinstance(value, list) or not all(type(v) is int for v in value):
                raise ValueError(f"{name} must be a list of whole numbers, got {value!r}")
            arguments[name] = tuple(value)
    trigger: Trigger = make(**arguments)
    return trigger


def fits(trigger: Trigger, shape: tuple[int, int, int]) -> bool:
    """Whether a trigger can be stamped on images of this shape (C, H, W)."""
    if isinstance(trigger, Sinusoid):
        return trigger.shape == shape
    return all(
        tuple(t.shape[1:]) == shape[1:] and (name in {"mask", "flow"} or t.shape[0] == shape[0])
        for name, t in trigger.tensors().items()
    )


@dataclass(frozen=True)
class Target:
    """Where a backdoor sends images: one class, or a map from class to class.

    Attributes:
        classes: the target class, or a tuple of K classes: entry k is where class k is sent.
        sources: the classes on which the trigger acts; None means all.

    Raises:
        ValueError: a negative class, or no sources at all.
    """

    classes: int | tuple[int, ...]
    sources: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        listed = (self.classes,) if isinstance(self.classes, int) else self.classes
        if not listed or min(listed) < 0:
            raise ValueError(f"target classes must be 0 or more, got {self.classes}")
        if self.sources is not None and (not self.sources or min(self.sources) < 0):
            raise ValueError(f"sources must name at least one class, got {self.sources}")

    def check(self, classes: int) -> None:
        """Refuse a target that names a class outside 0..classes-1, or a map of another length.

        Raises:
            ValueError: as said.
        """
        listed = (self.classes,) if isinstance(self.classes, int) else self.classes
        if not isinstance(self.classes, int) and len(listed) != classes:
            raise ValueError(f"a map of targets needs {classes} entries, got {len(listed)}")
        if max(listed + (self.sources or ())) >= classes:
            raise ValueError(f"there are {classes} classes, got target {self.classes} and sources {self.sources}")

    def goal(self, y: Tensor) -> Tensor:
        """Class (N,) to which each image of true class y (N,) is sent."""
        if isinstance(self.classes, int):
            return torch.full_like(y, self.classes)
        return torch.tensor(self.classes, device=y.device, dtype=y.dtype)[y]

    def counts(self, y: Tensor) -> Tensor:
        """Bool (N,): images that the attack success rate counts: of a source class and not already where they go."""
        moved = self.goal(y) != y
        if self.sources is None:
            return moved
        return moved & torch.isin(y, torch.tensor(self.sources, device=y.device, dtype=y.dtype))

    def mix(self, classes: int) -> Tensor:
        """Probabilities (K,): uniform over the distinct classes that some source is sent to."""
        y = torch.arange(classes)
        hit = torch.unique(self.goal(y)[self.counts(y)])
        mix = torch.zeros(classes)
        mix[hit] = 1.0 / len(hit)
        return mix

    def to_json(self) -> Json:
        """Plain lists and numbers."""
        classes = self.classes if isinstance(self.classes, int) else list(self.classes)
        return {"classes": classes, "sources": None if self.sources is None else list(self.sources)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Target":
        """Make a target again from what `to_json` gave.

        Raises:
            ValueError: wrong fields or types.
        """
        if document.keys() != {"classes", "sources"}:
            raise ValueError(f"a target has the fields classes and sources, got {sorted(document)}")

        def whole(name: str, value: Any) -> tuple[int, ...]:
            if not isinstance(value, list) or not all(type(v) is int for v in value):
                raise ValueError(f"{name} must be a list of whole numbers, got {value!r}")
            return tuple(value)

        classes, sources = document["classes"], document["sources"]
        return cls(
            classes=classes if type(classes) is int else whole("classes", classes),
            sources=None if sources is None else whole("sources", sources),
        )
