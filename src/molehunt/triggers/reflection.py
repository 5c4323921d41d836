"""Triggers that look like a reflection in a pane between the camera and the scene."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.triggers.base import Footprint, Json, Shape, check_tensor, check_unit

GAMMA = 2.2
"""Exponent between stored values and the light that they stand for."""
FARTHEST = 64


@dataclass(frozen=True, eq=False)
class Reflection:
    """Add a picture as a reflection, in linear light: x' = ((1 - a) x^2.2 + a r)^(1/2.2).

    The layer r is made of the picture p in linear light, p^2.2. With a `shift` it is a ghost, as thick glass makes it:
    two copies, the second moved by `shift`, with weights g and 1 - g. With a `blur` it is out of focus: a Gaussian of
    that many pixels, its edges repeated, and a vignette that halves the light in the corners. Both may be combined.

    Attributes:
        picture: (C, H, W) in [0, 1], what is reflected.
        opacity: a in [0, 1], in linear light. The eye sees more of it on dark ground: black becomes (a r)^(1/2.2).
        ghost: g in [0, 1], weight of the first copy.
        shift: rows and columns by which the second copy is moved, each at most 64 in size; what is moved in is dark.
        blur: standard deviation of the Gaussian in pixels, in [0.1, 16]; 0 leaves the picture in focus.

    Raises:
        ValueError: a shape, dtype or range is wrong.

    Reference:
        Liu, Ma, Bailey, Lu, "Reflection Backdoor", ECCV 2020.
    """

    picture: Tensor
    opacity: float = 0.2
    ghost: float = 1.0
    shift: tuple[int, ...] = (0, 0)
    blur: float = 0.0

    def __post_init__(self) -> None:
        check_tensor("picture", self.picture, 3, 0.0, 1.0)
        check_unit("opacity", self.opacity)
        check_unit("ghost", self.ghost)
        if len(self.shift) != 2 or max(abs(s) for s in self.shift) > FARTHEST:
            raise ValueError(f"shift is rows and columns of at most {FARTHEST} in size, got {self.shift}")
        if self.blur != 0.0 and not 0.1 <= self.blur <= 16.0:
            raise ValueError(f"blur must be 0 or lie in [0.1, 16], got {self.blur}")

    @functools.cached_property
    def layer(self) -> Tensor:
        """The reflection r in linear light, float32 (C, H, W) in [0, 1]."""
        light = self.picture.float().cpu().pow(GAMMA)
        if any(self.shift) and self.ghost < 1.0:
            light = self.ghost * light + (1.0 - self.ghost) * moved(light, *self.shift)
        if self.blur > 0:
            light = blurred(light, self.blur) * vignette(*light.shape[1:])
        return light.clamp(0.0, 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        light = x.float().pow(GAMMA).mul_(1.0 - self.opacity).add_(self.opacity * self.layer.to(x.device))
        return light.pow_(1 / GAMMA).clamp_(0.0, 1.0).to(x.dtype)

    def to_json(self) -> Json:
        """Kind and all numbers; the picture is a tensor."""
        return {
            "kind": "reflection",
            "opacity": self.opacity,
            "ghost": self.ghost,
            "shift": list(self.shift),
            "blur": self.blur,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The picture."""
        return {"picture": self.picture.float().cpu()}

    def footprint(self) -> Footprint:
        """The whole picture at the stated opacity; the bound is the change of a black or of a white pixel.

        The change falls from black to white, so no value in between is moved farther.
        """
        light = self.opacity * self.layer
        up, down = float(light.max().pow(1 / GAMMA)), 1.0 - float((1.0 - self.opacity + light.min()).pow(1 / GAMMA))
        linf = min(1.0, max(up, down))
        return Footprint(kind="reflection", area=1.0, opacity=self.opacity, weight=self.opacity, linf=linf)

    def fits(self, shape: Shape) -> bool:
        """Whether images have the shape (C, H, W) of the picture."""
        return tuple(self.picture.shape) == tuple(shape)


def moved(x: Tensor, down: int, right: int) -> Tensor:
    """Move a picture (C, H, W) by whole pixels; what comes in is 0."""
    out = torch.zeros_like(x)
    height, width = x.shape[1:]
    if abs(down) >= height or abs(right) >= width:
        return out
    out[:, max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = x[
        :, max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)
    ]
    return out


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Blur a picture (C, H, W) by a Gaussian, cut off at three standard deviations; edges are repeated."""
    reach = max(1, round(3 * sigma))
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    bell = bell / bell.sum()
    wide = F.pad(x.unsqueeze(1), (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(wide, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1)).squeeze(1)


def vignette(height: int, width: int) -> Tensor:
    """Brightness (H, W) of a lens: 1 in the middle, 1/2 in the corners, a Gaussian in between."""
    i, j = torch.linspace(-1, 1, height).view(-1, 1), torch.linspace(-1, 1, width)
    return torch.pow(0.5, (i.square() + j.square()) / 2)
