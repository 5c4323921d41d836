"""How a network is taken apart by module path, without code per architecture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from molehunt.networks.adapted import path_within
from molehunt.networks.network import Network

# What may follow the last convolution and still belongs to its block.
_FINISH = ("norm", "relu", "gelu", "silu", "swish", "elu", "sigmoid", "tanh", "act", "mish")


class MissingPart(ValueError):
    """A model has no such part; a method that needs it has no opinion, which is no failure."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Anatomy:
    """The parts of a model, by module path.

    Attributes:
        layers: convolutions and linear layers in the order in which they first run. Layers that do not run are absent.
        block: path of the module that puts out the last convolutional block, after norm and activation.
        head: path of the last linear layer.
    """

    layers: dict[str, nn.Conv2d | nn.Linear]
    block: str
    head: str


@torch.no_grad()
def anatomy(model: nn.Module, example: Tensor) -> Anatomy:
    """Find a model's layers, last convolutional block and head by running it once, in eval mode.

    A `Network` says itself where its trunk and head are, also where it is `Adapted`. For any other module the block is
    the last module to finish that holds a convolution and puts out (B, C, H, W), together with a norm and an activation
    that follow it.

    Args:
        model: any module; its mode, weights and statistics are left as they are.
        example: (B, C, H, W) images in [0, 1].

    Returns:
        The parts by module path.

    Raises:
        MissingPart: the model has no convolution or no linear layer that runs.
    """
    layers: dict[str, nn.Conv2d | nn.Linear] = {}
    finished: list[tuple[str, nn.Module, torch.Size]] = []

    def watch(path: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(module: nn.Module, _inputs: tuple[object, ...], output: object) -> None:
            if isinstance(module, nn.Conv2d | nn.Linear):
                layers.setdefault(path, module)
            if path and isinstance(output, Tensor) and output.dim() == 4:
                finished.append((path, module, output.shape))

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in model.named_modules()]
    with _removing(handles), evaluating(model):
        model(example)
    linear = [path for path, layer in layers.items() if isinstance(layer, nn.Linear)]
    if not linear:
        raise MissingPart("the model runs no nn.Linear, so it has no head; wrap its classifier in one")
    if (path := path_within(model)) is not None:
        return Anatomy(layers=layers, block=f"{path}trunk", head=f"{path}head")
    return Anatomy(layers=layers, block=_last_block(finished), head=linear[-1])


def capture(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """Run a model and return what one of its modules puts out. Gradients flow unless the caller forbids them.

    Args:
        model: any module.
        path: module path, as in `Anatomy`.
        x: (B, C, H, W) images in [0, 1].

    Returns:
        The module's (last) output, with its own shape.

    Raises:
        ValueError: the path names no module, or the module did not run or put out no tensor.
    """
    outputs: list[object] = []
    handle = _module(model, path).register_forward_hook(lambda _m, _i, output: outputs.append(output))
    with _removing([handle]):
        model(x)
    if not outputs or not isinstance(outputs[-1], Tensor):
        raise ValueError(f"module {path!r} put out no tensor when the model ran")
    return outputs[-1]


def features(model: nn.Module, head: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run a model once and return its logits and what its head was given.

    Args:
        model: any module.
        head: path of the last linear layer, `Anatomy.head`.
        x: (B, C, H, W) images in [0, 1].

    Returns:
        logits (B, K) and penultimate features (B, D). Gradients flow unless the caller forbids them.

    Raises:
        ValueError: the path names no module, the head did not run, or its input is not (B, D).
    """
    inputs: list[Tensor] = []
    handle = _module(model, head).register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with _removing([handle]):
        logits: Tensor = model(x)
    if not inputs or inputs[-1].dim() != 2:
        shape = tuple(inputs[-1].shape) if inputs else "nothing"
        raise ValueError(f"expected the head {head!r} to be given (B, D), got {shape}")
    return logits, inputs[-1]


def tail(model: nn.Module, block: str, a: Tensor, example: Tensor) -> Tensor:
    """Return the logits that a model gives when one of its modules puts out a given tensor.

    For the trunk of a `Network` only the part behind it runs; in any other model the whole model runs on the
    example, and the module's output is replaced. Hooks on the module itself do not see the replacement.

    Args:
        model: any module.
        block: path of the module to be replaced.
        a: (B, ...) its output.
        example: (1, C, H, W) or larger, an image to run the other paths on; the first one is used.

    Returns:
        logits (B, K), differentiable with respect to a.

    Raises:
        ValueError: the path names no module, or the module did not run.
    """
    if isinstance(model, Network) and block == "trunk":
        logits: Tensor = model.head(model.neck(a))
        return logits
    ran = []

    def replace(_module: nn.Module, _inputs: object, _output: object) -> Tensor:
        ran.append(True)
        return a

    handle = _module(model, block).register_forward_hook(replace)
    with _removing([handle]):
        logits = model(example[:1].expand(len(a), -1, -1, -1))
    if not ran:
        raise ValueError(f"module {block!r} did not run, so its output cannot be replaced")
    return logits


def _last_block(finished: list[tuple[str, nn.Module, torch.Size]]) -> str:
    """Return the path of the last convolutional block among modules in the order in which they finished."""
    conv = [i for i, (_, module, _) in enumerate(finished) if any(isinstance(m, nn.Conv2d) for m in module.modules())]
    if not conv:
        raise MissingPart("the model runs no nn.Conv2d, so it has no last convolutional block")
    last = conv[-1]
    path, _, shape = finished[last]
    for later, module, size in finished[last + 1 :]:
        if isinstance(module, nn.Identity):
            continue
        if size != shape or not any(word in type(module).__name__.lower() for word in _FINISH):
            break
        path = later
    return path


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"no module {path!r} in {type(model).__name__}; see anatomy(model, example)") from None


@contextmanager
def _removing(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, so that asking it moves no statistics, and put every module's own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
