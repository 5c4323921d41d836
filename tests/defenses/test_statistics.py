import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation
from torch import Tensor

from molehunt.defenses._statistics import median, smallness, spread

NORMS = st.lists(st.floats(0.5, 500.0), min_size=3, max_size=12)


@pytest.mark.parametrize("count", [1, 2, 5, 10, 43])
def test_median_and_spread_agree_with_numpy_and_scipy(count: int) -> None:
    values = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    assert float(median(values)) == pytest.approx(np.median(values.numpy()))
    if count > 1:
        expected = median_abs_deviation(values.numpy(), scale="normal")
        assert float(spread(values)) == pytest.approx(expected, rel=1e-4)


def test_an_even_number_of_classes_has_the_middle_of_two_as_its_median() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    assert float(median(values)) == 3.0
    assert float(torch.median(values)) == 2.0  # what peers take


def test_the_index_of_the_official_readme() -> None:
    # GTSRB, target 33: median 64.47, MAD 13.24, L1 norm 16.1, anomaly index 3.652.
    far = 13.24 / 1.4826
    values = torch.tensor([64.47 + far, 64.47 - far, 16.1, 64.47, 64.47 + far], dtype=torch.float64)
    assert float(smallness(values)[2]) == pytest.approx(3.652, abs=2e-3)


def test_equal_values_have_index_zero() -> None:
    assert torch.equal(smallness(torch.full((10,), 7.3)), torch.zeros(10, dtype=torch.float64))


def test_a_zero_mad_leaves_the_index_finite_and_the_odd_one_on_top() -> None:
    index = smallness(torch.tensor([5.0] * 8 + [1.0, 9.0]))
    assert torch.isfinite(index).all()
    assert int(index.argmax()) == 8
    assert float(index[8]) == pytest.approx(4.0 / (1.2533 * 0.8))
    assert float(index[0]) == 0.0


def test_a_large_outlier_is_never_above_the_median() -> None:
    index = smallness(torch.tensor([50.0, 52.0, 54.0, 56.0, 58.0, 900.0]))
    assert float(index[5]) < -50
    assert float(index.max()) < 2


def test_a_floor_bounds_the_index_of_values_that_hardly_differ() -> None:
    values = torch.tensor([1.00, 1.01, 1.02, 1.03, 0.94])
    assert float(smallness(values)[4]) > 4
    assert float(smallness(values, floor=0.2)[4]) == pytest.approx((1.01 - 0.94) / 0.2, rel=1e-5)
    assert torch.equal(smallness(values, floor=1e-6), smallness(values))


@given(NORMS, st.floats(0.01, 100.0), st.floats(-100.0, 100.0))
def test_the_index_ignores_unit_and_origin(values: list[float], unit: float, origin: float) -> None:
    norms = torch.tensor(values, dtype=torch.float64)
    # Values that differ by rounding alone have no index worth comparing.
    if float(spread(norms)) < 1e-3:
        return
    moved = smallness(norms * unit + origin)
    assert torch.allclose(moved, smallness(norms), rtol=1e-5, atol=1e-5)


@given(NORMS, st.randoms(use_true_random=False))
def test_the_index_ignores_the_order_of_the_classes(values: list[float], random: object) -> None:
    order = list(range(len(values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    norms = torch.tensor(values, dtype=torch.float64)
    assert torch.allclose(smallness(norms[order]), smallness(norms)[order], rtol=1e-9)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (torch.zeros(0), "shape"),
        (torch.zeros(2, 2), "shape"),
        (torch.tensor([1.0, torch.nan]), "finite"),
        (torch.tensor([1.0, torch.inf]), "finite"),
    ],
)
def test_refuses_what_has_no_median(values: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        smallness(values)
