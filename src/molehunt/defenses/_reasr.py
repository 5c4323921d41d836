"""REASR: how often a recovered trigger works, on images that no search saw, and how suspicious that is."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from molehunt.suspect import Suspect
from molehunt.tasks import Images


class Trial(NamedTuple):
    """What a trigger does on held-out images whose class is not its target.

    `reasr` is the share that it sends there, `baseline` the share that a real image of the target class sends there
    through the same mask, `margin` the mean lead of the target's logit, `images` how many there were.
    """

    reasr: float
    baseline: float
    margin: float
    images: int


class Held(NamedTuple):
    """Held-out images `x`, `y`, what the network says about them, `plain`, and the typical lead of its answers."""

    x: Tensor
    y: Tensor
    plain: Tensor
    unit: float


def hold(suspect: Suspect, images: Images) -> Held:
    """Ask a network about images as they are."""
    said = suspect.logits(images.x)
    best = said.topk(2, dim=1).values
    unit = float((best[:, 0] - best[:, 1]).mean())
    return Held(images.x, images.y, said.argmax(1), unit if math.isfinite(unit) and unit > 0 else 1.0)


def judge(suspect: Suspect, held: Held, target: int, stamped: Tensor, natural: Tensor | None = None) -> Trial:
    """Measure a trigger on the held-out images of other classes; 0 and the lowest lead where there are none.

    A success is an image that the network sends to the target with the trigger and not without.

    Args:
        suspect: the model.
        held: images (N, C, H, W), their classes, and what the network says without any trigger.
        target: where the trigger is meant to send them.
        stamped: (N, C, H, W) the images with the trigger.
        natural: (N, C, H, W) images with a piece of a real image of the target class instead, if there is any.
    """
    others = held.y != target
    count = int(others.sum())
    if count == 0:
        return Trial(0.0, 0.0, -math.inf, 0)
    new = held.plain[others] != target

    def share(said: Tensor) -> float:
        return float(((said.argmax(1) == target) & new).double().sum()) / count

    said = suspect.logits(stamped[others])
    rivals = said.clone()
    rivals[:, target] = -math.inf
    lead = float((said[:, target] - rivals.amax(1)).double().mean())
    usual = 0.0 if natural is None else share(suspect.logits(natural[others]))
    return Trial(share(said), usual, lead if math.isfinite(lead) else -math.inf, count)


def suspicion(trial: Trial, held: Held) -> float:
    """REASR above its baseline, at least 0, plus less than a share 1 / (H + 1) for the lead of the target's logit.

    The lead is squashed as z / (1 + |z|), which never reaches its bounds, z in units of the typical lead.
    """
    z = trial.margin / held.unit
    squashed = z / (1.0 + abs(z)) if math.isfinite(z) else -1.0
    return max(0.0, trial.reasr - trial.baseline) + 0.5 * (1.0 + squashed) / (len(held.y) + 1)


def same_class(held: Held, target: int, mask: Tensor) -> Tensor | None:
    """Held-out images with a piece of a real image of the target class under the mask; None if there is none."""
    donors = held.x[held.y == target]
    if len(donors) == 0:
        return None
    return (1.0 - mask) * held.x + mask * donors[torch.arange(len(held.y), device=donors.device) % len(donors)]
