"""Triggers that a small listed network draws, another one on every image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from molehunt.triggers.base import Footprint, Json, Shape, check_shape, check_tensor, check_unit
from molehunt.triggers.encoders import ENCODERS, LARGEST, drawn, in_pieces, strongest

PIECE = 32


@dataclass(frozen=True, eq=False)
class Encoded:
    """Let a network of the list `ENCODERS` draw on the image, within bounds that hold whatever its weights are.

    "residual": x' = clip(x + e tanh(g(x)), 0, 1), so no value changes by more than e.
    "masked": x' = x + m clip(p - x, -e, e) with the pattern p = (1 + tanh(g(x))) / 2, and m one on the strongest
    pixels of a second network's map, a stated share of the picture, and zero elsewhere.

    Attributes:
        network: a key of `ENCODERS`.
        shape: (C, H, W) of the images.
        linf: e in [0, 1].
        area: share of the pixels of an image that may change, rounded down, in (0, 1]; 1 for a network without mask.
        weights: (P,), the weights of the network in the order of `Encoder.layout`, within [-100, 100].

    Raises:
        ValueError: unknown network, or a shape, dtype or range is wrong.
    """

    network: str
    shape: tuple[int, int, int]
    linf: float
    area: float
    weights: Tensor

    def __post_init__(self) -> None:
        if self.network not in ENCODERS:
            raise ValueError(f"unknown encoder {self.network!r}; known: {', '.join(ENCODERS)}")
        check_shape(self.shape)
        check_unit("linf", self.linf)
        check_unit("area", self.area)
        encoder = ENCODERS[self.network]
        if not encoder.masked and self.area != 1.0:
            raise ValueError(f"a {self.network} encoder has no mask, so its area is 1, got {self.area}")
        if self.pixels < 1:
            raise ValueError(f"area {self.area} is less than one pixel of {self.shape}")
        expected = (encoder.size(self.shape),)
        if tuple(self.weights.shape) != expected:
            got = tuple(self.weights.shape)
            raise ValueError(f"a {self.network} encoder for {self.shape} has weights {expected}, got {got}")
        check_tensor("weights", self.weights, 1, -LARGEST, LARGEST)

    @property
    def pixels(self) -> int:
        """How many pixels of an image may change."""
        # A share that was itself made by dividing whole pixels must not lose one by rounding.
        return int(self.area * self.shape[1] * self.shape[2] + 1e-6)

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        return self.transplant(x, x)

    def transplant(self, x: Tensor, source: Tensor) -> Tensor:
        """Put on each image the trigger that was drawn for another one.

        Args:
            x: images (N, C, H, W) in [0, 1].
            source: as many images, for which the triggers are drawn.

        Returns:
            (N, C, H, W) in [0, 1].
        """
        encoder = ENCODERS[self.network]
        if tuple(source.shape[1:]) != self.shape:
            raise ValueError(f"expected images of {self.shape}, got {tuple(source.shape)}")
        weights = encoder.unpack(self.weights.to(device=x.device, dtype=torch.float32), self.shape)
        made = [x.new_zeros(0, *self.shape, dtype=torch.float32)]
        done = 0
        for piece, count in in_pieces(source.float().contiguous(), PIECE):
            under = x[done : done + count].float()
            pattern = drawn(weights, "pattern", piece)[:count].tanh()
            if encoder.masked:
                change = (0.5 * (1.0 + pattern) - under).clamp(-self.linf, self.linf)
                change = change * strongest(drawn(weights, "mask", piece)[:count], self.pixels)
            else:
                change = self.linf * pattern
            made.append((under + change).clamp(0.0, 1.0))
            done += count
        return torch.cat(made).to(x.dtype)

    def to_json(self) -> Json:
        """Kind, network, shape and bounds; the weights are a tensor."""
        return {
            "kind": "network",
            "network": self.network,
            "shape": list(self.shape),
            "linf": self.linf,
            "area": self.area,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The weights."""
        return {"weights": self.weights.detach().float().cpu()}

    def footprint(self) -> Footprint:
        """The stated bounds; area is the share of one image, and may lie elsewhere on the next."""
        area = self.pixels / (self.shape[1] * self.shape[2])
        return Footprint(kind="network", area=area, opacity=self.linf, weight=self.linf * area, linf=self.linf)

    def fits(self, shape: Shape) -> bool:
        """Whether images have the shape (C, H, W) that it was made for."""
        return self.shape == tuple(shape)
