"""Pair inversion: search the cheapest trigger from every class to every other, for backdoors of some classes alone."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from molehunt.defenses._inversion import Schedule, invert, random_start, schedule_batches
from molehunt.defenses.neural_cleanse import FAST
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect
from molehunt.triggers import Patch

POLISHES = 20
"""Rounds of the median polish."""


class _Found(NamedTuple):
    """Best patch of every pair of classes: tables (K, K) by source and target, the diagonal without meaning."""

    mask: Tensor  # (K, K, 1, H, W)
    pattern: Tensor  # (K, K, C, H, W)
    norm: Tensor
    success: Tensor
    works: Tensor


@dataclass(frozen=True, kw_only=True)
class PairInversion:
    """Search, for every ordered pair of classes, the smallest patch that sends images of the one to the other.

    A backdoor that works on some classes alone needs a large patch for the others, so a search over all images, like
    Neural Cleanse's, sees nothing. Here every source class is searched by itself.

    Score: by how much the logarithm of the smallest patch's L1 norm from s to t lies below what is usual for that
    source and that target, less what the way back, from t to s, lies below its own (0 where it lies above); the
    largest over all pairs; at least 0, higher is more suspicious, no upper bound. What is usual is the sum of an
    effect of the source and one of the target, by median polish. The way back is subtracted since classes that are
    alike are near in both directions, and a backdoor leads one way.

    Class scores: the same by target, the largest over the sources; a target that no image can be sent to has 0.

    The trigger is the patch of the pair with the largest score, for its source alone (`sources`); None where no patch
    works. A pair whose patch sends less than `confirm` of the source's images to the target is *censored*: its norm
    becomes the largest one observed.

    Details: `norms` and `success` (K, K) by source and target, 0 on the diagonal; `censored`, a list of [source,
    target]; `excess` (K, K), what the score is the largest of, 0 where it would be negative.

    Attributes:
        schedule: length of the searches and behavior of lambda.
        restarts: searches per pair from different random starts; the smallest mask that works counts.
        confirm: share of the source's images that a patch must send to the target, in (0, 1].
        limit: images per forward pass at most.

    Raises:
        ValueError: a setting out of its range, or a class without two clean images.

    Reference:
        The search is that of Wang et al., "Neural Cleanse", IEEE S&P 2019. Shen et al., "Backdoor Scanning for Deep
        Neural Networks through K-Arm Optimization", ICML 2021, search from single classes too.

    Departures from the paper:
        K-Arm spends its steps on the pairs that look best so far, here every pair is searched as long. It compares a
        mask with a fixed size, and with the way back; here the logarithm is compared with what is usual for the source
        and the target, and with the way back. A patch is confirmed on all images of its source, those of the search
        included: a class of the defender's has some fifty.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)

    schedule: Schedule = FAST
    restarts: int = 1
    confirm: float = 0.75
    limit: int = 500

    def __post_init__(self) -> None:
        for name in ("restarts", "limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.confirm <= 1:
            raise ValueError(f"confirm must lie in (0, 1], got {self.confirm}")

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Search every pair of the suspect's classes; see the class."""
        if suspect.clean is None:
            raise ValueError("pair inversion needs clean images, got none")
        x, y = suspect.clean
        seen = [x[(y == source).to(x.device)] for source in range(suspect.classes)]
        if few := [source for source, mine in enumerate(seen) if len(mine) < 2]:
            raise ValueError(f"pair inversion needs two clean images of every class, class {few[0]} has fewer")
        found = self._search(suspect, seen, run)
        return _answer(found)

    def _search(self, suspect: Suspect, seen: list[Tensor], run: Run) -> _Found:
        """Search the pairs, source by source."""
        classes, shape = suspect.classes, suspect.task.shape
        mask, pattern = torch.zeros(classes, classes, 1, *shape[1:]), torch.zeros(classes, classes, *shape)
        success = torch.zeros(classes, classes, dtype=torch.float64)
        norm, works = success.clone(), torch.zeros(classes, classes, dtype=torch.bool)
        for source, mine in enumerate(seen):
            others = torch.tensor([k for k in range(classes) if k != source])

            def tick(done: int, total: int, begun: int = source) -> None:
                run.check()
                if done % self.schedule.updates == 0:
                    run.report(begun * total + done, classes * total)

            ends = invert(
                suspect.forward,
                mine,
                others.repeat(self.restarts),
                random_start(self.restarts * len(others), shape, run.rng),
                schedule_batches(len(mine), self.schedule, run.rng),
                self.schedule,
                limit=self.limit,
                tick=tick,
            )
            rank = torch.where(ends.works, ends.mask.sum(dim=(1, 2, 3)), math.inf).cpu().view(self.restarts, -1)
            rows = rank.argmin(0) * len(others) + torch.arange(len(others))
            mask[source, others], pattern[source, others] = ends.mask.cpu()[rows], ends.pattern.cpu()[rows]
            for target in others.tolist():
                run.check()
                patch = Patch(mask=mask[source, target], pattern=pattern[source, target])
                success[source, target] = float((suspect.logits(patch(mine)).argmax(1) == target).double().mean())
            works[source, others] = ends.works.cpu()[rows] & (success[source, others] >= self.confirm)
        norm = mask.double().sum(dim=(2, 3, 4))
        return _Found(mask=mask, pattern=pattern, norm=norm, success=success, works=works)


def _answer(found: _Found) -> Finding:
    """Make the statistic and the finding."""
    classes = len(found.norm)
    pairs = ~torch.eye(classes, dtype=torch.bool)
    norm = found.norm.clone()
    if bool(found.works.any()):
        norm[pairs & ~found.works] = norm[found.works].max()
    excess = one_way(torch.where(pairs, norm, 1.0).clamp(min=1e-6).log())
    excess[~found.works] = 0.0
    best = divmod(int(excess.argmax()), classes)
    trigger = None
    if bool(found.works.any()) and float(excess[best]) > 0:
        trigger = Patch(mask=found.mask[best].clone(), pattern=found.pattern[best].clone())
    return Finding(
        defense="pair_inversion",
        score=float(excess.max()),
        class_scores=excess.max(0).values,
        trigger=trigger,
        target=best[1] if trigger else None,
        sources=(best[0],) if trigger else (),
        details={
            "norms": found.norm,
            "success": found.success,
            "censored": (pairs & ~found.works).nonzero().tolist(),
            "excess": excess,
        },
    )


def one_way(log_norm: Tensor) -> Tensor:
    """By how much each pair's patch is smaller than usual, less what the way back is: (K, K), at least 0.

    Args:
        log_norm: (K, K) by source and target; the diagonal is not looked at.

    Returns:
        float64 (K, K), 0 on the diagonal. A number that is added to a row changes nothing, one that is added to a
        column little: where the polish ends depends on where it begins.
    """
    diagonal = torch.eye(len(log_norm), dtype=torch.bool)
    rest = log_norm.double().masked_fill(diagonal, math.nan)
    for _ in range(POLISHES):
        # quantile, not median: for an even number of pairs the mean of the two in the middle.
        rest = rest - rest.nanquantile(0.5, dim=1, keepdim=True)
        rest = rest - rest.nanquantile(0.5, dim=0, keepdim=True)
    below = (-rest).masked_fill(diagonal, 0.0)
    return (below - below.T.clamp(min=0.0)).clamp(min=0.0)
