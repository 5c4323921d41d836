"""STRIP: an input that insists on its class, whatever is mixed into it, carries a trigger."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.engine import Run
from molehunt.findings import Candidate, Finding
from molehunt.suspect import Access, Suspect

# (images, overlays, alpha, mean pixel (C, 1, 1)) -> mixtures; all but the last two may leave [0, 1] on purpose.
MIXES: dict[str, Callable[[Tensor, Tensor, float, Tensor], Tensor]] = {
    "add normalized": lambda x, p, alpha, mean: x + p - mean,
    "add": lambda x, p, alpha, mean: x + p,
    "add clipped": lambda x, p, alpha, mean: (x + p).clamp(0.0, 1.0),
    "blend": lambda x, p, alpha, mean: (1.0 - alpha) * x + alpha * p,
}


@dataclass(frozen=True, kw_only=True)
class STRIP:
    """Mix an image with many clean ones and measure how undecided the network is about the mixtures.

    Score: the largest excess mass of low entropies, in [-rejection, 1]; 0 is what a clean model gives, higher is more
    suspicious. It is the share of images whose mean entropy lies at or below the boundary (the `rejection` quantile
    of clean images) minus the share of the clean calibration images that do. It is taken over the stream, where there
    is one, and for each candidate trigger over clean images of other classes that carry it; the largest of them
    counts. Without any candidate in an empty tuple there is nothing that a trigger producer would suspect, which is
    evidence, so the score is the lowest one, -rejection. A stream in which a share s is stamped gives about s.

    `input_scores` are minus the mean entropy, in bits: from -log2 K to 0, higher is likelier to carry a trigger.
    `class_scores` split the same excess by class: the class that flagged inputs are sent to, the candidate's target.
    `details` hold the calibration (mean, standard deviation, both boundaries, in bits), the clean entropies, one row
    per candidate, and warnings, among them that clean entropies look manipulated.

    Attributes:
        mix: how two images become one, a key of `MIXES`. "blend" is the paper's (1 - alpha) x + alpha p, "add" and
            "add clipped" are x + p without and with clipping to [0, 1], "add normalized" is x + p minus the mean
            pixel, which is adding after a normalization.
        alpha: weight of the overlay in "blend", in [0, 1].
        overlays: M, mixtures per image.
        rejection: share of clean images that may be flagged, in (0, 0.5].
        pool: share of the clean images that serve as overlays; the others calibrate. The two never meet.
        batch: mixtures that go through the network at once.

    Raises:
        ValueError: a setting out of range; a stream of no images; too few clean images.

    Reference:
        Gao, Xu, Wang, Chen, Ranasinghe, Nepal, "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks",
        ACSAC 2019.

    Departures from the paper:
        16 overlays per image, not 100: more did not help. Pictures are added, as in the authors' own notebook, not
        blended: the blend halves the contrast of the trigger, and on a CIFAR-10 network it all but lost it
        (docs/reference/defenses/strip.md has both measurements; `STRIP.paper()` has the blend). The boundary is the
        empirical quantile; the normal fit is reported beside it. The paper judges inputs only; the score of the model,
        and the use on recovered triggers, are ours.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (
        frozenset({Access.CLEAN, Access.INPUTS}),
        frozenset({Access.CLEAN, Access.CANDIDATES}),
    )
    mix: str = "add"
    alpha: float = 0.5
    overlays: int = 16
    rejection: float = 0.01
    pool: float = 0.2
    batch: int = 256

    def __post_init__(self) -> None:
        if self.mix not in MIXES:
            raise ValueError(f"unknown mix {self.mix!r}; known: {', '.join(MIXES)}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")
        if self.overlays < 1 or self.batch < 1:
            raise ValueError(f"overlays and batch must be at least 1, got {self.overlays} and {self.batch}")
        if not 0.0 < self.rejection <= 0.5:
            raise ValueError(f"rejection must lie in (0, 0.5], got {self.rejection}")
        if not 0.0 < self.pool < 1.0:
            raise ValueError(f"pool must lie in (0, 1), got {self.pool}")

    @classmethod
    def paper(cls) -> "STRIP":
        """Settings of the paper: 100 overlays, blended half and half in pixel space."""
        return cls(mix="blend", alpha=0.5, overlays=100)

    @classmethod
    def notebook(cls) -> "STRIP":
        """Settings of the authors' notebook: 100 overlays, the sum of the pixels, unclipped."""
        return cls(mix="add", overlays=100)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Judge the stream and every candidate trigger, whichever is granted; see the class."""
        if suspect.clean is None or (suspect.inputs is None and suspect.candidates is None):
            raise ValueError("STRIP needs clean images, and a stream of inputs or candidate triggers")
        if suspect.inputs is not None and len(suspect.inputs) == 0:
            raise ValueError("the stream has no images; grant None where there is no stream")
        stream, candidates = suspect.inputs, suspect.candidates or ()
        overlay, rest = self.split(len(suspect.clean.y), run.rng)
        key = int(torch.randint(2**62, (), generator=run.rng))
        x, y = suspect.clean.x[rest.to(suspect.device)], suspect.clean.y[rest.to(suspect.device)]
        pool = suspect.clean.x[overlay.to(suspect.device)]
        mean = suspect.clean.x.mean((0, 2, 3)).view(-1, 1, 1)
        count = len(x) * (1 + len(candidates)) + (0 if stream is None else len(stream))
        done = 0

        def measure(images: Tensor, keys: int) -> tuple[Tensor, Tensor]:
            """Mean entropy (N,) in bits and likeliest class (N,) under mixing, on the CPU."""
            nonlocal done
            rows = partners(images, pool, self.overlays, keys)
            entropy, classes = [], []
            step = max(1, self.batch // self.overlays)
            for part, row in zip(torch.split(images, step), torch.split(rows, step), strict=True):
                run.check()
                p = pool[row.to(pool.device)]
                z = MIXES[self.mix](part.unsqueeze(1), p, self.alpha, mean).flatten(0, 1)
                log_probs = F.log_softmax(suspect.logits(z, self.batch), 1).view(len(part), self.overlays, -1)
                entropy.append(entropy_bits(log_probs).mean(1))
                classes.append(log_probs.exp().mean(1).argmax(1))
                done += len(part)
                run.report(done, count)
            return torch.cat(entropy).cpu(), torch.cat(classes).cpu()

        clean, clean_class = measure(x, key)
        boundary = quantile_boundary(clean, self.rejection)
        base = float((clean <= boundary).double().mean())
        score = -self.rejection
        class_scores = torch.full((suspect.classes,), -self.rejection)
        details: dict[str, Any] = {
            "calibration": calibration(clean, boundary, self.rejection),
            "clean_entropies": clean,
            "warnings": warnings(clean, suspect.classes),
        }
        entropies: Tensor | None = None
        if stream is not None:
            # Another key: the stream's image 0 must not share its partners with calibration image 0.
            entropies, stream_class = measure(stream, key + 1)
            flagged = entropies <= boundary
            score = max(score, float(flagged.double().mean()) - base)
            votes = torch.bincount(stream_class[flagged], minlength=suspect.classes) / len(entropies)
            usual = torch.bincount(clean_class[clean <= boundary], minlength=suspect.classes) / len(clean)
            class_scores = torch.maximum(class_scores, votes - usual)
            details["flagged"] = int(flagged.sum())
        judged = []
        for candidate in candidates:
            row = _judge(candidate, x, y.cpu(), clean, boundary, base, lambda images: measure(images, key))
            judged.append(row)
            score = max(score, row["score"])
            class_scores[candidate.target] = max(float(class_scores[candidate.target]), row["score"])
        if suspect.candidates is not None:
            details["candidates"] = judged
        return Finding(
            defense="strip",
            score=score,
            class_scores=class_scores,
            input_scores=None if entropies is None else -entropies,
            details=details,
        )

    def split(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows that serve as overlays and rows that calibrate, disjoint, together all of `count`.

        Raises:
            ValueError: so few images that either part would be smaller than the number of overlays.
        """
        size = max(self.overlays, round(self.pool * count))
        if count - size < self.overlays:
            raise ValueError(f"{self.overlays} overlays need {2 * self.overlays} clean images or more, got {count}")
        order = torch.randperm(count, generator=rng)
        return order[:size], order[size:]


