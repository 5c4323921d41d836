"""Batch norm folded into the layer before it, for models that are only evaluated."""

import copy
from collections import Counter
from itertools import pairwise

import torch
from torch import Tensor, nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Copy a model with every batch norm folded into the convolution or linear layer before it.

    Folded are pairs that follow each other in one `nn.Sequential`, also with a max-pool between when all
    scales of the norm are positive. A folded norm becomes an `nn.Identity`, so module paths stay as they were. In
    eval mode the copy gives the same logits to about 1e-5 of their size; it is not meant for training. Left alone are
    norms without running statistics, layers that the model uses in several places, and layers with hooks.

    Args:
        model: any module; it is not changed.

    Returns:
        A deep copy in eval mode.
    """
    folded = copy.deepcopy(model).eval()
    # A layer or a weight that appears twice serves two norms, and can be folded into neither.
    layers = Counter(id(layer) for _, layer in folded.named_modules(remove_duplicate=False))
    tensors = Counter(id(tensor) for _, tensor in folded.named_parameters(remove_duplicate=False))
    for sequence in [layer for layer in folded.modules() if type(layer) is nn.Sequential]:
        names = list(sequence._modules)
        for here, after in pairwise(names):
            layer, norm_name = sequence._modules[here], after
            if isinstance(sequence._modules[after], nn.MaxPool2d) and after != names[-1]:
                norm_name = names[names.index(after) + 1]
            norm = sequence._modules[norm_name]
            if not isinstance(layer, nn.Conv2d | nn.Linear) or type(norm) not in _NORMS:
                continue
            assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
            shared = any(layers[id(m)] > 1 for m in (layer, norm)) or tensors[id(layer.weight)] > 1
            if shared or _hooked(layer) or _hooked(norm) or norm.running_mean is None or norm.running_var is None:
                continue
            scale, shift = _affine(norm)
            # max(s * z) is s * max(z) for s > 0 only.
            if norm_name != after and not bool((scale > 0).all()):
                continue
            _fold(layer, scale, shift)
            sequence._modules[norm_name] = nn.Identity()
    return folded


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


def _affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift (C,) in float64 with norm(z) = scale * z + shift."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


@torch.no_grad()
def _fold(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> None:
    weight = layer.weight.double()
    if layer.bias is not None:
        shift = shift + scale * layer.bias.double()
    wide = weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    requires_grad = layer.weight.requires_grad
    layer.weight = nn.Parameter(wide.to(layer.weight), requires_grad=requires_grad)
    layer.bias = nn.Parameter(shift.to(layer.weight), requires_grad=requires_grad)
