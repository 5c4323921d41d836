"""The shape that every network has, and the layers that are our own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel.

    Attributes:
        mean: buffer (C, 1, 1), in pixel units.
        std: buffer (C, 1, 1), in pixel units, positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        """Return (x - mean) / std, same shape (B, C, H, W)."""
        return (x - self.mean) / self.std


class Dropout(nn.Module):
    """Dropout that draws from a generator of its own, never from the global one.

    In eval mode it is the identity. In training mode it needs `dropout_rng`, which the trainer enters.

    Args:
        p: share of values set to zero, in [0, 1).

    Raises:
        ValueError: p lies outside [0, 1).
        RuntimeError: used in training mode outside `dropout_rng`.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"expected a dropout share in [0, 1), got {p}")
        self.p = p
        self.rng: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share p of its values set to zero and the others scaled by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        if self.rng is None:
            raise RuntimeError(
                "dropout in training mode needs a generator: train inside `with dropout_rng(model, rng)`"
            )
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.rng)
        return x * keep / (1 - self.p)


@contextmanager
def dropout_rng(model: nn.Module, rng: torch.Generator) -> Iterator[None]:
    """Let every `Dropout` of a model draw from one generator while the context is open.

    Args:
        model: any module.
        rng: a generator on the device of the model's activations.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Dropout)]
    for layer in layers:
        layer.rng = rng
    try:
        yield
    finally:
        for layer in layers:
            layer.rng = None


class Whitening(nn.Conv2d):
    """A convolution whose filters are the principal axes of image patches, scaled to unit variance.

    It has two filters per axis, one of each sign, because a rectifier follows. The filters are set from training
    images by `initialize` and are not trained afterwards; in the state dict they are an ordinary weight.

    Args:
        channels: input channels C.
        size: side of the patches, in pixels.
        stride: step between patches, in pixels.

    Reference:
        The idea is used for CIFAR-10 speed runs, e.g. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single
        GPU", 2024.
    """

    def __init__(self, channels: int, size: int = 2, stride: int = 1) -> None:
        super().__init__(channels, 2 * channels * size * size, size, stride=stride, bias=False)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def initialize(self, x: Tensor, floor: float = 5e-4) -> None:
        """Set the filters from images as this layer sees them, that is, normalized.

        Args:
            x: (N, C, H, W) normalized training images; a few thousand are enough.
            floor: added to the variance of every axis, so that empty directions are not blown up.
        """
        size = self.kernel_size[0]
        # Every patch of up to 2 000 images: the covariance is settled long before that.
        patches = F.unfold(x[:2000].double(), size).transpose(1, 2).flatten(0, 1)
        centered = patches - patches.mean(0)
        variances, axes = torch.linalg.eigh(centered.T @ centered / len(centered))
        # eigh leaves the sign of an axis open; both signs are used, so fix it to make the layer reproducible.
        axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))
        filters = (axes / torch.sqrt(variances.clamp(min=0) + floor)).T.flip(0)
        filters = filters.reshape(-1, x.shape[1], size, size)
        self.weight.copy_(torch.cat((filters, -filters)))


class Network(nn.Module):
    """An image classifier in four parts: normalize, trunk, neck, head.

    Pixels are floats in [0, 1]. The trunk ends with the last convolutional block, after its norm and
    activation; the neck pools, flattens and may hold hidden layers; the head is the last linear layer.

    Args:
        name: the name it is built by.
        shape: (C, H, W) of one image.
        classes: number of classes K.
        normalize: the first layer.
        trunk: (B, C, H, W) to (B, D, h, w). Transformers of the zoo extra may hand on (B, tokens, D).
        neck: (B, D, h, w) to (B, F), the penultimate features.
        head: (B, F) to logits (B, K).
    """

    def __init__(
        self,
        *,
        name: str,
        shape: Shape,
        classes: int,
        normalize: Normalize,
        trunk: nn.Module,
        neck: nn.Module,
        head: nn.Linear,
    ) -> None:
        super().__init__()
        self.name = name
        self.shape = shape
        self.classes = classes
        self.normalize = normalize
        self.trunk = trunk
        self.neck = neck
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images x (B, C, H, W) in [0, 1]."""
        logits: Tensor = self.head(self.neck(self.trunk(self.normalize(x))))
        return logits

    def initialize(self, images: Tensor) -> None:
        """Set the layers that are computed from data, not learned: today the `Whitening` convolution.

        A network without such a layer is left as it is. Call it once, before training from scratch.

        Args:
            images: (N, C, H, W) training images in [0, 1].
        """
        for layer in self.trunk.modules():
            if isinstance(layer, Whitening):
                layer.initialize(self.normalize(images[:2000].to(layer.weight)))
                return
