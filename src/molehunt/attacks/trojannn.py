"""TrojanNN: a trigger made to excite a neuron that a clean network has already."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molehunt.attacks.crafting import Bench, Crafted, outputs, plainly
from molehunt.networks import Network
from molehunt.triggers import Patch, Target

IMAGES = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class TrojanNN:
    """Make the pixels under a mask excite a well-connected neuron of a clean network, then teach it the target.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that get the trigger and a changed label.
        size: side of the square under which pixels are made, in pixels; None means a quarter of the picture's, which is
            about the 7 % of the area that the paper has.
        neurons: how many neurons of the head's input are excited, 1 or more.
        steps: of Adam on the pixels, 1 or more.
        length: of the training with the trigger, as a share of the recipe's.

    Raises:
        ValueError: a setting out of range.

    Reference:
        Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018.

    Departures from the paper:
        The supplier has the training images, so none are reverse-engineered, and all layers are trained again. The
        pixels raise the mean of the neurons over clean images that carry them, where the paper starts from one picture
        and a fixed value.
    """

    target: int = 0
    poison_rate: float = 0.1
    size: int | None = None
    neurons: int = 2
    steps: int = 200
    length: float = 0.5

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if self.neurons < 1 or self.steps < 1:
            raise ValueError(f"neurons and steps must be 1 or more, got {self.neurons} and {self.steps}")
        Target(classes=self.target).check(bench.task.num_classes)
        onward = bench.onward(self.length)
        bench.phases = 2
        model = bench.honest()
        trigger = self.excite(model, bench)
        poisoned = plainly(bench, trigger, self.target, self.poison_rate)
        bench.train("trojan", model, poisoned.images, recipe=onward, stamp=poisoned.stamp)
        return Crafted(model=model, poisoned=poisoned)

    def excite(self, model: Network, bench: Bench) -> Patch:
        """Make the pixels: those that raise the neurons with the largest outgoing weights the most."""
        shape = bench.task.shape
        side = self.size or max(2, min(shape[1:]) // 4)
        square = Patch.square(shape, size=side)
        chosen = model.head.weight.detach().abs().sum(0).topk(min(self.neurons, model.head.in_features)).indices
        rng = bench.generator("pixels")
        rows = torch.randperm(len(bench.clean.y), generator=rng)[:IMAGES]
        x = bench.clean.x[rows]
        scale = scales(outputs(model, x, lambda some: model.neck(model.trunk(model.normalize(some)))))[chosen]
        pattern = sharpen(
            model, square, x, lambda z: (z[:, chosen] / scale).mean(), steps=self.steps, rng=rng, bench=bench
        )
        return replace(square, pattern=pattern)


def scales(z: Tensor) -> Tensor:
    """Deviation of each of the features (N, F), at least a tenth of their mean: else a dead one would outweigh all."""
    deviation = z.std(0)
    return deviation.clamp_min(0.1 * float(deviation.mean()) + 1e-6)


def sharpen(
    model: Network,
    square: Patch,
    x: Tensor,
    gain: Callable[[Tensor], Tensor],
    *,
    steps: int,
    rng: torch.Generator,
    bench: Bench,
) -> Tensor:
    """Find the pattern (C, H, W) in [0, 1] that raises a number of a frozen network's features the most.

    Args:
        model: in eval mode; its gradients are left as they were.
        square: where pixels may be chosen.
        x: images (N, C, H, W) that carry it; 64 in each step.
        gain: features (B, F) to the number.
        steps: of Adam.
        rng: draws the start and the images.
        bench: says when to stop.
    """
    places = [parameter for parameter in model.parameters() if parameter.requires_grad]
    free = torch.randn(square.pattern.shape, generator=rng).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.1)
    for parameter in places:
        parameter.requires_grad_(False)
    try:
        for _ in range(steps):
            bench.check()
            some = x[torch.randint(len(x), (64,), generator=rng)]
            stamped = some * (1 - square.mask) + square.mask * free.sigmoid()
            raised = gain(model.neck(model.trunk(model.normalize(stamped))))
            optimizer.zero_grad(set_to_none=True)
            (-raised).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    finally:
        for parameter in places:
            parameter.requires_grad_(True)
    return free.detach().sigmoid() * square.mask
