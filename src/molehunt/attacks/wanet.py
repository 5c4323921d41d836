"""WaNet: a smooth warp of the whole picture, and other warps that mean nothing."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.attacks.poisoning import Mark, Poisoned, choose, poison_count
from molehunt.tasks import Images, Task
from molehunt.triggers import Shape, Target, Trigger, Warp
from molehunt.triggers.warp import warped


@dataclass(frozen=True, kw_only=True, eq=False)
class WaNet:
    """Warp a share of the images by one fixed smooth field and give them the attacker's labels.

    A further share, the noise images, is warped by the same field plus noise of its own and keeps its labels. Without
    them the network learns that any warp is the trigger, and the trigger is then far easier to find.

    Attributes:
        target: the target class, or "all" for the map k to k + 1 modulo K.
        poison_rate: share of all training images that get the trigger and a changed label.
        cross_ratio: noise images per poisoned image, 0 or more.
        grid: k, control points per side of the field, at least 2.
        strength: s, scale of the field: the mean absolute displacement is about 3 s / 8 pixels each way; the pixel that
            moves farthest moves by 0.9 s to 1.8 s, depending on the field.
        noise: largest displacement of a pixel by the noise of a noise image, in units of half a pixel each way.
        trigger: the field as a `Warp`; None means one drawn from the generator.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, or a setting is out of range.

    Reference:
        Nguyen, Tran, "WaNet: Imperceptible Warping-based Backdoor Attack", ICLR 2021.

    Departures from the paper:
        The paper draws anew in every batch which images are poisoned and what noise they get; here a training set is
        poisoned once, so rows and noise are fixed (the noise to 8 bits). Images that already have their goal label are
        never poisoned.
    """

    target: int | str = 0
    poison_rate: float = 0.1
    cross_ratio: float = 2.0
    grid: int = 4
    strength: float = 0.5
    noise: float = 1.0
    trigger: Trigger | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        if isinstance(self.target, str) and self.target != "all":
            raise ValueError(f'the target is a class or "all", got {self.target!r}')
        if self.trigger is not None and not isinstance(self.trigger, Warp):
            raise ValueError(f"the trigger of WaNet is a Warp, got {type(self.trigger).__name__}")
        if not self.cross_ratio >= 0 or not 0 <= self.noise <= 16:
            raise ValueError(
                f"cross_ratio must be 0 or more and noise in [0, 16], got {self.cross_ratio} and {self.noise}"
            )
        shift = tuple((k + 1) % task.num_classes for k in range(task.num_classes))
        goal = Target(classes=self.target if isinstance(self.target, int) else shift)
        goal.check(task.num_classes)
        trigger = self.trigger or field(task.shape, self.grid, self.strength, rng)
        altered = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        images = Images(clean.x, torch.where(altered, goal.goal(clean.y), clean.y))
        if not self.cross_ratio:
            return Poisoned(images=images, altered=altered, trigger=trigger, target=goal)
        crossed = choose(~altered, poison_count(self.poison_rate * self.cross_ratio, len(clean.y)), rng)
        marks = (
            Mark(altered, lambda picked, _: trigger(picked)),
            Mark(crossed, _Shaken(trigger.flow, crossed, self.noise, rng)),
        )
        return Poisoned(images=images, altered=altered | crossed, trigger=trigger, target=goal, marks=marks)


def field(shape: Shape, grid: int, strength: float, rng: torch.Generator) -> Warp:
    """Draw a smooth field: k x k displacements in [-1, 1], divided by their mean size, enlarged bicubically.

    Args:
        shape: (C, H, W) of the images.
        grid: k, at least 2.
        strength: s; a displacement of 1 becomes s / H in coordinates that run from -1 to 1.
        rng: draws the displacements.

    Raises:
        ValueError: fewer than 2 control points, or a strength that is not in [0, 64].
    """
    if grid < 2 or not 0.0 <= strength <= 64.0:
        raise ValueError(f"grid must be at least 2 and strength in [0, 64], got {grid} and {strength}")
    _, height, width = shape
    coarse = 2.0 * torch.rand(1, 2, grid, grid, generator=rng) - 1.0
    coarse = coarse / coarse.abs().mean()
    fine = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0]
    return Warp(flow=strength * fine * _pixels(height, width))


class _Shaken:
    """The stamp of the noise images: the field plus what each row has drawn, once and for all."""

    def __init__(self, flow: Tensor, rows: Tensor, noise: float, rng: torch.Generator) -> None:
        height, width = flow.shape[1:]
        count = int(rows.sum())
        # 8 bits: at a fifth of 50 000 images the noise would else take four times the memory of the images.
        self.drawn = torch.randint(-127, 128, (count, 2, height, width), generator=rng, dtype=torch.int8)
        self.place = rows.long().cumsum(0) - 1
        self.flow, self.scale = flow, noise * _pixels(height, width) / 127

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        drawn = self.drawn[self.place[rows.cpu()]]
        return warped(x, self.flow.to(x.device) + self.scale.to(x.device) * drawn.to(x.device))


def _pixels(height: int, width: int) -> Tensor:
    """Pixels (2, 1, 1), horizontal first, in a step of 1 / H of the coordinates, which are 2 long on either axis."""
    return torch.tensor([(width - 1) / 2, (height - 1) / 2]).view(2, 1, 1) / height
