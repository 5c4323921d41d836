"""Spectral signatures: poisoned samples stick out along the leading axis of their class's features."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from molehunt.defenses._fresh import redraw, trainable
from molehunt.defenses._spectra import Grouped, Spectra, class_spectra, coordinates, halves, largest_gaps
from molehunt.defenses._spectre import SQUARES, spectre
from molehunt.engine import OutOfTime, Run
from molehunt.findings import Finding
from molehunt.networks import NETWORKS, Network
from molehunt.suspect import BATCH, Access, Suspect
from molehunt.tasks import Images
from molehunt.training import recipe_for, train

Score = Literal["squared", "quantum"]

MORE = 1.5
"""Samples that are removed, over those that are assumed to be poisoned."""
HALVES = (0.25, 0.85)
"""A class is warned of whose smaller part has at least this share of it, where at least this share of the variance
along its leading axis lies between the two parts (0.64 for a normal distribution, 0.75 for a uniform one)."""
RANK = 1e-10
"""Axes with less than this share of the leading one's variance are taken for none."""


@dataclass(frozen=True, kw_only=True)
class SpectralSignatures:
    """Find the training samples that stick out along the leading axis of their class; train again without them.

    Score: none for the model, since the method is about samples. `sample_scores` (N,) are, with `score="squared"`, the
    squared coordinate of a sample's centered penultimate features along the leading right singular vector of its
    class, in squared units of the features, 0 or more, higher is likelier to be poisoned; over a class they sum to its
    largest singular value squared. With `score="quantum"` they are SPECTRE's, about 1 for a clean sample.

    `class_scores` (K,) are an extension of ours, to be compared with those of clean reference models on their training
    sets: the log of the leading squared singular value over the mean of the others, 0 where all directions vary
    alike. With "quantum" the log of tr(S' Q), by how much samples stick out of those that would be kept. Higher is
    likelier to be the target class; a number of its own says nothing.

    `repaired` is the suspect's architecture trained from fresh weights on what is left.

    `details` hold `removed`, int64 rows of the training set; by class `sizes`, `removed_per_class`, `epsilons` (the
    shares that were assumed), `top` (the largest singular value), `variance_share` (of the leading axis), `split` and
    `split_variance` (the share of a class's smaller part, and of the variance that lies between the parts, along that
    axis); with "quantum" `directions`, how many were taken, and `criteria` (K, T), tr(S' Q) of each of the `tried`
    numbers; `outliers`, the `class` with the highest class score and the `scores` of its samples (n_k,), float32,
    falling; what was trained in `retrained`; and `warnings`. Where the axis splits a class near in half one of them
    says that beyond 50 % of poison it is the clean samples that stick out.

    Attributes:
        epsilon: share of a class that is assumed to be poisoned, in [0, 0.5], an upper bound; or "gap": as many
            samples as lie above the largest gap in the sorted scores of the class, at most half.
        score: "squared", or "quantum" for SPECTRE.
        alpha: with "quantum", weight of the directions that stick out most, 0 or more; 0 is the whitened distance.
        retrain: also train again.
        batch: images per forward pass.

    Raises:
        ValueError: a setting out of range; no training set or an empty one; features that are not finite.

    Reference:
        Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018. The quantum score: Hayase, Kong,
        Somani, Oh, "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics", ICML 2021.

    Departures from the paper:
        In class k min(round(1.5 epsilon n_k), floor(n_k / 2)) samples are removed: epsilon is a share of the class as
        it is handed over, poison included, and more than half never goes. The choice by the gap and the scores of
        classes are ours. SPECTRE's robust covariance comes from a simpler filter, which takes epsilon n_k samples out
        in five portions by the quadratic form that varies most. A network that this package cannot build is not
        trained again, and a warning says so.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.TRAINING}),)
    epsilon: float | Literal["gap"] = 0.05
    score: Score = "squared"
    alpha: float = 4.0
    retrain: bool = True
    batch: int = BATCH

    def __post_init__(self) -> None:
        if self.epsilon != "gap" and not (isinstance(self.epsilon, float | int) and 0.0 <= self.epsilon <= 0.5):
            raise ValueError(f'epsilon must lie in [0, 0.5] or be "gap", got {self.epsilon!r}')
        if self.score not in get_args(Score):
            raise ValueError(f"unknown score {self.score!r}; known: {', '.join(get_args(Score))}")
        if self.score == "quantum" and self.epsilon == "gap":
            raise ValueError("the quantum score needs epsilon as a share, for its covariance trusts all but so many")
        if not 0.0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be 0 or more and finite, got {self.alpha}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Score every training sample, and train again without the highest; see the class."""
        if suspect.training is None or not len(suspect.training.y):
            raise ValueError("spectral signatures need the training set, with at least one sample")
        x, y = suspect.training
        features = self.features(suspect, x, run)
        axes = max(SQUARES) if self.score == "quantum" else 1
        spectra = class_spectra(features, y, suspect.classes, axes=axes, check=run.check)
        along = coordinates(features, y, spectra, check=run.check)
        smaller, between = halves(along[:, 0], y, suspect.classes)
        details: dict[str, Any] = {
            "sizes": spectra.sizes.tolist(),
            "top": spectra.values[:, 0].sqrt().cpu(),
            "variance_share": spectra.share().cpu(),
            "split": smaller.cpu(),
            "split_variance": between.cpu(),
            "warnings": broken(smaller, between),
        }
        if self.score == "quantum":
            scores, class_scores, more = self._quantum(along, y, spectra, run)
            details |= more
        else:
            scores, class_scores = along[:, 0].square(), spectra.excess()
        epsilons = self.epsilons(scores, y, spectra.sizes)
        counts = removal_counts(spectra.sizes, epsilons)
        gone = marked(scores, y, counts)
        details |= {
            "epsilons": epsilons.cpu(),
            "removed": gone.nonzero().squeeze(1).cpu(),
            "removed_per_class": counts.tolist(),
            "outliers": outliers(scores, y, class_scores),
        }
        repaired = None
        if self.retrain:
            try:
                repaired = self._train_again(suspect, Images(x[~gone], y[~gone]), run, details)
            except (OutOfTime, FloatingPointError) as error:
                # The scores are there, and are worth something without it.
                details["warnings"].append(f"not trained again: {error}")
        return Finding(
            defense="spectral_signatures",
            class_scores=class_scores,
            sample_scores=scores,
            repaired=repaired,
            details=details,
        )

    def features(self, suspect: Suspect, x: Tensor, run: Run) -> Tensor:
        """Penultimate features (N, d) in float32 of all images as they are, in their order, in eval mode."""
        rows = []
        for part in torch.split(x, self.batch):
            run.check()
            rows.append(suspect.features(part, self.batch))
            # Training again, where it follows, counts its own images.
            run.report(sum(map(len, rows)), len(x))
        return torch.cat(rows)

    def epsilons(self, scores: Tensor, y: Tensor, sizes: Tensor) -> Tensor:
        """Share (K,) of every class that is assumed to be poisoned, float64."""
        if self.epsilon == "gap":
            return largest_gaps(scores, y, len(sizes)).double() / sizes.clamp(min=1)
        return torch.full_like(sizes, float(self.epsilon), dtype=torch.float64)

    def _quantum(self, along: Tensor, y: Tensor, spectra: Spectra, run: Run) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Scores (N,) and class scores (K,) of SPECTRE, and what it chose."""
        assert self.epsilon != "gap", "refused in __post_init__"
        sizes = spectra.sizes
        variance = spectra.values / sizes.clamp(min=1)[:, None]
        used = spectra.values > RANK * spectra.values[:, :1]
        scale = torch.where(used, variance.clamp(min=1e-300).rsqrt(), 0.0)
        rows, present = Grouped.of(y, len(sizes)).padded()
        trim = torch.tensor([min(round(self.epsilon * n), n // 2) for n in sizes.tolist()], device=y.device)
        removed = removal_counts(sizes, torch.full_like(sizes, self.epsilon, dtype=torch.float64))
        scores = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        directions, criteria, tried = [], [], []
        # A copy of the points of so many classes takes at most 128 MB, or is one class.
        step = max(1, 2**24 // (scale.shape[1] * rows.shape[1]))
        for group in torch.split(torch.arange(len(sizes), device=y.device), step):
            there = present[group]
            points = along[rows[group]] * scale[group, None] * there[..., None]
            found = spectre(points, there, trim[group], removed[group], alpha=self.alpha, check=run.check)
            scores[rows[group][there]] = found.scores[there]
            directions += found.directions.tolist()
            criteria.append(found.criteria.cpu())
            tried = list(found.tried)
        table = torch.cat(criteria)
        more = {"directions": directions, "tried": tried, "criteria": table}
        return scores, table.amax(1).clamp(min=1.0).log(), more

    def _train_again(
        self, suspect: Suspect, left: Images, run: Run, details: dict[str, Any]
    ) -> Mapping[str, Tensor] | None:
        """Train the suspect's architecture from fresh weights by the task's recipe; the state dict, on the CPU."""
        task, name = suspect.task, suspect.model.name if isinstance(suspect.model, Network) else None
        if name is None or not (name in NETWORKS or name.startswith("timm:")):
            what = type(suspect.model).__name__ if name is None else repr(name)
            details["warnings"].append(f"not trained again: {what} is no network that can be built by name")
            return None
        recipe = recipe_for(name, task)
        if suspect.dtype == torch.float32:
            recipe = replace(recipe, precision="float32")
        made = redraw(suspect.model, run.rng, task)
        trainable(made)
        done = train(made, left, recipe, rng=run.rng, report=run.report, check=run.check, device=suspect.device)
        details["retrained"] = {
            "network": name,
            "images": len(left.y),
            "recipe": recipe.to_json(),
            "losses": list(done.losses),
        }
        return {key: value.detach().cpu() for key, value in made.state_dict().items()}


def removal_counts(sizes: Tensor, epsilons: Tensor) -> Tensor:
    """How many samples (K,) of classes of these sizes (K,) are removed at these shares (K,): at most half of each."""
    pairs = zip(sizes.tolist(), epsilons.tolist(), strict=True)
    # Rounded before the factor: else one sample of 49 becomes 0.999... of a sample, and 1.5 times that is one, not two.
    counts = [min(round(MORE * round(share * n, 6)), n // 2) for n, share in pairs]
    return torch.tensor(counts, device=sizes.device)


def marked(scores: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Bool (N,): of each class the `counts` (K,) samples with the highest scores (N,), ties by index."""
    return Grouped.of(labels, len(counts), scores).places() < counts[labels]


def outliers(scores: Tensor, labels: Tensor, class_scores: Tensor) -> dict[str, Any]:
    """The class with the highest of the scores (K,), and the scores of its samples, of all (N,), highest first."""
    worst = int(class_scores.argmax())
    return {"class": worst, "scores": scores[labels == worst].sort(descending=True).values.float().cpu()}


def broken(smaller: Tensor, between: Tensor) -> list[str]:
    """Return a warning for every class that its leading axis splits near in half, from what `halves` found."""
    share, variance = HALVES
    return [
        f"class {k}: its leading axis splits it into {part:.0%} and {1 - part:.0%}; should the larger part be the "
        "poison, it is the clean samples that score high and are removed"
        for k, (part, explained) in enumerate(zip(smaller.tolist(), between.tolist(), strict=True))
        if part >= share and explained >= variance
    ]
