"""Adap-Patch: one of four faint patches in training, two of them in full in the attack, and covers with true labels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from molehunt.attacks.poisoning import Mark, Poisoned, choose, poison_count
from molehunt.tasks import Images, Task
from molehunt.triggers import CORNERS, Patch, Shape, Target


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapPatch:
    """Stamp one of four faint patches on some images, of which only a part gets the target's label.

    Each patch alone is weak evidence for the target class, because covers carry it with their true label. Two patches
    together at full opacity are strong evidence, and wake the backdoor.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that get a patch and the target's label.
        cover_rate: share of all training images that get a patch and keep their label.
        size: side of a patch in pixels; None means the shorter side of the picture over 4.6.
        opacities: of the four patches in training, in the order of `molehunt.triggers.CORNERS`.
        stamped: the numbers, from 0, of the patches that the attack stamps.
        opacity: of these in the attack.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, other than four opacities, or no such patch.

    Reference:
        Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses",
        ICLR 2023.

    Departures from the paper:
        Higher rates (the paper poisons 0.3 % and covers 0.6 %) and higher opacities in training (its own are 0.5, 0.2,
        0.5, 0.3). The patches are random black and white pixels in the four corners, drawn from the generator, instead
        of the logos of the authors.
    """

    target: int = 0
    poison_rate: float = 0.04
    cover_rate: float = 0.04
    size: int | None = None
    opacities: tuple[float, ...] = (0.8, 0.4, 0.8, 0.5)
    stamped: tuple[int, ...] = (0, 2)
    opacity: float = 1.0

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        goal = Target(classes=self.target)
        goal.check(task.num_classes)
        if len(self.opacities) != len(CORNERS):
            raise ValueError(f"opacities has one value for each of the {len(CORNERS)} corners, got {self.opacities}")
        if not self.stamped or not set(self.stamped) <= set(range(len(CORNERS))):
            raise ValueError(f"stamped names patches from 0 to {len(CORNERS) - 1}, got {self.stamped}")
        size = max(1, int(min(task.shape[1:]) / 4.6)) if self.size is None else self.size
        patches = [_patch(task.shape, size, corner, rng) for corner in CORNERS]
        shown = [patches[number] for number in sorted(set(self.stamped))]
        trigger = Patch(
            mask=torch.stack([patch.mask for patch in shown]).amax(0),
            pattern=torch.stack([patch.pattern for patch in shown]).amax(0),
            opacity=self.opacity,
        )
        poisoned = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        altered = poisoned | choose(~poisoned, poison_count(self.cover_rate, len(clean.y)), rng)
        which = torch.randint(len(CORNERS), altered.shape, generator=rng)
        y = torch.where(poisoned, goal.goal(clean.y), clean.y)
        marks = tuple(
            Mark(altered & (which == number), _Faint(patch, opacity))
            for number, (patch, opacity) in enumerate(zip(patches, self.opacities, strict=True))
        )
        return Poisoned(images=Images(clean.x, y), altered=altered, trigger=trigger, target=goal, marks=marks)


class _Faint:
    """Stamps a patch at an opacity of its own."""

    def __init__(self, patch: Patch, opacity: float) -> None:
        self.patch = Patch(mask=patch.mask, pattern=patch.pattern, opacity=opacity)

    def __call__(self, x: Tensor, _: Tensor) -> Tensor:
        return self.patch(x)


def _patch(shape: Shape, size: int, corner: str, rng: torch.Generator) -> Patch:
    """Random black and white pixels in a corner, the same in all channels."""
    mask = Patch.square(shape, size=size, color="white", corner=corner).mask
    return Patch(mask=mask, pattern=(mask * torch.randint(2, mask.shape, generator=rng)).repeat(shape[0], 1, 1))
