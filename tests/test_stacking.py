"""Weights of defenses, learned from references: what they must never do, and what they are worth."""

import math
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from molehunt import stacking
from molehunt.calibration import Population, Reference, shipped
from molehunt.fusion import fuse
from molehunt.reliability import out_of_fold
from molehunt.stacking import contributions, enough, fit, probability

Rows = list[list[float]]


def drawn(count: int, shift: Sequence[float], seed: int) -> Rows:
    """Rows of normal scores, each column moved by its shift."""
    rng = random.Random(seed)
    return [[rng.gauss(by, 1.0) for by in shift] for _ in range(count)]


def references(columns: int = 3, *, noise: int = 0, seed: int = 0) -> tuple[Rows, dict[str, Rows]]:
    """99 clean models and four families, each seen by one defense and its neighbor; `noise` columns see nothing."""
    still = [0.0] * (columns + noise)
    families = {}
    for number in range(4):
        seen = list(still)
        seen[number % columns], seen[(number + 1) % columns] = 3.0, 1.5
        families[f"family {number}"] = drawn(12, seen, 10 * seed + number + 1)
    return drawn(99, still, 10 * seed), families


def log_loss(p: float, truth: bool) -> float:
    return -math.log(p if truth else 1.0 - p)


def test_no_weight_is_negative_and_loud_defenses_have_some() -> None:
    clean, planted = references()
    stack = fit(clean, planted)
    assert stack.joint > 0
    assert min(stack.weights) >= 0
    assert stack.models == 99 + 48
    backwards = {name: [[-v for v in row] for row in rows] for name, rows in planted.items()}
    turned = fit(clean, backwards)
    assert (turned.joint, *turned.weights) == pytest.approx((0.0,) * 4, abs=1e-6), "directions are known, not learned"


def test_p_grows_with_every_score() -> None:
    stack = fit(*references())
    for column in range(3):
        p_values = [0.5, 0.4, 0.6]
        said = []
        for value in (1.0, 0.7, 0.4, 0.1, 0.05, 0.01):
            p_values[column] = value
            said.append(probability(stack, p_values))
        assert all(low <= high for low, high in pairwise(said))
        assert said[0] < said[-1]


def test_what_the_defenses_contribute_sums_to_the_log_odds() -> None:
    stack = fit(*references())
    p_values = [0.02, 0.3, 0.9]
    parts = contributions(stack, p_values)
    p = probability(stack, p_values)
    assert stack.intercept + sum(parts) == pytest.approx(math.log(p / (1 - p)))
    assert min(parts) >= 0
    assert max(parts) == parts[0]


def test_no_probability_leaves_the_clip_however_well_the_references_part() -> None:
    clean = [[i / 100, i / 100] for i in range(99)]
    planted = {name: [[9.0, 9.0]] * 30 for name in "abc"}
    stack = fit(clean, planted)
    assert 0.98 < probability(stack, [0.01, 0.01]) <= 0.99
    assert probability(stack, [1.0, 1.0]) >= 0.01
    few = fit(clean[:19], {name: [[9.0, 9.0]] for name in "abc"})
    assert probability(few, [0.05, 0.05]) <= 1 - 1 / 24


def test_the_prior_moves_the_odds_and_nothing_else() -> None:
    stack = fit(*references())
    even, rare = (probability(stack, [0.05, 0.2, 0.5], prior=prior) for prior in (0.5, 0.1))
    assert rare / (1 - rare) == pytest.approx(even / (1 - even) / 9)


def test_a_family_counts_once_however_many_models_it_has() -> None:
    clean, planted = references()
    once = fit(clean, planted)
    twice = fit(clean, {name: rows * (3 if name == "family 0" else 1) for name, rows in planted.items()})
    ask = [0.03, 0.5, 0.5]
    assert probability(twice, ask) == pytest.approx(probability(once, ask), abs=0.05)


