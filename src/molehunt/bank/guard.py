"""The guard: weight norm and accuracy alone must not tell models apart that differ only in how much they saw."""

from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 0.6
"""AUC up to which a population may be told apart by what says nothing about backdoors."""


def telltale(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> float:
    """Measure how well a linear classifier on (weight norm, clean accuracy) tells two groups of models apart.

    Least squares on standardized columns. Every pair of models, one of each group, is scored by a classifier that
    was fitted without the two, so that two groups of one kind give 0.5 on average, and not what was learned by heart.

    Args:
        first: norm and accuracy of clean models.
        second: those of clean models that were trained on as many extra benign samples as a poison has.

    Returns:
        The cross-validated AUC in [0, 1]; compare with `MOST`.

    Raises:
        ValueError: fewer than three models in a group, or a number that is not finite.
    """
    if len(first) < 3 or len(second) < 3:
        raise ValueError(f"the guard needs three models of each group, got {len(first)} and {len(second)}")
    x = torch.tensor([*first, *second], dtype=torch.float64)
    if not bool(x.isfinite().all()):
        raise ValueError("norms and accuracies must be finite")
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-12)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    y = torch.tensor([-1.0] * len(first) + [1.0] * len(second), dtype=x.dtype)
    wins = 0.0
    for i in range(len(first)):
        for j in range(len(first), len(x)):
            weight = _fit(x, y, leave=(i, j))
            a, b = float(x[i] @ weight), float(x[j] @ weight)
            wins += 1.0 if b > a else 0.5 if b == a else 0.0
    return wins / (len(first) * len(second))


def _fit(x: Tensor, y: Tensor, leave: tuple[int, int]) -> Tensor:
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[list(leave)] = False
    # A little ridge: a constant column, such as an accuracy of 1 everywhere, has no inverse.
    some = x[keep]
    square = some.T @ some + 1e-6 * torch.eye(x.shape[1], dtype=x.dtype)
    weight: Tensor = torch.linalg.solve(square, some.T @ y[keep])
    return weight
