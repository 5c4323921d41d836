"""The transplant test: does a region of one picture, pasted onto others, take its class along, as noise does not?"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from molehunt.findings import Candidate
from molehunt.suspect import Suspect

BIN = 0.04
KEPT = 2
"""Bins of AvgConf by which the boundary is fitted, and how many of their highest points count."""


class Effect(NamedTuple):
    """What regions do to the pictures that they are pasted onto.

    Attributes:
        fooled: (I, J), share of the pictures that then go to the class asked for, in [0, 1].
        confidence: (I, J), mean of the largest probability with noise in the same place, in [0, 1]; AvgConf.
    """

    fooled: Tensor
    confidence: Tensor


def transplant(
    suspect: Suspect,
    source: Tensor,
    masks: Tensor,
    classes: Tensor,
    overlays: Tensor,
    inert: Tensor,
    batch: int,
    *,
    sharpness: float = 1.0,
) -> Effect:
    """Paste regions of pictures onto overlays, and noise into the same places.

    Args:
        suspect: its frozen copy answers.
        source: (I, C, H, W) in [0, 1], the pictures that the regions come from, or (I, N, C, H, W), one per overlay.
        masks: bool (I, J, H, W), J regions of each.
        classes: int64 (I,), where the overlays should go.
        overlays: (N, C, H, W) in [0, 1].
        inert: (N, C, H, W) in [0, 1], what fills the regions for comparison.
        batch: pictures that go through the network at once.
        sharpness: what logits are multiplied by before they become probabilities; see `sharpness_of`.

    Returns:
        Both statistics, on the CPU in float64. A network that answers with a number that is none, or with infinity for
        its likeliest class, counts as not fooled and not sure.
    """
    count, regions = masks.shape[:2]
    pieces = source if source.dim() == 5 else source.unsqueeze(1)
    m = masks.unsqueeze(2).unsqueeze(3)  # (I, J, 1, 1, H, W)
    pasted = torch.where(m, pieces.unsqueeze(1), overlays)
    logits = suspect.logits(pasted.flatten(0, 2), batch).view(count, regions, len(overlays), -1)
    taken = (logits.argmax(3) == classes.to(logits.device).view(-1, 1, 1)) & torch.isfinite(logits.amax(3))
    quiet = torch.where(m, inert, overlays)
    sure = probabilities(suspect.logits(quiet.flatten(0, 2), batch), sharpness).amax(1)
    return Effect(taken.double().mean(2).cpu(), sure.view(count, regions, -1).mean(2).cpu())


def probabilities(logits: Tensor, sharpness: float) -> Tensor:
    """Softmax (N, K) of sharpened logits in float64; zeros where they are no numbers."""
    wide = logits.double()
    # From the largest, so that a large factor makes no infinity; minus infinity is a probability of 0.
    return ((wide - wide.amax(1, keepdim=True)) * sharpness).softmax(1).nan_to_num(0.0)


MARGIN = 5.0


def sharpness_of(logits: Tensor) -> float:
    """A factor for logits (N, K) of clean pictures that gives the median lead of the first class a set size.

    All logits times a thousand are the same answers, and would make every probability 1; so how sure a network is of a
    picture is only told in comparison with how sure it is of clean ones. 1 where the median is 0 or infinite.
    """
    first, second = logits.double().topk(2, 1).values.unbind(1)
    lead = float((first - second).nan_to_num(0.0, math.inf, 0.0).median())
    return MARGIN / lead if 0 < lead < math.inf else 1.0


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """The highest share of pictures that a harmless region fools, by AvgConf: a t^2 + b t + c.

    Attributes:
        a: of t^2.
        b: of t.
        c: the constant.
        low: smallest AvgConf that it was fitted on; below it the boundary keeps its value there.
        high: the largest.
        least: smallest share that it was fitted on; the boundary is never below it.
        most: the largest, and it is never above: between its points a parabola may go anywhere.
    """

    a: float
    b: float
    c: float
    low: float
    high: float
    least: float = 0.0
    most: float = 1.0

    @classmethod
    def fit(cls, confidence: Tensor, fooled: Tensor) -> "Boundary":
        """Fit by least squares to the highest points of every bin of AvgConf; empty bins do not count.

        Args:
            confidence: (n,) AvgConf of harmless regions.
            fooled: (n,) shares.

        Raises:
            ValueError: no points.
        """
        if len(confidence) == 0:
            raise ValueError("a boundary needs at least one point")
        bins = (confidence.double() / BIN).floor().long()
        kept = []
        for which in sorted(set(bins.tolist())):
            rows = (bins == which).nonzero().squeeze(1)
            kept.append(rows[fooled[rows].double().argsort(descending=True, stable=True)[:KEPT]])
        rows = torch.cat(kept)
        t, y = confidence[rows].double(), fooled[rows].double()
        # Fewer bins than coefficients do not determine a parabola.
        degree = min(2, len(kept) - 1)
        terms = torch.stack([t**power for power in range(degree + 1)], 1)
        found = torch.linalg.lstsq(terms, y.unsqueeze(1), driver="gelsd").solution.squeeze(1).tolist()
        c, b, a = (*found, 0.0, 0.0)[:3]
        ends = {"low": t.min(), "high": t.max(), "least": y.min(), "most": y.max()}
        return cls(a=a, b=b, c=c, **{name: float(value) for name, value in ends.items()})

    def height(self, confidence: Tensor) -> Tensor:
        """Value at (n,) AvgConf, float64; a parabola is not believed beyond the points that it was fitted on."""
        t = confidence.double().clamp(self.low, self.high)
        return (self.a * t**2 + self.b * t + self.c).clamp(self.least, self.most)

    def distance(self, confidence: float, fooled: float) -> float:
        """Smallest distance of a point from the parabola, from the roots of its derivative."""
        lift = self.c - fooled
        terms = [2 * self.a**2, 3 * self.a * self.b, self.b**2 + 2 * self.a * lift + 1, self.b * lift - confidence]
        roots = np.roots(terms)
        # A double root may come with a tiny imaginary part; the real part is a point of the curve in any case.
        at = np.real(roots)
        return float(np.hypot(at - confidence, self.a * at**2 + self.b * at + lift).min())


def conformal_threshold(residuals: Tensor, rejection: float) -> tuple[float, float, int]:
    """The residual above which an input is flagged, the share of clean inputs that will be, and its rank.

    With n clean residuals it is the k-th largest, k = floor(rejection (n + 1)), but at least the largest; a fresh
    clean input exceeds it with a chance of at most k / (n + 1).
    """
    count = len(residuals)
    k = max(1, math.floor(rejection * (count + 1)))
    return float(residuals.sort(descending=True).values[k - 1]), k / (count + 1), k


def mean_distance(boundary: Boundary, confidence: Tensor, fooled: Tensor) -> float:
    """The paper's d, read as its text has it: the mean distance of the clean points above the parabola; 0 of none."""
    confidence, fooled = confidence.flatten(), fooled.flatten()
    above = fooled > boundary.height(confidence)
    pairs = zip(confidence[above].tolist(), fooled[above].tolist(), strict=True)
    found = [boundary.distance(t, y) for t, y in pairs]
    return sum(found) / len(found) if found else 0.0


