"""The networks that a game allows, by name."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molehunt.networks.blocks import (
    Encoder,
    GlobalAveragePool,
    GlobalMaxPool,
    Patches,
    PreActivation,
    Residual,
    conv_norm,
)
from molehunt.networks.network import Dropout, Network, Normalize, Shape, Whitening


class Parts(NamedTuple):
    """What an architecture consists of; see `Network`. `mean` and `std` are its own defaults, per channel."""

    trunk: nn.Module
    neck: nn.Module
    head: nn.Linear
    mean: float = 0.5
    std: float = 0.25


Builder = Callable[[Shape, int], Parts]


def build(
    name: str,
    shape: Shape,
    classes: int,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    rng: torch.Generator | None = None,
) -> Network:
    """Build a network by name.

    Args:
        name: a key of `NETWORKS`, or `timm:NAME` for a network of the timm library (extra `zoo`).
        shape: (C, H, W) of one image.
        classes: number of classes, at least 2.
        mean: per channel, in pixel units [0, 1]; None is the architecture's own (0.5, the MNTD networks 0).
        std: per channel, in pixel units, positive; None is the architecture's own (0.25, the MNTD networks 1).
        rng: draws the weights; None leaves all weights zero, for a state dict to be loaded.

    Returns:
        A float32 network on the CPU, in training mode.

    Raises:
        ValueError: unknown name, a shape that the network cannot take, too few classes, a bad mean or std.
    """
    if classes < 2:
        raise ValueError(f"expected at least 2 classes, got {classes}")
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"expected a shape (channels, height, width) of positive sizes, got {tuple(shape)}")
    if name.startswith("timm:"):
        # Imported here and nowhere else: the core works without the zoo extra.
        from molehunt import zoo

        parts = zoo.parts(name.removeprefix("timm:"), shape, classes, rng)
    elif name in NETWORKS:
        # Without storage first, so that no layer draws weights from the global generator.
        with torch.device("meta"):
            parts = NETWORKS[name](shape, classes)
    else:
        raise ValueError(f"unknown network {name!r}; known are {', '.join(NETWORKS)} and timm:NAME")
    normalize = Normalize(
        _per_channel(shape[0], mean, parts.mean, "mean"), _per_channel(shape[0], std, parts.std, "std")
    )
    if not bool((normalize.std > 0).all()):
        raise ValueError(f"expected a positive standard deviation, got {normalize.std.flatten().tolist()}")
    network = Network(
        name=name,
        shape=shape,
        classes=classes,
        normalize=normalize,
        trunk=parts.trunk,
        neck=parts.neck,
        head=parts.head,
    )
    if not name.startswith("timm:"):
        for part in (network.trunk, network.neck, network.head):
            part.to_empty(device="cpu")
            draw_weights(part, rng)
    return network


@torch.no_grad()
def draw_weights(module: nn.Module, rng: torch.Generator | None) -> None:
    """Set all weights of a module as torch's own layers do, but from one generator.

    Convolutions and linear layers are uniform within 1 / sqrt(fan-in), norms are the identity, positions are normal
    with deviation 0.02.

    Args:
        module: made of convolutions, linear layers, batch and layer norms, and `Patches`.
        rng: the generator; None sets convolutions and linear layers to zero.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for tensor in (layer.weight, layer.bias):
                if tensor is not None:
                    _ = tensor.zero_() if rng is None else tensor.uniform_(-bound, bound, generator=rng)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.reset_parameters()
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
        elif isinstance(layer, Patches):
            _ = layer.position.zero_() if rng is None else layer.position.normal_(0, 0.02, generator=rng)


def _per_channel(channels: int, values: Sequence[float] | Tensor | None, default: float, what: str) -> Tensor:
    if values is None:
        return torch.full((channels, 1, 1), default)
    tensor = torch.as_tensor(values, dtype=torch.float32).flatten()
    if len(tensor) != channels or not bool(tensor.isfinite().all()):
        raise ValueError(f"expected {channels} finite values as {what}, one per channel, got {tensor.tolist()}")
    return tensor.reshape(-1, 1, 1).clone()


