"""The transplant test: does a region of one picture, pasted onto others, take its class along, as noise does not?"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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
    suspect: Suspect, source: Tensor, masks: Tensor, classes: Tensor, overlays: Tensor, inert: Tensor, batch: int
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

    Returns:
        Both statistics, on the CPU in float64.
    """
    count, regions = masks.shape[:2]
    pieces = source if source.dim() == 5 else source.unsqueeze(1)
    m = masks.unsqueeze(2).unsqueeze(3)  # (I, J, 1, 1, H, W)
    pasted = torch.where(m, pieces.unsqueeze(1), overlays)
    logits = suspect.logits(pasted.flatten(0, 2), batch).view(count, regions, len(overlays), -1)
    fooled = (logits.argmax(3) == classes.to(logits.device).view(-1, 1, 1)).double().mean(2)
    quiet = torch.where(m, inert, overlays)
    sure = suspect.logits(quiet.flatten(0, 2), batch).softmax(1).amax(1)
    return Effect(fooled.cpu(), sure.double().view(count, regions, -1).mean(2).cpu())


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """The highest share of pictures that a harmless region fools, by AvgConf: a t^2 + b t + c.

    Attributes:
        a: of t^2.
        b: of t.
        c: the constant.
        low: smallest AvgConf that it was fitted on; below it the boundary keeps its value there.
        high: the largest.
    """

    a: float
    b: float
    c: float
    low: float
    high: float

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
        return cls(a=a, b=b, c=c, low=float(t.min()), high=float(t.max()))

    def height(self, confidence: Tensor) -> Tensor:
        """Value at (n,) AvgConf, float64; a parabola is not believed beyond the points that it was fitted on."""
        t = confidence.double().clamp(self.low, self.high)
        return self.a * t**2 + self.b * t + self.c

    def distance(self, confidence: float, fooled: float) -> float:
        """Smallest distance of a point from the parabola, from the roots of its derivative."""
        lift = self.c - fooled
        terms = [2 * self.a**2, 3 * self.a * self.b, self.b**2 + 2 * self.a * lift + 1, self.b * lift - confidence]
        roots = np.roots(terms)
        # A double root may come with a tiny imaginary part; the real part is a point of the curve in any case.
        at = np.real(roots)
        return float(np.hypot(at - confidence, self.a * at**2 + self.b * at + lift).min())
