"""Neuron pruning: cut the last hidden neurons that a recovered trigger wakes."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from molehunt.defenses._held_out import HAIR
from molehunt.defenses._recovered import Recovered, others, ready, rebuilt, told
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.networks import features
from molehunt.suspect import BATCH, Access, Suspect
from molehunt.tasks import Images
from molehunt.training import accuracy


@dataclass(frozen=True, kw_only=True)
class NeuronPruning:
    """Set to zero what the head reads of the neurons that a recovered trigger wakes, until the trigger stops working.

    Score: none; this is a pure repair of what other defenses found. `repaired` is an ordinary state dict on the CPU
    with the keys of the suspect's, which differs from it in columns of the head alone; None where no recovered trigger
    works.

    `details` hold `order` (D,), the inputs of the head, those first that triggers wake most; `accuracies` (D + 1,) and
    `successes` (D + 1,), accuracy on held-out images and the largest success of a trigger on those of other classes,
    shares in [0, 1], when the first 0, 1, ..., D neurons are pruned; `pruned`, how many are; `triggers`, of each that
    works {defense, target, before, after}; `accuracy`, `before` and `repaired`; and `warnings`.

    Attributes:
        works: least share of held-out images of other classes that a trigger has to send to its target, in (0, 1].
        until: share of them at which a trigger counts as dead, in [0, 1).
        tolerance: accuracy on held-out images that pruning may cost, in [0, 1]; where no level keeps to it and kills
            all triggers, the last one before the accuracy first falls below it is taken.
        held_out: share of the clean images that measure, in (0, 1); the others rank.

    Raises:
        ValueError: a setting out of range, or too few clean images.

    Reference:
        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
        Neural Networks", IEEE S&P 2019.

    Departures from the paper:
        All levels are measured, not one after the other, and accuracy bounds them. Neurons are ranked on images of
        other classes than the target. Of several triggers the one that wakes a neuron most ranks it.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN, Access.CANDIDATES}),)
    works: float = 0.5
    until: float = 0.05
    tolerance: float = 0.04
    held_out: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 < self.works <= 1.0:
            raise ValueError(f"works must lie in (0, 1], got {self.works}")
        if not 0.0 <= self.until < 1.0:
            raise ValueError(f"until must lie in [0, 1), got {self.until}")
        if not 0.0 <= self.tolerance <= 1.0:
            raise ValueError(f"tolerance must lie in [0, 1], got {self.tolerance}")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must lie in (0, 1), got {self.held_out}")

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Prune a copy of the suspect; see the class."""
        start = ready("neuron_pruning", suspect, self.held_out, self.works, run)
        rank, held, found = start.images, start.held, start.found
        if not found:
            return start.idle
        head = suspect.anatomy.head
        order = self.order(suspect, rank, found, run)
        accuracies, successes = levels(suspect, head, held, found, order, run)
        pruned = self.level(accuracies, successes)
        state = {key: value.detach().cpu().clone().contiguous() for key, value in suspect.model.state_dict().items()}
        state[f"{head}.weight"][:, order[:pruned]] = 0.0
        repaired = rebuilt(suspect.model, state)
        said = told(found, repaired, held)
        left = [one for one in said if one["after"] > self.until]
        warnings = [f"{len(left)} of {len(said)} recovered triggers still work somewhat"] if left else []
        details: dict[str, Any] = {
            "order": order,
            "accuracies": accuracies,
            "successes": successes,
            "pruned": pruned,
            "triggers": said,
            "accuracy": {"before": accuracy(suspect.model, held), "repaired": accuracy(repaired, held)},
            "warnings": warnings,
        }
        return Finding(defense="neuron_pruning", repaired=state, details=details)

    def order(self, suspect: Suspect, images: Images, found: list[Recovered], run: Run) -> Tensor:
        """The inputs of the head, int64 (D,), by how much more active triggers make them, the most first."""
        return gaps(suspect, images, found, run).amax(0).argsort(descending=True, stable=True)

    def level(self, accuracies: Tensor, successes: Tensor) -> int:
        """How many neurons to prune: the fewest that kill all triggers, if accuracy allows, else what it allows."""
        crossed = (accuracies < accuracies[0] - self.tolerance - HAIR).nonzero()
        last = int(crossed[0]) - 1 if len(crossed) else len(accuracies) - 1
        dead = (successes[: last + 1] <= self.until).nonzero()
        return int(dead[0]) if len(dead) else last


def gaps(suspect: Suspect, images: Images, found: list[Recovered], run: Run) -> Tensor:
    """By trigger, how much more active it makes each input of the head, on images of other classes: float64 (T, D).

    Means over the images; where there is no image of another class, all gaps are 0.
    """
    rows = []
    for one in found:
        run.check()
        some = others(images, one.candidate.target)
        stamped = penultimate(suspect, one.candidate.trigger(some.x), run)
        rows.append((stamped - penultimate(suspect, some.x, run)).sum(0) / max(1, len(some.y)))
    return torch.stack(rows)


def penultimate(suspect: Suspect, x: Tensor, run: Run) -> Tensor:
    """What enters the head: float64 (N, D), on the CPU; N is at least 1."""
    rows = []
    for part in torch.split(x, BATCH):
        run.check()
        rows.append(suspect.features(part).double().cpu())
    return torch.cat(rows)


@torch.no_grad()
def levels(
    suspect: Suspect, head: str, held: Images, found: list[Recovered], order: Tensor, run: Run
) -> tuple[Tensor, Tensor]:
    """Accuracy, and the largest success of a trigger, at every number of pruned neurons: twice float64 (D + 1,).

    A pruned neuron takes its share out of every logit, so all levels are one cumulative sum. Answers are those of the
    model as it was submitted, in float32.
    """
    layer = suspect.model.get_submodule(head)
    weight = layer.weight.detach().double().cpu()[:, order]  # type: ignore[operator]
    bias = layer.bias.detach().double().cpu() if isinstance(layer.bias, Tensor) else torch.zeros(len(weight))

    def right(x: Tensor, y: Tensor) -> Tensor:
        counts = torch.zeros(len(order) + 1, dtype=torch.float64)
        # So that the logits of all levels stay below 16 MB, and what they are made from below 100.
        step = max(1, 2**21 // (len(counts) * len(weight)))
        for part, labels in zip(torch.split(x, step), torch.split(y.cpu(), step), strict=True):
            run.check()
            read = features(suspect.model, head, part)[1].double().cpu()
            shares = read[:, None, order] * weight  # (B, K, D)
            kept = shares.flip(2).cumsum(2).flip(2)
            logits = torch.cat([kept, torch.zeros_like(kept[..., :1])], 2) + bias[:, None]
            counts += (logits.argmax(1) == labels[:, None]).sum(0)
        return counts / max(1, len(y))

    accuracies = right(held.x, held.y)
    reached = []
    for one in found:
        some = others(held, one.candidate.target)
        reached.append(right(one.candidate.trigger(some.x), torch.full_like(some.y, one.candidate.target)))
        run.report(len(reached), len(found))
    return accuracies, torch.stack(reached).amax(0)
