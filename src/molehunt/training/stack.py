"""Several networks of one architecture as one module: their layers side by side, their numbers never mixed."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.networks import Network
from molehunt.networks.blocks import GlobalAveragePool, GlobalMaxPool, PreActivation, Residual
from molehunt.networks.network import Dropout, Normalize, Whitening

Rule = Callable[["Stack", str, nn.Module, Tensor], Tensor]


class Stack(nn.Module):
    """S networks of one architecture that run and train in the same operations.

    A convolution of S networks is one convolution in S groups, a linear layer one batched matrix product, and a batch
    norm one over S times the channels, so its statistics are exactly each network's own. No operation adds numbers of
    two networks. Activations are (B, S C, H, W) before and (S, B, F) after the flattening.

    The parameters are those of the networks, one behind the other, and are held here; the networks given are not
    changed until `unstack`.

    Args:
        networks: S networks in the same mode, of one name, shape and number of classes.

    Raises:
        ValueError: none, or networks that differ in architecture.
        TypeError: a layer that has no rule here, named.
    """

    def __init__(self, networks: Sequence[Network]) -> None:
        super().__init__()
        if not networks:
            raise ValueError("expected at least one network to stack")
        kinds = {(network.name, network.shape, network.classes) for network in networks}
        if len(kinds) > 1:
            raise ValueError(f"expected networks of one architecture, got {sorted(kinds)}")
        # Kept out of the module tree: its parameters are not to be trained, its layers only say what to do.
        self._plan = (networks[0],)
        self.size = len(networks)
        for path, layer in networks[0].named_modules():
            if not any(True for _ in layer.children()) and type(layer) not in RULES:
                listed = ", ".join(sorted(kind.__name__ for kind in RULES))
                raise TypeError(f"no rule to stack {type(layer).__name__} ({path}); known are {listed}")
            if any(True for _ in layer.children()) and not isinstance(layer, Network) and type(layer) not in RULES:
                raise TypeError(f"no rule to stack the block {type(layer).__name__} ({path})")
        states = [network.state_dict() for network in networks]
        trained = {name: parameter.requires_grad for name, parameter in networks[0].named_parameters()}
        for name in states[0]:
            together = torch.stack([state[name] for state in states])
            if name in trained:
                self.register_parameter(_flat(name), nn.Parameter(together, requires_grad=trained[name]))
            else:
                self.register_buffer(_flat(name), together)
        self.rngs: tuple[torch.Generator, ...] = ()

    def tensor(self, name: str) -> Tensor:
        """Return the stacked tensor (S, ...) of a state-dict name of the single network."""
        found: Tensor = getattr(self, _flat(name))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (S, B, K) of one batch per network: x (S, B, C, H, W) in [0, 1]."""
        network = self._plan[0]
        members, batch, channels = x.shape[:3]
        if members != self.size:
            raise ValueError(f"expected one batch for each of {self.size} networks, got {members}")
        # Channels last for S C channels: the values of a pixel of all networks are neighbors.
        x = x.permute(1, 3, 4, 0, 2).reshape(batch, *x.shape[3:], members * channels).permute(0, 3, 1, 2)
        for path in ("normalize", "trunk", "neck", "head"):
            x = self.run(path, getattr(network, path), x)
        return x

    def run(self, path: str, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply one layer of all networks."""
        return RULES[type(layer)](self, path, layer, x)

    @torch.no_grad()
    def unstack(self, networks: Sequence[Network]) -> None:
        """Copy everything back into S networks, bit for bit.

        Raises:
            ValueError: another number of networks.
        """
        if len(networks) != self.size:
            raise ValueError(f"expected {self.size} networks, got {len(networks)}")
        for index, network in enumerate(networks):
            for name, value in network.state_dict().items():
                value.copy_(self.tensor(name)[index])


def _flat(name: str) -> str:
    return name.replace(".", "__")


def _own(stack: Stack, path: str, name: str) -> Tensor | None:
    """Return the stacked tensor of a layer, its first two dimensions merged: (S, n, ...) to (S n, ...)."""
    flat = _flat(f"{path}.{name}")
    return getattr(stack, flat).flatten(0, 1) if hasattr(stack, flat) else None


def _sequence(stack: Stack, path: str, layer: nn.Module, x: Tensor) -> Tensor:
    for name, child in layer.named_children():
        x = stack.run(f"{path}.{name}", child, x)
    return x


def _normalize(stack: Stack, path: str, _: nn.Module, x: Tensor) -> Tensor:
    mean, std = _own(stack, path, "mean"), _own(stack, path, "std")
    assert mean is not None
    assert std is not None
    return (x - mean) / std


def _convolution(stack: Stack, path: str, layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise TypeError(f"no rule to stack a convolution with padding {layer.padding!r}, {layer.padding_mode} ({path})")
    weight = _own(stack, path, "weight")
    assert weight is not None
    groups = stack.size * layer.groups
    return F.conv2d(x, weight, _own(stack, path, "bias"), layer.stride, layer.padding, layer.dilation, groups)


def _linear(stack: Stack, path: str, _: nn.Module, x: Tensor) -> Tensor:
    weight = stack.tensor(f"{path}.weight").transpose(1, 2)
    if hasattr(stack, _flat(f"{path}.bias")):
        return torch.baddbmm(stack.tensor(f"{path}.bias").unsqueeze(1), x, weight)
    return torch.bmm(x, weight)


def _batch_norm(stack: Stack, path: str, layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.BatchNorm2d)
    mean, variance = _own(stack, path, "running_mean"), _own(stack, path, "running_var")
    weight, bias = _own(stack, path, "weight"), _own(stack, path, "bias")
    rate = 0.0 if layer.momentum is None else layer.momentum
    if layer.training and layer.track_running_stats:
        counted = stack.tensor(f"{path}.num_batches_tracked")
        counted.add_(1)
        if layer.momentum is None:
            rate = 1.0 / float(counted.flatten()[0])
    # The merged statistics are views of the stacked buffers, so batch_norm updates those in place.
    return F.batch_norm(x, mean, variance, weight, bias, layer.training or mean is None, rate, layer.eps)


def _pointwise(stack: Stack, path: str, layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return out


def _flatten(stack: Stack, path: str, layer: nn.Module, x: Tensor) -> Tensor:
    batch, channels = x.shape[:2]
    return x.reshape(batch, stack.size, channels // stack.size * math.prod(x.shape[2:])).transpose(0, 1)


def _pooled(stack: Stack, path: str, layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return out.reshape(len(out), stack.size, -1).transpose(0, 1)


def _dropout(stack: Stack, path: str, layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, Dropout)
    if not layer.training or layer.p == 0:
        return x
    if not stack.rngs:
        raise RuntimeError("dropout in training mode needs a generator per network: set Stack.rngs")
    # Each network draws from its own generator and in the shape of its own activations, as it would alone.
    own = x if x.dim() == 3 else x.reshape(len(x), stack.size, -1, *x.shape[2:]).transpose(0, 1)
    keep = torch.stack(
        [torch.empty_like(one).bernoulli_(1 - layer.p, generator=rng) for one, rng in zip(own, stack.rngs, strict=True)]
    )
    out = own * keep / (1 - layer.p)
    return out if x.dim() == 3 else out.transpose(0, 1).reshape(x.shape)


def _residual(stack: Stack, path: str, layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, Residual)
    out: Tensor = layer.activation(
        stack.run(f"{path}.residual", layer.residual, x) + stack.run(f"{path}.shortcut", layer.shortcut, x)
    )
    return out


def _pre_activation(stack: Stack, path: str, layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, PreActivation)
    a = stack.run(f"{path}.activation", layer.activation, x)
    rest = x if layer.shortcut is None else stack.run(f"{path}.shortcut", layer.shortcut, a)
    return stack.run(f"{path}.residual", layer.residual, a) + rest


RULES: dict[type[nn.Module], Rule] = {
    nn.Sequential: _sequence,
    Normalize: _normalize,
    nn.Conv2d: _convolution,
    Whitening: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: _pointwise,
    nn.MaxPool2d: _pointwise,
    nn.AvgPool2d: _pointwise,
    nn.Identity: _pointwise,
    nn.Flatten: _flatten,
    GlobalMaxPool: _pooled,
    GlobalAveragePool: _pooled,
    Dropout: _dropout,
    Residual: _residual,
    PreActivation: _pre_activation,
}
"""How each kind of layer runs for all networks at once; a subclass needs an entry of its own."""
