"""Fine-pruning: cut the channels that clean images leave asleep, then fine-tune what is left."""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from molehunt.defenses._channels import (
    Reader,
    activity,
    block_output,
    find_reader,
    fold,
    level_logits,
    level_masks,
    masked,
)
from molehunt.defenses._fresh import trainable
from molehunt.defenses._held_out import HAIR, split
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.networks import Anatomy, anatomy
from molehunt.suspect import Access, Suspect, freeze
from molehunt.tasks import Augment, Images
from molehunt.training import Recipe, accuracy, train


@dataclass(frozen=True, kw_only=True)
class FinePruning:
    """Cut dormant channels of the last convolutional block, then fine-tune all weights on clean images.

    Score: none; this is a pure repair. `repaired` is an ordinary state dict with the keys of the suspect's: the
    pruned channels are cut out of the layer that reads them, so no mask is needed to run it.

    `details` hold `order` (C,), the channels from dormant to active; `curve` (C + 1,), the accuracy on held-out
    images when the first j of them are pruned, shares in [0, 1]; `pruned`, how many were; the held-out accuracy
    before, after pruning and after fine-tuning; and `rates`, the learning rates that were tried, each with the held-out
    accuracy that it led to, None where it diverged, and `lr`, the one taken. With `baselines` also the state dicts
    of pruning alone (`prune_only`) and of fine-tuning alone (`fine_tune_only`), and the accuracy of the latter.

    Attributes:
        tolerance: accuracy on held-out images that pruning may cost, in [0, 1], and that the whole repair should not
            exceed; 0.04 is 4 points.
        held_out: share of the clean images that measure accuracy, in (0, 1); the others rank and fine-tune.
        steps: fine-tuning steps.
        batch: images per step.
        lr: highest learning rate; it falls to 0 along a cosine.
        attempts: fine-tunings, 1 or more, each from the start at a third of the rate before, until the held-out
            accuracy keeps to the tolerance; where none does, the most accurate one is taken.
        warmup: share of the steps over which the learning rate rises to `lr`, in [0, 1].
        momentum: of stochastic gradient descent.
        weight_decay: of the weights, per step times the learning rate.
        baselines: also hand back the two halves of the method on their own; fine-tuning then runs twice.

    Raises:
        ValueError: a setting out of range, or too few clean images.

    Reference:
        Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
        RAID 2018.

    Departures from the paper:
        The budget of fine-tuning is a number of steps, not of epochs, so that the time does not depend on how many
        clean images there are. All prune levels are measured, and the last one before the first crossing is taken.
        Fine-tuning augments as the task allows. The rate is lowered where it costs too much accuracy: what one network
        needs to forget a trigger ruins another, and held-out accuracy is all that a defender can see. Where the network
        offers no place to cut channels (a layer norm reads the block) nothing is pruned, and a warning says so.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)
    tolerance: float = 0.04
    held_out: float = 0.2
    steps: int = 200
    batch: int = 64
    lr: float = 0.05
    attempts: int = 3
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    baselines: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.tolerance <= 1.0:
            raise ValueError(f"tolerance must lie in [0, 1], got {self.tolerance}")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must lie in (0, 1), got {self.held_out}")
        if self.steps < 0 or self.batch < 1:
            raise ValueError(f"steps must be 0 or more and batch 1 or more, got {self.steps} and {self.batch}")
        if self.attempts < 1:
            raise ValueError(f"attempts must be 1 or more, got {self.attempts}")
        self.recipe(1, "none", self.lr)  # refuses the rest, here and not only after the ranking

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Repair a copy of the suspect; see the class."""
        if suspect.clean is None or len(suspect.clean.y) < 4:
            raise ValueError("fine-pruning needs 4 clean images or more, to rank and tune on and to hold out")
        tune, held = split(suspect.clean, self.held_out, run.rng)
        model = copy.deepcopy(suspect.model)
        parts = anatomy(model, held.x[:1])
        order = torch.argsort(activity(model, parts.block, tune.x), stable=True)
        run.check()
        a = block_output(model, parts.block, held.x)
        reader = find_reader(model, parts, a, held.x[:1])
        curve = prune_curve(model, parts, a, held, order, reader, run)
        pruned, warnings = stop(curve, self.tolerance), []
        if reader is None and pruned:
            warnings.append(f"channels of {parts.block!r} cannot be cut out of this network: nothing was pruned")
            pruned = 0
        mask = level_masks(order)[pruned]
        least = float(curve[0]) - self.tolerance
        made = self.repair(suspect, mask, reader, tune, held, run, least=least)
        if made.accuracy < least - HAIR:
            warnings.append(
                f"the repair costs more than {100 * self.tolerance:g} points of held-out accuracy at every rate tried"
            )
        details: dict[str, Any] = {
            "block": parts.block,
            "order": order.cpu(),
            "curve": curve,
            "pruned": pruned,
            "images": {"tune": len(tune.y), "held_out": len(held.y)},
            "accuracy": {"before": float(curve[0]), "pruned": float(curve[pruned]), "repaired": made.accuracy},
            "rates": made.rates,
            "lr": made.lr,
            "warnings": warnings,
        }
        if self.baselines:
            alone = dataclasses.replace(self, steps=0).repair(suspect, mask, reader, tune, held, run)
            plain = self.repair(suspect, torch.ones_like(mask), reader, tune, held, run, least=least)
            details |= {"prune_only": alone.state, "fine_tune_only": plain.state}
            details["accuracy"]["fine_tune_only"] = plain.accuracy
        return Finding(defense="fine_pruning", repaired=made.state, details=details)

    def recipe(self, images: int, augment: Augment, lr: float) -> Recipe:
        """How so many images are fine-tuned on at a learning rate.

        Raises:
            ValueError: a setting out of range.
        """
        return Recipe(
            epochs=max(1, self.steps) * min(self.batch, images) / images,
            batch=self.batch,
            optimizer="sgd",
            lr=lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="cosine",
            warmup=self.warmup,
            augment=augment,
            initialize=False,
        )

    def repair(
        self,
        suspect: Suspect,
        mask: Tensor,
        reader: Reader | None,
        tune: Images,
        held: Images,
        run: Run,
        *,
        least: float = 0.0,
    ) -> "Repair":
        """Fine-tune a copy of the suspect with a mask fixed in place, then cut the masked channels.

        Args:
            suspect: the model, left as it is.
            mask: (C,), 0 for a channel that is pruned.
            reader: what `find_reader` found.
            tune: images to fine-tune on.
            held: images that measure accuracy.
            run: for its clock and its generator.
            least: accuracy at which no lower rate is tried, in [0, 1].

        Raises:
            FloatingPointError: fine-tuning diverged at every rate.
        """
        if not self.steps:
            return self._attempt(suspect, mask, reader, tune, held, run, None)
        rates: list[dict[str, float | None]] = []
        best: Repair | None = None
        for attempt in range(self.attempts):
            lr = self.lr / 3**attempt
            try:
                made = self._attempt(suspect, mask, reader, tune, held, run, lr)
            except FloatingPointError:
                rates.append({"lr": lr, "accuracy": None})
                if best is None and attempt == self.attempts - 1:
                    raise
                continue
            rates.append({"lr": lr, "accuracy": made.accuracy})
            if made.accuracy >= least - HAIR:
                return dataclasses.replace(made, rates=rates)
            if best is None or made.accuracy > best.accuracy:
                best = made
        assert best is not None, "else the last attempt would have raised"
        return dataclasses.replace(best, rates=rates)

    def _attempt(
        self,
        suspect: Suspect,
        mask: Tensor,
        reader: Reader | None,
        tune: Images,
        held: Images,
        run: Run,
        lr: float | None,
    ) -> "Repair":
        """Repair at one rate; without one nothing is fine-tuned."""
        model = copy.deepcopy(suspect.model)
        parts = anatomy(model, held.x[:1])
        if lr is not None:
            trainable(model)
            recipe = self.recipe(len(tune.y), suspect.task.augment, lr)
            if suspect.dtype == torch.float32:
                recipe = dataclasses.replace(recipe, precision="float32")
            with masked(model, parts.block, mask):
                train(model, tune, recipe, rng=run.rng, report=run.report, check=run.check, device=suspect.device)
        freeze(model)
        if reader is not None:
            fold(model, parts, reader, mask)
        state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
        return Repair(state=state, accuracy=accuracy(model, held), lr=lr)


