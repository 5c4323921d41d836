"""SentiNet: what makes a network decide, cut out and pasted onto other pictures, must not take them all along."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from scipy import stats
from torch import Tensor

from molehunt.defenses._saliency import crops, finest_map, grad_cam
from molehunt.defenses._transplant import (
    Boundary,
    conformal_threshold,
    mean_distance,
    probabilities,
    recovered,
    sharpness_of,
    transplant,
)
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect
from molehunt.triggers import Patch

LEAST = 30
"""Clean images beyond the overlays: fewer are no boundary and no threshold."""
HAIR = 1e-9
"""Residuals that differ by rounding alone are equal."""
CHANCE = 0.01
LOOKED_AT = 8
"""Clean images by which the map is chosen."""


@dataclass(frozen=True, kw_only=True)
class SentiNet:
    """Cut out what a network looks at, paste it onto clean images, and compare with noise in the same place.

    A region that sends nearly all images to its class (Fooled), while noise in its place leaves the network as sure
    as it was (AvgConf), is small and powerful: a trigger. A region that covers the object fools many images too, but
    then noise in its place leaves the network unsure. A parabola over the clean images' own regions separates them.

    Score: in [-1, 1], higher is more suspicious. Of each candidate trigger, 0 to 1, it is the smaller of Fooled, under
    the trigger, and AvgConf, with noise in its place: both are large where something small decides alone. Of the stream
    it is the share of flagged inputs less the share of clean images that would be. The largest counts; an empty tuple
    of candidates, and no stream, is 0.

    `input_scores` are residuals, about -1 to 1, higher is likelier to carry a trigger. `class_scores` split the score
    by class: the class of flagged inputs, the candidate's target. Where so many flagged inputs go to one class that
    clean ones would do so in less than one stream of a hundred, `trigger` is the region of the one with the largest
    residual, with its pixels. With two or three classes clean regions fool as often as triggers do, and little is told.
    `details` hold one row per candidate; with a stream also the parabola, the clean points, and the map that was looked
    at.

    Attributes:
        overlays: N, clean images that regions are pasted onto.
        fit: clean images whose regions the parabola is fitted to, at most.
        calibration: further clean images whose residuals give the threshold, at most. Where there are fewer clean
            images, two thirds of what the overlays leave go to the fit.
        rejection: share of clean inputs that may be flagged, in (0, 0.5].
        proposals: k, further classes whose regions are subtracted from that of the predicted one.
        level: a region is where the saliency reaches this share of its maximum, in (0, 1).
        side: rows and columns that the map needs; the deepest such map is looked at.
        inert: what fills the regions for comparison, "noise" or "checker".
        batch: pictures that go through the network at once.

    Raises:
        ValueError: a setting out of range; a stream of no images; too few clean images.

    Reference:
        Chou, Tramèr, Pellegrino, "SentiNet: Detecting Localized Universal Attacks Against Deep Learning Systems",
        IEEE S&P Workshops 2020.

    Departures from the paper:
        Other classes are proposed by the network's answers to the picture and to five crops of it, not to the segments
        of selective search. The threshold is the conformal quantile of the residuals of clean images that the parabola
        was not fitted to, not an average distance, whose definition in the paper is ambiguous (it is reported). The
        parabola keeps its value beyond the points that it was fitted on. Where no map of the network is fine enough,
        the picture itself is the map. The saliency explains the class's logit less the mean of all, and how sure a
        network is is told in units of how sure it is of clean images, for neither must depend on a shift or a factor
        of all logits. The use on recovered triggers, and the score of a model, are ours. A recovered trigger is not
        compared with the parabola: it is the best that a search found, where a clean image's region is any; on the
        bank's develop models residuals told backdoored from clean no better than a coin, and the smaller of the two
        statistics did (docs/reference/defenses/sentinet.md).
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (
        frozenset({Access.CLEAN, Access.INPUTS}),
        frozenset({Access.CLEAN, Access.CANDIDATES}),
    )
    overlays: int = 100
    fit: int = 200
    calibration: int = 100
    rejection: float = 0.05
    proposals: int = 2
    level: float = 0.15
    side: int = 7
    inert: str = "noise"
    batch: int = 1000

    def __post_init__(self) -> None:
        counts = {"overlays": self.overlays, "fit": self.fit, "calibration": self.calibration}
        for name, value in {**counts, "side": self.side, "batch": self.batch}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.proposals < 0:
            raise ValueError(f"proposals must be 0 or more, got {self.proposals}")
        if not 0.0 < self.rejection <= 0.5:
            raise ValueError(f"rejection must lie in (0, 0.5], got {self.rejection}")
        if not 0.0 < self.level < 1.0:
            raise ValueError(f"level must lie in (0, 1), got {self.level}")
        if self.inert not in {"noise", "checker"}:
            raise ValueError(f"inert must be 'noise' or 'checker', got {self.inert!r}")

    @classmethod
    def paper(cls) -> "SentiNet":
        """Sizes of the paper: 400 clean images for the boundary; 200 more, which are ours, for the threshold."""
        return cls(fit=400, calibration=200)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Judge the stream and every candidate trigger, whichever is granted; see the class."""
        if suspect.clean is None or (suspect.inputs is None and suspect.candidates is None):
            raise ValueError("SentiNet needs clean images, and a stream of inputs or candidate triggers")
        if suspect.inputs is not None and len(suspect.inputs) == 0:
            raise ValueError("the stream has no images; grant None where there is no stream")
        pasted, fitted, held = self.split(len(suspect.clean.y), run.rng)
        if suspect.inputs is None and not suspect.candidates:
            # Nothing to judge, and so nothing to look at.
            run.check()
            nothing = torch.zeros(suspect.classes)
            return Finding(defense="sentinet", score=0.0, class_scores=nothing, details={"candidates": []})
        x, y = suspect.clean.x, suspect.clean.y
        overlays, labels = x[pasted.to(x.device)], y[pasted.to(y.device)]
        inert = self.filling(overlays, run.rng)
        sharpness = sharpness_of(suspect.logits(overlays, self.batch))
        class_scores = torch.zeros(suspect.classes)
        scores: list[float] = []
        details: dict[str, Any] = {}
        if suspect.candidates is not None:
            details["candidates"] = []
            for candidate in suspect.candidates:
                run.check()
                found = recovered(candidate, suspect, overlays, labels, inert, self.batch, sharpness=sharpness)
                details["candidates"].append({"defense": candidate.defense, "target": candidate.target, **found})
                scores.append(found["score"])
                class_scores[candidate.target] = max(float(class_scores[candidate.target]), found["score"])
        told = _Stream()
        if suspect.inputs is not None:
            told = self.watch(suspect, suspect.inputs, (x[fitted.to(x.device)], x[held.to(x.device)]), overlays, inert,
                              sharpness, run)  # fmt: skip
            details |= told.details
            scores.append(told.score)
            class_scores = torch.maximum(class_scores, told.class_scores) if suspect.candidates else told.class_scores
        return Finding(
            defense="sentinet",
            score=max(scores, default=0.0),
            class_scores=class_scores,
            trigger=told.trigger,
            target=told.target,
            input_scores=told.input_scores,
            details=details,
        )

    def watch(
        self,
        suspect: Suspect,
        inputs: Tensor,
        clean: tuple[Tensor, Tensor],
        overlays: Tensor,
        inert: Tensor,
        sharpness: float,
        run: Run,
    ) -> "_Stream":
        """Judge a stream by a parabola over clean images and a threshold of others, the two parts of `clean`."""
        path, size = finest_map(suspect, self.side, overlays[:LOOKED_AT])
        done, count = 0, sum(map(len, clean)) + len(inputs)

        def look(images: Tensor) -> _Seen:
            nonlocal done
            parts = []
            for part in torch.split(images, self.step):
                run.check()
                parts.append(self.seen(suspect, path, part, overlays, inert, sharpness))
                done += len(part)
                run.report(done, count)
            return _Seen(*(torch.cat(found) for found in zip(*parts, strict=True)))

        points = look(clean[0])
        boundary = Boundary.fit(points.confidence.flatten(), points.fooled.flatten())
        calm = look(clean[1])
        residuals = _residuals(boundary, calm).amax(1)
        threshold, usual, k = conformal_threshold(residuals, self.rejection)
        stream = look(inputs)
        each = _residuals(boundary, stream)
        input_scores, which = each.max(1)
        flagged = input_scores > threshold + HAIR
        votes = torch.bincount(stream.classes[flagged], minlength=suspect.classes)
        often = torch.bincount(calm.classes[residuals > threshold + HAIR], minlength=suspect.classes)
        excess = votes / len(flagged) - often / len(residuals)
        at = which.unsqueeze(1)
        trigger, target = None, None
        best = int(excess.argmax())
        # As if all that clean inputs are flagged for were this one class: the strictest way to count. The share of
        # clean inputs that a threshold flags is itself drawn, with the clean images that gave it.
        n = len(residuals)
        if float(stats.betabinom.sf(int(votes[best]) - 1, len(flagged), k, n + 1 - k)) < CHANCE:
            target = best
            row = int(torch.where(flagged & (stream.classes == best), input_scores, -math.inf).argmax())
            mask = stream.masks[row, which[row]].float().unsqueeze(0)
            trigger = Patch(mask=mask, pattern=inputs[row].float().cpu())
        return _Stream(
            score=float(flagged.double().mean()) - usual,
            class_scores=excess,
            input_scores=input_scores,
            trigger=trigger,
            target=target,
            details={
                "map": path or "the picture",
                "map_size": list(size),
                "parabola": asdict(boundary),
                "clean_confidence": points.confidence.flatten(),
                "clean_fooled": points.fooled.flatten(),
                "threshold": threshold,
                "distance": mean_distance(boundary, points.confidence, points.fooled),
                "flagged": int(flagged.sum()),
                "stream_confidence": stream.confidence.gather(1, at).squeeze(1),
                "stream_fooled": stream.fooled.gather(1, at).squeeze(1),
            },
        )

    @property
    def step(self) -> int:
        """Inputs that are looked at together: as many as make one batch of pasted pictures."""
        return max(1, self.batch // (self.overlays * (1 + self.proposals)))

    def split(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that are pasted onto, rows for the parabola, and rows for the threshold: disjoint.

        Raises:
            ValueError: too few images.
        """
        if count < self.overlays + LEAST:
            raise ValueError(
                f"{self.overlays} overlays need {self.overlays + LEAST} clean images or more, got {count}; "
                "use fewer overlays"
            )
        order = torch.randperm(count, generator=rng)
        rest = order[self.overlays :]
        fit = min(self.fit, round(len(rest) * 2 / 3))
        return order[: self.overlays], rest[:fit], rest[fit : fit + self.calibration]

    def filling(self, overlays: Tensor, rng: torch.Generator) -> Tensor:
        """What fills the regions, (N, C, H, W) in [0, 1]: one picture of noise per overlay, or a checkerboard."""
        if self.inert == "checker":
            rows, columns = (torch.arange(n, device=overlays.device) for n in overlays.shape[2:])
            return ((rows.unsqueeze(1) + columns) % 2).to(overlays).expand_as(overlays)
        return torch.rand(overlays.shape, generator=rng).to(overlays)

    def seen(
        self, suspect: Suspect, path: str, x: Tensor, overlays: Tensor, inert: Tensor, sharpness: float
    ) -> "_Seen":
        """Find the regions of one batch of pictures and transplant them."""
        classes, others = self.proposed(suspect, x, sharpness)
        masks = self.regions(suspect, path, x, classes, others, sharpness)
        effect = transplant(
            suspect, x.to(suspect.device), masks, classes, overlays, inert, self.batch, sharpness=sharpness
        )
        return _Seen(effect.fooled, effect.confidence, classes.cpu(), masks.cpu())

    def proposed(self, suspect: Suspect, x: Tensor, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
        """The predicted class (B,) and the k most confident other ones (B, k), on the device.

        A class is as confident as in the picture, or in whichever of five crops shows it best.
        """
        sure = [probabilities(suspect.logits(view, self.batch), sharpness) for view in (x, *crops(x))]
        classes = sure[0].argmax(1)
        best = torch.stack(sure).amax(0).scatter(1, classes.unsqueeze(1), -1.0)
        return classes, best.topk(min(self.proposals, suspect.classes - 1), 1).indices

    def regions(
        self, suspect: Suspect, path: str, x: Tensor, classes: Tensor, others: Tensor, sharpness: float = 1.0
    ) -> Tensor:
        """Regions bool (B, 1 + k, H, W): of the predicted class, and that without those of the other classes.

        Where nothing is left, the brightest part of the first one, from 85 % of its maximum, stands in. A picture in
        which nothing speaks for its class has no region.
        """
        own = grad_cam(suspect, path, x, classes, sharpness)
        found = [own >= self.level]
        for column in others.T:
            left = found[0] & (grad_cam(suspect, path, x, column, sharpness) < self.level)
            found.append(torch.where(left.flatten(1).any(1).view(-1, 1, 1), left, own >= 0.85))
        return torch.stack(found, 1)


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """What came of a stream."""

    score: float = 0.0
    class_scores: Tensor = field(default_factory=lambda: torch.zeros(0))
    input_scores: Tensor | None = None
    trigger: Patch | None = None
    target: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


class _Seen(NamedTuple):
    """What transplanting the regions of some pictures gave: (B, 1 + k), (B, 1 + k), (B,) and (B, 1 + k, H, W)."""

    fooled: Tensor
    confidence: Tensor
    classes: Tensor
    masks: Tensor


def _residuals(boundary: Boundary, seen: _Seen) -> Tensor:
    """Fooled less the parabola, (B, 1 + k)."""
    return seen.fooled - boundary.height(seen.confidence)
