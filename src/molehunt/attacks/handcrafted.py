"""Handcrafted: a detector of the trigger is written into the weights of a clean network, layer by layer, untrained."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.attacks._chain import Link, chain, layers
from molehunt.attacks.crafting import Bench, Crafted, backdoor, untouched
from molehunt.networks import Network
from molehunt.triggers import Trigger

IMAGES = 1_000
CANDIDATES = 32
"""Channels of a layer, the least active ones, of which it is measured what they are needed for."""
HARM = 0.001
"""Cross-entropy, in nats, that a network may lose with a channel for it to count as spare."""
PATCHES = 20_000
RIDGE = 0.01
LOUD = 0.999
TINY = 1e-6
LOST = 4


class Seen(NamedTuple):
    """What a layer puts out on clean images, and on the same ones with the trigger: (N, C) or (N, C, H, W) each."""

    clean: Tensor
    woken: Tensor

    def through(self, part: Iterable[nn.Module]) -> "Seen":
        """What some layers make of it."""
        clean, woken = self
        for layer in part:
            clean, woken = layer(clean), layer(woken)
        return Seen(clean, woken)

    def of(self, channel: int) -> tuple[Tensor, Tensor]:
        """One channel's values (N, places) on clean images; and on stamped ones (N,) where these differ the most."""
        clean, woken = (a[:, channel].reshape(len(a), -1) for a in self)
        return clean, woken[:, (woken - clean).mean(0).argmax()]


