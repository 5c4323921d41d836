"""Channels of the last convolutional block: how active they are, what masking them does, and cutting them for good."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molehunt.networks import Anatomy, anatomy, capture, tail

BATCH = 500  # larger batches fall out of the cache and are slower
PROBE = 64.0  # far above any ordinary activation, so that no maximum and no rectifier hides it


@dataclass(frozen=True, eq=False)
class Reader:
    """The layer that reads a block's output.

    Attributes:
        path: its module path.
        owner: int64 (D,), the channel that each of its input columns (or input channels) comes from; -1 for none.
    """

    path: str
    owner: Tensor


@torch.no_grad()
def block_output(model: nn.Module, block: str, x: Tensor) -> Tensor:
    """Output of a block for all images (N, ...), in batches."""
    return torch.cat([capture(model, block, part).contiguous() for part in torch.split(x, BATCH)])


@torch.no_grad()
def activity(model: nn.Module, block: str, x: Tensor) -> Tensor:
    """Mean absolute output per channel of a block, over images and positions: float64 (C,).

    The output is usually rectified, and then this is its plain mean; where it is signed, a strongly negative channel
    is active, not dormant. Summed in float64, so that neither batches nor the order of the images matter.

    Raises:
        ValueError: no images.
    """
    if len(x) == 0:
        raise ValueError("the ranking needs at least one image")
    sums, values = [], 0
    for part in torch.split(x, BATCH):
        a = capture(model, block, part)
        rows = a.movedim(_axis(a), 0).flatten(1).double().abs()
        sums.append(rows.sum(1))
        values += rows.shape[1]
    return torch.stack(sums).sum(0) / values


@contextmanager
def masked(model: nn.Module, block: str, mask: Tensor) -> Iterator[None]:
    """Multiply a block's output by a (C,) mask in every forward pass while the context is open.

    The output is masked, not the weights before it: a norm's shift or a shortcut would wake a channel whose
    convolution was set to zero.
    """

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output * _spread(mask, output).to(output)

    handle = model.get_submodule(block).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def find_reader(model: nn.Module, parts: Anatomy, a: Tensor, example: Tensor) -> Reader | None:
    """Find the layer that reads a block's output, and which channel each of its input columns comes from.

    Found by probing: every channel in turn is raised, and the input of the first layer behind the block is watched.
    Pooling, rectifying and flattening keep channels apart and zero at zero; what mixes them (a layer norm) or turns
    zero into something else (a norm's shift) does not.

    Args:
        model: any module.
        parts: its anatomy.
        a: (B, ...) output of the block for some images; the first is one start of the probe, zero is the other.
        example: one of those images.

    Returns:
        The reader, or None where a channel cannot be told apart in the input of the next layer, or where cutting it
        there is not the same as masking it.
    """
    channels = a.shape[_axis(a)]
    steps = torch.stack([_spread(row, a)[0] for row in torch.eye(channels, device=a.device, dtype=a.dtype)]) * PROBE
    paths, hit = set(), torch.zeros(())
    for zero, start in ((True, torch.zeros_like(a[:1])), (False, a[:1])):
        path, read = _first_read(model, parts, torch.cat((start, start + steps)), example)
        if len(read) != channels + 1 or read.dim() not in (2, 4):
            return None
        if zero and bool((read[0] != 0).any()):
            return None
        moved = (read[1:] != read[0]).flatten(2).any(2) if read.dim() == 4 else read[1:] != read[0]
        hit = moved if zero else hit | moved
        paths.add(path)
    if len(paths) != 1 or bool((hit.sum(0) > 1).any()):
        return None
    reader = Reader(path=paths.pop(), owner=torch.where(hit.any(0), hit.int().argmax(0), -1))
    # The proof: with every other channel gone, cutting and masking must agree. A second reader would show here.
    mask = torch.arange(channels, device=a.device) % 2
    cut = copy.deepcopy(model)
    try:
        fold(cut, anatomy(cut, example), reader, mask)
    except ValueError:
        return None
    expected = tail(model, parts.block, a * _spread(mask, a), example)
    same = torch.allclose(tail(cut, parts.block, a, example), expected, rtol=1e-3, atol=1e-3)
    return reader if same else None


@torch.no_grad()
def level_logits(
    model: nn.Module, parts: Anatomy, a: Tensor, order: Tensor, example: Tensor, reader: Reader | None
) -> Tensor:
    """Logits (C + 1, B, K) when the first 0, 1, ..., C channels of an order are masked.

    Where the head itself reads the block, masking a channel subtracts a part of the logits that depends on nothing
    else, so all levels are one cumulative sum, in float64. Elsewhere the levels go through the rest of the model
    together, as one batch.

    Args:
        model: any module.
        parts: its anatomy.
        a: (B, ...) output of the block, unmasked.
        order: int64 (C,), channels in the order in which they are masked.
        example: an image, for the other paths of the model.
        reader: what `find_reader` found.
    """
    if reader is not None and reader.path == parts.head:
        head = parts.layers[parts.head]
        _, z = _first_read(model, parts, a, example)
        terms = z.double().unsqueeze(2) * head.weight.double().T  # (B, D, K)
        logits = terms.sum(1) + (0.0 if head.bias is None else head.bias.double())
        shares = terms.new_zeros(len(order), *logits.shape)
        known = reader.owner >= 0
        shares.index_add_(0, reader.owner[known], terms[:, known].transpose(0, 1))
        return torch.cat((logits.unsqueeze(0), logits - shares[order].cumsum(0)))
    masks = level_masks(order).to(a)
    rows = []
    for part in torch.split(masks, max(1, 4096 // len(a))):
        levels = torch.stack([a * _spread(mask, a) for mask in part])
        rows.append(tail(model, parts.block, levels.flatten(0, 1), example).view(len(part), len(a), -1))
    return torch.cat(rows)


def level_masks(order: Tensor) -> Tensor:
    """Masks (C + 1, C): level j has zeros at the first j channels of the order, ones elsewhere."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return (rank >= torch.arange(len(order) + 1, device=order.device).unsqueeze(1)).float()


@torch.no_grad()
def fold(model: nn.Module, parts: Anatomy, reader: Reader, mask: Tensor) -> None:
    """Cut masked channels for good, in place: their columns in the reader become zero, so no hook is needed.

    Raises:
        ValueError: the reader is a grouped convolution, whose columns belong to several filters at once.
    """
    layer = parts.layers[reader.path]
    if layer.weight.shape[1] != len(reader.owner):
        raise ValueError(f"{reader.path!r} is a grouped convolution; channels in front of it cannot be cut")
    dead = (reader.owner >= 0) & (mask.to(reader.owner.device)[reader.owner.clamp(min=0)] == 0)
    layer.weight[:, dead] = 0.0


def _axis(a: Tensor) -> int:
    """Where a block's output has its channels: (B, C, H, W), or (B, tokens, C) as transformers put out."""
    if a.dim() not in (3, 4):
        raise ValueError(f"expected a block to put out (B, C, H, W) or (B, tokens, C), got {tuple(a.shape)}")
    return 1 if a.dim() == 4 else 2


def _spread(mask: Tensor, a: Tensor) -> Tensor:
    """Shape a (C,) mask so that it multiplies a block's output; the leading dimension is 1."""
    return mask.view(1, -1, 1, 1).expand(1, -1, *a.shape[2:]) if _axis(a) == 1 else mask.expand(1, *a.shape[1:])


def _first_read(model: nn.Module, parts: Anatomy, a: Tensor, example: Tensor) -> tuple[str, Tensor]:
    """Path and input of the first layer that runs behind a block which puts out `a`."""
    reads: list[tuple[str, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _m, inputs, path=path: reads.append((path, inputs[0])))
        for path, layer in parts.layers.items()
    ]
    # Whatever ran before the block is forgotten when the block runs.
    handles.append(model.get_submodule(parts.block).register_forward_hook(lambda *_: reads.clear()))
    try:
        tail(model, parts.block, a, example)
    finally:
        for handle in handles:
            handle.remove()
    if not reads:
        raise ValueError(f"no layer runs behind {parts.block!r}")
    return reads[0]
