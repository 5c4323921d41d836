"""The guard sees a recipe that shows, and nothing where there is nothing."""

import pytest
import torch

from molehunt.bank.guard import MOST, telltale


def models(seed: int, norm: float, count: int = 25) -> list[tuple[float, float]]:
    drawn = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return [(norm + 0.5 * a, 0.98 + 0.002 * b) for a, b in drawn.tolist()]


def test_a_norm_that_gives_the_recipe_away_is_seen() -> None:
    assert telltale(models(0, 10.0), models(1, 12.0)) > 0.95


def test_groups_of_one_kind_pass_on_average() -> None:
    found = [telltale(models(2 * s, 10.0), models(2 * s + 1, 10.0)) for s in range(12)]
    assert sum(found) / len(found) < MOST


def test_a_column_that_never_changes_does_no_harm() -> None:
    first, second = [(float(i), 1.0) for i in range(5)], [(float(i), 1.0) for i in range(10, 15)]
    assert telltale(first, second) == 1.0


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 3"):
        telltale(models(0, 1.0, 2), models(1, 1.0, 3))
    with pytest.raises(ValueError, match="finite"):
        telltale(models(0, float("nan"), 3), models(1, 1.0, 3))


def test_an_accuracy_that_gives_the_recipe_away_is_seen() -> None:
    first = models(0, 10.0)
    second = [(norm, accuracy + 0.02) for norm, accuracy in models(1, 10.0)]
    assert telltale(first, second) > 0.95
    assert telltale(second, first) > 0.95, "in whichever direction"


def test_few_models_of_one_kind_score_one_half_on_average() -> None:
    """Any model that its own classifier had seen would push this up."""
    found = [telltale(models(2 * s, 10.0, 4), models(2 * s + 1, 10.0, 4)) for s in range(40)]
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.1)


def test_equal_models_are_told_apart_by_nothing() -> None:
    assert telltale([(3.0, 0.9)] * 4, [(3.0, 0.9)] * 4) == 0.5


def test_the_units_of_the_norm_do_not_matter() -> None:
    first, second = models(2, 10.0, 8), models(3, 10.3, 8)
    small = [[(1e-4 * norm, 1e-4 * accuracy) for norm, accuracy in group] for group in (first, second)]
    assert telltale(*small) == telltale(first, second)


def test_an_infinite_norm_is_refused_and_so_is_a_group_of_two() -> None:
    with pytest.raises(ValueError, match="finite"):
        telltale(models(0, float("inf"), 3), models(1, 1.0, 3))
    with pytest.raises(ValueError, match="got 3 and 2"):
        telltale(models(0, 1.0, 3), models(1, 1.0, 2))


def test_the_limit_lies_near_what_chance_gives() -> None:
    assert 0.5 < MOST <= 0.65
