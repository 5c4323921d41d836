"""Reliability: no model is judged by its own seed or family, and shares are counted where probabilities lie."""

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

from molehunt.calibration import Population, Reference, shipped
from molehunt.conformal import posterior
from molehunt.figures import reliability_chart
from molehunt.reliability import Judged, exact_interval, fitting_part, holding, out_of_fold, reliability

SETTINGS = {"configuration": {}, "stream": False}


def people(*models: Reference) -> Population:
    names = sorted({name for model in models for name in model.scores})
    return Population(task="t", network="n", models=models, defenses=dict.fromkeys(names, SETTINGS))


def one(seed: int, score: float | None, attack: str | None = None) -> Reference:
    return Reference(seed=seed, scores={"d": score}, attack=attack)


# Four clean models and four planted ones of two families; seed 3 was used for a clean and for a planted model.
SMALL = people(
    one(1, 1.0),
    one(2, 2.0),
    one(3, 3.0),
    one(4, 4.0),
    one(3, 9.0, "badnets"),
    one(6, 2.5, "badnets"),
    one(7, 8.0, "blended"),
    one(8, 0.0, "blended"),
)


@pytest.mark.parametrize(
    ("index", "clean", "planted"),
    [
        (0, [2.0, 3.0, 4.0], [9.0, 2.5, 8.0, 0.0]),  # a clean model: all but itself
        (2, [1.0, 2.0, 4.0], [2.5, 8.0, 0.0]),  # its seed was used for a planted one too
        (4, [1.0, 2.0, 4.0], [8.0, 0.0]),  # a planted one: neither its family nor its seed
        (5, [1.0, 2.0, 3.0, 4.0], [8.0, 0.0]),
        (7, [1.0, 2.0, 3.0, 4.0], [9.0, 2.5]),
    ],
)
def test_neither_seed_nor_family_of_the_judged_model_is_fitted(
    index: int, clean: list[float], planted: list[float]
) -> None:
    part = fitting_part(SMALL, SMALL.models[index])
    assert [row[0] for row in part.table(["d"])] == clean
    assert [row[0] for row in part.table(["d"], planted=True)] == planted


def test_families_that_stamp_the_same_kind_of_trigger_are_one() -> None:
    attacks = ["badnets", "tact", "blended", "adap_blend", "wanet"]
    many = people(one(0, 1.0), *(one(10 + i, float(i), attack) for i, attack in enumerate(attacks)))
    kept = {model.attack: {other.attack for other in fitting_part(many, model).planted} for model in many.planted}
    assert kept["tact"] == kept["badnets"] == {"blended", "adap_blend", "wanet"}
    assert kept["adap_blend"] == kept["blended"] == {"badnets", "tact", "wanet"}
    assert kept["wanet"] == set(attacks) - {"wanet"}


def test_out_of_fold_answers_worked_by_hand() -> None:
    said = [judged.said for judged in out_of_fold(SMALL, prior=0.5)]
    assert all(s is not None for s in said)
    # Clean: rank among the three others. 1: all three as high, 4/4; 2: two, 3/4; 3 (of 1, 2, 4): one, 2/4; 4: 1/4.
    # Planted: 9 among 1, 2, 4: 1/4; 2.5 among all four: two as high, 3/5; 8: 1/5; 0: all, 5/5.
    assert [s.p_value for s in said if s] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.25, 0.6, 0.2, 1.0])
    assert [(s.clean, s.planted) for s in said if s] == [
        *[(3, 4), (3, 4), (3, 3), (3, 4)],
        *[(3, 2), (4, 2), (4, 2), (4, 2)],
    ]
    # The BadNets model 9 is weighed by what Blended models showed: 8 beats 1, 2, 4 (1/4), 0 beats none (4/4).
    assert said[4] is not None
    assert said[4].p == pytest.approx(posterior(0.25, 3, planted={"blended": [0.25, 1.0]}))
    # In-fold its own rank and its sibling's would have spoken for it.
    assert said[4].p != pytest.approx(posterior(0.25, 3, planted={"badnets": [0.25, 0.5], "blended": [0.25, 1.0]}))


