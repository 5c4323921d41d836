"""Neural Cleanse: search the cheapest trigger of every class, and ask whether one is abnormally cheap."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from molehunt.defenses._inversion import Inversion, Schedule, invert, random_start, schedule_batches
from molehunt.defenses._statistics import median, smallness
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images
from molehunt.triggers import Patch

FAST = Schedule(
    steps=15,
    updates=5,
    batch=8,
    rate=0.2,
    success=0.975,
    penalty=1e-2,
    from_zero=False,
    patience=1,
    up=1.5,
    down=1.5**1.5,
    progress=0.99,
    stop_after=8,
)
"""About 40 times fewer images than the official schedule; see docs/reference/defenses/neural_cleanse.md."""

OFFICIAL = Schedule(steps=1000, updates=31, batch=32)
"""The authors' GTSRB script: 1000 sweeps over 1000 images at most."""


class Patches(NamedTuple):
    """The best patch per class: `mask` (K, 1, H, W), `pattern` (K, C, H, W), `norm` (K,) L1 norms of the masks.

    `success` (K,) is the share of held-out images of other classes that it sends there, `works` bool (K,) tells whether
    that suffices, `penalty` and `steps` (K,) how the search ended.
    """

    mask: Tensor
    pattern: Tensor
    norm: Tensor
    success: Tensor
    works: Tensor
    penalty: Tensor
    steps: Tensor


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse:
    """Search, for every class, the smallest patch that sends clean images there.

    Score: how far the smallest mask lies below the median of all classes, in robust standard deviations (MAD, but at
    least `floor`) of the logarithms of the L1 norms; at least 0, higher is more suspicious, no upper bound. It is 0
    where all masks are equally large and where fewer than two classes have a patch that works. The paper flags above
    2 on raw norms (here `details["raw_index"]`); with ten classes and normal norms that flags one clean model in
    three, so compare with clean reference models instead.

    Class scores: the same distance for every class; censored classes (below) lie one under the lowest other.

    Only patches that work count: a class whose search never reached `schedule.success`, or whose patch sends less than
    `confirm` of the held-out images there, is *censored*: its norm becomes the largest one observed, so that it is
    never the outlier. The trigger is the smallest working patch, also on a clean model; None if there is none.

    Details: `norms`, `success`, `censored`, `penalty`, `steps` per class of `searched`; `raw_index` and `log_index`
    (without floor), `log_ratio` (logarithm of median over smallest norm); `flagged` (the paper's rule on raw norms);
    `candidates`, the patches of the smallest classes, as a list of {target, norm, success, trigger}.

    Attributes:
        schedule: length of the searches and behavior of lambda; `FAST`, `OFFICIAL` or your own.
        norms: which norms the score compares, their logarithms or the raw ones.
        floor: smallest standard deviation of the logarithms that is believed: about what two searches of one class
            differ by. Unused with raw norms.
        restarts: searches per class from different random starts; the smallest mask that works counts. None: 3 on
            pictures of one channel, 10 on others, where one search in five misses a small patch.
        shortlist: with many classes: search all for `screening` of the steps, then in full only the so many with the
            smallest masks, among which alone the score is computed. None searches all classes in full.
        screening: share of the steps that the first look takes, in (0, 1).
        start: upper end of the uniform start values of the mask, in (0, 1].
        holdout: share of the clean images kept for confirming patches, in (0, 1).
        confirm: share of held-out images of other classes that a patch must send to its class, in (0, 1].
        candidates: patches that go into the details at most.
        limit: images per forward pass at most.

    Raises:
        ValueError: a setting out of its range, or too few clean images.

    Reference:
        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
        Neural Networks", IEEE S&P 2019.

    Departures from the paper:
        The score compares logarithms of norms and bounds their spread from below. All classes share one batch. The
        default schedule moves lambda every few updates instead of every sweep and starts above 0; each class is
        searched from several starts. The patch that is kept is the one in the middle of its step. Patches are confirmed
        on held-out images, and classes without a working one are censored. The loss is the cross-entropy that the paper
        states; the authors' code minimizes 16.1 (1 - p). Filtering inputs, pruning and unlearning are not done here.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)

    schedule: Schedule = FAST
    norms: Literal["log", "raw"] = "log"
    floor: float = 0.2
    restarts: int | None = None
    shortlist: int | None = None
    screening: float = 0.3
    start: float = 1.0
    holdout: float = 0.25
    confirm: float = 0.9
    candidates: int = 3
    limit: int = 500

    def __post_init__(self) -> None:
        if self.norms not in ("log", "raw"):
            raise ValueError(f'norms is "log" or "raw", got {self.norms!r}')
        if not self.floor >= 0:
            raise ValueError(f"floor must not be negative, got {self.floor}")
        for name in ("restarts", "candidates", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.shortlist is not None and self.shortlist < 3:
            raise ValueError(f"a shortlist needs 3 classes for a median to mean something, got {self.shortlist}")
        for name in ("screening", "holdout"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie strictly between 0 and 1, got {getattr(self, name)}")
        for name in ("start", "confirm"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")

    @classmethod
    def official(cls) -> "NeuralCleanse":
        """The authors' published settings: their schedule, raw norms."""
        return cls(schedule=OFFICIAL, norms="raw", restarts=1, holdout=0.1)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Search every class of the suspect; see the class."""
        clean = suspect.clean
        if clean is None or len(clean.y) < 10:
            raise ValueError(
                f"Neural Cleanse needs at least 10 clean images, got {0 if clean is None else len(clean.y)}"
            )
        order = torch.randperm(len(clean.y), generator=run.rng).to(clean.x.device)
        kept = max(1, round(self.holdout * len(order)))
        held = Images(clean.x[order[:kept]], clean.y[order[:kept]])
        x = clean.x[order[kept:]]

        classes = torch.arange(suspect.classes)
        if self.shortlist is not None and self.shortlist < suspect.classes:
            brief = max(1, round(self.screening * self.schedule.steps))
            look = self._search(suspect, x, held, classes, brief, run)
            # Censored classes last: how small a mask is that does not work says nothing.
            classes = torch.where(look.works, look.norm, math.inf).argsort(stable=True)[: self.shortlist].sort().values
        found = self._search(suspect, x, held, classes, self.schedule.steps, run)
        return self._answer(found, classes, suspect.classes)

    def _search(self, suspect: Suspect, x: Tensor, held: Images, classes: Tensor, steps: int, run: Run) -> Patches:
        """Search some classes for so many steps; answers are on the CPU, in the order of `classes`."""
        rule = self.schedule if steps == self.schedule.steps else self.schedule.shortened(steps)
        # Drawn for every class there is, so that a class starts alike whichever others are searched beside it.
        starts = self.restarts or (3 if suspect.task.shape[0] == 1 else 10)
        mask, pattern = random_start(starts * suspect.classes, suspect.task.shape, run.rng, self.start)
        batches = schedule_batches(len(x), rule, run.rng)
        rows = (torch.arange(starts)[:, None] * suspect.classes + classes).flatten()

        def tick(done: int, total: int) -> None:
            run.check()
            if done % rule.updates == 0:
                run.report(done, total)

        targets = classes.repeat(starts)
        ends = invert(
            suspect.forward, x, targets, (mask[rows], pattern[rows]), batches, rule, limit=self.limit, tick=tick
        )
        return self._confirm(suspect, Inversion(*(column.cpu() for column in ends)), held, classes, run)

    def _confirm(self, suspect: Suspect, ends: Inversion, held: Images, classes: Tensor, run: Run) -> Patches:
        """Keep of a class's searches, restart by restart, the smallest patch that held-out images confirm."""
        norm = ends.mask.double().sum(dim=(1, 2, 3))
        rank = torch.where(ends.works, norm, math.inf).view(-1, len(classes))
        kept: list[tuple[int, float]] = []
        for column, target in enumerate(classes.tolist()):
            tried: list[tuple[int, float]] = []
            # Smallest first: as a rule the first is confirmed, and the others need not be tried.
            for restart in rank[:, column].argsort(stable=True).tolist():
                run.check()
                row = restart * len(classes) + column
                patch = Patch(mask=ends.mask[row], pattern=ends.pattern[row])
                tried.append((row, _success(suspect, held, patch, target)))
                if bool(ends.works[row]) and tried[-1][1] >= self.confirm:
                    kept.append(tried[-1])
                    break
            else:
                kept.append(tried[0])
        rows = [row for row, _ in kept]
        success = torch.tensor([rate for _, rate in kept], dtype=torch.float64)
        return Patches(
            mask=ends.mask[rows],
            pattern=ends.pattern[rows],
            norm=norm[rows],
            success=success,
            works=ends.works[rows] & (success >= self.confirm),
            penalty=ends.penalty[rows],
            steps=ends.steps[rows],
        )

    def _answer(self, found: Patches, classes: Tensor, total: int) -> Finding:
        """Make the statistic and the finding."""
        works = found.works
        norms = found.norm.clone()
        if bool(works.any()):
            norms[~works] = norms[works].max()
        raw, log = smallness(norms), smallness(norms.log())
        small = raw if self.norms == "raw" else smallness(norms.log(), self.floor)
        # One working class has nothing to be compared with, since the others are given its norm.
        usable = int(works.sum()) >= 2
        lowest = float(small.min()) - 1.0
        class_scores = torch.full((total,), lowest, dtype=torch.float64)
        class_scores[classes] = torch.where(works, small, lowest)

        order = torch.where(works, norms, math.inf).argsort(stable=True)[: int(works.sum())]
        best: list[dict[str, Any]] = [
            {
                "target": int(classes[row]),
                "norm": float(norms[row]),
                "success": float(found.success[row]),
                "trigger": Patch(mask=found.mask[row].clone(), pattern=found.pattern[row].clone()),
            }
            for row in order[: self.candidates].tolist()
        ]
        details: dict[str, Any] = {
            "searched": classes.tolist(),
            "norms": norms.tolist(),
            "success": found.success.tolist(),
            "censored": (~works).tolist(),
            "penalty": found.penalty.tolist(),
            "steps": found.steps.tolist(),
            "raw_index": float(raw.max()) if usable else 0.0,
            "log_index": float(log.max()) if usable else 0.0,
            "log_ratio": float(median(norms.log()) - norms.log().min()) if usable else 0.0,
            "flagged": [int(c) for c, far in zip(classes, raw, strict=True) if usable and far > 2],
            "candidates": best,
        }
        return Finding(
            defense="neural_cleanse",
            score=float(small.max()) if usable else 0.0,
            class_scores=class_scores.float(),
            trigger=best[0]["trigger"] if best else None,
            target=best[0]["target"] if best else None,
            details=details,
        )


def _success(suspect: Suspect, held: Images, patch: Patch, target: int) -> float:
    """Share of held-out images of other classes that a patch sends to its target; 0 if there are none."""
    x = held.x[held.y != target]
    if len(x) == 0:
        return 0.0
    return float((suspect.logits(patch(x)).argmax(1) == target).float().mean())
