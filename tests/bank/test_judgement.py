"""AUC by hand, an interval that covers it, and scores that say nothing."""

import pytest
import torch

from molehunt.bank.judgement import judge


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