def test_fresh_models_are_judged_without_their_family_too() -> None:
    (judged,) = out_of_fold(SMALL, [one(99, 5.0, "blended")], prior=0.5)
    assert judged.said is not None
    # BadNets models alone: 9 beats all of 1, 2, 3, 4 (1/5), 2.5 is beaten by two (3/5).
    assert judged.said.p == pytest.approx(posterior(0.2, 4, planted={"badnets": [0.2, 0.6]}))


def test_a_perfect_detector_of_one_family_does_not_vouch_for_another() -> None:
    """In-fold, the found squares would make the unseen waves look well covered."""
    clean = [one(i, 0.1 * i) for i in range(19)]
    found = [one(100 + i, 9.0, "square") for i in range(8)]
    missed = [one(200 + i, 0.95, "wave") for i in range(8)]
    answers = out_of_fold(people(*clean, *found, *missed), prior=0.5)
    waves = [a.said.p for a in answers if a.model.attack == "wave" and a.said]
    alone = [a.said.p for a in out_of_fold(people(*clean, *found), missed, prior=0.5) if a.said]
    assert waves == alone


def test_a_model_without_a_score_is_not_judged() -> None:
    answers = out_of_fold(people(*SMALL.models, one(50, None, "sig")), prior=0.5)
    assert [a.said is None for a in answers] == [False] * 8 + [True]
    with pytest.raises(ValueError, match=r"strictly between 0 and 1, got 1\.0"):
        out_of_fold(SMALL, prior=1.0)


def test_the_smallest_p_value_is_one_over_the_references_plus_one() -> None:
    for n in (1, 4, 19, 59):
        (judged,) = out_of_fold(people(*[one(i, float(i)) for i in range(n)]), [one(99, 1e9)], prior=0.5)
        assert judged.said is not None
        assert judged.said.p_value == judged.said.p_values["d"] == pytest.approx(1 / (n + 1))


# -- reliability -------------------------------------------------------------------------------------------------------


def test_reliability_worked_by_hand() -> None:
    p = [0.0, 0.1, 0.3, 0.5, 0.6, 1.0]
    truth = [False, True, False, True, True, True]
    low, high = reliability(p, truth, 2)
    assert (low.low, low.high, low.count) == (0.0, 0.5, 3)
    assert low.mean == pytest.approx(0.4 / 3)
    assert low.share == pytest.approx(1 / 3)
    assert (high.low, high.high, high.count) == (0.5, 1.0, 3)  # 0.5 belongs to the upper half, 1 to the last bin
    assert high.mean == pytest.approx(0.7)
    assert high.share == 1.0
    # All three of three: the share may be as low as the cube root of 2.5 %.
    assert high.least == pytest.approx(0.025 ** (1 / 3))
    assert high.most == 1.0


def test_an_empty_bin_has_no_share_and_any_share_is_possible() -> None:
    bins = reliability([0.05], [False], (0.0, 0.1, 0.2, 1.0))
    assert [(b.count, b.mean, b.share) for b in bins] == [(1, 0.05, 0.0), (0, None, None), (0, None, None)]
    assert (bins[1].least, bins[1].most) == (0.0, 1.0)
    assert sum(b.count for b in reliability([], [], 4)) == 0


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (2, 7), (5, 5), (13, 40)])
def test_an_exact_interval_ends_where_what_was_seen_becomes_unlikely(hits: int, count: int) -> None:
    least, most = exact_interval(hits, count)
    assert least <= hits / count <= most
    if hits > 0:
        assert binom.sf(hits - 1, count, least) == pytest.approx(0.025)
    if hits < count:
        assert binom.cdf(hits, count, most) == pytest.approx(0.025)


def test_probabilities_that_are_true_lie_in_their_intervals() -> None:
    rng = torch.Generator().manual_seed(0)
    p = torch.rand(4000, generator=rng, dtype=torch.float64)
    truth = (torch.rand(4000, generator=rng, dtype=torch.float64) < p).tolist()
    bins = reliability(p.tolist(), truth, 10)
    assert sum(b.count for b in bins) == 4000
    assert all(a.high == b.low for a, b in pairwise(bins))
    inside = sum(b.mean is not None and b.least <= b.mean <= b.most for b in bins)
    assert inside >= 9
    bold = reliability((p**0.2).tolist(), truth, 10)
    assert sum(b.mean is not None and b.count > 50 and b.mean > b.most for b in bold) >= 4, "boasting is seen"