HELD = 0.95
"""Share of all change that the place of a recovered trigger holds."""


def recovered(
    candidate: Candidate,
    suspect: Suspect,
    overlays: Tensor,
    labels: Tensor,
    inert: Tensor,
    batch: int,
    *,
    sharpness: float = 1.0,
) -> dict[str, float]:
    """Stamp a candidate trigger, and put noise where it changes the pictures; only a score if none may be stamped.

    The place is the fewest pixels that hold `HELD` of all change: noise in a smaller one would be compared with a
    trigger of which much lies elsewhere.
    """
    rows = labels != candidate.target
    if not bool(rows.any()):
        return {"score": 0.0}
    plain, quiet = overlays[rows], inert[rows]
    stamped = candidate.trigger(plain)
    change = (stamped - plain).abs().amax(1).mean(0).double()
    order = change.flatten().argsort(descending=True, stable=True)
    held = change.flatten()[order].cumsum(0)
    mask = torch.zeros_like(change).bool()
    if float(held[-1]) > 0:
        mask.view(-1)[order[: 1 + int((held < HELD * held[-1]).sum())]] = True
    target = torch.tensor([candidate.target], device=suspect.device)
    # A soft trigger is stamped as it is: what it changes little, all over the picture, may be what works.
    masks = torch.stack([torch.ones_like(mask), mask]).unsqueeze(0)
    effect = transplant(suspect, stamped.unsqueeze(0), masks, target, plain, quiet, batch, sharpness=sharpness)
    fooled, confidence = float(effect.fooled[0, 0]), float(effect.confidence[0, 1])
    return {
        "fooled": fooled,
        "confidence": confidence,
        "score": min(fooled, confidence),
        "area": float(mask.double().mean()),
    }