def partners(images: Tensor, pool: Tensor, overlays: int, key: int) -> Tensor:
    """Rows (N, M) of the pool that each of N images is mixed with, drawn without replacement.

    The draw depends on the key and on the index of the image alone, so no score depends on what else is in a batch,
    and fewer overlays are a prefix of more. An image that is in the pool itself never meets itself there.

    Raises:
        ValueError: an image has fewer than M partners.
    """
    places: dict[bytes, list[int]] = {}
    for row, picture in enumerate(pool.cpu()):
        places.setdefault(picture.contiguous().numpy().tobytes(), []).append(row)
    rng = torch.Generator()
    rows = []
    for index, image in enumerate(images.cpu()):
        order = torch.randperm(len(pool), generator=rng.manual_seed((key + 0x9E3779B97F4A7C15 * index) % 2**63))
        own = places.get(image.contiguous().numpy().tobytes())
        if own:
            order = order[~torch.isin(order, torch.tensor(own))]
        if len(order) < overlays:
            raise ValueError(f"image {index} has {len(order)} partners in the pool, {overlays} overlays are asked for")
        rows.append(order[:overlays])
    return torch.stack(rows)


def entropy_bits(log_probs: Tensor) -> Tensor:
    """Shannon entropy in bits over the last dimension, from natural log probabilities; 0 log 0 is 0."""
    bits: Tensor = torch.special.entr(log_probs.exp()).sum(-1) / math.log(2)
    return bits


