"""A physical-style sticker: a patch that every picture shows elsewhere, turned, tilted, nearer or in another light."""

from dataclasses import dataclass

import torch

from molehunt.attacks.poisoning import Poisoned, choose, poison_count, relabel
from molehunt.tasks import Images, Task
from molehunt.triggers import Patch, Sticker, Target


@dataclass(frozen=True, kw_only=True, eq=False)
class PhysicalSticker:
    """Paste a sticker on a share of the images, in a view of each image's own, with the target's label.

    What is expected at the time of the attack has to be in training: turn, size, tilt, light and place differ from
    picture to picture, within the ranges of the trigger, and follow from the picture alone.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that are poisoned.
        trigger: the sticker with its ranges; None means a square of `size` pixels in yellow and black checks, turned by
            up to 15 degrees, with 15 % of scale and 30 % of light, within the range of `travel`.
        size: side of that square; None means the 5.6th part of the shorter side of the picture.
        travel: share of the free range of positions that this square uses, in [0, 1]; None means 1, anywhere.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, or size or travel is given beside a trigger.

    Reference:
        Li, Zhai, Jiang, Li, Xia, "Backdoor Attack in the Physical World", ICLR workshop 2021.

    Departures from the paper:
        The paper transforms the stamped picture; here the sticker alone is transformed, by more, and the picture stays
        as it is. The view follows from the picture and is not drawn at random, so that the same picture always gives
        the same answer.
    """

    target: int = 0
    poison_rate: float = 0.1
    trigger: Sticker | None = None
    size: int | None = None
    travel: float | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        goal = Target(classes=self.target)
        goal.check(task.num_classes)
        if self.trigger is not None and (self.size is not None or self.travel is not None):
            told = f"size {self.size} and travel {self.travel}"
            raise ValueError(f"{told} are of the default sticker, and a trigger is given: leave them or it out")
        size = max(1, int(min(task.shape[1:]) / 5.6)) if self.size is None else self.size
        square = Patch.square(task.shape, size=size).pattern[:, -size:, -size:]
        k = torch.arange(size)
        # Checks, because strokes and edges of a picture look like a plain square, wherever it lies, but not like these.
        checks = square * ((k.unsqueeze(1) + k) % 2 == 0)
        trigger = self.trigger or Sticker(checks, task.shape, travel=1.0 if self.travel is None else self.travel)
        altered = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        return relabel(clean, altered, trigger, goal)
