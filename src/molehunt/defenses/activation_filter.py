"""Activation filter: inputs that wake the neurons which a recovered trigger wakes."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from molehunt.defenses._recovered import ready
from molehunt.defenses.neuron_pruning import gaps, penultimate
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect


@dataclass(frozen=True, kw_only=True)
class ActivationFilter:
    """Tell inputs apart by the last hidden neurons that a recovered trigger wakes.

    Score: none of the model. Input scores: by trigger the mean activation of its neurons, in standard deviations above
    the mean of held-out clean images; the largest over the triggers counts. Higher is likelier to carry a trigger.
    None where no recovered trigger works.

    `details` hold `triggers`, of each that works {defense, target, neurons}; `threshold`, the score that the share
    `false_alarms` of held-out clean images exceeds; `rejected`, how many inputs exceed it; and `warnings`.

    Attributes:
        share: of the inputs of the head that are looked at, in (0, 1]; at least one is.
        false_alarms: share of clean images that may be rejected, in (0, 1).
        works: least share of held-out images of other classes that a trigger has to send to its target, in (0, 1].
        held_out: share of the clean images that set the scale and the threshold, in (0, 1); the others rank.

    Raises:
        ValueError: a setting out of range, or too few clean images.

    Reference:
        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
        Neural Networks", IEEE S&P 2019.

    Departures from the paper:
        Several triggers are looked for at once, each by neurons and on a scale of its own. Neurons are ranked on images
        of other classes than the target.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN, Access.CANDIDATES, Access.INPUTS}),)
    share: float = 0.01
    false_alarms: float = 0.05
    works: float = 0.5
    held_out: float = 0.5

    def __post_init__(self) -> None:
        for name in ("share", "works"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        for name in ("false_alarms", "held_out"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in (0, 1), got {getattr(self, name)}")

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Score the suspect's inputs; see the class."""
        if suspect.inputs is None or len(suspect.inputs) == 0:
            raise ValueError("the activation filter needs inputs to score")
        start = ready("activation_filter", suspect, self.held_out, self.works, run)
        rank, held, found = start.images, start.held, start.found
        if not found:
            return start.idle
        gap = gaps(suspect, rank, found, run)  # (T, D)
        most = max(1, round(self.share * gap.shape[1]))
        chosen = gap.argsort(dim=1, descending=True, stable=True)[:, :most]
        usual, seen = (penultimate(suspect, x, run)[:, chosen].mean(2) for x in (held.x, suspect.inputs))
        middle, wide = usual.mean(0), usual.std(0)
        # Neurons that clean images never wake have no spread: what they are woken by is told in their own units.
        wide = torch.where(wide > 0, wide, 1.0)
        ours, scores = (((a - middle) / wide).amax(1) for a in (usual, seen))
        threshold = float(ours.quantile(1.0 - self.false_alarms))
        details: dict[str, Any] = {
            "triggers": [
                {"defense": one.candidate.defense, "target": one.candidate.target, "neurons": neurons.tolist()}
                for one, neurons in zip(found, chosen, strict=True)
            ],
            "threshold": threshold,
            "rejected": int((scores > threshold).sum()),
            "warnings": [],
        }
        return Finding(defense="activation_filter", input_scores=scores, details=details)
