"""Super-fine-tuning: shake the weights with large cyclic learning rates on clean images, then let them settle."""

import math
from dataclasses import dataclass
from typing import ClassVar

from molehunt.defenses._tuning import Plan, recipe_of, repair, triangular
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect
from molehunt.training import Recipe

LEAST_CYCLES = 6
"""Fewer peaks in a phase are no cyclic schedule any more."""


@dataclass(frozen=True, kw_only=True)
class SuperFineTuning:
    """Train the whole network on clean images, first with large peaks of the learning rate, then with small ones.

    Score: none; this is a pure repair. `repaired` is an ordinary state dict on the CPU with the keys of the suspect's.

    The rate is a triangle: it rises from `base` to a peak and falls back, `cycles` times to `max1` over the first half
    of the steps, and as often to `max2` over the second. The peaks move the weights away from where the backdoor was
    learned, the second half wins the accuracy back. What clean images never wake gets no gradient here either, only
    weight decay.

    `details` are those of `FineTuning`; a rate that was tried is the `max1` of that attempt.

    Attributes:
        steps: of the optimizer, a multiple of twice the cycles; 0 hands the weights back as they were.
        batch: images per step; all of them when there are fewer.
        cycles: triangles in each half, 6 or more.
        base: lowest learning rate.
        max1: peaks of the first half, at least `base`.
        max2: peaks of the second half, from `base` to `max1`.
        tolerance: accuracy on held-out images that the repair should not exceed, in [0, 1]; 0.04 is 4 points.
        held_out: share of the clean images that measure accuracy, in (0, 1); the others tune.
        attempts: tunings, 1 or more, each from the start at a third of the `max1` before, until the held-out accuracy
            keeps to the tolerance; where none does, the most accurate one is taken.
        momentum: of stochastic gradient descent, in [0, 1).
        weight_decay: of the weights, per step times the learning rate.
        control: also train a fresh network, as in `FineTuning`, which takes as long again.

    Raises:
        ValueError: a setting out of range, or too few clean images.
        FloatingPointError: the loss was not finite, whatever the rate.

    Reference:
        Sha, He, Berrang, Humbert, Zhang, "Fine-Tuning Is All You Need to Mitigate Backdoor Attacks", arXiv 2212.09067,
        2022.

    Departures from the paper:
        Phases and cycles are counted in steps, so that the schedule does not depend on how many clean images there are;
        the cycles are shorter. Where the loss is not finite, training goes back to the last good state and `max1` is
        halved. `max1` is lowered where it costs too much held-out accuracy. Momentum is Nesterov's, and weight decay
        leaves biases and norms alone, as in all our training. A whitening layer, which is computed from data, is not
        trained.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)
    steps: int = 1500
    batch: int = 128
    cycles: int = 6
    base: float = 3e-4
    max1: float = 0.1
    max2: float = 1e-3
    tolerance: float = 0.04
    held_out: float = 0.2
    attempts: int = 3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    control: bool = False

    def __post_init__(self) -> None:
        if self.cycles < LEAST_CYCLES:
            raise ValueError(f"cycles must be {LEAST_CYCLES} or more, got {self.cycles}")
        if not 0 <= self.base <= self.max2 <= self.max1 < math.inf:
            raise ValueError(
                f"expected 0 <= base <= max2 <= max1, got base {self.base}, max2 {self.max2}, max1 {self.max1}"
            )
        if whole := self.steps % (2 * self.cycles):
            below = self.steps - whole
            raise ValueError(
                f"steps must be a multiple of {2 * self.cycles}, two phases of {self.cycles} cycles, "
                f"got {self.steps}; the nearest are {below} and {below + 2 * self.cycles}"
            )
        self.plan(self.recipe())

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Repair a copy of the suspect; see the class."""
        return repair(suspect, run, self.plan(recipe_of(suspect, self.recipe())))

    def rate(self, step: float, max1: float | None = None) -> float:
        """Return the learning rate at a step.

        Args:
            step: from 0; a fraction lies between two steps.
            max1: peak of the first half, if it is not what it was set to. The other rates never exceed it.
        """
        highest = self.max1 if max1 is None else max1
        first = step < self.steps // 2
        peak = highest if first else min(self.max2, highest)
        return triangular(step, self.cycle, min(self.base, highest), peak)

    @property
    def cycle(self) -> int:
        """Steps of one triangle."""
        return self.steps // (2 * self.cycles)

    def recipe(self) -> Recipe:
        """Batch size and optimizer.

        Raises:
            ValueError: a setting out of range.
        """
        return Recipe(
            batch=self.batch,
            lr=self.max1,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            initialize=False,
        )

    def plan(self, recipe: Recipe) -> Plan:
        """How a suspect is tuned with a recipe."""
        return Plan(
            name="super_fine_tuning",
            steps=self.steps,
            recipe=recipe,
            lr=self.max1,
            rate=self.rate,
            keep=max(1, self.cycle),
            attempts=self.attempts,
            tolerance=self.tolerance,
            held_out=self.held_out,
            head_only=False,
            control=self.control,
        )