@dataclass(frozen=True, kw_only=True, eq=False)
class Repair:
    """A repaired model.

    Attributes:
        state: its state dict, on the CPU.
        accuracy: on the images held out, in [0, 1].
        lr: the learning rate that it was fine-tuned with; None where it was not.
        rates: all that were tried, `lr`, each with the `accuracy` that it led to, None where it diverged.
    """

    state: dict[str, Tensor]
    accuracy: float
    lr: float | None
    rates: list[dict[str, float | None]] = field(default_factory=list)


def prune_curve(
    model: nn.Module, parts: Anatomy, a: Tensor, held: Images, order: Tensor, reader: Reader | None, run: Run
) -> Tensor:
    """Accuracy (C + 1,) on held-out images when the first 0, 1, ..., C channels of the order are masked.

    Args:
        model: the network, unmasked.
        parts: its anatomy.
        a: (N, ...) output of its block for the held-out images.
        held: those images.
        order: int64 (C,), dormant channels first.
        reader: what `find_reader` found.
        run: for its clock.
    """
    right = torch.zeros(len(order) + 1, dtype=torch.float64, device=a.device)
    # So that the logits of all levels stay below 64 MB.
    step = max(1, 2**23 // (len(right) * max(64, a[0].numel())))
    for part, y in zip(torch.split(a, step), torch.split(held.y, step), strict=True):
        run.check()
        logits = level_logits(model, parts, part, order, held.x[:1], reader)
        right += (logits.argmax(2) == y).sum(1)
    return (right / len(held.y)).cpu()


def stop(curve: Tensor, tolerance: float) -> int:
    """Return how many channels to prune: as many as possible before the accuracy first falls below the tolerance.

    Args:
        curve: (C + 1,), accuracy by number of pruned channels.
        tolerance: loss against no pruning that is allowed, as a share.
    """
    crossed = (curve < curve[0] - tolerance - HAIR).nonzero()
    return int(crossed[0]) - 1 if len(crossed) else len(curve) - 1