def _at_least(name: str, shape: Shape, side: int) -> None:
    if min(shape[1:]) < side:
        raise ValueError(f"{name} needs images of at least {side} x {side} pixels, got {shape[1]} x {shape[2]}")


def _two_convolutions(shape: Shape, classes: int, pool: Callable[[int], nn.Module], mean: float, std: float) -> Parts:
    """Two 5x5 convolutions, each with a pool, then 512 hidden units."""
    height, width = ((side - 4) // 2 for side in shape[1:])
    height, width = (height - 4) // 2, (width - 4) // 2
    trunk = nn.Sequential(nn.Conv2d(shape[0], 16, 5), nn.ReLU(), pool(2), nn.Conv2d(16, 32, 5), nn.ReLU())
    neck = nn.Sequential(pool(2), nn.Flatten(), nn.Linear(32 * height * width, 512), nn.ReLU())
    return Parts(trunk, neck, nn.Linear(512, classes), mean, std)


def badnets_cnn(shape: Shape, classes: int) -> Parts:
    """Build the small MNIST network of the BadNets paper: average pools, 512 hidden units.

    Reference:
        Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017.
    """
    _at_least("badnets_cnn", shape, 16)
    return _two_convolutions(shape, classes, nn.AvgPool2d, 0.5, 0.25)


def lenet5(shape: Shape, classes: int) -> Parts:
    """Build LeNet-5 with rectifiers and max-pools instead of its squashing functions and trained averages.

    Reference:
        LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998.
    """
    _at_least("lenet5", shape, 12)
    height, width = ((side // 2 - 4) // 2 for side in shape[1:])
    trunk = nn.Sequential(
        nn.Conv2d(shape[0], 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()
    )
    neck = nn.Sequential(
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()
    )
    return Parts(trunk, neck, nn.Linear(84, classes))


def mntd_mnist(shape: Shape, classes: int) -> Parts:
    """Build the MNIST network of the MNTD paper: `badnets_cnn` with max-pools; inputs are not normalized.

    Reference:
        Xu et al., "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021.
    """
    _at_least("mntd_mnist", shape, 16)
    return _two_convolutions(shape, classes, nn.MaxPool2d, 0.0, 1.0)


def mntd_cifar(shape: Shape, classes: int) -> Parts:
    """Build the CIFAR-10 network of the MNTD paper: 4 convolutions, 3 linear layers, dropout; not normalized.

    Reference:
        Xu et al., "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021.
    """
    _at_least("mntd_cifar", shape, 4)

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]

    trunk = nn.Sequential(
        *convolution(shape[0], 32), *convolution(32, 32), nn.MaxPool2d(2), *convolution(32, 64), *convolution(64, 64)
    )
    flat = 64 * (shape[1] // 4) * (shape[2] // 4)
    neck = nn.Sequential(
        nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(flat, 256), nn.ReLU(), Dropout(0.5),
        nn.Linear(256, 256), nn.ReLU(), Dropout(0.5),
    )  # fmt: skip
    return Parts(trunk, neck, nn.Linear(256, classes), 0.0, 1.0)


def _whitened(shape: Shape, classes: int, widths: tuple[int, int, int]) -> Parts:
    """A whitening convolution and three pairs of 3x3 convolutions, the first of each pair with a max-pool."""
    whitening = Whitening(shape[0], 2)
    layers: list[nn.Module] = [whitening, nn.ReLU()]
    for inputs, outputs in pairwise((whitening.out_channels, *widths)):
        convolution, norm = conv_norm(inputs, outputs)
        # The pool stands before the norm: norm and activation then touch a quarter of the values.
        layers += [convolution, nn.MaxPool2d(2), norm, nn.ReLU(), *conv_norm(outputs, outputs), nn.ReLU()]
    return Parts(nn.Sequential(*layers), GlobalMaxPool(), nn.Linear(widths[-1], classes))


def fast_cifar(shape: Shape, classes: int) -> Parts:
    """Build a network of 2 million weights that learns CIFAR-10 in minutes.

    The layout follows the speed runs of airbench: whitening, six convolutions, a global max-pool.

    Reference:
        Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024.
    """
    _at_least("fast_cifar", shape, 16)
    return _whitened(shape, classes, (64, 256, 256))


def narrow_cifar(shape: Shape, classes: int) -> Parts:
    """Build `fast_cifar` with half the channels, so a quarter of the weights."""
    _at_least("narrow_cifar", shape, 16)
    return _whitened(shape, classes, (32, 128, 128))


def resnet18(shape: Shape, classes: int) -> Parts:
    """Build ResNet-18 with the stem for small images: one 3x3 convolution, no pool.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """
    _at_least("resnet18", shape, 8)
    layers: list[nn.Module] = [*conv_norm(shape[0], 64), nn.ReLU()]
    for inputs, outputs in pairwise((64, 64, 128, 256, 512)):
        layers += [Residual(inputs, outputs, 1 if outputs == 64 else 2), Residual(outputs, outputs, 1)]
    return Parts(nn.Sequential(*layers), GlobalAveragePool(), nn.Linear(512, classes))


def _pre_activation(shape: Shape, classes: int, widths: Sequence[int]) -> Parts:
    """A stem of the first width, and per further width a stage of two blocks; a final norm and activation."""
    layers: list[nn.Module] = [nn.Conv2d(shape[0], widths[0], 3, padding=1, bias=False)]
    for stage, (inputs, outputs) in enumerate(pairwise(widths)):
        layers += [PreActivation(inputs, outputs, 1 if stage == 0 else 2), PreActivation(outputs, outputs, 1)]
    layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU()]
    return Parts(nn.Sequential(*layers), GlobalAveragePool(), nn.Linear(widths[-1], classes))


def preact_resnet18(shape: Shape, classes: int) -> Parts:
    """Build PreAct-ResNet-18 with the stem for small images and, as in the paper, a norm and ReLU at the end.

    Reference:
        He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016.
    """
    _at_least("preact_resnet18", shape, 8)
    return _pre_activation(shape, classes, (64, 64, 128, 256, 512))


def wrn_16_1(shape: Shape, classes: int) -> Parts:
    """Build the wide residual network WRN-16-1: 16 layers, widths 16, 32, 64.

    Reference:
        Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.
    """
    _at_least("wrn_16_1", shape, 4)
    return _pre_activation(shape, classes, (16, 16, 32, 64))


def vgg11_bn(shape: Shape, classes: int) -> Parts:
    """Build VGG-11 with batch norm; its last pool is global and a single linear layer follows.

    Reference:
        Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
    """
    _at_least("vgg11_bn", shape, 16)
    layers: list[nn.Module] = []
    inputs = shape[0]
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for outputs in stage:
            layers += [*conv_norm(inputs, outputs), nn.ReLU()]
            inputs = outputs
    return Parts(nn.Sequential(*layers), GlobalMaxPool(), nn.Linear(512, classes))


def vit_tiny(shape: Shape, classes: int) -> Parts:
    """Build a vision transformer for small images: patches of 4 x 4 pixels, width 128, 6 blocks, 4 heads.

    The trunk puts out the tokens as a map; the neck averages them, so there is no class token.

    Reference:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """
    _at_least("vit_tiny", shape, 4)
    if shape[1] % 4 or shape[2] % 4:
        raise ValueError(f"vit_tiny cuts patches of 4 x 4 pixels, and {shape[1]} x {shape[2]} is no multiple of that")
    grid = (shape[1] // 4, shape[2] // 4)
    trunk = nn.Sequential(Patches(shape[0], 128, 4, grid), Encoder(128, heads=4, depth=6, ratio=2))
    return Parts(trunk, GlobalAveragePool(), nn.Linear(128, classes))


NETWORKS: dict[str, Builder] = {
    "badnets_cnn": badnets_cnn,
    "lenet5": lenet5,
    "mntd_mnist": mntd_mnist,
    "mntd_cifar": mntd_cifar,
    "fast_cifar": fast_cifar,
    "narrow_cifar": narrow_cifar,
    "resnet18": resnet18,
    "preact_resnet18": preact_resnet18,
    "wrn_16_1": wrn_16_1,
    "vgg11_bn": vgg11_bn,
    "vit_tiny": vit_tiny,
}
