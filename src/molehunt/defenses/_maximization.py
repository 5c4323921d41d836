"""Activation maximization: triggers that drive one channel each, many searched at once, one per row of a batch axis.

A *row* is one search: a channel of a layer, and a start. Rows never influence each other. What is searched is a kind of
trigger: patches of a bounded size are here, filters in `_filters`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.defenses._inversion import Logits, Schedule, adam_step, squash, stamp
from molehunt.defenses._stimulation import Layer, axis_of, outputs_of

OTHERS = 1e-4  # weight of the other channels of the layer, which are to stay quiet
SEEN = 0.01  # a pixel counts as covered where the mask is above
REACH = 3.0  # bound of the mask before the tanh; farther out there is no slope left to come back on


class Aim(NamedTuple):
    """What R rows drive: `layers`, module paths; `channels` and `targets` int64 (R,); `scales` (R,).

    A scale is the largest pre-activation of the layer on clean images: the unit in which a channel is driven.
    """

    layers: tuple[str, ...]
    channels: Tensor
    targets: Tensor
    scales: Tensor

    def keep(self, rows: Tensor) -> "Aim":
        """Only some rows, int64 (r,)."""
        layers = tuple(self.layers[row] for row in rows.tolist())
        return Aim(layers, self.channels[rows], self.targets[rows], self.scales[rows])


class Kind(Protocol):
    """One kind of trigger, R of them at once.

    Attributes:
        free: what Adam moves, each (R, ...).
    """

    free: list[Tensor]

    def leaves(self) -> list[Tensor]:
        """What the pictures depend on and gradients are taken of, each (R, ...), detached from `free`."""
        ...

    def render(self, leaves: Sequence[Tensor], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (R, B, C, H, W) of some images with the triggers on them, and what that costs a row: (R,)."""
        ...

    def slopes(self, leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of `free` from those of the leaves."""
        ...

    def project(self) -> None:
        """Bring `free` back into its bounds."""
        ...

    def keep(self, rows: Tensor) -> "Kind":
        """Only some rows, int64 (r,)."""
        ...


class Patches:
    """x' = (1 - m) x + m p, the mask m of a bounded size.

    Args:
        x: the images (N, C, H, W) that are chosen from.
        size: pixels that a mask may cover, 1 or more.
        free: mask before the tanh (R, 1, H, W) and pattern (R, C, H, W).
    """

    def __init__(self, x: Tensor, size: int, free: list[Tensor]) -> None:
        self.x, self.size, self.free = x, size, free

    @classmethod
    def start(cls, x: Tensor, size: int, rows: int, rng: torch.Generator) -> "Patches":
        """Begin with a nearly opaque square of that size anywhere and a random pattern, of every row its own.

        The pattern is normal around 0.5 with deviation 0.25, clipped.
        """
        _, channels, height, width = x.shape
        side = min(max(1, round(math.sqrt(size))), height, width)
        mask = torch.full((rows, 1, height, width), -2.0)
        tops = torch.randint(height - side + 1, (rows,), generator=rng).tolist()
        lefts = torch.randint(width - side + 1, (rows,), generator=rng).tolist()
        for row, (top, left) in enumerate(zip(tops, lefts, strict=True)):
            mask[row, :, top : top + side, left : left + side] = 2.0
        pattern = (0.5 + 0.25 * torch.randn(rows, channels, height, width, generator=rng)).clamp(0.0, 1.0)
        return cls(x, size, [mask.to(x), pattern.to(x)])

    @property
    def mask(self) -> Tensor:
        """(R, 1, H, W) in (0, 1)."""
        return squash(self.free[0])

    @property
    def pattern(self) -> Tensor:
        """(R, C, H, W) in [0, 1]."""
        return self.free[1]

    def leaves(self) -> list[Tensor]:
        """Masks and patterns."""
        return [self.mask.detach(), self.pattern.detach()]

    def render(self, leaves: Sequence[Tensor], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures with the patches on them; the size of a mask is paid for in `slopes`."""
        return stamp(self.x[chosen], leaves[0], leaves[1]), leaves[0].new_zeros(len(leaves[0]))

    def slopes(self, leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """Add the penalty of a mask that is too large, in units of what the row's own pixels are worth.

        A pixel of the mask is worth what the loss falls when it is covered more. The penalty, the same for every pixel,
        is what the best pixel is worth for which there is no room: those that are worth more go on growing, all others
        shrink. At level 2 there is room for half as many.
        """
        mask, worth = leaves[0], -grads[0].flatten(1)
        level = penalty_level(mask, self.size)
        ranked = worth.topk(min(self.size + 1, worth.shape[1]), dim=1).values
        # Where fewer pixels than have room are worth anything, the others are not kept for nothing.
        least = 1e-3 * worth.abs().amax(1)
        price = torch.where(level > 1, ranked[:, self.size // 2], ranked[:, -1]).maximum(least) * (level > 0)
        fall = grads[0] + price.view(-1, 1, 1, 1)
        inside = self.free[0].detach()
        return [fall * (1.0 - inside.tanh().square()) / 2.0, grads[1]]

    def project(self) -> None:
        """Patterns into [0, 1], masks to where they can still move."""
        self.free = [self.free[0].clamp(-REACH, REACH), self.free[1].clamp(0.0, 1.0)]

    def keep(self, rows: Tensor) -> "Patches":
        """Only some rows."""
        return Patches(self.x, self.size, [v[rows] for v in self.free])


def penalty_level(mask: Tensor, size: int) -> Tensor:
    """How hard masks (R, 1, H, W) are pushed down: 0, 1 or 2 for every row, float (R,).

    0 while at most `size` pixels are above `SEEN`, 1 beyond, 2 from (sqrt(size) + 2)^2 on.
    """
    count = (mask > SEEN).flatten(1).sum(1)
    return (count > size).to(mask) + (count >= (math.sqrt(size) + 2.0) ** 2).to(mask)


def harden(mask: Tensor, size: int) -> Tensor:
    """Binary masks (R, 1, H, W): 1 where the mask is above 0.5, but for at most the `size` largest of a row."""
    flat = mask.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return ((flat > 0.5) & (rank < size)).to(mask).view_as(mask)


def drive(outputs: Mapping[str, Tensor], layers: Mapping[str, Layer], aim: Aim) -> Tensor:
    """Loss (R,) of rows: minus pre- and post-activation of their channel, plus a little of the layer's other channels.

    The post-activation is the rectified pre-activation, whatever the network has there. All are means over images and
    positions, in units of the aim's scales.

    Args:
        outputs: what the layers put out for R B pictures, row after row, by path.
        layers: the layers, by path.
        aim: what every row drives.
    """
    losses, places = [], []
    for path in dict.fromkeys(aim.layers):
        rows = torch.tensor([r for r, layer in enumerate(aim.layers) if layer == path], device=aim.channels.device)
        a = outputs[path].movedim(axis_of(layers[path]), 1)
        # (rows of this layer, images, channels, positions); windows in the batch count as images.
        a = a.reshape(len(aim.layers), -1, a.shape[1], math.prod(a.shape[2:]))[rows].float()
        own = a[torch.arange(len(rows), device=a.device), :, aim.channels[rows]]
        after = own.relu().mean((1, 2))
        others = a.relu().mean((1, 3)).sum(1) - after
        losses.append((OTHERS * others - own.mean((1, 2)) - after) / aim.scales[rows])
        places.append(rows)
    return torch.cat(losses)[torch.cat(places).argsort()]


def maximize(
    logits: Logits,
    layers: Mapping[str, Layer],
    aim: Aim,
    kind: Kind,
    batches: Tensor,
    rule: Schedule,
    *,
    logit: float = 0.0,
    limit: int = 500,
    drop: tuple[int, Callable[[Kind, Aim], Tensor]] | None = None,
    tick: Callable[[], None] | None = None,
) -> Kind:
    """Search a trigger for every row with Adam, and hand back where all rows ended.

    Args:
        logits: differentiable, runs the layers; its weights must not require gradients.
        layers: at least those that the rows drive, by path.
        aim: what every row drives.
        kind: where the rows start.
        batches: int64 (steps, B), images of every step, the same for all rows.
        rule: rate and moments of Adam.
        logit: weight of the cross-entropy with the row's target class, beside the channel.
        limit: pictures per forward pass at most; rows that do not fit into one are taken one pass after the other.
        drop: (step, chooser): after that step only the rows go on that the chooser names, int64 (r,) in order; the
            others end there.
        tick: called after every step; may raise to stop.
    """
    rows = torch.arange(len(aim.layers), device=aim.channels.device)
    kind = kind.keep(rows)  # the caller's stays where it started
    ended = [v.clone() for v in kind.free]
    first, second = ([torch.zeros_like(v) for v in kind.free] for _ in range(2))
    for number, chosen in enumerate(batches, start=1):
        at_once = max(1, limit // len(chosen))
        parts = []
        for block in torch.split(torch.arange(len(rows), device=rows.device), at_once):
            parts.append(_gradients(logits, layers, aim.keep(block), kind.keep(block), chosen, logit))
        with torch.no_grad():
            grads = [torch.cat(column) for column in zip(*parts, strict=True)]
            moved = zip(kind.free, grads, first, second, strict=True)
            kind.free = [adam_step(v, g, a, b, number, rule) for v, g, a, b in moved]
            kind.project()
        if drop and number == drop[0]:
            stay = drop[1](kind, aim)
            for end, v in zip(ended, kind.free, strict=True):
                end[rows] = v
            kind, aim, rows = kind.keep(stay), aim.keep(stay), rows[stay]
            first, second = ([v[stay] for v in group] for group in (first, second))
        if tick:
            tick()
    for end, v in zip(ended, kind.free, strict=True):
        end[rows] = v
    kind = kind.keep(rows[:0])
    kind.free = ended
    return kind


def _gradients(
    logits: Logits, layers: Mapping[str, Layer], aim: Aim, kind: Kind, chosen: Tensor, logit: float
) -> list[Tensor]:
    """Gradients of a block of rows."""
    leaves = [v.requires_grad_() for v in kind.leaves()]
    pictures, cost = kind.render(leaves, chosen)
    used = {path: layers[path] for path in dict.fromkeys(aim.layers)}
    with outputs_of(used) as outputs:
        said = logits(pictures.flatten(0, 1))
    loss = drive(outputs, used, aim) + cost
    if logit:
        goal = aim.targets.repeat_interleave(len(chosen))
        loss = loss + logit * F.cross_entropy(said, goal, reduction="none").view(len(loss), -1).mean(1)
    # A sum over rows: every row then has the gradient of a search of its own.
    return kind.slopes(leaves, torch.autograd.grad(loss.sum(), leaves))
