"""Artificial brain stimulation: set one channel of one layer to a constant and watch which logit rises.

A *channel* is all of a convolution's output map with one index, or one output of a linear layer (at every token, where
there are tokens). Its *pre-activation* is what the layer puts out in the frozen copy, where a batch norm that follows
has been folded into the layer.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.networks import Anatomy, Network

Layer: TypeAlias = nn.Conv2d | nn.Linear
Sections: TypeAlias = Sequence[tuple[str, nn.Module]]


class Channel(NamedTuple):
    """A channel that looks compromised: stimulated, it lifts the logit of one class on nearly all images.

    Attributes:
        layer: module path of its layer.
        channel: its index, from 0.
        target: the class that it lifts.
        value: by how much more than any other class, in logits: the smallest such lead over the images.
    """

    layer: str
    channel: int
    target: int
    value: float


def hidden_layers(parts: Anatomy) -> dict[str, Layer]:
    """Every convolution and linear layer that runs, but the head, whose channels are the logits themselves."""
    return {path: layer for path, layer in parts.layers.items() if path != parts.head}


def sections(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Cut a model into modules which, run one after the other, are the model: (path, module) in order.

    A `Network` and an `nn.Sequential` are cut, and each part of theirs that is an `nn.Sequential` too; a residual block
    or a transformer stays whole, and so does any other model (path "").
    """
    if type(model) is nn.Sequential:
        return _flatten("", model)
    # A subclass may run its parts otherwise.
    if isinstance(model, Network) and type(model).forward is Network.forward:
        named = ((name, getattr(model, name)) for name in ("normalize", "trunk", "neck", "head"))
        return [section for name, part in named for section in _flatten(name, part)]
    return [("", model)]


