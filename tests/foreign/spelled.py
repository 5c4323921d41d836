"""Networks in the spelling of others, written for these tests: the oracle of every dialect."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, projection: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.projection = projection
        if stride != 1 or inputs != outputs:
            path = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            setattr(self, projection, path)

    def forward(self, x: Tensor) -> Tensor:
        way = getattr(self, self.projection, None)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + (x if way is None else way(x)))


class PreBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, projection: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.projection = projection
        if stride != 1 or inputs != outputs:
            way: nn.Module = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            setattr(self, projection, way if projection == "convShortcut" else nn.Sequential(way))

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x))
        way = getattr(self, self.projection, None)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(a)))) + (x if way is None else way(a))
        return out


def stages(block: type[Block] | type[PreBlock], projection: str) -> list[nn.Sequential]:
    widths = (64, 64, 128, 256, 512)
    return [
        nn.Sequential(block(a, b, 1 if a == b else 2, projection), block(b, b, 1, projection))
        for a, b in pairwise(widths)
    ]


class ResNet18(nn.Module):
    """`shortcut` and `linear`, as many CIFAR repositories have it, or `downsample` and `fc`, as torchvision."""

    def __init__(self, *, projection: str = "shortcut", head: str = "linear") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(Block, projection)
        self.head = head
        setattr(self, head, nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = getattr(self, self.head)(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


class PreActResNet18(nn.Module):
    """No norm behind the last block, as BackdoorBench and many CIFAR repositories have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(PreBlock, "shortcut")
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        out: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


class Group(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = PreBlock(inputs, outputs, stride, "convShortcut")
        self.layer = nn.Sequential(first, PreBlock(outputs, outputs, 1, "convShortcut"))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-16-1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1, self.block2, self.block3 = Group(16, 16, 1), Group(16, 32, 2), Group(32, 64, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        out: Tensor = self.fc(F.relu(self.bn1(x)).mean((2, 3)))
        return out


class Small(nn.Module):
    """The small MNIST network under names of its own; with average pools it is `badnets_cnn`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 5), nn.Conv2d(16, 32, 5)
        self.fc1, self.fc2 = nn.Linear(512, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv1, self.conv2):
            x = F.avg_pool2d(F.relu(layer(x)), 2)
        out: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return out


def shaken(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics that are not those of a fresh norm, so that a swapped one is noticed."""
    rng = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                tensor.data.add_(torch.rand(tensor.shape, generator=rng) * 0.3)
    return model.eval()
