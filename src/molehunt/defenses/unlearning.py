"""Unlearning: train on pictures that carry the recovered triggers and keep their true labels."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from molehunt.defenses._fresh import trainable
from molehunt.defenses._held_out import HAIR
from molehunt.defenses._recovered import Recovered, ready, rebuilt, told
from molehunt.engine import OutOfTime, Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images
from molehunt.training import Recipe, accuracy, train


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """Stamp recovered triggers on clean images, keep the labels true, and train on them for a while.

    Score: none; this is a pure repair of what other defenses found. `repaired` is an ordinary state dict on the CPU
    with the keys of the suspect's; None where no recovered trigger works, as nothing is there to unlearn.

    `details` hold `triggers`, of each that works {defense, target, before, after}, the shares of held-out images of
    other classes that it sends to its target; `accuracy`, shares in [0, 1] of the held-out images, `before` and
    `repaired`; `images`, how many tuned, how many of those were stamped, and how many were held out; `rates`, the
    learning rates that were tried, each with the accuracy that it led to, None where it diverged; `lr`, the one taken;
    and `warnings`.

    Attributes:
        share: of the images that are stamped, in (0, 1]; several triggers share them.
        works: least share of held-out images of other classes that a trigger has to send to its target, in (0, 1];
            triggers that do less are left alone.
        steps: of the optimizer.
        batch: images per step.
        lr: highest learning rate; it rises over the first fifth of the steps and falls to 0 along a cosine.
        attempts: trainings, 1 or more, each from the start at a third of the rate before, until the held-out accuracy
            keeps to the tolerance; where none does, the most accurate one is taken.
        tolerance: accuracy on held-out images that the repair may cost, in [0, 1]; 0.04 is 4 points.
        held_out: share of the clean images that measure, in (0, 1); the others tune.
        momentum: of stochastic gradient descent, in [0, 1).
        weight_decay: of the weights, per step times the learning rate.

    Raises:
        ValueError: a setting out of range, or too few clean images.
        FloatingPointError: the loss was not finite, whatever the rate.

    Reference:
        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
        Neural Networks", IEEE S&P 2019.

    Departures from the paper:
        The budget is a number of steps, not one pass over a tenth of the training set. Images of a trigger's own
        target class are never stamped with it: their label is the one that the trigger produces, so they would teach
        it again. All recovered triggers that work are unlearned together, whoever recovered them. The rate is lowered
        where it costs too much held-out accuracy. Images are augmented as the task allows before they are stamped.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN, Access.CANDIDATES}),)
    share: float = 0.2
    works: float = 0.5
    steps: int = 100
    batch: int = 64
    lr: float = 0.01
    attempts: int = 3
    tolerance: float = 0.04
    held_out: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        for name in ("share", "works"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        for name in ("steps", "batch", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.tolerance <= 1.0:
            raise ValueError(f"tolerance must lie in [0, 1], got {self.tolerance}")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must lie in (0, 1), got {self.held_out}")
        self.recipe(self.steps * self.batch, self.lr)  # refuses the rest

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Repair a copy of the suspect; see the class."""
        start = ready("unlearning", suspect, self.held_out, self.works, run)
        tune, held, found = start.images, start.held, start.found
        if not found:
            return start.idle
        owner = self.stamped(tune, found, run.rng)
        before = accuracy(suspect.model, held)
        best, rates, warnings = self._repair(suspect, tune, held, owner, found, run, before - self.tolerance)
        reached, lr, state = best
        if reached < before - self.tolerance - HAIR:
            points = f"{100 * self.tolerance:g} points of held-out accuracy"
            warnings.append(f"the repair costs more than {points} at every rate tried")
        said = told(found, rebuilt(suspect.model, state), held)
        left = [one for one in said if one["after"] >= self.works]
        if left:
            warnings.append(f"{len(left)} of {len(said)} recovered triggers still work")
        details: dict[str, Any] = {
            "triggers": said,
            "accuracy": {"before": before, "repaired": reached},
            "images": {"tune": len(tune.y), "stamped": int((owner >= 0).sum()), "held_out": len(held.y)},
            "rates": rates,
            "lr": lr,
            "warnings": warnings,
        }
        return Finding(defense="unlearning", repaired=state, details=details)

    def recipe(self, images: int, lr: float) -> Recipe:
        """How so many images are tuned on at a learning rate.

        Raises:
            ValueError: a setting out of range.
        """
        return Recipe(
            epochs=self.steps * min(self.batch, images) / images,
            batch=self.batch,
            optimizer="sgd",
            lr=lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="cosine",
            warmup=0.2,
            initialize=False,
        )

    def stamped(self, tune: Images, found: Sequence[Recovered], rng: torch.Generator) -> Tensor:
        """Which trigger each image carries: int64 (N,), its place among the triggers, -1 for none.

        No image carries a trigger whose target is its own class. The triggers take turns, so each gets its part of
        `share`, or all images that it may have.
        """
        owner = torch.full((len(tune.y),), -1)
        order = torch.randperm(len(tune.y), generator=rng)
        wanted, y = max(1, round(self.share * len(tune.y))), tune.y.cpu()
        for place, one in enumerate(found):
            free = order[(owner[order] < 0) & (y[order] != one.candidate.target)]
            owner[free[: -(-wanted // len(found))]] = place
        return owner

    def _repair(
        self,
        suspect: Suspect,
        tune: Images,
        held: Images,
        owner: Tensor,
        found: Sequence[Recovered],
        run: Run,
        least: float,
    ) -> tuple[tuple[float, float, dict[str, Tensor]], list[dict[str, float | None]], list[str]]:
        """Train at falling rates; answer (accuracy, rate, state) of the one taken, all rates, and warnings."""

        def stamp(x: Tensor, rows: Tensor) -> Tensor:
            carried = owner.to(rows.device)[rows]
            for place, one in enumerate(found):
                hit = carried == place
                if bool(hit.any()):
                    x = x.clone()
                    x[hit] = one.candidate.trigger(x[hit])
            return x

        seed = run.rng.get_state()
        rates: list[dict[str, float | None]] = []
        best: tuple[float, float, dict[str, Tensor]] | None = None
        for attempt in range(self.attempts):
            lr = self.lr / 3**attempt
            run.rng.set_state(seed)
            model = copy.deepcopy(suspect.model)
            trainable(model)
            recipe = replace(self.recipe(len(tune.y), lr), augment=suspect.task.augment)
            if suspect.dtype == torch.float32:
                recipe = replace(recipe, precision="float32")
            try:
                train(
                    model,
                    tune,
                    recipe,
                    rng=run.rng,
                    stamp=stamp,
                    report=run.report,
                    check=run.check,
                    device=suspect.device,
                )
            except OutOfTime:
                # What is finished is an answer; a repair that costs more than it should is better than none.
                if best is None:
                    raise
                return best, rates, [f"no time was left to try {lr:g}"]
            except FloatingPointError:
                rates.append({"lr": lr, "accuracy": None})
                if best is None and attempt == self.attempts - 1:
                    raise
                continue
            state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
            # Measured on what is handed back, and not on what was trained: a public port hands back another network.
            reached = accuracy(rebuilt(suspect.model, state), held)
            rates.append({"lr": lr, "accuracy": reached})
            if best is None or reached > best[0] or reached >= least - HAIR:
                best = reached, lr, state
            if reached >= least - HAIR:
                break
        assert best is not None, "else the last attempt would have raised"
        return best, rates, []
