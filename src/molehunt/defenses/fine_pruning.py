"""Fine-pruning: cut the channels that clean images leave asleep, then fine-tune what is left."""

import copy
import dataclasses
from dataclasses import dataclass
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
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.networks import Anatomy, Whitening, anatomy
from molehunt.suspect import Access, Suspect, freeze
from molehunt.tasks import Augment, Images
from molehunt.training import Recipe, accuracy, train


@dataclass(frozen=True, kw_only=True)
class FinePruning:
    """Cut dormant channels of the last convolutional block, then fine-tune all weights on clean images.

    Score: none; this is a pure repair. `repaired` is an ordinary state dict with the keys of the suspect's: the
    pruned channels are cut out of the layer that reads them, so no mask is needed to run it.

    `details` hold `order` (C,), the channels from dormant to active; `curve` (C + 1,), the accuracy on held-out
    images when the first j of them are pruned, shares in [0, 1]; `pruned`, how many were; and the held-out accuracy
    before, after pruning and after fine-tuning. With `baselines` also the state dicts of pruning alone (`prune_only`)
    and of fine-tuning alone (`fine_tune_only`), and the accuracy of the latter.

    Attributes:
        tolerance: accuracy on held-out images that pruning may cost, in [0, 1]; 0.04 is 4 points.
        held_out: share of the clean images that measure accuracy, in (0, 1); the others rank and fine-tune.
        steps: fine-tuning steps.
        batch: images per step.
        lr: highest learning rate; it falls to 0 along a cosine.
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
        Fine-tuning augments as the task allows. Where the network offers no place to cut channels (a layer norm reads
        the block) nothing is pruned, and a warning says so.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)
    tolerance: float = 0.04
    held_out: float = 0.2
    steps: int = 200
    batch: int = 64
    lr: float = 0.05
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
        self.recipe(1, "none")  # refuses the rest, here and not only after the ranking

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Repair a copy of the suspect; see the class."""
        if suspect.clean is None or len(suspect.clean.y) < 4:
            raise ValueError("fine-pruning needs 4 clean images or more, to rank and tune on and to hold out")
        tune, held = self.split(suspect.clean, run.rng)
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
        repaired, tuned = self.repair(suspect, mask, reader, tune, held, run)
        details: dict[str, Any] = {
            "block": parts.block,
            "order": order.cpu(),
            "curve": curve,
            "pruned": pruned,
            "images": {"tune": len(tune.y), "held_out": len(held.y)},
            "accuracy": {"before": float(curve[0]), "pruned": float(curve[pruned]), "repaired": tuned},
            "warnings": warnings,
        }
        if self.baselines:
            alone, _ = dataclasses.replace(self, steps=0).repair(suspect, mask, reader, tune, held, run)
            plain, unpruned = self.repair(suspect, torch.ones_like(mask), reader, tune, held, run)
            details |= {"prune_only": alone, "fine_tune_only": plain}
            details["accuracy"]["fine_tune_only"] = unpruned
        return Finding(defense="fine_pruning", repaired=repaired, details=details)

    def split(self, clean: Images, rng: torch.Generator) -> tuple[Images, Images]:
        """Images to rank and fine-tune on, and images held out to measure accuracy; disjoint by index."""
        size = min(len(clean.y) - 1, max(1, round(self.held_out * len(clean.y))))
        order = torch.randperm(len(clean.y), generator=rng).to(clean.y.device)
        held, tune = order[:size], order[size:]
        return Images(clean.x[tune], clean.y[tune]), Images(clean.x[held], clean.y[held])

    def recipe(self, images: int, augment: Augment) -> Recipe:
        """How so many images are fine-tuned on.

        Raises:
            ValueError: a setting out of range.
        """
        return Recipe(
            epochs=max(1, self.steps) * min(self.batch, images) / images,
            batch=self.batch,
            optimizer="sgd",
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="cosine",
            warmup=self.warmup,
            augment=augment,
            initialize=False,
        )

    def repair(
        self, suspect: Suspect, mask: Tensor, reader: Reader | None, tune: Images, held: Images, run: Run
    ) -> tuple[dict[str, Tensor], float]:
        """Fine-tune a copy of the suspect with a mask fixed in place, then cut the masked channels.

        Returns:
            The state dict of the copy, on the CPU, and its accuracy on the images held out.
        """
        model = copy.deepcopy(suspect.model)
        parts = anatomy(model, held.x[:1])
        if self.steps:
            for module in model.modules():
                # A whitening layer is computed from data, not learned, and no recipe trains it.
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(not isinstance(module, Whitening))
            recipe = self.recipe(len(tune.y), suspect.task.augment)
            with masked(model, parts.block, mask):
                train(model, tune, recipe, rng=run.rng, report=run.report, check=run.check, device=suspect.device)
        freeze(model)
        if reader is not None:
            fold(model, parts, reader, mask)
        state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
        return state, accuracy(model, held)


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
    # A hair of slack: 0.9 - 0.04 must allow an accuracy of 0.86.
    crossed = (curve < curve[0] - tolerance - 1e-9).nonzero()
    return int(crossed[0]) - 1 if len(crossed) else len(curve) - 1
