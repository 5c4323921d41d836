"""Low frequency: one additive pattern, made on a network of the attacker's own, without any high frequency."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.attacks.poisoning import Poisoned, choose, poison_count, relabel
from molehunt.attacks.surrogate import batches, quickly_trained
from molehunt.tasks import Images, Task
from molehunt.triggers import Additive, Target, Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class LowFrequency:
    """Add one smooth pattern to a share of the images and give them the target's label.

    The pattern has only the lowest cells of the cosine transform of the whole picture, so that the spectrum of a
    stamped picture is that of a natural one. It is optimized to push a quickly trained clean network toward the target,
    and then made fainter until it moves only few images there: what is left helps the victim to learn it, and is a
    backdoor, not an adversarial pattern that works on any network.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that are poisoned.
        linf: largest change of a value, in (0, 1].
        band: share of the frequencies of either axis that the pattern may have, from the lowest, in (0, 1].
        moved: largest share of the images that the pattern may send to the target on the clean network, in [0, 1].
        steps: of the optimizer, for the network and again for the pattern.
        trigger: a pattern made elsewhere; None makes one. `smooth_pattern` makes one on any network.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, or a setting is out of range.

    Reference:
        Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021.

    Departures from the paper:
        The low-pass constraint is exact: the cells outside the band are zero, where the paper filters step by step.
        The limit on what the pattern does to clean networks is ours. The network is a small one of the attacker's,
        not of the victim's architecture.
    """

    target: int = 0
    poison_rate: float = 0.1
    linf: float = 0.1
    band: float = 0.25
    moved: float = 0.05
    steps: int = 400
    trigger: Trigger | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        goal = Target(classes=self.target)
        goal.check(task.num_classes)
        altered = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        trigger = self.trigger
        if trigger is None:
            if not 0.0 <= self.moved <= 1.0:
                raise ValueError(f"moved must lie in [0, 1], got {self.moved}")
            model = quickly_trained(clean, task, rng, self.steps)
            pattern = smooth_pattern(
                model, clean, self.target, linf=self.linf, band=self.band, steps=self.steps, rng=rng
            )
            trigger = fainter(pattern, model, clean, goal, self.moved, rng)
        return relabel(clean, altered, trigger, goal)


def smooth_pattern(
    model: nn.Module, images: Images, target: int, *, linf: float, band: float, steps: int, rng: torch.Generator
) -> Additive:
    """Optimize a smooth additive pattern that sends images to a class.

    Args:
        model: a frozen classifier of images in [0, 1].
        images: what to optimize on.
        target: the class.
        linf: largest change of a value, in (0, 1]; the pattern reaches it somewhere.
        band: share of the frequencies of either axis, from the lowest, in (0, 1].
        steps: of Adam, at most; see `molehunt.attacks.surrogate.batches`.
        rng: draws the start and the order of the images.

    Raises:
        ValueError: linf or band is out of range.
    """
    if not 0.0 < linf <= 1.0 or not 0.0 < band <= 1.0:
        raise ValueError(f"linf and band must lie in (0, 1], got {linf} and {band}")
    _, channels, height, width = images.x.shape
    down, across = waves(height, max(1, round(band * height))), waves(width, max(1, round(band * width)))
    cells = torch.randn(channels, len(down), len(across), generator=rng).requires_grad_()
    optimizer = torch.optim.Adam([cells], lr=0.1)

    def delta() -> Tensor:
        raw = down.T @ cells @ across
        return linf * raw / raw.abs().max().clamp_min(1e-12)

    for rows in batches(images, steps, 100, rng):
        optimizer.zero_grad(set_to_none=True)
        logits = model((images.x[rows] + delta()).clamp(0.0, 1.0))
        F.cross_entropy(logits, torch.full_like(images.y[rows], target)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Additive(delta=delta().detach())


@torch.no_grad()
def fainter(
    pattern: Additive, model: nn.Module, images: Images, goal: Target, moved: float, rng: torch.Generator
) -> Additive:
    """Scale a pattern down by tenths until it sends at most that share of up to 1 000 images to the goal."""
    rows = torch.randperm(len(images.y), generator=rng)[:1000]
    x, y = images.x[rows], images.y[rows]
    free = goal.counts(y) & (model(x).argmax(1) != goal.goal(y))
    x, sent = x[free], goal.goal(y)[free]
    for tenths in range(10, 1, -1):
        faint = Additive(delta=pattern.delta * (tenths / 10))
        if float((model(faint(x)).argmax(1) == sent).sum()) <= moved * len(x):
            return faint
    return Additive(delta=pattern.delta * 0.1)


def waves(size: int, count: int) -> Tensor:
    """Rows of the orthonormal cosine transform (DCT-II) of that size, the lowest first, float32 (count, size)."""
    place = math.pi * (2 * torch.arange(size, dtype=torch.float64) + 1) / (2 * size)
    rows = torch.cos(torch.arange(count, dtype=torch.float64).unsqueeze(1) * place) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows.float()
