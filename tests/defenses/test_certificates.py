"""Certificates: each number against its definition, and the exact vote against draws."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from molehunt.defenses._certificates import (
    certified,
    clopper_pearson,
    gaussian_radius,
    hoeffding,
    partition_flips,
    shared_radius,
    uniform_holds,
)
from molehunt.defenses._nearest import Array, noncentral, vote_bounds

# --------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("votes", "alpha", "margin", "soft", "lower", "hard"),
    [
        (100, 0.001, 0.186, 0.893, 0.9333, 1.500),
        (1000, 0.001, 0.0588, 1.565, 0.99312, 2.463),
        (1000, 0.05, 0.0387, 1.766, 0.99701, 2.749),
        (10000, 0.001, 0.0186, 2.084, 0.99931, 3.199),
    ],
)
def test_what_unanimous_votes_certify_at_most(
    votes: int, alpha: float, margin: float, soft: float, lower: float, hard: float
) -> None:
    loose, close = hoeffding(1.0, votes, alpha), clopper_pearson(votes, votes, alpha)
    assert 1 - loose == pytest.approx(margin, abs=5e-4)
    assert close == pytest.approx(lower, abs=5e-5)
    # Of two classes the other one has the rest.
    assert gaussian_radius(loose, 1 - loose, 1.0) == pytest.approx(soft, abs=2e-3)
    assert gaussian_radius(close, 1 - close, 1.0) == pytest.approx(hard, abs=2e-3)


@given(votes=st.integers(1, 500), alpha=st.floats(1e-4, 0.5), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_bound_of_hard_votes_is_where_so_many_become_unlikely(votes: int, alpha: float, share: float) -> None:
    count = round(share * votes)
    low = clopper_pearson(count, votes, alpha)
    assert 0.0 <= low <= count / votes
    if count:
        assert stats.binom.sf(count - 1, votes, low) == pytest.approx(alpha, rel=1e-6)
    assert low >= hoeffding(count / votes, votes, alpha) - 1e-12


def test_more_votes_and_more_risk_never_shrink_a_radius() -> None:
    def radius(votes: int, alpha: float) -> float:
        low = clopper_pearson(9 * votes // 10, votes, alpha)
        return gaussian_radius(low, 1 - low, 0.5)

    assert radius(10, 0.01) < radius(100, 0.01) < radius(1000, 0.01)
    assert radius(100, 0.001) < radius(100, 0.01) < radius(100, 0.1)


@given(low=st.floats(0.01, 0.99), high=st.floats(0.01, 0.99), sigma=st.floats(0.05, 5))
@settings(max_examples=60, deadline=None)
def test_at_the_radius_both_classes_are_equally_likely(low: float, high: float, sigma: float) -> None:
    radius = gaussian_radius(low, high, sigma)
    if low <= high:
        assert radius == 0.0
        return
    normal = stats.norm
    assert normal.cdf(normal.ppf(low) - radius / sigma) == pytest.approx(
        normal.cdf(normal.ppf(high) + radius / sigma), abs=1e-9
    )
    assert gaussian_radius(low, high, 2 * sigma) == pytest.approx(2 * radius)
    assert shared_radius(radius, 4) == pytest.approx(radius / 2)


def test_under_uniform_noise_no_change_is_certified_and_a_change_as_wide_as_the_noise_never() -> None:
    assert uniform_holds(0.6, 0.4, torch.zeros(3, 5), 1.0)
    assert not uniform_holds(0.5, 0.5, torch.zeros(3, 5), 1.0)
    for change in (1.0, -1.0, 7.0):
        assert not uniform_holds(1.0, 0.0, torch.tensor([[change, 0.0]]), 1.0)
    # 1 - (p_A - p_B) / 2 is .6; two samples that move by a fifth leave .64, three .512.
    assert uniform_holds(0.9, 0.1, torch.full((2, 1), 0.2), 1.0)
    assert not uniform_holds(0.9, 0.1, torch.full((3, 1), -0.2), 1.0)
    assert uniform_holds(0.9, 0.1, torch.full((3, 1), 0.2), 2.0)


@given(votes=st.lists(st.integers(0, 12), min_size=2, max_size=5))
@settings(max_examples=100, deadline=None)
def test_so_many_flips_change_no_partition_vote_and_one_more_can(votes: list[int]) -> None:
    counts = torch.tensor(votes)
    winner = int(counts.argmax())
    flips = partition_flips(counts)
    for other in range(len(votes)):
        if other == winner:
            continue
        moved = counts.clone()
        moved[winner] -= flips
        moved[other] += flips
        assert int(moved.argmax()) == winner or flips > votes[winner]
    strongest = [
        other
        for other in range(len(votes))
        if other != winner and votes[winner] - votes[other] - (other < winner) < 2 * (flips + 1)
    ]
    assert strongest, "one more would not change it either: the bound is too small"
    for other in range(len(votes)):
        assert other == winner or partition_flips(counts, other) == -1


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: clopper_pearson(3, 2, 0.1), "got 3 of 2"),
        (lambda: clopper_pearson(0, 0, 0.1), "got 0 of 0"),
        (lambda: clopper_pearson(1, 2, 1.0), "alpha must lie in"),
        (lambda: hoeffding(1.2, 10, 0.1), "a mean of scores lies in"),
        (lambda: gaussian_radius(0.9, 0.1, 0.0), "sigma must be above 0, got 0"),
        (lambda: gaussian_radius(1.1, 0.1, 1.0), "low is a probability"),
        (lambda: gaussian_radius(0.9, math.nan, 1.0), "high is a probability"),
        (lambda: gaussian_radius(1.0, 0.1, 1.0), "nothing is certain"),
        (lambda: gaussian_radius(0.9, 0.0, 1.0), "nothing is certain"),
        (lambda: uniform_holds(2.0, 0.0, torch.zeros(1), 1.0), "low is a probability"),
        (lambda: shared_radius(1.0, 0), "1 sample or more, got 0"),
        (lambda: uniform_holds(0.9, 0.1, torch.zeros(1), 0.0), "width of the noise"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


def test_abstaining_counts_as_not_certified() -> None:
    rate, accuracy = certified(
        torch.tensor([0.0, 0.5, 1.0, 2.0]), torch.tensor([True, True, False, True]), torch.tensor([0.0, 0.5, 1.5])
    )
    assert rate.tolist() == [0.75, 0.5, 0.25]
    assert accuracy.tolist() == [0.5, 0.25, 0.25]


# --------------------------------------------------------------------------------- the exact nearest-neighbor vote


def case(seed: int, count: int, dimension: int, classes: int) -> tuple[Array, Array, Any]:
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    return rng.random(dimension), rng.random((count, dimension)), y


def drawn(x: Array, train: Array, y: Any, classes: int, sigma: float, neighbors: int, draws: int = 40_000) -> Array:
    """Shares of the vote over draws of the noise."""
    noise = np.random.default_rng(7).standard_normal((draws, *train.shape))
    near = np.argsort(((train + sigma * noise - x) ** 2).sum(2), 1)[:, :neighbors]
    votes = np.stack([(y[near] == one).sum(1) for one in range(classes)], 1)
    return np.bincount(votes.argmax(1), minlength=classes) / draws


def test_the_distribution_is_that_of_noncentral_chi_square() -> None:
    apart, edges = np.array([1e-9, 3.0, 50.0, 900.0]), np.array([5.0, 40.0, 200.0, 1500.0])
    found = noncentral(edges, 20, apart)
    expected = np.stack([stats.ncx2.cdf(edges, 20, value) for value in apart])
    assert found == pytest.approx(expected, abs=1e-12)
    assert noncentral(edges, 20, np.zeros(1)) == pytest.approx(stats.chi2.cdf(edges, 20)[None], abs=1e-12)


@pytest.mark.parametrize("neighbors", [1, 3, 5])
@pytest.mark.parametrize(("seed", "count", "dimension", "classes"), [(0, 8, 2, 2), (1, 30, 5, 3), (2, 60, 12, 4)])
def test_draws_of_the_noise_agree(seed: int, count: int, dimension: int, classes: int, neighbors: int) -> None:
    x, train, y = case(seed, count, dimension, classes)
    bounds = vote_bounds(x, train, y, classes, 0.4, neighbors=neighbors, bins=400)
    shares = drawn(x, train, y, classes, 0.4, neighbors)
    error = 3.5 * np.sqrt(shares * (1 - shares) / 40_000) + 1e-6
    assert bool((bounds.low <= shares + error).all())
    assert bool((bounds.high >= shares - error).all())
    assert float((bounds.high - bounds.low).max()) < 0.03
    assert bounds.low.sum() <= 1.0 <= bounds.high.sum()


def test_more_bins_lie_within_fewer() -> None:
    x, train, y = case(3, 40, 6, 3)
    few, many = (vote_bounds(x, train, y, 3, 0.3, bins=bins) for bins in (50, 1000))
    assert float((many.high - many.low).max()) < float((few.high - few.low).min())
    assert bool((few.low <= many.high).all())
    assert bool((many.low <= few.high).all())


def test_one_neighbor_by_the_way_of_several() -> None:
    from molehunt.defenses import _nearest

    x, train, y = case(4, 25, 4, 3)
    apart = ((train - x) ** 2).sum(1) / 0.3**2
    before = noncentral(_nearest._edges(apart, 4, 1, 300), 4, apart)
    fast, general = _nearest._nearest(before, y, 3), _nearest._several(before, y, 3, 1)
    # Two of one class in a bin leave nothing open; only the fast way knows.
    assert bool((general.low <= fast.low + 1e-12).all())
    assert bool((fast.high <= general.high + 1e-12).all())
    assert float((general.high - general.low).max()) < 0.02


def test_the_order_of_the_points_does_not_matter() -> None:
    x, train, y = case(5, 30, 5, 3)
    order = np.random.default_rng(1).permutation(30)
    for neighbors in (1, 3):
        one = vote_bounds(x, train, y, 3, 0.3, neighbors=neighbors)
        other = vote_bounds(x, train[order], y[order], 3, 0.3, neighbors=neighbors)
        assert one.low == pytest.approx(other.low, abs=1e-12)
        assert one.high == pytest.approx(other.high, abs=1e-12)


@pytest.mark.parametrize("neighbors", [1, 3])
def test_without_noise_it_is_the_ordinary_vote(neighbors: int) -> None:
    x, train, y = case(6, 30, 5, 3)
    near = np.argsort(((train - x) ** 2).sum(1))[:neighbors]
    plain = int(np.bincount(y[near], minlength=3).argmax())
    bounds = vote_bounds(x, train, y, 3, 1e-3, neighbors=neighbors)
    assert float(bounds.low[plain]) > 0.999
    # A thousand times as far as its noise: nothing else is ever near.
    assert float(np.delete(bounds.high, plain).max()) < 1e-3


def radius_of(x: Array, train: Array, y: Any, sigma: float) -> tuple[int, float]:
    bounds = vote_bounds(x, train, y, 2, sigma, bins=1000)
    winner = int(bounds.low.argmax())
    return winner, gaussian_radius(float(bounds.low[winner]), float(bounds.high[1 - winner]), sigma)


@pytest.mark.parametrize("seed", range(8))
def test_no_change_within_the_radius_changes_the_vote_even_in_the_worst_directions(seed: int) -> None:
    x, train, y = case(10 + seed, 12, 3, 2)
    winner, radius = radius_of(x, train, y, 0.5)
    # What changes most: a loser goes straight to the query, and the winner's points go away from it.
    towards = np.zeros_like(train)
    losers = np.flatnonzero(y != winner)
    nearest = losers[((train[losers] - x) ** 2).sum(1).argmin()]
    towards[nearest] = x - train[nearest]
    away = np.where((y == winner)[:, None], train - x, 0.0)
    for change in (towards, away, towards + away):
        step = change / np.linalg.norm(change)
        moved = vote_bounds(x, train + 0.999 * radius * step, y, 2, 0.5, bins=1000)
        assert float(moved.high[winner]) >= float(moved.low[1 - winner])
    if radius:
        # Far outside, it does change: the radius is no number that is always too small.
        flipped = vote_bounds(x, train + 40 * away / np.linalg.norm(away) + towards, y, 2, 0.5, bins=1000)
        assert float(flipped.low[1 - winner]) > float(flipped.high[winner])


def test_what_lies_far_away_counts_against_the_winner_all_the_same() -> None:
    # All points within reach are of one class; the others must not vanish, for then anything would be certified.
    rng = np.random.default_rng(3)
    train = np.concatenate([0.3 * rng.random((50, 784)), 1 - 0.3 * rng.random((50, 784))])
    y = np.repeat([0, 1], 50)
    x = np.full(784, 0.15)
    for neighbors in (1, 3):
        bounds = vote_bounds(x, train, y, 2, 0.5, neighbors=neighbors)
        radius = gaussian_radius(float(bounds.low[0]), float(bounds.high[1]), 0.5)
        # One point of the other class on the query decides the vote of one neighbor.
        cost = float(np.linalg.norm(train[50:] - x, axis=1).min())
        assert 0 < radius < cost


def test_a_vote_is_never_certain() -> None:
    x, train, y = case(6, 30, 5, 3)
    for neighbors in (1, 3):
        bounds = vote_bounds(x, train, y, 3, 1e-3, neighbors=neighbors)
        assert float(bounds.low.max()) <= 1 - 1e-9
        assert float(bounds.high.min()) >= 1e-9


def test_bytes_are_no_other_points_than_their_numbers() -> None:
    rng = np.random.default_rng(4)
    train, x, y = rng.integers(0, 256, (20, 6), np.uint8), rng.integers(0, 256, 6, np.uint8), np.arange(20) % 2
    one = vote_bounds(x, train, y, 2, 60.0)
    other = vote_bounds(x.astype(float), train.astype(float), y, 2, 60.0)
    assert np.array_equal(one.low, other.low)
    with pytest.raises(ValueError, match="must be finite"):
        vote_bounds(np.full(6, np.nan), train.astype(float), y, 2, 60.0)


def test_a_class_without_points_never_wins() -> None:
    x, train, y = case(9, 20, 4, 2)
    for neighbors in (1, 3):
        bounds = vote_bounds(x, train, 2 * y, 4, 0.3, neighbors=neighbors)
        assert float(bounds.low[[1, 3]].max()) == 0.0
    assert float(vote_bounds(x, train, 2 * y, 4, 0.3).high[[1, 3]].max()) < 1e-8


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sigma": 0.0}, "sigma above 0"),
        ({"neighbors": 0}, "neighbors >= 1"),
        ({"bins": 1}, "bins >= 2"),
        ({"neighbors": 20}, "20 neighbors need more than as many labeled points, got 20"),
        ({"classes": 1}, "classes lie in 0 to 0, got 0 to 1"),
    ],
)
def test_a_vote_that_cannot_be_is_refused(changes: dict[str, Any], told: str) -> None:
    x, train, y = case(9, 20, 4, 2)
    settings_: dict[str, Any] = {"classes": 2, "sigma": 0.3, **changes}
    with pytest.raises(ValueError, match=told):
        vote_bounds(x, train, y, **settings_)
