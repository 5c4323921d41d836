"""Fine-tuning: go on training on clean images, and hope that the backdoor is forgotten."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from molehunt.defenses._tuning import Plan, recipe_of, repair
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect
from molehunt.training import Recipe

Schedule = Literal["constant", "cosine"]
Layers = Literal["all", "head"]


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Train the whole network on clean images at a small learning rate.

    Score: none; this is a pure repair. `repaired` is an ordinary state dict on the CPU with the keys of the suspect's.

    A backdoor that clean images never wake gets no gradient, and stays: weight decay alone touches its weights. This is
    the yardstick for stronger repairs.

    `details` hold `accuracy`, shares in [0, 1] of the held-out images, `before` and `repaired`; `images`, how many
    tuned and how many were held out; `rates`, the learning rates that were tried, `lr`, each with the `accuracy` that
    it led to, None where it diverged, and `restored`, how often it went back to an earlier state at half the rate
    because the loss was not finite; `lr`, the one taken; and `warnings`. With `control` also `scratch`, the state dict
    of a fresh network of the same architecture after as many steps on the same images, and its accuracy: a repair that
    is no more accurate than that has saved nothing.

    Attributes:
        steps: of the optimizer; 0 hands the weights back as they were.
        batch: images per step; all of them when there are fewer.
        lr: highest learning rate.
        schedule: "cosine" lets the rate fall to 0, "constant" keeps it.
        layers: "all", or "head" for the last linear layer alone, with norms and their statistics as they are.
        tolerance: accuracy on held-out images that the repair should not exceed, in [0, 1]; 0.04 is 4 points.
        held_out: share of the clean images that measure accuracy, in (0, 1); the others tune.
        attempts: tunings, 1 or more, each from the start at a third of the rate before, until the held-out accuracy
            keeps to the tolerance; where none does, the most accurate one is taken.
        momentum: of stochastic gradient descent, in [0, 1).
        weight_decay: of the weights, per step times the learning rate.
        control: also train a fresh network, which takes as long again.

    Raises:
        ValueError: a setting out of range, or too few clean images.
        FloatingPointError: the loss was not finite, whatever the rate.

    Reference:
        Sha, He, Berrang, Humbert, Zhang, "Fine-Tuning Is All You Need to Mitigate Backdoor Attacks", arXiv 2212.09067,
        2022, for fine-tuning as a defense in its own right.

    Departures from the paper:
        The budget is a number of steps, not of epochs. Momentum is Nesterov's, and weight decay leaves biases and norms
        alone, as in all our training. A whitening layer, which is computed from data, is not trained. The rate is
        lowered where it costs too much held-out accuracy. The control is ours.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)
    steps: int = 300
    batch: int = 128
    lr: float = 0.01
    schedule: Schedule = "cosine"
    layers: Layers = "all"
    tolerance: float = 0.04
    held_out: float = 0.2
    attempts: int = 3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    control: bool = False

    def __post_init__(self) -> None:
        for name, kinds in (("schedule", Schedule), ("layers", Layers)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}")
        self.plan(self.recipe())

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Repair a copy of the suspect; see the class."""
        return repair(suspect, run, self.plan(recipe_of(suspect, self.recipe())))

    def recipe(self) -> Recipe:
        """Batch size, optimizer and schedule.

        Raises:
            ValueError: a setting out of range.
        """
        return Recipe(
            batch=self.batch,
            lr=self.lr,
            schedule=self.schedule,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            initialize=False,
        )

    def plan(self, recipe: Recipe) -> Plan:
        """How a suspect is tuned with a recipe."""
        return Plan(
            name="fine_tuning",
            steps=self.steps,
            recipe=recipe,
            lr=self.lr,
            rate=lambda step, highest: highest * recipe.rate(step, self.steps),
            keep=max(1, self.steps // 12),
            attempts=self.attempts,
            tolerance=self.tolerance,
            held_out=self.held_out,
            head_only=self.layers == "head",
            control=self.control,
        )
