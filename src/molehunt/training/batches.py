"""The batches of one training: their order, their augmentation and what is stamped on them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from molehunt.tasks import Images
from molehunt.training.augmentation import cover, crop
from molehunt.training.recipes import Recipe

Stamp = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W), rows int64 (B,) of the training set) to x, on the images of one batch after augmentation."""


class Order:
    """Batches of rows without end: one shuffled pass after the other, cut into batches of one size.

    Args:
        count: rows of the training set.
        batch: rows per batch.
        rng: shuffles.
    """

    def __init__(self, count: int, batch: int, rng: torch.Generator) -> None:
        self.count, self.batch, self.rng = count, batch, rng
        self.rows = torch.empty(0, dtype=torch.int64)
        self.passes = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """Return rows (B,) and, for each, the number of its pass (B,), from 0."""
        rows, pass_ = self.rows[: self.batch], torch.full((min(len(self.rows), self.batch),), self.passes - 1)
        self.rows = self.rows[self.batch :]
        if (missing := self.batch - len(rows)) > 0:
            fresh = torch.randperm(self.count, generator=self.rng)
            rows, self.rows = torch.cat((rows, fresh[:missing])), fresh[missing:]
            pass_ = torch.cat((pass_, torch.full((missing,), self.passes)))
            self.passes += 1
        return rows, pass_


class Batches:
    """The batches that one training sees; a function of the data, the recipe and the generator.

    Args:
        images: x (N, C, H, W) in [0, 1] and labels (N,), on the device of the training.
        recipe: its batch size and augmentation.
        rng: on the CPU; draws order and augmentation.
        stamp: puts the trigger on the images of a batch after augmentation, given their row numbers.
    """

    def __init__(self, images: Images, recipe: Recipe, rng: torch.Generator, stamp: Stamp | None = None) -> None:
        self.x, self.y = images
        self.recipe, self.rng, self.stamp = recipe, rng, stamp
        self.order = Order(len(self.x), min(recipe.batch, len(self.x)), rng)
        # Which images are mirrored in even passes; the others are mirrored in odd ones, so that two passes show both
        # sides of every image.
        self.mirrored = torch.randint(2, (len(self.x),), generator=rng)
        self.color = self.x.mean((0, 2, 3)) if recipe.cutout else None

    @property
    def passes(self) -> int:
        """Passes over the data that have begun."""
        return self.order.passes

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next images (B, C, H, W), augmented and stamped, in channels-last layout, and labels (B,)."""
        picked, labels, _ = self.picked()
        return picked, labels

    def picked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `next` does and the rows (B,) that the images have in the training set."""
        rows, passes = self.order.next()
        picked = self._augment(rows, self.mirrored[rows] ^ (passes & 1))
        rows = rows.to(self.x.device)
        return self.stamp(picked, rows) if self.stamp else picked, self.y[rows], rows

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return what `restore` needs, besides the generator's own state: tensors, and whole numbers."""
        return {"rows": self.order.rows, "mirrored": self.mirrored}, {"passes": self.order.passes}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Go on where a state was taken."""
        self.order.rows, self.order.passes = tensors["rows"], numbers["passes"]
        self.mirrored = tensors["mirrored"]

    def _augment(self, rows: Tensor, mirror: Tensor) -> Tensor:
        x, recipe = self.x, self.recipe
        picked = x[rows.to(x.device)].contiguous(memory_format=torch.channels_last)
        if recipe.augment != "none":
            reach = (-recipe.shift, recipe.shift + 1)
            down, right = torch.randint(*reach, (2, len(rows)), generator=self.rng).to(x.device)
            picked = crop(picked, down, right, mirror.bool().to(x.device) if recipe.augment == "flip_crop" else None)
        if self.color is None:
            return picked
        # Its center lies anywhere in the picture.
        center = torch.rand(2, len(rows), generator=self.rng).to(x.device)
        height, width = x.shape[2:]
        top, left = (center[0] * height).long(), (center[1] * width).long()
        return cover(picked, top - recipe.cutout // 2, left - recipe.cutout // 2, recipe.cutout, self.color)