def quantile_boundary(entropies: Tensor, rejection: float) -> float:
    """Return the largest entropy that still flags: floor(r N) of the N clean ones lie at or below it, at least one."""
    return float(entropies.sort().values[max(1, math.floor(rejection * len(entropies))) - 1])


def calibration(entropies: Tensor, boundary: float, rejection: float) -> dict[str, float]:
    """Return what the clean entropies are like, in bits: mean, std, the boundary in use and that of the normal fit."""
    mean, std = float(entropies.double().mean()), float(entropies.double().std())
    normal = mean + std * NormalDist().inv_cdf(rejection)
    return {"images": len(entropies), "mean": mean, "std": std, "boundary": boundary, "normal_boundary": normal}


def warnings(entropies: Tensor, classes: int) -> list[str]:
    """Return signs that the entropies of clean images cannot be trusted, for people."""
    found = []
    highest = math.log2(classes)
    middle = float(entropies.median())
    # The paper's own answer to a network trained to be undecided about blended triggers: look at the clean
    # entropies. It names 3.0 bits for ten classes, of at most 3.32.
    if middle > 0.9 * highest:
        found.append(f"entropy manipulated? half of the clean images reach {middle:.2f} of at most {highest:.2f} bits")
    if float(entropies.max()) < 0.01:
        found.append("no clean image makes the network undecided: every entropy is near 0, so nothing stands out")
    return found


def _judge(
    candidate: Candidate,
    x: Tensor,
    y: Tensor,
    clean: Tensor,
    boundary: float,
    base: float,
    measure: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> dict[str, Any]:
    """Compare the entropies of the calibration images with and without a candidate trigger.

    The same partners are used both times. Images of the target class are left out: they go there anyway.
    """
    stamped, _ = measure(candidate.trigger(x))
    others = y != candidate.target
    low, usual = stamped[others], clean[others]
    caught = float((low <= boundary).double().mean()) if len(low) else 0.0
    # Share of pairs in which the stamped image has the lower entropy, ties counting half.
    below = (low[:, None] < usual).double() + 0.5 * (low[:, None] == usual).double()
    return {
        "defense": candidate.defense,
        "target": candidate.target,
        "score": caught - base,
        "caught": caught,
        "auc": float(below.mean()) if len(low) else 0.5,
        "entropy": float(low.double().mean()) if len(low) else None,
        "entropies": low,
    }
