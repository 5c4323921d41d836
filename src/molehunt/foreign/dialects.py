"""How others name the weights of networks that compute exactly what one of ours does.

A dialect is taken only where its names *and* the architecture behind them are one known thing; tests hold each against
a network written in the foreign spelling.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from molehunt import networks
from molehunt.networks import Network
from molehunt.networks.network import Shape

_TOP = {"conv1": "trunk.0", "bn1": "trunk.1", "linear": "head", "fc": "head"}
_RESIDUAL = {"conv1": "residual.0", "bn1": "residual.1", "conv2": "residual.3", "bn2": "residual.4"}
_PRE = {"bn1": "activation.0", "conv1": "residual.0", "bn2": "residual.1", "conv2": "residual.3"}


def without_final_norm(shape: Shape, classes: int) -> Network:
    """Build `preact_resnet18` as most toolkits do: the sum of the last block is pooled as it is."""
    made = networks.build("preact_resnet18", shape, classes)
    assert isinstance(made.trunk, nn.Sequential)
    made.trunk = made.trunk[:-2]
    made.name = "preact_resnet18 without final norm"
    return made


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """A foreign spelling of one network.

    Attributes:
        network: the name of the network that it spells; what `--network` may say.
        spoken: who writes so, for the report.
        marks: patterns of which each must be found among the names, so that two spellings are not confused.
        rename: from a foreign module path to ours, None where there is no such module.
        make: builds the network, zero weights.
        certain: whether the names alone say which network it is. Where they do not, the user has to name it.
    """

    network: str
    spoken: str
    marks: tuple[str, ...]
    rename: Callable[[str], str | None] = field(repr=False)
    make: Callable[[Shape, int], Network] = field(repr=False)
    certain: bool = True

    def speaks(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the names bear all marks, and the first convolution is 3x3 as in every network here."""
        stem = next((v for k, v in state.items() if k.removeprefix("features.") == "conv1.weight"), None)
        marked = all(any(re.match(mark, name) for name in state) for mark in self.marks)
        return marked and stem is not None and tuple(stem.shape[2:]) == (3, 3)

    def translate(self, name: str) -> str | None:
        """Turn the name of a tensor into ours; None where this dialect has no such name."""
        path, _, kind = name.rpartition(".")
        ours = self.rename(path)
        return None if ours is None else f"{ours}.{kind}"


def _resnet(path: str) -> str | None:
    path = path.removeprefix("features.").removeprefix("classifier.")
    if path in _TOP:
        return _TOP[path]
    found = re.fullmatch(r"layer([1-4])\.([01])\.(?:(conv[12]|bn[12])|(?:shortcut|downsample)\.([01]))", path)
    if found is None:
        return None
    stage, block, part, projection = found.groups()
    return f"trunk.{3 + 2 * (int(stage) - 1) + int(block)}." + (_RESIDUAL[part] if part else f"shortcut.{projection}")


def _preact(path: str) -> str | None:
    if path in {"conv1", "linear"}:
        return _TOP[path]
    found = re.fullmatch(r"layer([1-4])\.([01])\.(?:(conv[12]|bn[12])|shortcut\.0)", path)
    if found is None:
        return None
    stage, block, part = found.groups()
    return f"trunk.{1 + 2 * (int(stage) - 1) + int(block)}." + (_PRE[part] if part else "shortcut")


def _wide(path: str) -> str | None:
    if path in {"conv1", "bn1", "fc"}:
        return {"conv1": "trunk.0", "bn1": "trunk.7", "fc": "head"}[path]
    found = re.fullmatch(r"block([1-3])\.layer\.([01])\.(?:(conv[12]|bn[12])|convShortcut)", path)
    if found is None:
        return None
    group, block, part = found.groups()
    return f"trunk.{1 + 2 * (int(group) - 1) + int(block)}." + (_PRE[part] if part else "shortcut")


def _of(name: str) -> Callable[[Shape, int], Network]:
    return lambda shape, classes: networks.build(name, shape, classes)


_SMALL = _of("resnet18")
DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        network="resnet18",
        spoken="the CIFAR networks of many repositories (conv1, layer1.0.shortcut, linear)",
        marks=(r"conv1\.", r"bn1\.", r"layer2\.0\.shortcut\.", r"linear\."),
        rename=_resnet,
        make=_SMALL,
    ),
    Dialect(
        network="resnet18",
        spoken="TrojanZoo's resnet18_comp",
        marks=(r"features\.conv1\.", r"features\.layer2\.0\.downsample\.", r"classifier\.fc\."),
        rename=_resnet,
        make=_SMALL,
    ),
    Dialect(
        network="resnet18",
        spoken="torchvision's ResNet-18 with a 3x3 stem",
        marks=(r"conv1\.", r"layer2\.0\.downsample\.", r"fc\."),
        rename=_resnet,
        make=_SMALL,
        certain=False,  # a max-pool behind the stem leaves no mark in the names
    ),
    Dialect(
        network="preact_resnet18",
        spoken="BackdoorBench and the CIFAR networks of many repositories (conv1, layer1.0.bn1, linear, no final norm)",
        marks=(r"conv1\.", r"layer2\.0\.shortcut\.0\.", r"layer1\.0\.bn1\.", r"linear\."),
        rename=_preact,
        make=without_final_norm,
    ),
    Dialect(
        network="wrn_16_1",
        spoken="the wide residual networks of many repositories (block1.layer.0, convShortcut, fc)",
        marks=(r"conv1\.", r"block2\.layer\.0\.convShortcut\.", r"fc\."),
        rename=_wide,
        make=_of("wrn_16_1"),
    ),
)
