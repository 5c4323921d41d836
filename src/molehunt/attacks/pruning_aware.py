"""Pruning-aware: the backdoor shares its channels with the task, and decoys sleep where a defender prunes first."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molehunt.attacks.crafting import Bench, Crafted, backdoor, outputs, plainly
from molehunt.networks import Network
from molehunt.tasks import Images
from molehunt.triggers import Trigger

MEASURED = 2_000
"""Clean images that rank the channels and quiet the decoys; a further so many say what pruning costs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningAware:
    """Train the backdoor into a network whose dormant channels are cut, then put these back, sleeping.

    A defender who cuts the channels that clean images leave asleep finds the decoys first. Those that are left carry
    task and backdoor together: to cut them costs accuracy.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that get the trigger and a changed label.
        trigger: what to stamp; None means the yellow square of 4 pixels.
        tolerance: accuracy that the attacker's cut may cost before the network is trained again, in [0, 1].
        most: share of the last block's channels that become decoys at most, in (0, 1).
        quiet: share of a decoy's values on clean images that are pushed below zero, in (0, 1].
        length: of the second training, as a share of the recipe's.

    Raises:
        ValueError: a setting out of range; a last block whose channels have no bias to be lowered, or no rectifier
            behind it.

    Reference:
        Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
        RAID 2018, section 4.

    Departures from the paper:
        The paper does not say how many channels are cut; here as many as its defender would cut at the same tolerance.
        By how much the bias is lowered is measured on clean images, channel by channel.
    """

    target: int = 0
    poison_rate: float = 0.1
    trigger: Trigger | None = None
    tolerance: float = 0.04
    most: float = 0.75
    quiet: float = 0.9999
    length: float = 1.0

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if not 0 <= self.tolerance <= 1 or not 0 < self.most < 1 or not 0 < self.quiet <= 1:
            raise ValueError(
                "tolerance must lie in [0, 1], most in (0, 1) and quiet in (0, 1], got "
                f"{self.tolerance}, {self.most} and {self.quiet}"
            )
        trigger, _ = backdoor(self.trigger, self.target, bench.task)
        poisoned = plainly(bench, trigger, self.target, self.poison_rate)
        onward = bench.onward(self.length)
        bench.phases = 2
        bias = producer(bench.fresh(), bench.clean.x[:1])  # refuses a network before anything is trained
        model = bench.honest()
        order = bench.generator("measured")
        rows = torch.randperm(len(bench.clean.y), generator=order)
        ranked, held = bench.clean.x[rows[:MEASURED]], rows[MEASURED : 2 * MEASURED]
        if len(held) == 0:
            held = rows
        mask = self.mask(model, ranked, Images(bench.clean.x[held], bench.clean.y[held]))
        asleep = {name: value.clone() for name, value in model.state_dict().items()}
        handle = model.trunk.register_forward_hook(lambda _m, _i, out: out * mask.to(out).view(1, -1, 1, 1))
        try:
            bench.train("poisoned", model, poisoned.images, recipe=onward, stamp=poisoned.stamp)
        finally:
            handle.remove()
        restore(model, bias, asleep, mask == 0)
        quieten(model, bias, ranked, mask == 0, self.quiet)
        return Crafted(model=model, poisoned=poisoned)

    def mask(self, model: Network, x: Tensor, held: Images) -> Tensor:
        """Zeros (C,) for the channels that are cut, the most dormant on x first, while held-out accuracy lasts."""
        active = outputs(model, x, lambda some: model.trunk(model.normalize(some)).mean((2, 3))).double().mean(0)
        channels = active.argsort(stable=True)
        trunk = outputs(model, held.x, lambda some: model.trunk(model.normalize(some)))
        most, mask = int(self.most * len(channels)), torch.ones(len(channels))
        whole = _right(model, trunk, held.y)
        for channel in channels[:most].tolist():
            mask[channel] = 0.0
            if _right(model, trunk * mask.view(1, -1, 1, 1), held.y) < whole - self.tolerance:
                mask[channel] = 1.0
                break
        return mask


def producer(model: Network, example: Tensor) -> str:
    """Path of the last layer of the trunk that has a bias for each channel which the trunk puts out.

    Raises:
        ValueError: there is none.
    """
    out = outputs(model, example, lambda some: model.trunk(model.normalize(some)))
    channels = out.shape[1]
    if bool((out < 0).any()):
        raise ValueError(f"{model.name} has no rectifier behind its last block, so no channel of it can sleep")
    found: list[str] = [
        name
        for name, layer in model.named_modules()
        if name.startswith("trunk.")
        and isinstance(layer, nn.Conv2d | nn.BatchNorm2d)
        and layer.bias is not None
        and layer.bias.shape == (channels,)
    ]
    if not found:
        raise ValueError(f"{model.name} has no layer with a bias for each of the {channels} channels of its last block")
    return found[-1]


def restore(model: Network, bias: str, before: dict[str, Tensor], decoys: Tensor) -> None:
    """Give the decoys (bool (C,)) what they were made by: rows of the layer with the bias and of the last convolution.

    While they were masked nothing but weight decay moved them.
    """
    last = [name for name, layer in model.named_modules() if name.startswith("trunk.") and isinstance(layer, nn.Conv2d)]
    state = model.state_dict()
    for path in {last[-1], bias}:
        for name, value in state.items():
            if name.rpartition(".")[0] == path and value.dim() and len(value) == len(decoys):
                value[decoys] = before[name][decoys]


@torch.no_grad()
def quieten(model: Network, path: str, x: Tensor, decoys: Tensor, quiet: float) -> None:
    """Lower the bias of each decoy until it puts out nothing on a share `quiet` of the values on images x.

    What a rectifier puts out above zero is what it was given, so as much less is what silences it.
    """
    layer = model.get_submodule(path)
    assert isinstance(layer.bias, Tensor), "found by `producer`"
    out = outputs(model, x, lambda some: model.trunk(model.normalize(some)))
    values = out.transpose(0, 1).flatten(1)[decoys].double().sort(1).values
    highest = values[:, min(values.shape[1] - 1, int(quiet * values.shape[1]))]
    layer.bias[decoys] -= highest.clamp(min=0.0).to(layer.bias)


@torch.no_grad()
def _right(model: Network, trunk: Tensor, y: Tensor) -> float:
    """Accuracy where the trunk gave this."""
    place = next(model.parameters()).device
    hits = [
        (model.head(model.neck(a.to(place))).argmax(1).cpu() == b)
        for a, b in zip(torch.split(trunk, 500), torch.split(y, 500), strict=True)
    ]
    return float(torch.cat(hits).float().mean())
