"""SPECTRE: a robust covariance, by which samples are whitened, and the quantum score of what then sticks out.

All classes are one axis: points are (K, n, k), n the size of the largest class, with a bool (K, n) for what is there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from molehunt.defenses._spectra import silent

SQUARES = (1, 4, 9, 16, 25, 36, 49, 64)
"""Numbers of directions that are tried."""
ROUNDS = 5
"""In how many portions the filter takes samples out."""
POWER = 15
"""Steps of power iteration towards the direction of the heaviest tail."""
PER_DIRECTION = 5
"""Samples for each direction in which the numbers of directions are compared."""
FLOOR = 1e-6
"""Least variance that is divided by, of 1 that all samples have in every direction."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectre:
    """Scores of SPECTRE, and how they were chosen.

    Attributes:
        scores: float64 (K, n), 0 or more, higher is likelier to be poisoned; 0 for what is not there.
        directions: int64 (K,), the number of directions that was taken.
        criteria: float64 (K, T), tr(S' Q) of each number that was tried.
        tried: the T numbers.
    """

    scores: Tensor
    directions: Tensor
    criteria: Tensor
    tried: tuple[int, ...]


def spectre(
    points: Tensor,
    present: Tensor,
    trim: Tensor,
    removed: Tensor,
    *,
    alpha: float = 4.0,
    check: Callable[[], None] = silent,
) -> Spectre:
    """Score samples by how far they stick out of what the bulk of their class does.

    For every number k of `SQUARES` the first k directions are whitened robustly and scored. Then all directions are
    whitened by the covariance of those that this score would keep, and the k after which the removed ones stick out
    most is taken, class by class; of a class of n kept samples the first n / 5 directions, at least one.

    Args:
        points: float64 (K, n, m), centered coordinates along principal axes with variance 1, by falling variance of
            the features; 0 where there is no sample.
        present: bool (K, n).
        trim: int64 (K,), how many samples the robust covariance may distrust.
        removed: int64 (K,), how many the score would remove.
        alpha: how strongly the direction that sticks out most is preferred; 0 for not at all.
        check: called often; raises to stop.
    """
    width = points.shape[2]
    tried = tuple(dict.fromkeys(min(k, width) for k in SQUARES))
    scores, criteria = [], []
    for k in tried:
        check()
        part = points[..., :k]
        trusted = trusted_points(part, present, trim, check=check)
        x = whiten(part, trusted) * present[..., None]
        score, _ = quantum_scores(x, present, alpha)
        kept = present & ~highest(score, present, removed)
        # A covariance in more directions than a fifth of the samples is noise: small classes would stick out of it.
        sure = torch.arange(width, device=points.device) < (kept.sum(1, keepdim=True) // PER_DIRECTION).clamp(min=1)
        again = whiten(points * sure[:, None], kept) * present[..., None]
        scores.append(score)
        criteria.append(quantum_scores(again, present, alpha)[1])
    table = torch.stack(criteria, 1)
    # The lowest k of equals: rounding must not decide where nothing was removed.
    best = (table >= table.amax(1, keepdim=True) * (1 - 1e-9)).int().argmax(1)
    rows = torch.arange(len(points), device=points.device)
    chosen = torch.tensor(tried, device=points.device)[best]
    return Spectre(scores=torch.stack(scores)[best, rows], directions=chosen, criteria=table, tried=tried)


def covariance(points: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (K, k) and covariance (K, k, k), divided by the count, of the points (K, n, k) that are chosen, (K, n)."""
    weight = chosen.double() / chosen.sum(1, keepdim=True).clamp(min=1)
    mean = (weight[:, None] @ points)[:, 0]
    centered = (points - mean[:, None]) * chosen[..., None]
    return mean, centered.mT @ (centered * weight[..., None])


def whiten(points: Tensor, chosen: Tensor) -> Tensor:
    """All points (K, n, k) in coordinates in which the chosen ones (K, n) have mean 0 and covariance I."""
    mean, sigma = covariance(points, chosen)
    values, vectors = torch.linalg.eigh(sigma)
    root = (vectors * values.clamp(min=FLOOR).rsqrt()[:, None]) @ vectors.mT
    white: Tensor = (points - mean[:, None]) @ root
    return white


def trusted_points(points: Tensor, present: Tensor, trim: Tensor, *, check: Callable[[], None] = silent) -> Tensor:
    """Bool (K, n), all but `trim` (K,) samples: those without whom no direction has a heavy tail.

    In `ROUNDS` portions: whiten by the samples that are still trusted, find the quadratic form of the points whose
    variance is largest (for normal ones it is the same for all forms; a small group far away makes it large), and
    distrust the samples for which that form is farthest from its mean.

    Args:
        points: float64 (K, n, k).
        present: bool (K, n).
        trim: int64 (K,), at most the samples of a class less one.
        check: called often; raises to stop.
    """
    trusted = present
    for turn in range(ROUNDS):
        portion = trim * (turn + 1) // ROUNDS - trim * turn // ROUNDS
        if not bool(portion.any()):
            continue
        y = whiten(points, trusted) * trusted[..., None]
        far = heaviest_form(y, trusted, check=check).abs()
        trusted = trusted & ~highest(far, trusted, portion)
    return trusted


def heaviest_form(y: Tensor, chosen: Tensor, *, check: Callable[[], None] = silent) -> Tensor:
    """Values (K, n), less their mean, of the quadratic form y' V y, |V| = 1, that varies most over the chosen points.

    The covariance of y y', a matrix of k^2 by k^2, is never formed: its leading eigenvector V comes from power
    iteration, which begins with the form of the sample that lies farthest out, for a start without chance.

    Args:
        y: float64 (K, n, k), 0 where a point is not chosen.
        chosen: bool (K, n).
        check: called in every step; raises to stop.
    """
    weight = chosen.double() / chosen.sum(1, keepdim=True).clamp(min=1)
    farthest = (y.square().sum(2) * chosen).argmax(1)
    start = y[torch.arange(len(y), device=y.device), farthest]
    form = start[:, :, None] * start[:, None]
    values = torch.zeros_like(weight)
    for _ in range(POWER):
        check()
        form = form / form.flatten(1).norm(dim=1).clamp(min=1e-300)[:, None, None]
        values = ((y @ form) * y).sum(2)
        values = (values - (values * weight).sum(1, keepdim=True)) * chosen
        form = y.mT @ (y * (values * weight)[..., None])
    return values


def quantum_matrix(sigma: Tensor, alpha: float) -> Tensor:
    """Q (K, k, k), symmetric, positive definite, of trace 1: expm(alpha (S - I) / (|S| - 1)) over its trace.

    `expm` is the exponential of the matrix, and |S| its largest eigenvalue. Where that is no more than 1 nothing sticks
    out, and Q is I / k.

    Args:
        sigma: (K, k, k), covariances S of whitened samples.
        alpha: 0 or more.
    """
    values, vectors = torch.linalg.eigh(sigma)
    beyond = values[:, -1:] - 1
    # Rounding alone puts the norm of a covariance of whitened data some 1e-12 off 1.
    sticks = beyond > 1e-9
    exponent = torch.where(sticks, alpha * (values - 1) / torch.where(sticks, beyond, 1.0), 0.0)
    # softmax divides by the trace, and cannot overflow.
    weights = torch.softmax(exponent, 1)
    q: Tensor = (vectors * weights[:, None]) @ vectors.mT
    return q


def quantum_scores(x: Tensor, present: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Scores x' Q x (K, n) of whitened samples (K, n, k), and tr(S' Q) (K,), S' the covariance of them all."""
    _, sigma = covariance(x, present)
    q = quantum_matrix(sigma, alpha)
    scores = ((x @ q) * x).sum(2) * present
    return scores.clamp(min=0.0), (sigma * q).sum((1, 2))


def highest(scores: Tensor, present: Tensor, counts: Tensor) -> Tensor:
    """Bool (K, n): of each class the `counts` (K,) samples with the highest scores, ties by place."""
    order = torch.sort(torch.where(present, scores, -math.inf), dim=1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (place < counts[:, None]) & present
