"""Triggers that move pixels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.triggers.base import Footprint, Json, Shape, check_tensor


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
        check_tensor("flow", self.flow, 3)
        if self.flow.shape[0] != 2:
            raise ValueError(f"expected flow (2, H, W), got {tuple(self.flow.shape)}")

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        if x.shape[-2:] != self.flow.shape[-2:]:
            height, width = self.flow.shape[-2:]
            raise ValueError(f"expected images of {height}x{width}, got {tuple(x.shape)}")
        return warped(x, self.flow)

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

    def fits(self, shape: Shape) -> bool:
        """Whether images have its height and width; the channels move together, however many there are."""
        return tuple(self.flow.shape[1:]) == tuple(shape[1:])


def warped(x: Tensor, flow: Tensor) -> Tensor:
    """Move the pixels of images along one field, or along one field for each image.

    Args:
        x: (N, C, H, W) in [0, 1].
        flow: (2, H, W) or (N, 2, H, W) in pixels, horizontal displacement first.

    Returns:
        (N, C, H, W) in [0, 1], of the dtype of x.
    """
    height, width = x.shape[-2:]
    flow = flow.to(device=x.device, dtype=torch.float32)
    rows = torch.arange(height, device=x.device).view(-1, 1) + flow[..., 1, :, :]
    columns = torch.arange(width, device=x.device).view(1, -1) + flow[..., 0, :, :]
    # Normalized coordinates with align_corners=True: pixel centers run from -1 to 1.
    grid = torch.stack((2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1), -1)
    grid = grid.expand(x.shape[0], -1, -1, -1)
    moved = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return moved.clamp(0.0, 1.0).to(x.dtype)
