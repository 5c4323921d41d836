"""Details are read with distrust: what is not of its kind is as good as missing."""

import math

import pytest
import torch

from molehunt.details import index, mapping, matrix, number, numbers, setting
from molehunt.findings import Finding


def test_numbers_are_lists_or_vectors_of_finite_numbers() -> None:
    assert numbers([1, 2.5]) == numbers((1, 2.5)) == numbers(torch.tensor([1, 2.5])) == [1.0, 2.5]


@pytest.mark.parametrize(
    "value",
    [
        None,
        "12",
        3.0,
        {},
        [1, None],
        ["1"],
        [math.nan],
        [10**400],
        torch.tensor(1.0),
        torch.ones(2, 2),
        torch.tensor([1j]),
    ],
    ids=str,
)
def test_anything_else_is_no_numbers(value: object) -> None:
    assert numbers(value) == []


def test_a_matrix_has_two_dimensions() -> None:
    assert matrix(torch.tensor([[1, 2], [3, 4]])) == [[1.0, 2.0], [3.0, 4.0]]
    for value in (None, [[1.0]], torch.ones(2), torch.ones(2, 0), torch.tensor([[1.0, math.inf]])):
        assert matrix(value) == []


def test_a_number_is_finite_and_an_index_lies_within() -> None:
    assert number(3) == 3.0
    assert [number(v) for v in (None, "3", math.inf, math.nan, 10**400, torch.tensor(3.0))] == [None] * 6
    assert index(2, 3) == 2
    assert [index(v, 3) for v in (3, -1, 1.0, None, "1")] == [None] * 5


def test_settings_are_those_of_the_record() -> None:
    made = Finding(defense="some", record={"configuration": {"tolerance": 0.04}})
    assert setting(made, "tolerance") == 0.04
    assert setting(made, "other") is None
    assert setting(Finding(defense="some"), "tolerance") is None
    assert mapping([("a", 1)]) == {}
