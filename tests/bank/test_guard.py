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
