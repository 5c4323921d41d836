"""How a classifier wants its pixels: named normalizations, and one's own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from molehunt.foreign.errors import ForeignError
from molehunt.networks import Normalize
from molehunt.tasks import Task

PRESETS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "signed": ((0.5,), (0.5,)),
    "bytes": ((0.0,), (1 / 255,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
}
"""Means and deviations in units of [0, 1], one for all channels or one each: pixels as they are, from -1 to 1, from 0
to 255, and two that are in general use."""
HELP = "none, signed, bytes, imagenet, cifar10, task or MEAN/STD such as 0.5/0.25 or 0.49,0.48,0.45/0.25,0.24,0.26"


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """A normalization: (x - mean) / std for x in [0, 1].

    Attributes:
        name: how it is written, as `pixels` reads it.
        mean, std: one number for all channels, or one each.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def fits(self, channels: int) -> bool:
        """Whether it can be applied to so many channels."""
        return {len(self.mean), len(self.std)} <= {1, channels}

    def layer(self, channels: int) -> Normalize:
        """Make the layer that does it.

        Raises:
            ForeignError: it is for another number of channels.
        """
        if not self.fits(channels):
            count = max(len(self.mean), len(self.std))
            raise ForeignError(
                f"the normalization {self.name!r} is for {count} channels, the network is given {channels}"
            )
        mean, std = (
            torch.tensor(v, dtype=torch.float32).expand(channels).reshape(-1, 1, 1) for v in (self.mean, self.std)
        )
        return Normalize(mean.clone(), std.clone())


def pixels(text: str | tuple[Sequence[float], Sequence[float]], task: Task) -> Pixels:
    """Read a normalization.

    Args:
        text: a name of `PRESETS`; "task", the mean and deviation of the task's own pictures; "MEAN/STD" in units of
            [0, 1], each one number or one per channel with commas between; the same behind "bytes:" in units of 0 to
            255; or mean and deviation as two sequences.
        task: what the model was trained for.

    Raises:
        ForeignError: it is none of these, or a deviation is not positive.
    """
    if not isinstance(text, str):
        mean, std = (tuple(float(v) for v in values) for values in text)
        return _checked(f"{_written(mean)}/{_written(std)}", mean, std)
    if text == "task":
        return Pixels(name="task", mean=task.mean, std=task.std)
    if text in PRESETS:
        return Pixels(name=text, mean=PRESETS[text][0], std=PRESETS[text][1])
    unit = 255.0 if text.startswith("bytes:") else 1.0
    parts = text.removeprefix("bytes:").split("/")
    try:
        mean, std = (tuple(float(number) / unit for number in part.split(",")) for part in parts)
    except ValueError:
        raise ForeignError(f"expected a normalization ({HELP}), got {text!r}") from None
    return _checked(text, mean, std)


def candidates(task: Task, channels: int) -> tuple[Pixels, ...]:
    """Normalizations that models commonly expect, for so many channels."""
    usual = [*(pixels(name, task) for name in ("none", "task", "signed", "imagenet", "cifar10", "bytes"))]
    return tuple(p for p in usual if p.fits(channels))


def _checked(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Pixels:
    if not all(math.isfinite(v) for v in (*mean, *std)) or not all(v > 0 for v in std) or not mean or not std:
        raise ForeignError(f"expected finite means and positive deviations, got {name!r}")
    return Pixels(name=name, mean=mean, std=std)


def _written(values: Sequence[float]) -> str:
    return ",".join(f"{v:g}" for v in values)