def test_an_attack_that_nobody_planted_shows_by_one_defense_alone() -> None:
    """Its defense saw nothing of any known family, so plain stacking would have given it no weight at all."""
    clean, planted = references(3, noise=1)
    stack = fit(clean, planted)
    ordinary = probability(stack, [0.5, 0.5, 0.5, 0.5])
    assert probability(stack, [0.5, 0.5, 0.5, 0.01]) > max(0.6, 2 * ordinary)


@pytest.mark.parametrize("seed", range(3))
def test_a_defense_that_sees_nothing_costs_little(seed: int) -> None:
    """Log-loss on fresh models with a column of pure noise and without.

    It is not free: the joint evidence is a mean over the defenses, for any of them may be the one that sees an attack
    that nobody planted, and one more that is blind dilutes it.
    """
    losses = []
    for noise in (0, 1):
        stack = fit(*references(noise=noise, seed=seed))
        clean, _ = references(noise=noise, seed=seed)
        fresh_clean, fresh = references(noise=noise, seed=seed + 50)
        said = [(row, False) for row in fresh_clean] + [(row, True) for rows in fresh.values() for row in rows]
        ranks = [([(1 + sum(c[d] >= v for c in clean)) / 100 for d, v in enumerate(row)], truth) for row, truth in said]
        weights = {True: 0.5 / 48, False: 0.5 / 99}
        losses.append(sum(weights[truth] * log_loss(probability(stack, p), truth) for p, truth in ranks))
    assert losses[1] < losses[0] + 0.06


def test_too_few_references_learn_no_weights() -> None:
    clean, planted = references()
    assert enough(clean[:19], planted)
    assert not enough(clean[:18], planted)
    two = {name: planted[name] for name in ("family 0", "family 1")}
    assert not enough(clean, two | {"family 2": []})
    with pytest.raises(ValueError, match="got 99 and 2"):
        fit(clean, two)
    with pytest.raises(ValueError, match="rows of 3 scores"):
        fit(clean, {name: [row[:2] for row in rows] for name, rows in planted.items()})
    with pytest.raises(ValueError, match="expected 3 p-values, got 2"):
        probability(fit(clean, planted), [0.5, 0.5])


def population(clean: Rows, planted: dict[str, Rows]) -> Population:
    names = [f"d{k}" for k in range(len(clean[0]))]
    models = [Reference(seed=i, scores=dict(zip(names, row, strict=True))) for i, row in enumerate(clean)]
    for number, (family, rows) in enumerate(planted.items(), start=1):
        for i, row in enumerate(rows):
            models.append(Reference(seed=1000 * number + i, attack=family, scores=dict(zip(names, row, strict=True))))
    return Population(task="t", network="n", models=tuple(models), defenses={name: {} for name in names})


def test_the_fusion_uses_weights_where_there_are_references_enough() -> None:
    clean, planted = references()
    whole = population(clean, planted)
    scores = {"d0": 3.5, "d1": 0.0, "d2": 0.1}
    learned = fuse(scores, whole)
    assert learned.contributions.keys() == scores.keys()
    assert max(learned.contributions, key=lambda name: learned.contributions[name]) == "d0"
    assert learned.p > 0.8
    bare = fuse(scores, population(clean, {}))
    assert not bare.contributions
    assert bare.p_value == learned.p_value


def test_a_defense_that_is_missing_is_as_if_it_had_never_been() -> None:
    clean, planted = references()
    without = population(
        [row[:2] for row in clean], {name: [row[:2] for row in rows] for name, rows in planted.items()}
    )
    scores = {"d0": 2.0, "d1": 0.4}
    assert fuse(scores, population(clean, planted)) == fuse(scores, without)


@pytest.mark.parametrize("task", ["mnist5k", "mnist"])
def test_on_the_shipped_references_unmet_families_are_told_better_than_by_rank_alone(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = shipped(task, "badnets_cnn")
    assert bank is not None
    losses = []
    for least in (stacking.FAMILIES, 99):
        monkeypatch.setattr(stacking, "FAMILIES", least)
        judged = out_of_fold(bank, prior=0.5)
        said = [log_loss(one.said.p, one.model.attack is not None) for one in judged if one.said]
        losses.append(sum(said) / len(said))
    assert losses[0] < losses[1]
    assert losses[0] < 0.25
