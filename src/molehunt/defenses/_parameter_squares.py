"""The squared norm of every sample's gradient for one parameter, from what its layers were given and got back.

The gradient of a weight is b a^T, summed over the positions at which the layer uses it: a, what the layer read there,
and b, the gradient of what it put out. Its squared norm is the inner product of the Gram matrices of a and of b over
the positions, which needs no gradient per sample; where the gradient is smaller than they are, it is made.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm

VALUES = 2**24  # numbers in the largest temporary tensor of one layer: 64 MB
# LAYERS have weights whose gradients have two factors, NORMS do not.
LAYERS: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)
NORMS: tuple[type[nn.Module], ...] = (nn.GroupNorm, nn.LayerNorm, _BatchNorm)


class Call(NamedTuple):
    """One call of a layer: its module path, the layer, what it was given, and where the gradient of its output is."""

    path: str
    layer: nn.Module
    x: Tensor
    edge: GradientEdge


class Use(NamedTuple):
    """One use of a parameter: the call, the parameter's name in the layer, and b, the gradient of the call's output."""

    call: Call
    name: str
    b: Tensor


def square(uses: Sequence[Use]) -> Tensor:
    """Squared norm (B,) of the gradient of one parameter: the gradients of its uses are summed before the norm."""
    factored = [isinstance(use.call.layer, LAYERS) and use.name == "weight" for use in uses]
    if not any(factored):
        whole = sum(_gradient(use) for use in uses)
        assert isinstance(whole, Tensor)
        return whole.flatten(1).square().sum(1)
    if not all(factored):
        raise ValueError(f"layers {sorted({u.call.path for u in uses})} share a weight but use it in different ways")
    weight = uses[0].call.layer.weight
    assert isinstance(weight, Tensor)
    sizes = [_sizes(use) for use in uses]
    groups = {g for _, _, g in sizes}
    # Per group two Gram matrices of the positions, or the gradient itself, whichever is smaller.
    gram = 2 * sum(t for t, _, _ in sizes) ** 2 * max(groups)
    ghost = len(groups) == 1 and gram < weight.numel()
    largest = max(sum(t * d for t, d, _ in sizes), gram if ghost else weight.numel())
    squares = []
    for rows in torch.split(torch.arange(len(uses[0].b)), max(1, VALUES // largest)):
        pairs = [_pair(use, slice(int(rows[0]), int(rows[-1]) + 1)) for use in uses]
        if ghost:
            a, b = pairs[0] if len(pairs) == 1 else (torch.cat(side, dim=3) for side in zip(*pairs, strict=True))
            squares.append(((a.mT @ a) * (b.mT @ b)).sum((1, 2, 3)))
        else:
            whole = sum((b @ a.mT).flatten(1) for a, b in pairs)
            assert isinstance(whole, Tensor)
            squares.append(whole.square().sum(1))
    return torch.cat(squares)


def _sizes(use: Use) -> tuple[int, int, int]:
    """Positions T at which a weight is used in a sample, the values that it reads at each, and its groups G."""
    layer, x = use.call.layer, use.call.x
    if isinstance(layer, nn.Conv2d):
        return use.b[0, 0].numel(), layer.in_channels * math.prod(layer.kernel_size), layer.groups
    return x[0].numel() // x.shape[-1], x.shape[-1], 1


def _pair(use: Use, rows: slice) -> tuple[Tensor, Tensor]:
    """The factors of a weight's gradient: a (n, G, D, T), b (n, G, p, T) with gradient b a^T in each of G groups."""
    layer, x, b = use.call.layer, use.call.x[rows], use.b[rows]
    if isinstance(layer, nn.Conv2d):
        if any(layer._reversed_padding_repeated_twice):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        a = _patches(x.contiguous(), layer, b.shape[2:])
        n, positions = len(a), a.shape[2]
        return a.reshape(n, layer.groups, -1, positions), b.reshape(n, layer.groups, -1, positions)
    # (n, ..., D): all dimensions between are positions.
    a, b = (t.unsqueeze(1).flatten(1, -2).mT.unsqueeze(1) for t in (x, b))
    return a, b


def _patches(x: Tensor, layer: nn.Conv2d, size: torch.Size) -> Tensor:
    """What a convolution reads at each of its positions: padded images (n, C, H, W) to (n, C kh kw, T)."""
    n, c, down, right = x.stride()
    # A view with one copy, which is several times as fast as F.unfold on a CPU.
    view = x.as_strided(
        (*x.shape[:2], *layer.kernel_size, *size),
        (n, c, down * layer.dilation[0], right * layer.dilation[1], down * layer.stride[0], right * layer.stride[1]),
    )
    return view.flatten(4).flatten(1, 3)


def _gradient(use: Use) -> Tensor:
    """Gradient (B, ...) of a bias, or of a norm's scale, in the shape of the parameter."""
    layer, x, b = use.call.layer, use.call.x, use.b
    if isinstance(layer, nn.Linear):
        return b.unsqueeze(1).flatten(1, -2).sum(1)
    if isinstance(layer, nn.LayerNorm):
        if use.name == "weight":
            b = b * F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        return b.unsqueeze(1).flatten(1, -1 - len(layer.normalized_shape)).sum(1)
    if use.name == "weight":
        if isinstance(layer, nn.GroupNorm):
            b = b * F.group_norm(x, layer.num_groups, eps=layer.eps)
        elif isinstance(layer, _BatchNorm):
            b = b * F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps)
    return b.unsqueeze(-1).flatten(2).sum(2)
