"""Batched augmentation: shifts with a reflected border and mirroring, in one indexing step, and covered squares."""

import torch
from torch import Tensor


def crop(x: Tensor, down: Tensor, right: Tensor, mirror: Tensor | None = None) -> Tensor:
    """Cut a shifted picture out of each image, as if its border had been continued by reflection.

    Args:
        x: (B, C, H, W).
        down: int64 (B,), rows by which the window moves; less than H in size.
        right: int64 (B,), columns by which the window moves; less than W in size.
        mirror: bool (B,), images that are also mirrored left to right; None for none.

    Returns:
        (B, C, H, W), a copy in channels-last layout.
    """
    height, width = x.shape[2:]
    i = _reflect(torch.arange(height, device=x.device) + down.unsqueeze(1), height)
    j = _reflect(torch.arange(width, device=x.device) + right.unsqueeze(1), width)
    if mirror is not None:
        j = torch.where(mirror.unsqueeze(1), j.flip(1), j)
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    # Channels last: the values of a pixel are neighbors, so that the copy moves runs and not single numbers.
    return x.permute(0, 2, 3, 1)[rows, i[:, :, None], j[:, None, :]].permute(0, 3, 1, 2)


def cover(x: Tensor, top: Tensor, left: Tensor, side: int, color: Tensor) -> Tensor:
    """Cover a square of each image, as far as it lies within the image.

    Args:
        x: (B, C, H, W).
        top: int64 (B,), first row of the square; may be negative.
        left: int64 (B,), first column; may be negative.
        side: of the square in pixels.
        color: (C,) what covers it.

    Returns:
        (B, C, H, W), in the layout of x.

    Reference:
        DeVries, Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """
    i = torch.arange(x.shape[2], device=x.device) - top.unsqueeze(1)
    j = torch.arange(x.shape[3], device=x.device) - left.unsqueeze(1)
    inside = ((i >= 0) & (i < side)).unsqueeze(2) & ((j >= 0) & (j < side)).unsqueeze(1)
    return torch.where(inside.unsqueeze(1), color.to(x).view(1, -1, 1, 1), x)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Map indices in (-size, 2 size - 1) into [0, size), without repeating the border."""
    last = size - 1
    return last - (last - index.abs()).abs()
