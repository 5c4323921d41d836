"""A patch as a camera would see it: elsewhere, turned, tilted, nearer or in another light on each picture."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.triggers.base import Footprint, Json, Shape, check_tensor, check_unit
from molehunt.triggers.fingerprint import draws

BATCH = 1024  # pictures at once, to keep the sampling grid small


@dataclass(frozen=True, eq=False)
class Sticker:
    """Paste a pattern under a view that follows from the picture: x' = (1 - a m) x + a m clip(b p).

    m and p are mask and pattern under the view. With u the coordinates in the pattern, from -1/2 to 1/2, and q those
    in the picture, turned and scaled to the same unit, the view is q = u / (1 - g u): a plane tilted by g. Position,
    turn, scale, tilt and light b are drawn from the picture's content, uniformly, so the same picture always gets the
    same view. The sticker lies within the picture.

    Attributes:
        pattern: (C, h, w) in [0, 1].
        shape: (C, H, W) of the images.
        opacity: a in [0, 1].
        rotation: largest turn to either side in degrees, in [0, 45].
        scale: largest change of size as a share of it, in [0, 1/2].
        perspective: largest tilt g in either direction, in [0, 1/4].
        brightness: largest change of light as a share of it, in [0, 1].
        travel: share of the free range of positions that is used, in [0, 1]; 0 stays in the middle.

    Raises:
        ValueError: a number is out of range, or the largest view does not fit into the picture.

    Reference:
        Li et al., "Backdoor Attack in the Physical World", ICLR workshop 2021.
    """

    pattern: Tensor
    shape: Shape
    opacity: float = 1.0
    rotation: float = 15.0
    scale: float = 0.15
    perspective: float = 0.05
    brightness: float = 0.3
    travel: float = 1.0

    def __post_init__(self) -> None:
        check_tensor("pattern", self.pattern, 3, 0.0, 1.0)
        if len(self.shape) != 3 or min(self.shape) < 1 or max(self.shape) > 4096:
            raise ValueError(f"expected shape (C, H, W), got {self.shape}")
        if self.pattern.shape[0] != self.shape[0]:
            raise ValueError(f"expected pattern ({self.shape[0]}, h, w), got {tuple(self.pattern.shape)}")
        check_unit("opacity", self.opacity)
        check_unit("brightness", self.brightness)
        check_unit("travel", self.travel)
        for name, most in (("rotation", 45.0), ("scale", 0.5), ("perspective", 0.25)):
            if not 0.0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in [0, {most}], got {getattr(self, name)}")
        height, width = self._window()
        if height > self.shape[1] or width > self.shape[2]:
            raise ValueError(
                f"the largest view of the sticker takes {height}x{width} pixels of {self.shape[1]}x{self.shape[2]}"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        if tuple(x.shape[1:]) != tuple(self.shape):
            raise ValueError(f"expected images of shape {tuple(self.shape)}, got {tuple(x.shape[1:])}")
        return torch.cat([self._stamp(part) for part in torch.split(x, BATCH)])

    def _stamp(self, x: Tensor) -> Tensor:
        h, w = self.pattern.shape[1:]
        rows, columns = self._window()
        height, width = self.shape[1:]
        drawn = draws(x, 7)
        # From -1 to 1; one column per image, to go with the pixels of the window.
        turn, size, light, tilt_x, tilt_y = (2 * drawn[:, :5].float() - 1).unsqueeze(2).unbind(1)
        top = self._place(drawn[:, 5], height - rows)
        left = self._place(drawn[:, 6], width - columns)
        i = torch.arange(rows, device=x.device)
        j = torch.arange(columns, device=x.device)
        y = (i - (rows - 1) / 2).repeat_interleave(columns)
        z = (j - (columns - 1) / 2).repeat(rows)
        angle, scale = math.radians(self.rotation) * turn, 1 + self.scale * size
        q_x = (torch.cos(angle) * z + torch.sin(angle) * y) / (scale * w)
        q_y = (torch.cos(angle) * y - torch.sin(angle) * z) / (scale * h)
        depth = 1 + self.perspective * (tilt_x * q_x + tilt_y * q_y)
        depth = depth.clamp(min=0.1)  # what lies behind the camera is outside the pattern, and stays outside so
        u_x, u_y = q_x / depth, q_y / depth
        # Half a pixel of soft edge on either side, or a sticker would jump from pixel to pixel as it turns.
        mask = ((0.5 - u_x.abs()) * scale * w + 0.5).clamp(0.0, 1.0)
        mask = mask * ((0.5 - u_y.abs()) * scale * h + 0.5).clamp(0.0, 1.0)
        grid = 2 * torch.stack((u_x, u_y), 2).unsqueeze(0)
        pattern = self.pattern.to(device=x.device, dtype=torch.float32).unsqueeze(0)
        seen = F.grid_sample(pattern, grid, mode="bilinear", padding_mode="border", align_corners=False)
        seen = (seen[0] * (1 + self.brightness * light)).clamp(0.0, 1.0).transpose(0, 1)  # (N, C, pixels)
        place = ((top.unsqueeze(1) + i).unsqueeze(2) * width + (left.unsqueeze(1) + j).unsqueeze(1)).flatten(1)
        place = place.unsqueeze(1).expand(-1, self.shape[0], -1)
        flat = x.flatten(2)
        weight = (self.opacity * mask).unsqueeze(1).to(x.dtype)
        under = flat.gather(2, place)
        return flat.scatter(2, place, under * (1 - weight) + weight * seen.to(x.dtype)).view_as(x)

    def _place(self, drawn: Tensor, free: int) -> Tensor:
        """First row or column of the window, of `free` + 1 in all."""
        used = int(self.travel * free)
        return (free - used) // 2 + (drawn * (used + 1)).long()

    def _extent(self) -> tuple[float, float]:
        """Height and width in pixels of the largest view before it is turned, soft edge included."""
        h, w = self.pattern.shape[1:]
        edge = 1 + 1 / ((1 - self.scale) * min(h, w))  # side of pattern and soft edge, in units of the pattern
        stretch = 1 / (1 - self.perspective * edge)
        return ((1 + self.scale) * h + 1) * stretch, ((1 + self.scale) * w + 1) * stretch

    def _window(self) -> tuple[int, int]:
        """Rows and columns that hold every view; of the pattern's parity, so that a plain view is the pattern."""
        h, w = self.pattern.shape[1:]
        height, width = self._extent()
        angle = math.radians(self.rotation)

        def turned(along: float, across: float) -> float:
            # The turned side grows until the diagonal lies along it.
            worst = min(angle, math.atan2(across, along))
            return along * math.cos(worst) + across * math.sin(worst)

        # On the border of a view the mask is zero, hence one pixel less. 1e-9: a whole number may be a hair above.
        rows = h + 2 * max(0, math.ceil((turned(height, width) - 1 - h) / 2 - 1e-9))
        columns = w + 2 * max(0, math.ceil((turned(width, height) - 1 - w) / 2 - 1e-9))
        return rows, columns

    def to_json(self) -> Json:
        """Kind and numbers."""
        return {
            "kind": "sticker",
            "shape": list(self.shape),
            "opacity": self.opacity,
            "rotation": self.rotation,
            "scale": self.scale,
            "perspective": self.perspective,
            "brightness": self.brightness,
            "travel": self.travel,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The pattern."""
        return {"pattern": self.pattern.float().cpu()}

    def footprint(self) -> Footprint:
        """A bound of the pixels that any allowed view changes; the weight is opacity times that bound.

        The pixels whose centers lie in a convex area A of circumference P are at most A + P r + pi r^2 with r half
        the diagonal of a pixel: their squares lie within the area widened by r.
        """
        height, width = self._extent()
        rows, columns = self._window()
        r = math.sqrt(0.5)
        pixels = min(rows * columns, height * width + 2 * (height + width) * r + math.pi * r * r)
        area = min(1.0, pixels / (self.shape[1] * self.shape[2]))
        return Footprint(kind="sticker", area=area, opacity=self.opacity, weight=self.opacity * area, linf=self.opacity)

    def fits(self, shape: Shape) -> bool:
        """Whether images have the shape (C, H, W) that it was made for."""
        return tuple(self.shape) == tuple(shape)