def _flatten(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    if type(module) is not nn.Sequential:
        return [(path, module)]
    # Not `named_children`, which leaves out a module that occurs a second time.
    parts = [(name, part) for name, part in module._modules.items() if part is not None]
    return [section for name, part in parts for section in _flatten(f"{path}.{name}".lstrip("."), part)]


def axis_of(layer: Layer) -> int:
    """Where a layer's output has its channels: convolutions (B, C, H, W), linear layers (B, ..., C)."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


def width_of(layer: Layer) -> int:
    """C, how many channels a layer puts out."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


@contextmanager
def outputs_of(layers: Mapping[str, Layer]) -> Iterator[dict[str, Tensor]]:
    """Collect what layers put out in every forward pass while the context is open, the latest pass, by path."""
    found: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found[path] = output

        return hook

    handles = [layer.register_forward_hook(watch(path)) for path, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def largest(model: nn.Module, layers: Mapping[str, Layer], x: Tensor) -> dict[str, float]:
    """The largest pre-activation of every layer over images (B, C, H, W), channels and positions.

    Where a layer puts out nothing positive it is its largest magnitude, and 1 where it puts out nothing but zeros.
    """
    with outputs_of(layers) as found:
        model(x)
    tops = {}
    for path in layers:
        top, size = float(found[path].max()), float(found[path].abs().max())
        tops[path] = top if top > 0 else size if size > 0 else 1.0
    return tops


@torch.no_grad()
def stimulate(parts: Sections, h: Tensor, path: str, layer: Layer, channels: Tensor, values: Tensor) -> Tensor:
    """Neuron stimulation functions: logits (g, n, B, K), float32, with a whole channel set to a value.

    All other channels of the layer stay as the images make them. Where the first section is the layer itself, only
    what follows it runs g n B times; where the layer lies inside of it, a hook replaces the layer's output.

    Args:
        parts: the sections from the one that holds the layer to the end of the model.
        h: (B, ...) what the first of them is given.
        path: module path of the layer.
        layer: the layer.
        channels: int64 (g,).
        values: (n,) float.
    """
    count, levels, images = len(channels), len(values), len(h)
    rows = count * levels * images
    axis = axis_of(layer)
    which = channels.to(h.device).repeat_interleave(levels * images)
    value = values.to(h.device).repeat_interleave(images).repeat(count)

    def write(output: Tensor) -> Tensor:
        # A model may fold windows into the batch: then several rows in a row are one image.
        windows = len(output) // rows
        changed = output.movedim(axis, 1)  # a view, so writing to it writes to the output
        at = torch.arange(len(output), device=output.device)
        amount = value.to(output.dtype).repeat_interleave(windows)
        changed[at, which.repeat_interleave(windows)] = amount.view(-1, *(1,) * (changed.dim() - 2))
        return output

    if parts[0][0] == path:
        a = write(_tile(layer(h), count * levels))
        rest = parts[1:]
    else:
        # The output of a convolution or a linear layer is nobody else's memory, so it may be written to.
        handle = layer.register_forward_hook(lambda _module, _inputs, output: write(output))
        try:
            a = parts[0][1](_tile(h, count * levels))
        finally:
            handle.remove()
        rest = parts[1:]
    for _, module in rest:
        a = module(a)
    return a.float().view(count, levels, images, -1)


def _tile(a: Tensor, times: int) -> Tensor:
    """Copies (times B, ...) of (B, ...), in memory of their own."""
    tiled = a.repeat(times, *(1,) * (a.dim() - 1))
    return tiled.contiguous(memory_format=torch.channels_last) if a.dim() == 4 else tiled


def elevation(nsf: Tensor) -> Tensor:
    """How far a channel lifts every logit: (..., B, K), the highest over n - 1 values less that at the first.

    Args:
        nsf: (..., n, B, K) from `stimulate`; the first of the n values is 0.
    """
    return nsf[..., 1:, :, :].amax(-3) - nsf[..., 0, :, :]


@torch.no_grad()
def elevations(
    model: nn.Module,
    layers: Mapping[str, Layer],
    x: Tensor,
    levels: Sequence[float],
    *,
    limit: int = 2000,
    tick: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Elevations (C, B, K) of every channel of every layer, by module path.

    Args:
        model: any module, from images to logits (B, K).
        layers: which layers, by path.
        x: images (B, C, H, W).
        levels: n multiples of the layer's `largest` pre-activation that a channel is set to; the first is 0.
        limit: rows per forward pass at most; a pass holds as many channels as fit, one at least.
        tick: called after every pass; may raise to stop.
    """
    tops = largest(model, layers, x)
    at_once = channels_at_once(levels, len(x), limit)
    found: dict[str, Tensor] = {}
    h, parts = x, sections(model)
    for index, (name, section) in enumerate(parts):
        for path, layer in layers.items():
            if name not in ("", path) and not path.startswith(f"{name}."):
                continue
            values = torch.tensor(levels) * tops[path]
            rows = []
            # The last chunk may be a smaller one: no channel is left out.
            for channels in torch.split(torch.arange(width_of(layer)), at_once):
                rows.append(elevation(stimulate(parts[index:], h, path, layer, channels, values)).cpu())
                if tick:
                    tick()
            found[path] = torch.cat(rows)
        if index < len(parts) - 1:
            h = section(h)
    return found


def channels_at_once(levels: Sequence[float], images: int, limit: int) -> int:
    """g, how many channels share a forward pass of at most `limit` rows."""
    return max(1, limit // (len(levels) * images))


def passes(layers: Mapping[str, Layer], at_once: int) -> int:
    """How many forward passes `elevations` makes, after the one that finds the largest pre-activations."""
    return sum(-(-width_of(layer) // at_once) for layer in layers.values())


def suspicious(path: str, lifted: Tensor, y: Tensor, spare: int) -> list[Channel]:
    """Channels of a layer that lift one and the same class more than any other on at least B - `spare` images.

    Images of that class itself vote but do not count for the value: of them one cannot tell whether the channel means
    the class or moves anything there. Channels whose elevations are not finite are left out, and so are those that
    move nothing.

    Args:
        path: module path of the layer.
        lifted: (C, B, K) from `elevation`.
        y: int64 (B,) true classes of the images.
        spare: how many images may disagree.
    """
    lifted, y = lifted.float(), y.to(lifted.device)
    best, label = lifted.topk(2, dim=-1)
    label = label[..., 0]
    votes, target = F.one_hot(label, lifted.shape[-1]).sum(1).max(1)
    counts = (label == target[:, None]) & (y != target[:, None])
    lead = torch.where(counts, best[..., 0] - best[..., 1], torch.inf).amin(1)
    sound = (votes >= lifted.shape[1] - spare) & torch.isfinite(lead) & (lead > 0)
    sound &= torch.isfinite(lifted).flatten(1).all(1)
    return [Channel(path, c, int(target[c]), float(lead[c])) for c in sound.nonzero().flatten().tolist()]


def shortlist(found: Iterable[Channel], count: int, per_layer: int) -> list[Channel]:
    """The `count` channels to look at, highest value first.

    Half of the places (rounded up) are given away with at most `per_layer` for each layer, so that a layer in which
    values are large does not take them all; the other half goes to the best of the rest.
    """
    ranked = sorted(found, key=lambda channel: -channel.value)
    taken: Counter[str] = Counter()
    first: list[Channel] = []
    for channel in ranked:
        if len(first) < (count + 1) // 2 and taken[channel.layer] < per_layer:
            first.append(channel)
            taken[channel.layer] += 1
    rest = [channel for channel in ranked if channel not in first]
    return sorted(first + rest[: count - len(first)], key=lambda channel: -channel.value)
