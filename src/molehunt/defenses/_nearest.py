"""The K-nearest-neighbor vote under Gaussian noise on the training points, exactly: no draw is made.

The squared distance of a query to a noisy training point, in units of sigma squared, is noncentral chi-square. It is
cut into bins; what happens within one bin stays unknown and is counted for a class once and against it once, so that
two numbers bracket its probability.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import special

Array: TypeAlias = npt.NDArray[np.float64]

TAIL = 12.0
"""Standard deviations of a Poisson number beyond which nothing is summed: less than 1e-30 is lost."""
NEGLIGIBLE = 1e-18
"""A training point that comes before the last edge with a smaller chance counts as not doing so."""
SLACK = 1e-9
"""What rounding may cost, and far points that are not looked at: every bound is that much wider, and so never 0 or 1,
which would certify anything."""
BLOCK = 2_048
"""Training points at a time, nearest ones first: those of one block need about the same Poisson numbers."""
COARSE = 64


class Bracket(NamedTuple):
    """Bounds of the probability that each class wins the vote.

    Attributes:
        low: float64 (K,), counting what the bins leave open against the class.
        high: float64 (K,), counting it for the class.
    """

    low: Array
    high: Array


def vote_bounds(
    x: Array, train: Array, y: npt.NDArray[np.int64], classes: int, sigma: float, *, neighbors: int = 1, bins: int = 200
) -> Bracket:
    """Bracket the probability of each class to win the vote of the nearest noisy training points.

    Neighbors count equally; ties between classes go to the smaller class.

    Args:
        x: (d,) the query, without noise, in any number format; it is computed in float64.
        train: (n, d) training points, n above `neighbors`.
        y: (n,) their classes, 0 to `classes` - 1.
        classes: K.
        sigma: standard deviation of the noise on every value, above 0.
        neighbors: K of K-NN, 1 or more.
        bins: of the squared distance; more are slower and closer.

    Returns:
        Bounds that are wider than the bins make them by 1e-9, for rounding.

    Raises:
        ValueError: too few training points, numbers that are not finite, or a setting out of range.

    Reference:
        Weber, Xu, Karlaš, Zhang, Li, "RAB: Provable Robustness Against Backdoor Attacks", IEEE S&P 2023, section on
        K-NN. Bins hold equal shares of the last neighbor's distance; the paper's are of equal width.
    """
    if not sigma > 0 or neighbors < 1 or bins < 2:
        raise ValueError(f"sigma above 0, neighbors >= 1 and bins >= 2, got {sigma}, {neighbors} and {bins}")
    if len(train) <= neighbors or len(y) != len(train):
        raise ValueError(f"{neighbors} neighbors need more than as many labeled points, got {len(train)} and {len(y)}")
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(f"classes lie in 0 to {classes - 1}, got {y.min()} to {y.max()}")
    query, points = np.asarray(x, dtype=np.float64), np.asarray(train, dtype=np.float64)
    # Not the expansion into dot products, which loses the small distances.
    apart = ((points - query) ** 2).sum(1) / sigma**2
    if not bool(np.isfinite(apart).all()):
        raise ValueError("the query and the training points must be finite numbers")
    edges = _edges(apart, len(query), neighbors, bins)
    near = apart <= _reach(apart, len(query), edges[-1])
    # A point out of reach lies in the last bin, beyond the last edge, as good as surely; it is there all the same.
    before = np.zeros((len(points), len(edges)))
    before[near] = noncentral(edges, len(query), apart[near])
    found = _nearest(before, y, classes) if neighbors == 1 else _several(before, y, classes, neighbors)
    slack = SLACK + len(points) * NEGLIGIBLE
    return Bracket(np.clip(found.low - slack, 0.0, 1.0 - slack), np.clip(found.high + slack, slack, 1.0))


def noncentral(edges: Array, dimension: int, apart: Array) -> Array:
    """Distribution function of noncentral chi-square, (m, L), for m noncentralities at L values.

    A Poisson number of extra pairs of degrees of freedom: one product of a (m, J) and a (J, L) matrix for all.
    """
    found: Array = np.zeros((len(apart), len(edges)))
    order = np.argsort(apart)
    for start in range(0, len(order), BLOCK):
        rows = order[start : start + BLOCK]
        half = apart[rows] / 2.0
        spread = TAIL * np.sqrt(half) + 2 * TAIL
        pairs = np.arange(max(0, int((half - spread).min())), int((half + spread).max()) + 2, dtype=np.float64)
        weights = np.exp(special.xlogy(pairs, half[:, None]) - half[:, None] - special.gammaln(pairs + 1.0))
        # Their sum is 1 but for the rounding of large exponents.
        weights /= weights.sum(1, keepdims=True)
        found[rows] = weights @ special.gammainc(dimension / 2.0 + pairs[:, None], edges / 2.0)
    return found.clip(0.0, 1.0)


def _edges(apart: Array, dimension: int, neighbors: int, bins: int) -> Array:
    """Inner edges (bins - 1,), between which the distance of the last neighbor falls about equally often."""
    order = np.sort(apart)
    low, high = order[0], order[min(len(order) - 1, 2 * neighbors)]
    deviation = [np.sqrt(2.0 * (dimension + 2.0 * value)) for value in (low, high)]
    start = max(dimension + low - 8.0 * deviation[0], 0.0)
    even = np.linspace(start, dimension + high + 4.0 * deviation[1], COARSE + 1)[1:]
    # In few dimensions much happens near zero.
    coarse = np.concatenate([np.geomspace(even[0] / 1000.0, even[0], COARSE // 4)[:-1] if start == 0 else [], even])
    near = apart[apart <= _reach(apart, dimension, coarse[-1])]
    # The number of points before a value is about Poisson; what it is exactly does not matter for where to cut.
    share = special.gammainc(neighbors, noncentral(coarse, dimension, near).sum(0).clip(1e-300))
    share = np.maximum.accumulate(share) + np.arange(len(share)) * 1e-12  # strictly rising, for the interpolation
    wanted = np.linspace(share[0], share[-1], bins + 1)[1:-1]
    inner: Array = np.interp(wanted, share, coarse)
    return inner


def _reach(apart: Array, dimension: int, last: float) -> float:
    """Noncentrality beyond which a point comes before the last edge with a chance of less than `NEGLIGIBLE`.

    From the lower tail of noncentral chi-square, P(X <= d + l - 2 sqrt((d + 2 l) t)) <= exp(-t) (Birgé 2001).
    """
    t = -np.log(NEGLIGIBLE)
    grid = np.linspace(0.0, max(float(apart.max()), 1.0), 4096)
    surely_beyond = dimension + grid - 2.0 * np.sqrt((dimension + 2.0 * grid) * t) > last
    # The bound need not rise from the start; beyond the last place where it fails it holds.
    fails = np.flatnonzero(~surely_beyond)
    at = fails[-1] + 1 if len(fails) else 0
    return float(grid[at]) if at < len(grid) else float("inf")


def _nearest(before: Array, y: npt.NDArray[np.int64], classes: int) -> Bracket:
    """One neighbor: the nearest point of a class against the nearest of all others."""
    with np.errstate(divide="ignore"):
        logs = np.log1p(-before)
    # Edges 0 and infinity, where all and none are farther away.
    farther = np.stack([np.exp(logs[y == one].sum(0)) for one in range(classes)])
    farther = np.pad(farther, ((0, 0), (1, 0)), constant_values=1.0)
    none = np.array([[0.0 if bool((y == one).any()) else 1.0] for one in range(classes)])
    farther = np.concatenate([farther, none], 1)
    low, high = np.zeros(classes), np.zeros(classes)
    for one in range(classes):
        others = np.delete(farther, one, 0).prod(0)
        first = farther[one, :-1] - farther[one, 1:]
        low[one], high[one] = (first * others[1:]).sum(), (first * others[:-1]).sum()
    return Bracket(low, high)


def _several(before: Array, y: npt.NDArray[np.int64], classes: int, neighbors: int) -> Bracket:
    """Several neighbors: where an edge parts the last one from the next, the vote is known; the rest is open."""
    count = before.shape[0]
    upto = np.concatenate([before, np.ones((count, 1))], 1)
    earlier = np.concatenate([np.zeros((count, 1)), before], 1)
    beyond = 1.0 - upto
    present = [one for one in range(classes) if bool((y == one).any())]
    # k points of a class up to an edge, the others beyond; and the same with the bin before that edge empty.
    ways = {one: _counts(beyond[y == one], upto[y == one], neighbors) for one in present}
    empty = {one: _counts(beyond[y == one], earlier[y == one], neighbors) for one in present}
    won, known = np.zeros(classes), 0.0
    for split in _splits(neighbors, len(present)):
        chance = np.ones(upto.shape[1])
        idle = np.ones(upto.shape[1])
        for one, votes in zip(present, split, strict=True):
            chance = chance * ways[one][votes]
            idle = idle * empty[one][votes]
        mass = float(np.maximum(chance - idle, 0.0).sum())
        won[present[int(np.argmax(split))]] += mass
        known += mass
    return Bracket(won, won + max(0.0, 1.0 - known))


def _counts(beyond: Array, upto: Array, most: int) -> Array:
    """Poisson-binomial chances (most + 1, L) that 0, 1, ..., `most` of the points lie before each edge.

    Polynomials of degree 1 are multiplied in pairs, cut off at `most`. All terms are positive, so nothing cancels.
    """
    shape = (most + 1, beyond.shape[1])
    polynomials = np.zeros((len(beyond), *shape))
    polynomials[:, 0] = beyond
    polynomials[:, 1] = upto
    while len(polynomials) > 1:
        if len(polynomials) % 2:
            one = np.zeros((1, *shape))
            one[:, 0] = 1.0
            polynomials = np.concatenate([polynomials, one])
        left, right = polynomials[0::2], polynomials[1::2]
        product = np.zeros_like(left)
        for a in range(most + 1):
            for b in range(most + 1 - a):
                product[:, a + b] += left[:, a] * right[:, b]
        polynomials = product
    found: Array = polynomials[0]
    return found


def _splits(votes: int, classes: int) -> Iterator[tuple[int, ...]]:
    """All ways to spread votes over classes."""
    for bars in itertools.combinations(range(votes + classes - 1), classes - 1):
        places = (-1, *bars, votes + classes - 1)
        yield tuple(after - at - 1 for at, after in itertools.pairwise(places))