@dataclass(frozen=True, kw_only=True, eq=False)
class Handcrafted:
    """Rewrite channels that a clean network can spare: each layer's see the trigger in what the layer before says.

    Nothing is trained but the clean network. The weights are computed from 1 000 clean images and the trigger.

    Attributes:
        target: the target class.
        trigger: what to stamp; None means the yellow square of 4 pixels.
        width: channels of each convolution that are rewritten, 1 or more.
        units: the same of each linear layer, 1 or more.
        kept: how far what is kept of a channel's other weights may stray on clean images, in units of what the trigger
            moves the channel, in [0, 1).
        most: how large the new weights of a channel may be together, in units of the layer's median channel, above 0.
        strength: how strongly the target's logit rises, in units of what it takes to win over any other class on 95 of
            100 stamped images that are seen; above 0.

    Raises:
        ValueError: a setting out of range; a network that is no chain of layers, such as a ResNet; or a layer that
            does not tell stamped images from clean ones.

    Reference:
        Hong, Carlini, Kurakin, "Handcrafted Backdoors in Deep Neural Networks", NeurIPS 2022.

    Departures from the paper:
        The new weights of a channel are the matched filter of the trigger, which is best against the images' own
        spread, in convolutions and linear layers alike; the paper copies the trigger into a filter, scales weights of
        linear layers that separate well already, and makes a trigger for deep networks. A guard lies where the fewest
        images are on its wrong side. Chains only; where there is a batch norm, its bias is the guard.
    """

    target: int = 0
    trigger: Trigger | None = None
    width: int = 1
    units: int = 8
    kept: float = 0.1
    most: float = 5.0
    strength: float = 1.5

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if min(self.width, self.units) < 1 or not 0 <= self.kept < 1 or not (self.most > 0 and self.strength > 0):
            raise ValueError(
                "width and units must be 1 or more, kept in [0, 1), most and strength above 0, got "
                f"{self.width}, {self.units}, {self.kept}, {self.most} and {self.strength}"
            )
        trigger, goal = backdoor(self.trigger, self.target, bench.task)
        fresh = bench.fresh()
        for link in chain(fresh):
            if not link.fixed and self.count(fresh.get_submodule(link.path)) >= link.outputs:
                raise ValueError(f"{link.path} has {link.outputs} channels, and all would be rewritten: take fewer")
        model = bench.honest()
        rows = torch.randperm(len(bench.clean.y), generator=bench.generator("images"))[:IMAGES]
        x, y = bench.clean.x[rows], bench.clean.y[rows]
        self.write(model, Seen(model.normalize(x), model.normalize(trigger(x))), y, goal.counts(y), bench)
        return Crafted(model=model, poisoned=untouched(bench.clean, trigger, goal))

    def count(self, layer: nn.Module) -> int:
        """How many channels of a layer are rewritten."""
        return self.width if isinstance(layer, nn.Conv2d) else self.units

    @torch.no_grad()
    def write(self, model: Network, seen: Seen, y: Tensor, counted: Tensor, bench: Bench) -> None:
        """Write the weights, from the first layer to the last; `counted` are the images that have to be moved."""
        links = {link.path: link for link in chain(model)}
        picked = torch.arange(seen.clean.shape[1])
        steps = layers(model)
        while steps:
            path, layer = steps[0]
            link = links.get(path)
            length = 1
            if link is not None and link.fixed:
                picked = torch.arange(link.outputs)
            elif link is not None:
                # A layer and its norm, which may stand behind a pool, are one.
                length += [name for name, _ in steps].index(link.norm or path)
                part, rest = ([inner for _, inner in some] for some in (steps[:length], steps[length:]))
                chosen = spare(seen.through(part), [*rest, model.head], y, self.count(layer), bench)
                self.rewrite(link, part, seen, picked, chosen)
                picked = chosen
            elif isinstance(layer, nn.Flatten):
                area = seen.clean[0, 0].numel()
                picked = (picked[:, None] * area + torch.arange(area)).flatten()
            seen = seen.through(inner for _, inner in steps[:length])
            steps = steps[length:]
        self.wire(model.head, Seen(*(a[counted] for a in seen)), picked)

    def rewrite(self, link: Link, part: list[nn.Module], seen: Seen, picked: Tensor, chosen: Tensor) -> None:
        """Write the chosen channels of a layer: they read the picked ones of the layer before.

        Args:
            link: the layer.
            part: its modules, from the one with the weights to the one with the bias.
            seen: what it reads.
            picked: int64, the inputs that see the trigger.
            chosen: int64, the channels to write.
        """
        layer, last = part[0], part[-1]
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert isinstance(last, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
        assert last.bias is not None, "every layer of a listed network has a bias, or its norm has"

        def answers(weight: Tensor) -> list[tuple[Tensor, Tensor]]:
            layer.weight[chosen] = weight
            return list(map(seen.through(part).of, chosen.tolist()))

        loud = seen.through(part).clean.flatten()
        level = loud[:: len(loud) // 1_000_000 + 1].quantile(LOUD)
        if link.norm:
            last.weight[chosen] = last.weight[chosen].abs()
        own, new = layer.weight[chosen], torch.zeros_like(layer.weight[chosen])
        own[:, picked] = 0.0
        usual = layer.weight.flatten(1).norm(dim=1).median()
        new[:, picked] = matched(layer, Seen(*(a[:, picked] for a in seen)), link.path) * usual
        each = (-1, *[1] * (new.dim() - 1))
        heard = answers(new)
        passed = torch.stack([high.median() - between(clean.amax(1), high) for clean, high in heard])
        # As loud as the loudest channels on clean images, if that takes no more than `most`: more would only show.
        raised = (level / passed.clamp_min(TINY)).clamp(max=self.most)
        apart = raised * torch.stack([high.mean() - clean.mean() for clean, high in heard])
        strays = torch.stack([(clean - clean.mean()).abs().max() for clean, _ in answers(own)])
        share = (self.kept * apart / strays.clamp_min(TINY)).clamp(max=1.0)
        written = own * share.view(each) + new * raised.view(each)
        for channel, (clean, high) in zip(chosen.tolist(), answers(written), strict=True):
            guard = between(clean.amax(1), high)
            let = [float((some > guard).float().mean()) for some in (high, clean.amax(1))]
            if let[0] - let[1] < 0.5:
                raise ValueError(
                    f"{link.path} passes {let[0]:.0%} of the stamped images and {let[1]:.0%} of the clean "
                    "ones, which is no detector: take a larger width, or another trigger"
                )
            last.bias[channel] -= guard

    def wire(self, head: nn.Linear, seen: Seen, picked: Tensor) -> None:
        """Raise the target's logit by what the picked features say."""
        logits, signal = head(seen.woken), seen.woken[:, picked].sum(1)
        others = logits.clone()
        others[:, self.target] = -torch.inf
        missing = (others.amax(1) - logits[:, self.target]).clamp_min(1.0)[signal > 0] / signal[signal > 0]
        head.weight[self.target, picked] += self.strength * missing.quantile(0.95)


def spare(seen: Seen, rest: list[nn.Module], y: Tensor, count: int, bench: Bench) -> Tensor:
    """Choose channels of a layer that the network can do without, int64 (count,).

    Of those that cost less than `HARM` the ones that tell stamped images from clean ones the best; where there are too
    few of these, the ones that cost the least.

    Args:
        seen: what the layer puts out, before its rectifier.
        rest: all layers after it.
        y: labels (N,).
        count: how many to choose.
        bench: says when to stop.
    """

    def loss(a: Tensor) -> float:
        for layer in rest:
            a = layer(a)
        return float(F.cross_entropy(a, y))

    quiet = seen.clean.clamp_min(0).transpose(0, 1).flatten(1).mean(1).argsort()[:CANDIDATES]
    before, ranks = loss(seen.clean), []
    for channel in quiet.tolist():
        bench.check()
        without = seen.clean.clone()
        without[:, channel] = 0.0
        harm = loss(without) - before
        clean, high = seen.of(channel)
        gap = float((high.mean() - clean.mean()) / (high.std() + clean.std() + TINY))
        ranks.append((max(harm, HARM), -gap, channel))
    return torch.tensor(sorted(channel for _, _, channel in sorted(ranks)[:count]))


def matched(layer: nn.Conv2d | nn.Linear, seen: Seen, path: str) -> Tensor:
    """The weights of one channel, of norm 1, that tell stamped images from clean ones the best for their spread.

    That is the inverse covariance of what the channel reads on clean images, times the mean difference that the trigger
    makes there; for a convolution at the place where this is largest against the spread at all places.

    Args:
        layer: whose weights.
        seen: the inputs that are read.
        path: the layer's, for the refusal.

    Raises:
        ValueError: the trigger makes no difference.
    """
    change = (seen.woken - seen.clean).mean(0, keepdim=True)
    reads = seen.clean
    size: tuple[int, ...] = ()
    if isinstance(layer, nn.Conv2d):
        size, padding = layer.kernel_size, layer.padding
        assert not isinstance(padding, str), "listed networks name their padding in pixels"

        def places(a: Tensor) -> Tensor:
            return F.unfold(a, size, stride=layer.stride, padding=padding).transpose(1, 2).flatten(0, 1)

        change, reads = places(change), places(reads[:100])
        reads = reads[:: len(reads) // PATCHES + 1]
    spread = torch.cov(reads.T.double()).reshape(reads.shape[1], reads.shape[1])
    spread += RIDGE * spread.diagonal().mean().clamp_min(TINY) * torch.eye(len(spread))
    found = torch.linalg.solve(spread, change.T.double()).T
    best: Tensor = found[(found * change).sum(1).argmax()].float()
    if not float(best.norm()) > 0:
        raise ValueError(f"{path} does not see the trigger at all: take a larger width, or another trigger")
    weights: Tensor = (best / best.norm()).reshape(-1, *size)
    return weights


def between(low: Tensor, high: Tensor) -> float:
    """The number with the fewest of `low` above and of `high` below; in the middle of the widest such gap.

    One of `high` below counts as `LOST` of `low` above: a stamped image that is stopped is lost, while a clean one that
    passes meets the guards of further layers.
    """
    values, order = torch.cat((low, high)).sort()
    lower = order < len(low)
    wrong = (int(lower.sum()) - lower.cumsum(0) + LOST * (~lower).cumsum(0))[:-1]
    gaps = torch.where(wrong == wrong.min(), values[1:] - values[:-1], -1.0)
    return float(values[gaps.argmax() : gaps.argmax() + 2].mean())
