"""BppAttack: fewer color levels are the trigger."""

from dataclasses import dataclass

import torch
from torch import Tensor

from molehunt.attacks.poisoning import Mark, Poisoned, choose, poison_count
from molehunt.tasks import Images, Task
from molehunt.triggers import Quantize, Target, Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class Bpp:
    """Round the values of a share of the images to a few levels and give them the target's label.

    As many other images get the rounding error of *another* image and keep their labels. From these negatives the
    network learns that the error has to belong to the picture; without them any noise of that size is the trigger.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that get the trigger and a changed label.
        negative_rate: share of all training images that get a foreign rounding error and keep their label.
        levels: levels per channel, from 2 to 256.
        dither: diffuse the rounding errors (Floyd and Steinberg).
        trigger: the trigger itself; None means a `Quantize` of these settings.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, or a setting is out of range.

    Reference:
        Wang, Zhai, Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image
        Quantization and Contrastive Adversarial Learning", CVPR 2022.

    Departures from the paper:
        The training set is poisoned once, instead of anew in every batch. The paper's adversarial negatives are left
        out, its contrastive ones kept. Images that already have the target's label are never poisoned.
    """

    target: int = 0
    poison_rate: float = 0.1
    negative_rate: float = 0.1
    levels: int = 8
    dither: bool = False
    trigger: Trigger | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        goal = Target(classes=self.target)
        goal.check(task.num_classes)
        trigger = self.trigger or Quantize(shape=task.shape, levels=self.levels, dither=self.dither)
        altered = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        images = Images(clean.x, torch.where(altered, goal.goal(clean.y), clean.y))
        if self.negative_rate == 0:
            return Poisoned(images=images, altered=altered, trigger=trigger, target=goal)
        negative = choose(~altered, poison_count(self.negative_rate, len(clean.y)), rng)
        other = torch.randint(len(clean.y), (len(clean.y),), generator=rng)

        def foreign(x: Tensor, rows: Tensor) -> Tensor:
            source = clean.x[other[rows.to(other.device)].to(clean.x.device)].to(x)
            return (x + trigger(source) - source).clamp(0.0, 1.0)

        marks = (Mark(altered, lambda picked, _: trigger(picked)), Mark(negative, foreign))
        return Poisoned(images=images, altered=altered | negative, trigger=trigger, target=goal, marks=marks)
