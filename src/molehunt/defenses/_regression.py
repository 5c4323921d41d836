"""A regression over a population of models, and what it is worth: ridge, nested cross-validation, shuffled labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties among which the inner cross-validation chooses, in squared standard deviations of the features."""


def fit(features: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Ridge regression of labels on features: intercept and P coefficients, float64 (1 + P,).

    Features are standardized inside, so that one penalty means the same for all; the answer is for raw features. The
    intercept is free. A feature that never varies gets the coefficient 0.

    Args:
        features: (N, P).
        labels: (N,), numbers such as 0 and 1.
        penalty: times N it is added to the squared standard deviations, 0 or more.

    Raises:
        ValueError: no models, another number of labels, or a negative penalty.
    """
    x, y = features.double(), labels.double()
    if x.ndim != 2 or len(x) == 0 or y.shape != (len(x),):
        raise ValueError(f"expected features (N, P) and labels (N,), got {tuple(x.shape)} and {tuple(y.shape)}")
    if penalty < 0:
        raise ValueError(f"the penalty must not be negative, got {penalty}")
    middle, scale = x.mean(0), x.std(0, correction=0)
    varies = scale > 1e-12
    z = torch.where(varies, (x - middle) / torch.where(varies, scale, torch.ones_like(scale)), torch.zeros_like(x))
    gram = z.T @ z + penalty * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    # The pseudo-inverse, not a solve: without a penalty, more features than models leave the system singular.
    slope = torch.linalg.pinv(gram, hermitian=True) @ (z.T @ (y - y.mean()))
    slope = torch.where(varies, slope / torch.where(varies, scale, torch.ones_like(scale)), torch.zeros_like(slope))
    return torch.cat([(y.mean() - middle @ slope).reshape(1), slope])


def predict(weights: Tensor, features: Tensor) -> Tensor:
    """What a regression makes of features (N, P): float64 (N,)."""
    return weights[0] + features.double() @ weights[1:]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Predictions for models that were not fitted, and what was chosen without them.

    Attributes:
        predictions: (N,), one per model, each by a regression that has not seen it.
        chosen: per outer fold the name of the setup and the penalty.
    """

    predictions: Tensor
    chosen: tuple[tuple[str, float], ...]


def nested(
    setups: Mapping[str, Tensor],
    labels: Tensor,
    rng: torch.Generator,
    *,
    folds: int = 5,
    penalties: Sequence[float] = PENALTIES,
    groups: Tensor | None = None,
) -> HeldOut:
    """Predict every model by a regression whose setup and penalty were chosen without it.

    The models are dealt into folds, classes in turns. For each fold the other models choose setup and penalty, by the
    mean squared error of a cross-validation among themselves, and fit the regression that predicts it.

    Args:
        setups: features (N, P) by the name of the way in which they were measured.
        labels: (N,), 0 for clean and 1 for backdoored.
        rng: deals the folds.
        folds: of the outer and of the inner cross-validation, 2 or more.
        penalties: to choose from.
        groups: (N,), models of one group stay in one fold; None lets every model stand alone.

    Raises:
        ValueError: fewer groups than folds.
    """
    places = deal(labels, folds, rng, groups)
    predictions = torch.zeros(len(labels), dtype=torch.float64)
    taken = []
    for fold in range(folds):
        inside, outside = places != fold, places == fold
        within = deal(labels[inside], folds, rng, None if groups is None else groups[inside])
        best = min(
            ((name, penalty) for name in setups for penalty in penalties),
            key=lambda one: _error(setups[one[0]][inside], labels[inside], one[1], within),
        )
        weights = fit(setups[best[0]][inside], labels[inside], best[1])
        predictions[outside] = predict(weights, setups[best[0]][outside])
        taken.append(best)
    return HeldOut(predictions=predictions, chosen=tuple(taken))


def deal(labels: Tensor, folds: int, rng: torch.Generator, groups: Tensor | None = None) -> Tensor:
    """Deal models into folds: int64 (N,) in [0, folds), every label in turns, groups whole.

    Raises:
        ValueError: fewer than two folds, or fewer groups than folds.
    """
    keys = torch.arange(len(labels)) if groups is None else groups
    names = torch.unique(keys)
    if folds < 2 or len(names) < folds:
        raise ValueError(f"{len(names)} groups cannot be dealt into {folds} folds of two or more")
    first = torch.stack([labels[keys == name][0] for name in names])
    places = torch.zeros(len(labels), dtype=torch.int64)
    dealt = 0
    for label in torch.unique(first):
        mine = names[first == label]
        for name in mine[torch.randperm(len(mine), generator=rng)]:
            places[keys == name] = dealt % folds
            dealt += 1
    return places


def _error(features: Tensor, labels: Tensor, penalty: float, places: Tensor) -> float:
    """Mean squared error of held-out predictions."""
    total = 0.0
    for fold in range(int(places.max()) + 1):
        inside, outside = places != fold, places == fold
        off = predict(fit(features[inside], labels[inside], penalty), features[outside]) - labels[outside]
        total += float(off.square().sum())
    return total / len(labels)
