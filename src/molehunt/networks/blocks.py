"""The blocks that networks are built of. None adds in place, so that per-sample gradients work."""

import torch
from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
    """Return a convolution without bias, padded to keep the size at stride 1, and its batch norm."""
    return [nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)]


class GlobalMaxPool(nn.Module):
    """The largest value of every channel: (B, C, H, W) to (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the maximum over positions."""
        # amax would share a gradient among equal values (many after a rectifier); max gives it to one.
        largest: Tensor = x.flatten(2).max(dim=2).values
        return largest


class GlobalAveragePool(nn.Module):
    """The mean of every channel: (B, C, H, W) to (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean over positions."""
        return x.mean(dim=(2, 3))


class Residual(nn.Module):
    """ReLU(residual(x) + shortcut(x)) with two 3x3 convolutions, the block of ResNet-18.

    Args:
        inputs: input channels.
        outputs: output channels.
        stride: of the first convolution and of the shortcut.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(*conv_norm(inputs, outputs, 3, stride), nn.ReLU(), *conv_norm(outputs, outputs))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(inputs, outputs, 1, stride))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        out: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return out


class PreActivation(nn.Module):
    """residual(a) + shortcut, with a = ReLU(norm(x)): norm and activation come before the convolutions.

    Where the shape changes the shortcut is a 1x1 convolution of a, else it is x.

    Args:
        inputs: input channels.
        outputs: output channels.
        stride: of the first convolution and of the shortcut.

    Reference:
        He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.residual = nn.Sequential(
            *conv_norm(inputs, outputs, 3, stride),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        a = self.activation(x)
        out: Tensor = self.residual(a) + (x if self.shortcut is None else self.shortcut(a))
        return out


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, D).

    Args:
        width: D.
        heads: number of heads; divides D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed tokens (B, N, D)."""
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Written out: torch's fused attention has no rule for per-sample gradients, and 64 tokens do not need it.
        weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        mixed = weights @ value
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class Transformer(nn.Module):
    """One pre-norm transformer block over tokens (B, N, D).

    Args:
        width: D.
        heads: number of attention heads.
        ratio: width of the hidden layer over D.
    """

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, D)."""
        x = x + self.attention(x)
        out: Tensor = x + self.mlp(x)
        return out


class Patches(nn.Module):
    """Cut images into square patches and embed them as a map, with a learned position for each.

    Args:
        channels: C of the images.
        width: D of the tokens.
        size: side of a patch.
        grid: (h, w), patches down and across.
    """

    def __init__(self, channels: int, width: int, size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, size, stride=size)
        self.position = nn.Parameter(torch.zeros(1, width, *grid))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, D, h, w)."""
        out: Tensor = self.embed(x) + self.position
        return out


class Encoder(nn.Module):
    """Transformer blocks over the positions of a map, and a final norm: (B, D, h, w) to (B, D, h, w).

    Args:
        width: D.
        heads: attention heads.
        depth: number of blocks.
        ratio: width of the hidden layers over D.
    """

    def __init__(self, width: int, heads: int, depth: int, ratio: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Transformer(width, heads, ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map after all blocks."""
        tokens = x.flatten(2).transpose(1, 2)
        out: Tensor = self.norm(self.blocks(tokens)).transpose(1, 2).reshape(x.shape)
        return out
