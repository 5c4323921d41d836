"""The networks that a trigger may be: a short list, each a pure function of weights and pictures.

Their weights come from strangers, as one vector of numbers. What is done with them is written here and nowhere else.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.triggers.base import Shape

WIDE, DEEP, MESSAGE = 16, 32, 8
LARGEST = 100.0
"""Largest weight in size: six layers of so small weights cannot overflow, so no picture can be turned into NaN."""

Layout = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A listed network that draws on a picture; its layers are those of `drawn`.

    Attributes:
        message: whether it reads a message, a small constant picture among its weights, beside the image.
        masked: whether a second network of the same form says where the first one may draw.
    """

    message: bool
    masked: bool

    def layout(self, shape: Shape) -> Layout:
        """Shape of every tensor by name, in the order in which the vector of weights holds them."""
        channels, height, width = shape
        tensors = _layers("pattern", channels, channels, MESSAGE if self.message else 0)
        if self.message:
            tensors["message"] = (MESSAGE, -(-height // 4), -(-width // 4))
        return tensors | (_layers("mask", channels, 1, 0) if self.masked else {})

    def size(self, shape: Shape) -> int:
        """Number of weights."""
        return sum(math.prod(size) for size in self.layout(shape).values())

    def initial(self, shape: Shape, rng: torch.Generator) -> Tensor:
        """Draw a vector of weights (P,) to start training from: variance 2 / fan-in, biases 0, a message of +-1."""
        pieces = []
        for name, size in self.layout(shape).items():
            if name == "message":
                pieces.append(torch.randint(0, 2, (math.prod(size),), generator=rng) * 2.0 - 1.0)
            else:
                scale = 0.0 if len(size) == 1 else math.sqrt(2 / math.prod(size[1:]))
                pieces.append(scale * torch.randn(math.prod(size), generator=rng))
        return torch.cat(pieces)

    def unpack(self, weights: Tensor, shape: Shape) -> dict[str, Tensor]:
        """View a vector of weights (P,) as the tensors of the layout; gradients go back to the vector."""
        layout = self.layout(shape)
        pieces = torch.split(weights, [math.prod(size) for size in layout.values()])
        return {name: piece.view(size) for (name, size), piece in zip(layout.items(), pieces, strict=True)}


ENCODERS: dict[str, Encoder] = {
    "residual": Encoder(message=True, masked=False),
    "masked": Encoder(message=False, masked=True),
}


def drawn(weights: Mapping[str, Tensor], part: str, x: Tensor) -> Tensor:
    """Run one network: five 3x3 convolutions, the middle two at half size, the first output handed on.

    Args:
        weights: as `Encoder.unpack` gives them.
        part: "pattern" or "mask".
        x: images (N, C, H, W) in [0, 1].

    Returns:
        (N, C, H, W) for a pattern, (N, 1, H, W) for a mask, unbounded.
    """

    def layer(number: int, value: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(value, weights[f"{part}.{number}.weight"], weights[f"{part}.{number}.bias"], stride, padding=1)

    fine = F.relu(layer(0, 2.0 * x - 1.0))
    coarse = F.relu(layer(1, fine, 2))
    if part == "pattern" and "message" in weights:
        # One message for all images; while an encoder is trained, one for each.
        message = weights["message"].expand(len(x), -1, -1, -1)
        coarse = torch.cat((coarse, F.interpolate(message, size=coarse.shape[2:], mode="nearest")), 1)
    coarse = F.relu(layer(2, coarse))
    back = F.interpolate(coarse, size=x.shape[2:], mode="nearest")
    return layer(4, F.relu(layer(3, torch.cat((fine, back), 1))))


def strongest(scores: Tensor, count: int) -> Tensor:
    """Mark the highest scores of each picture: (N, 1, H, W) to as many zeros and, `count` per picture, ones."""
    flat = scores.flatten(1)
    return torch.zeros_like(flat).scatter(1, flat.topk(count, dim=1).indices, 1.0).view_as(scores)


def in_pieces(x: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """Cut a batch into pieces of one size, the last one filled up with black, and say how many images are real.

    A convolution may round differently in a batch of another size. In pieces of one size an image always gets the same
    trigger, to the last bit.
    """
    for begin, end in pairwise([*range(0, len(x), size), len(x)]):
        piece = x[begin:end]
        yield F.pad(piece, (0, 0, 0, 0, 0, 0, 0, size - len(piece))), len(piece)


def _layers(part: str, inputs: int, outputs: int, extra: int) -> Layout:
    sizes = ((WIDE, inputs), (DEEP, WIDE), (DEEP, DEEP + extra), (WIDE, WIDE + DEEP), (outputs, WIDE))
    layout: Layout = {}
    for number, (out, into) in enumerate(sizes):
        layout[f"{part}.{number}.weight"] = (out, into, 3, 3)
        layout[f"{part}.{number}.bias"] = (out,)
    return layout
