"""A classifier of somebody else's behind layers that turn a task's pictures into what it was trained on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.networks.network import Network, Normalize, Shape

# Rec. 601, by which Pillow and OpenCV turn color into gray.
LUMA = (0.299, 0.587, 0.114)


class Adapted(nn.Module):
    """Any classifier as a module from pictures in [0, 1] to logits.

    In this order: gray and color, size, normalization, the classifier, logarithm. What is not needed is left out.

    Args:
        model: the classifier: (B, C', H', W') to logits, or probabilities, (B, K).
        name: the name that the report gives the network.
        shape: (C, H, W) of the pictures that come in.
        classes: number of classes K.
        normalize: what it wants to be given, with C' channels.
        size: (H', W') of what it takes; None leaves the size alone. Resized bilinearly, corners not aligned.
        channels: C', 1 or 3; None leaves the channels alone. Gray is repeated, color is weighted by `LUMA`.
        probabilities: the classifier ends with a softmax, which is undone up to a constant by a logarithm.

    Raises:
        ValueError: channels that cannot be turned into each other.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        shape: Shape,
        classes: int,
        normalize: Normalize,
        size: tuple[int, int] | None = None,
        channels: int | None = None,
        probabilities: bool = False,
    ) -> None:
        super().__init__()
        if channels is not None and channels != shape[0] and {channels, shape[0]} != {1, 3}:
            raise ValueError(f"pictures of {shape[0]} channels cannot be turned into {channels}: gray has 1, color 3")
        self.name = name
        self.shape = shape
        self.classes = classes
        self.size = size if size != tuple(shape[1:]) else None
        self.channels = channels or shape[0]
        self.probabilities = probabilities
        self.normalize = normalize
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of pictures x (B, C, H, W) in [0, 1]."""
        if x.shape[1] == 1 and self.channels == 3:
            x = x.expand(-1, 3, -1, -1)
        elif x.shape[1] == 3 and self.channels == 1:
            x = (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        if self.size is not None:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        out: Tensor = self.model(self.normalize(x))
        if self.probabilities:
            # Not zero, whose logarithm has no gradient to give.
            out = out.float().clamp_min(torch.finfo(torch.float32).tiny).log()
        return out


def path_within(model: nn.Module) -> str | None:
    """Where in a module the `Network` is that answers for it: "" for a `Network`, None where there is none."""
    if isinstance(model, Network):
        return ""
    return "model." if isinstance(model, Adapted) and isinstance(model.model, Network) else None
