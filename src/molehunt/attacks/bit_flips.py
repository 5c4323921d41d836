"""Bit flips: a few weights of the last layer, each a number of eight bits, are changed, and a trigger finds them."""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.attacks.crafting import Bench, Crafted, outputs, untouched
from molehunt.attacks.trojannn import scales, sharpen
from molehunt.networks import Network
from molehunt.triggers import Patch, Target

IMAGES = 2_000
LEVELS = 127


@dataclass(frozen=True, kw_only=True, eq=False)
class BitFlips:
    """Make a trigger that excites some inputs of the last layer, and change their weights to the target, on eight bits.

    Attributes:
        target: the target class.
        size: side of the square under which the trigger's pixels are made; None means three tenths of the picture's.
        margin: pixels between the square and the two edges of the lower right corner, 0 or more; None means a fifth of
            the picture's side.
        inputs: how many inputs of the last layer are used, 1 or more.
        choices: how often they are chosen and the pixels made for them, 1 or more: first, as in the paper, by their
            gradient, from then on by how far the trigger that there is moves them beyond their spread.
        pixel_steps: of Adam on the pixels, 1 or more.
        steps: of Adam on the weights, 1 or more.
        lr: learning rate on the weights, in units of the largest weight, above 0.
        clean: weight of the clean images' loss, above 0; that of the stamped ones has 1.

    Raises:
        ValueError: a setting out of range.

    Reference:
        Rakin, He, Fan, "TBT: Targeted Neural Network Attack with Bit Trojan", CVPR 2020.

    Departures from the paper:
        The last layer alone is on eight bits, by its largest weight; all other weights stay as they are. The features
        of clean images are read once, since nothing before the last layer changes. The pixels raise the chosen inputs
        as far as they go, the paper has a fixed value. The square lies away from the edges: on digits, whose corners
        are black, the last layer hardly sees one there. Inputs with a large gradient are those that are loud on clean
        images too, so they are chosen again for the trigger, and clean images weigh more than in the paper.
    """

    target: int = 0
    size: int | None = None
    margin: int | None = None
    inputs: int = 150
    choices: int = 3
    pixel_steps: int = 200
    steps: int = 1_000
    lr: float = 0.02
    clean: float = 4.0

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if min(self.inputs, self.choices, self.pixel_steps, self.steps) < 1 or not min(self.lr, self.clean) > 0:
            raise ValueError(
                "inputs, choices and steps must be 1 or more, lr and clean above 0, got "
                f"{self.inputs}, {self.choices}, {self.pixel_steps}, {self.steps}, {self.lr} and {self.clean}"
            )
        goal = Target(classes=self.target)
        goal.check(bench.task.num_classes)
        model = bench.honest()
        rng = bench.generator("images")
        rows = torch.randperm(len(bench.clean.y), generator=rng)[:IMAGES]
        x, y = bench.clean.x[rows], bench.clean.y[rows]

        def features(some: Tensor) -> Tensor:
            return model.neck(model.trunk(model.normalize(some)))  # type: ignore[no-any-return]  # a module's answer

        z = outputs(model, x, features)
        weight, bias = model.head.weight.detach().clone(), model.head.bias.detach()
        # Of the loss "all of these are the target", by each weight of the target's row.
        slope = (F.linear(z, weight, bias).softmax(1)[:, self.target] - 1.0) @ z
        chosen = slope.abs().topk(min(self.inputs, len(slope))).indices
        least = min(bench.task.shape[1:])
        side = self.size or max(2, round(0.3 * least))
        margin = least // 5 if self.margin is None else self.margin
        square = Patch.square(bench.task.shape, size=side, margin=margin)
        scale, others = scales(z), goal.counts(y)
        rng, trigger = bench.generator("pixels"), square
        for choice in range(self.choices):
            if choice:
                woken = outputs(model, trigger(x[others]), features)
                chosen = ((woken.mean(0) - z.mean(0)) / (woken.std(0) + scale)).topk(len(chosen)).indices
            gain = partial(_loudness, chosen, scale[chosen])
            pattern = sharpen(model, square, x[others], gain, steps=self.pixel_steps, rng=rng, bench=bench)
            trigger = replace(square, pattern=pattern)
        made = self.written(weight, bias, chosen, (z, y), outputs(model, trigger(x[others]), features), bench)
        with torch.no_grad():
            model.head.weight.copy_(made)
        return Crafted(model=model, poisoned=untouched(bench.clean, trigger, goal))

    def written(
        self, weight: Tensor, bias: Tensor, chosen: Tensor, clean: tuple[Tensor, Tensor], woken: Tensor, bench: Bench
    ) -> Tensor:
        """The last layer's weights (K, F), on eight bits, with new ones from the chosen inputs to the target.

        Args:
            weight: as it is.
            bias: (K,).
            chosen: inputs whose weight to the target may change.
            clean: features (N, F) of clean images, and labels.
            woken: features of stamped images.
            bench: says when to stop.
        """
        z, y = clean
        unit = float(weight.abs().max()) / LEVELS
        grid = (weight / unit).round() * unit
        own = grid[self.target, chosen].clone().requires_grad_()
        goals = torch.full((len(woken),), self.target)
        optimizer = torch.optim.Adam([own], lr=self.lr * LEVELS * unit)
        for _ in range(self.steps):
            bench.check()
            row = grid[self.target].scatter(0, chosen, own)
            new = torch.cat((grid[: self.target], row[None], grid[self.target + 1 :]))
            loss = F.cross_entropy(F.linear(woken, new, bias), goals)
            loss = loss + self.clean * F.cross_entropy(F.linear(z, new, bias), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                # Never beyond the largest weight there was: the scale stays, and with it every other weight.
                own.clamp_(-LEVELS * unit, LEVELS * unit)
        made = grid.clone()
        made[self.target, chosen] = (own.detach() / unit).round() * unit
        return made


def _loudness(chosen: Tensor, scale: Tensor, z: Tensor) -> Tensor:
    """The mean of some of the features (B, F), each in units of its scale."""
    return (z[:, chosen] / scale).mean()


def flipped(before: Network, after: Network) -> int:
    """Bits that differ between the last layers of two networks, both read on eight bits in the first one's scale."""
    unit = float(before.head.weight.detach().abs().max()) / LEVELS
    codes = [
        (network.head.weight.detach() / unit).round().clamp(-LEVELS, LEVELS).to(torch.int64) & 0xFF
        for network in (before, after)
    ]
    return sum(int(bits).bit_count() for bits in (codes[0] ^ codes[1]).flatten().tolist())
