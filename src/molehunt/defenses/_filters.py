"""Filter triggers: every pixel of a picture becomes a mixture of its colors and those around it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Filters:
    """x' = clip(M [x, max, min, mean], 0, 1): every pixel is a mixture of its colors and those around it.

    The loss pays for pictures that no longer look like themselves: one less their mean structural similarity, a
    thousand times as much where that mean is below `floor`.

    Args:
        x: the images (N, C, H, W) that are chosen from.
        bases: what is mixed, (N, 4 C, H, W), from `surroundings`.
        floor: the smallest mean similarity that is wanted.
        free: the matrices (R, C, 4 C).
    """

    def __init__(self, x: Tensor, bases: Tensor, floor: float, free: list[Tensor]) -> None:
        self.x, self.bases, self.floor, self.free = x, bases, floor, free

    @classmethod
    def start(cls, x: Tensor, floor: float, rows: int) -> "Filters":
        """Begin with the identity."""
        channels = x.shape[1]
        matrix = torch.cat((torch.eye(channels), torch.zeros(channels, 3 * channels)), 1)
        return cls(x, surroundings(x), floor, [matrix.expand(rows, -1, -1).clone().to(x)])

    @property
    def matrix(self) -> Tensor:
        """(R, C, 4 C)."""
        return self.free[0]

    def leaves(self) -> list[Tensor]:
        """The matrices."""
        return [self.matrix.detach()]

    def render(self, leaves: Sequence[Tensor], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Filtered pictures, and how little they look like the images."""
        pictures = mix(leaves[0], self.bases[chosen])
        alike = similarity(pictures, self.x[chosen]).mean(1)
        weight = torch.where(alike.detach() < self.floor, 1000.0, 1.0)
        return pictures, weight * (1.0 - alike)

    def slopes(self, leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients as they are."""
        del leaves
        return list(grads)

    def project(self) -> None:
        """Nothing: pictures are clipped, matrices are free."""

    def keep(self, rows: Tensor) -> "Filters":
        """Only some rows."""
        return Filters(self.x, self.bases, self.floor, [self.matrix[rows]])


def surroundings(x: Tensor) -> Tensor:
    """Images and the largest, smallest and mean values around every pixel: (N, 4 C, H, W).

    The window is as large a part of the picture as 12 of 32 pixels, made odd so that it has a middle; at the border the
    picture is continued by its last pixels.
    """
    side = max(1, round(12 / 32 * min(x.shape[2:])))
    half = side // 2
    wide = F.pad(x, (half, half, half, half), mode="replicate")
    window = 2 * half + 1
    bases = (x, F.max_pool2d(wide, window, 1), -F.max_pool2d(-wide, window, 1), F.avg_pool2d(wide, window, 1))
    return torch.cat(bases, 1)


def mix(matrix: Tensor, bases: Tensor) -> Tensor:
    """Filter the same B images R times: (R, B, C, H, W) of matrices (R, C, 4 C) and bases (B, 4 C, H, W)."""
    return torch.einsum("rck,bkhw->rbchw", matrix, bases).clamp(0.0, 1.0)


def similarity(x: Tensor, y: Tensor, side: int = 7) -> Tensor:
    """Structural similarity (SSIM) of pictures with values in [0, 1], in [-1, 1]; 1 means equal.

    Means, variances and covariance are those of square windows with equal weights.

    Args:
        x: (R, B, C, H, W).
        y: (B, C, H, W).
        side: of a window, in pixels; less where pictures are smaller.

    Returns:
        (R, B), means over windows and channels.

    Reference:
        Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity",
        IEEE TIP 2004.
    """
    rows, images = x.shape[:2]
    side = min(side, *y.shape[2:])

    def local(z: Tensor) -> Tensor:
        return F.avg_pool2d(z.flatten(0, -4), side, 1).view(*z.shape[:-2], z.shape[-2] - side + 1, -1)

    a, b = local(x), local(y)
    variance_x, variance_y, common = local(x * x) - a * a, local(y * y) - b * b, local(x * y) - a * b
    low, high = 0.01**2, 0.03**2
    map_ = (2 * a * b + low) * (2 * common + high) / ((a * a + b * b + low) * (variance_x + variance_y + high))
    return map_.reshape(rows, images, -1).mean(2)
