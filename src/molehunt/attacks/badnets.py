"""BadNets: a patch stamped on a share of the training set, with the labels changed."""

from dataclasses import dataclass

import torch

from molehunt.attacks.poisoning import Poisoned, choose, poison_count, relabel
from molehunt.tasks import Images, Task
from molehunt.triggers import Patch, Shape, Sticker, Target, Trigger

PIXELS: dict[str, tuple[tuple[int, int], ...]] = {"pixel": ((2, 2),), "four pixels": ((2, 2), (3, 3), (4, 2), (2, 4))}
"""Where the white pixels are: rows from the bottom, columns from the right."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BadNets:
    """Stamp a patch on a share of the images and give them the attacker's labels.

    Three forms: all-to-one (`target` is a class), all-to-all (`target="all"`: class k goes to k + 1 modulo K) and
    source-specific (`sources` names the classes that the trigger acts on). In the source-specific form as many
    images of *other* classes are stamped and keep their labels (`cover_rate`): without such covers the network learns
    a trigger that works on every class, and "source-specific" would be a false name.

    Attributes:
        target: the target class, or "all" for the map k to k + 1 modulo K.
        sources: classes that the trigger acts on; None means all.
        poison_rate: share of ALL training images that get the trigger and a changed label.
        cover_rate: share of all training images, from outside the sources, that get the trigger and keep their label;
            None means as many as are poisoned when there are sources, else none.
        trigger: what to stamp; None means what `form`, `size` and `place` say.
        form: "square" (yellow), "pixel" (one, white) or "four pixels" (white, those of the paper).
        size: side of the square; None means 3 pixels.
        place: "corner" (lower right; the single pixel one step in), or "random": a square elsewhere on each picture, a
            function of its content.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, an unknown form or place, or one that another setting
            leaves without effect.

    Reference:
        Gu, Liu, Dolan-Gavitt, Garg, "BadNets: Evaluating Backdooring Attacks on Deep Neural Networks", IEEE Access,
        2019.

    Departures from the paper:
        Images that already have their goal label are never chosen, so that the rate is the share of labels changed. The
        trigger is stamped after augmentation. Cover images are not in the paper.
    """

    target: int | str = 0
    sources: tuple[int, ...] | None = None
    poison_rate: float = 0.1
    cover_rate: float | None = None
    trigger: Trigger | None = None
    form: str = "square"
    size: int | None = None
    place: str = "corner"

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        if isinstance(self.target, str) and self.target != "all":
            raise ValueError(f'the target is a class or "all", got {self.target!r}')
        shift = tuple((k + 1) % task.num_classes for k in range(task.num_classes))
        goal = Target(classes=self.target if isinstance(self.target, int) else shift, sources=self.sources)
        goal.check(task.num_classes)
        if self.cover_rate and not self.sources:
            raise ValueError(f"covers need sources to lie outside of, got cover_rate {self.cover_rate} without sources")
        trigger = self._trigger(task.shape)
        altered = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        poisoned = relabel(clean, altered, trigger, goal)
        covers = self.cover_rate
        if covers is None:
            covers = self.poison_rate if self.sources else 0.0
        if not covers:
            return poisoned
        others = ~torch.isin(clean.y, torch.tensor(self.sources or ()))
        cover = choose(others, poison_count(covers, len(clean.y)), rng)
        return Poisoned(images=poisoned.images, altered=altered | cover, trigger=trigger, target=goal)

    def _trigger(self, shape: Shape) -> Trigger:
        """What is stamped."""
        told = (self.form, self.size, self.place)
        if self.trigger is not None:
            if told != ("square", None, "corner"):
                raise ValueError(f"form, size and place are of the default trigger, and a trigger is given: {told}")
            return self.trigger
        if self.form not in {"square", *PIXELS} or self.place not in {"corner", "random"}:
            raise ValueError(
                f'form is "square", "pixel" or "four pixels" and place "corner" or "random", '
                f"got {self.form!r} and {self.place!r}"
            )
        if self.form in PIXELS:
            if self.size is not None or self.place == "random":
                raise ValueError(f"size and random places are for squares, got {told}")
            return Patch.pixels(shape, PIXELS[self.form])
        side = 3 if self.size is None else self.size
        square = Patch.square(shape, size=side)
        if self.place == "corner":
            return square
        pattern = square.pattern[:, -side:, -side:]
        return Sticker(pattern, shape, rotation=0.0, scale=0.0, perspective=0.0, brightness=0.0)
