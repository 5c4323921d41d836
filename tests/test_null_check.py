"""The null check: exact in cases worked by hand, quiet where nothing is wrong, and loud where something is."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from scipy.stats import betabinom

from molehunt.calibration import Population, Reference
from molehunt.null_check import count_alarms, expected_alarms, holm, null_check

SETTINGS = {"configuration": {}, "stream": False}


def people(columns: dict[str, Sequence[float | None]], first: int = 0) -> Population:
    names = list(columns)
    models = tuple(
        Reference(seed=first + i, scores=dict(zip(names, row, strict=True)))
        for i, row in enumerate(zip(*columns.values(), strict=True))
    )
    return Population(task="t", network="n", models=models, defenses=dict.fromkeys(names, SETTINGS))


def normal(count: int, seed: int, defenses: int = 2, shift: float = 0.0) -> Population:
    """Scores of clean models that depend on each other, as those of real defenses do."""
    rng = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, 1, generator=rng, dtype=torch.float64)
    own = torch.randn(count, defenses, generator=rng, dtype=torch.float64)
    scores = (0.6 * shared + 0.8 * own + shift).T.tolist()
    return people({f"d{i}": column for i, column in enumerate(scores)}, first=1000 * seed)


def test_a_check_worked_by_hand() -> None:
    # Three against three, all higher: distance 1, and of the C(6, 3) = 20 ways to part six scores two are so far apart.
    found = null_check(
        people({"a": [1.0, 2.0, 3.0], "b": [1.0, 3.0, 5.0]}),
        people({"a": [4.0, 5.0, 6.0], "b": [2.0, 4.0, 6.0]}, first=10),
        level=0.25,
    )
    a, b = found.defenses
    assert a.distance == 1.0
    assert a.p_value == pytest.approx(0.1)
    # At 1, 3 and 5 a third of `b` is ahead: as far as any two interleaved groups are, so p is 1.
    assert b.distance == pytest.approx(1 / 3)
    assert b.p_value == pytest.approx(1.0)
    assert a.corrected == pytest.approx(0.2)
    assert b.corrected == pytest.approx(1.0)
    # Three references can just say 1/4. All of a's are above them; of b's only the 6.
    assert (a.alarms.count, b.alarms.count, a.alarms.models) == (3, 1, 3)
    # Combined: reciprocal ranks 1/1 + 1/(3, 2, 1) against at most 1/2 + 1/1 of the reference (3, 5). Only (6, 6) is
    # ahead of it; (5, 4) with 1 + 1/2 ties with 1/2 + 1, and ties count against suspicion.
    assert found.alarms.count == 1
    assert (found.alarms.low, found.alarms.high) == expected_alarms(3, 3, 0.25)
    assert found.holds


def test_a_defense_that_lost_its_fresh_scores_is_named_and_nothing_holds() -> None:
    known = people({"a": [1.0, 2.0, 3.0], "b": [1.0, 3.0, 5.0]})
    fresh = people({"a": [1.5, 2.5, 3.5], "b": [None, None, 4.0]}, first=10)
    found = null_check(known, fresh, level=0.25)
    assert [d.defense for d in found.defenses] == ["a"]
    assert found.left_out == {"b": "fresh models: only 1 of 3 clean reference models have a score of it"}
    assert not found.holds
    assert null_check(known, people({"a": [1.5, 2.5, 3.5], "b": [2.0, 4.0, 6.0]}, first=10), level=0.25).holds


def test_where_no_alarm_could_be_raised_nothing_holds() -> None:
    # Fifteen references can say 1/16 at least, which is more than 5 %.
    few = null_check(normal(15, 1), normal(30, 2))
    assert (few.alarms.count, few.alarms.low, few.alarms.high) == (0, 0, 0)
    assert not few.alarms.possible
    assert not few.holds
    # No fresh model has a score of both.
    column = [float(i) for i in range(30)]
    known = people({"a": column, "b": column})
    fresh = people({"a": [None if i % 2 and i < 12 else i + 0.5 for i in range(30)], "b": column}, first=100)
    assert null_check(known, fresh).alarms.models == 24
    assert count_alarms([], 30).possible is False
    assert count_alarms([], 30).expected is False


def test_holm_worked_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize(("references", "models"), [(99, 100), (19, 40), (59, 30)])
def test_the_interval_of_alarms_is_beta_binomial(references: int, models: int) -> None:
    low, high = expected_alarms(references, models)
    reach = (references + 1) // 20
    law = betabinom(models, reach, references + 1 - reach)
    assert law.cdf(high) - (law.cdf(low - 1) if low else 0.0) >= 0.95
    assert law.cdf(low - 1) <= 0.025
    assert law.sf(high) <= 0.025
    assert low <= 0.05 * models <= high


def test_with_one_reference_per_rank_the_interval_is_worked_by_hand() -> None:
    # One reference, level 1/2, one model: it is above the reference or not, each in one case of two.
    assert expected_alarms(1, 1, 0.5) == (0, 1)
    # One reference, 99 models: how many beat it is uniform on 0 to 99, and 2.5 of a hundred are cut off at either end.
    assert expected_alarms(1, 99, 0.5) == (2, 97)
    assert expected_alarms(18, 1000) == (0, 0), "eighteen references cannot say 1/20"


def test_exchangeable_models_pass_and_false_positives_lie_inside() -> None:
    found = [null_check(normal(39, 2 * i), normal(60, 2 * i + 1)) for i in range(60)]
    assert sum(f.alarms.expected for f in found) >= 54
    assert sum(d.alarms.expected for f in found for d in f.defenses) >= 108
    assert sum(min(d.corrected for d in f.defenses) <= 0.05 for f in found) <= 7
    # And the interval is not so wide that everything would pass: a shift of one is seen nearly always.
    shifted = [null_check(normal(39, 2 * i), normal(60, 2 * i + 1, shift=1.0)) for i in range(20)]
    assert sum(f.holds for f in shifted) <= 2


def test_the_mean_of_false_positives_is_the_level() -> None:
    found = [null_check(normal(39, 2 * i), normal(60, 2 * i + 1)).alarms for i in range(60)]
    assert sum(f.count for f in found) / sum(f.models for f in found) == pytest.approx(0.05, abs=0.015)


def test_planted_models_and_missing_scores_are_left_out() -> None:
    known = people({"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [1.0, 2.0, 3.0, 4.0, None]})
    fresh = people({"a": [1.5, 2.5, 9.0, 2.0, 3.0], "b": [None, 2.5, 9.0, 2.0, 3.0]}, first=10)
    found = null_check(known, replace(fresh, models=(*fresh.models, replace(fresh.models[2], seed=99, attack="x"))))
    assert [(d.calibration, d.fresh) for d in found.defenses] == [(5, 5), (4, 4)]
    assert found.alarms.models == 4


def test_groups_that_cannot_be_compared_are_refused() -> None:
    known, fresh = people({"a": [1.0, 2.0]}), people({"a": [1.0, 2.0]}, first=10)
    for change, says in (
        ({"task": "u"}, "differ in task: 't', 'u'"),
        ({"network": "m"}, "differ in network"),
        ({"dtype": "bfloat16"}, "differ in dtype: 'float32', 'bfloat16'"),
        ({"models": known.models}, "both have the seed 0"),
        ({"defenses": {"a": SETTINGS | {"stream": True}}}, "a scored the two groups in different settings"),
        ({"models": ()}, "no defense scored both groups"),
    ):
        with pytest.raises(ValueError, match=says):
            null_check(known, replace(fresh, **change))
    with pytest.raises(ValueError, match="got 0"):
        null_check(known, fresh, level=0)