@pytest.mark.parametrize(
    ("p", "truth", "bins", "says"),
    [
        ([0.5], [], 2, "1 probabilities and 0 truths"),
        ([1.5], [True], 2, r"in \[0, 1\], got 1.5"),
        ([math.nan], [True], 2, "got nan"),
        ([0.5], [True], 0, "at least one bin, got 0"),
        ([0.5], [True], (0.0, 0.5, 0.5, 1.0), "rise from 0 to 1"),
        ([0.5], [True], (0.1, 1.0), "rise from 0 to 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(p: list[float], truth: list[bool], bins: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        reliability(p, truth, bins)
    with pytest.raises(ValueError, match="6 of 5"):
        exact_interval(6, 5)


def test_out_of_fold_probabilities_hold_where_scores_are_exchangeable() -> None:
    """Where planted models of four families score as the Beta family has it, what is said is what comes true."""
    said: list[float] = []
    true: list[bool] = []
    for trial in range(12):
        u = torch.rand(60, generator=torch.Generator().manual_seed(trial), dtype=torch.float64).tolist()
        models = [one(i, 1.0 - v) for i, v in enumerate(u[:30])]
        # Share of clean models that score as high: Beta(a, 1) with a = 1 / AUC - 1, here an AUC of .85.
        models += [one(30 + i, 1.0 - v ** (1 / (1 / 0.85 - 1)), f"family {i % 4}") for i, v in enumerate(u[30:])]
        judged: list[Judged] = out_of_fold(people(*models), prior=0.5)
        said += [a.said.p for a in judged if a.said]
        true += [a.model.attack is not None for a in judged if a.said]
    # Five intervals of 99 % each: of a hundred such tests of true probabilities five would fail.
    bins = reliability(said, true, 5, confidence=0.99)
    assert min(b.count for b in bins) >= 50
    for b in bins:
        assert b.mean is not None
        assert b.least <= b.mean <= b.most


def test_a_population_is_compared_at_its_own_share_of_planted_models() -> None:
    models = [one(i, 0.1 * i) for i in range(30)] + [one(100 + i, 9.0, f"family {i % 2}") for i in range(10)]
    told = [a.said.p for a in out_of_fold(people(*models, one(50, None)), prior=10 / 41) if a.said]
    bins = holding(people(*models, one(50, None)), 4)
    assert sum(b.count for b in bins) == len(told) == 40
    assert bins == reliability(told, [False] * 30 + [True] * 10, 4)
    with pytest.raises(ValueError, match="got 30 clean and 0 planted"):
        holding(people(*models[:30]))
    with pytest.raises(ValueError, match="none of the 2 models has a score"):
        holding(people(one(1, None), one(2, None, "sig")))


@pytest.mark.parametrize(("place", "task"), [(1, "mnist5k"), (2, "mnist")])
def test_the_page_shows_what_the_shipped_populations_give(place: int, task: str) -> None:
    page = (Path(__file__).parent.parent / "docs/reference/calibration.md").read_text()
    population = shipped(task, "badnets_cnn")
    assert population is not None
    judged = [a for a in out_of_fold(population, prior=len(population.planted) / len(population.models)) if a.said]
    p, truth = [a.said.p for a in judged if a.said], [a.model.attack is not None for a in judged]
    bins = reliability(p, truth, 5)
    rows = [
        f"| {b.low:g} to {b.high:g} | {b.count} | {b.mean:.3f} | {b.share:.3f} | {b.least:.3f} to {b.most:.3f} |"
        for b in bins
        if b.count
    ]
    told_of = page.split("| said |")[place]
    said = told_of.split("\n\n")[0]
    assert said.splitlines()[2:] == rows
    assert f"![{reliability_chart(bins).alt}]" in page
    brier = sum((q - y) ** 2 for q, y in zip(p, truth, strict=True)) / len(p)
    told = re.search(r"On average ([\d.]+) is said, and ([\d.]+) are backdoored\. The Brier score is ([\d.]+)", told_of)
    assert told is not None
    assert [f"{v:.3f}" for v in (sum(p) / len(p), sum(truth) / len(truth), brier)] == [
        told[1],
        told[2],
        told[3].rstrip("."),
    ]
