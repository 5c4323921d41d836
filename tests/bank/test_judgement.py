"""AUC by hand, intervals that cover, and scores that say nothing."""

import pytest
import torch

from molehunt.bank.judgement import alarms, judge


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_case_worked_by_hand() -> None:
    # Of the six pairs four are in order and one is a tie.
    assert judge([1.0, 2.0, 4.0], [2.0, 5.0], rng()).auc == pytest.approx(4.5 / 6)


def test_separated_scores_are_certain_and_reversed_ones_are_zero() -> None:
    low, high = [float(i) for i in range(20)], [float(i) for i in range(50, 70)]
    found = judge(low, high, rng())
    assert (found.auc, found.low, found.high) == (1.0, 1.0, 1.0)
    assert 0.5 < found.permuted < 0.75
    assert judge(high, low, rng()).auc == 0.0


def test_scores_that_say_nothing_lie_below_what_shuffled_labels_give() -> None:
    below = 0
    for seed in range(20):
        a, b = torch.randn(2, 30, generator=rng(seed)).tolist()
        found = judge(a, b, rng(seed))
        assert found.low <= found.auc <= found.high
        below += found.auc <= found.permuted
    assert below >= 16


def test_what_has_no_auc_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1 clean and 2 planted"):
        judge([1.0], [1.0, 2.0], rng())
    with pytest.raises(ValueError, match="finite"):
        judge([1.0, float("nan")], [1.0, 2.0], rng())


class TestFalseAlarms:
    def test_a_case_worked_by_hand(self) -> None:
        # Of 39 references two may score at least as high: 2 = 0.05 * 40, counting the model itself.
        references = [float(i) for i in range(39)]
        found = alarms(references, [36.5, 37.5, 38.5, 0.0])
        assert found is not None
        assert (found.count, found.models, found.references) == (2, 4, 39)

    def test_too_few_references_can_give_no_such_p_value(self) -> None:
        assert alarms([0.0] * 18, [1.0]) is None
        assert alarms([0.0] * 19, [1.0]) is not None

    def test_the_interval_covers_as_often_as_it_says(self) -> None:
        inside = 0
        for seed in range(200):
            drawn = torch.randn(199, generator=rng(seed)).tolist()
            found = alarms(drawn[:99], drawn[99:])
            assert found is not None
            inside += found.expected
        # 95 % of 200, less three standard deviations; discreteness makes it somewhat more than 95 %.
        assert inside >= 181

    def test_a_defense_that_scores_other_models_higher_is_caught(self) -> None:
        drawn = torch.randn(199, generator=rng())
        found = alarms(drawn[:99].tolist(), (drawn[99:] + 2.0).tolist())
        assert found is not None
        assert not found.expected
        assert found.count > found.high

    def test_what_cannot_be_counted_is_refused(self) -> None:
        with pytest.raises(ValueError, match="got 1"):
            alarms([0.0] * 20, [0.0], level=1.0)
        with pytest.raises(ValueError, match="no clean models"):
            alarms([0.0] * 20, [])
        with pytest.raises(ValueError, match="finite"):
            alarms([0.0] * 20, [float("nan")])


def test_what_shuffled_labels_give_is_the_quantile_of_a_rank_sum() -> None:
    a, b = torch.randn(2, 25, generator=rng(3)).tolist()
    deviation = ((25 + 25 + 1) / (12 * 25 * 25)) ** 0.5
    assert judge(a, b[:25], rng()).permuted == pytest.approx(0.5 + 1.645 * deviation, abs=0.02)


def test_models_are_counted_and_every_draw_is_the_generators() -> None:
    a, b = torch.randn(30, generator=rng(5)).tolist(), torch.randn(20, generator=rng(6)).add(0.5).tolist()
    one, same, other = (judge(a, b, rng(seed)) for seed in (1, 1, 2))
    assert (one.clean, one.planted) == (30, 20)
    assert one == same
    assert one.auc == other.auc
    assert one.low != other.low
    assert one.permuted != other.permuted


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf")])
def test_a_single_backdoored_model_and_infinite_scores_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="got 2 clean and 1 planted"):
        judge([1.0, 2.0], [1.0], rng())
    with pytest.raises(ValueError, match="finite"):
        judge([1.0, 2.0], [1.0, wrong], rng())
