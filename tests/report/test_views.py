"""Views: what does not fit together is refused where it is filled in."""

import dataclasses

import made_up
import pytest
import torch

from molehunt.report import GateView, Pictures


@pytest.mark.parametrize(
    ("gate", "margin"),
    [
        (GateView(name="accuracy", passed=True, measured=0.98, limit=0.97), 0.01),
        (GateView(name="specificity", passed=True, measured=0.05, limit=0.2, at_least=False), 0.15),
        (GateView(name="asr", passed=False, measured=0.5, limit=0.9), -0.4),
        (GateView(name="loads", passed=True), None),
    ],
)
def test_a_margin_is_positive_where_there_is_room(gate: GateView, margin: float | None) -> None:
    assert gate.margin == (None if margin is None else pytest.approx(margin))


def test_a_submission_is_valid_if_it_missed_no_gate() -> None:
    views = made_up.game().submissions
    assert [view.valid for view in views] == [view.team != "fern" for view in views]


def test_pictures_of_other_shapes_or_numbers_are_refused() -> None:
    x = torch.zeros(4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"expected images \(N, C, H, W\)"):
        Pictures(clean=x[0])
    with pytest.raises(ValueError, match="stamped: expected"):
        Pictures(clean=x, stamped=x[:2])
    with pytest.raises(ValueError, match="expected 4 names, got 1"):
        Pictures(clean=x, clean_says=("7",))


def test_a_verdict_about_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="q has 10 entries, but there are 2 classes"):
        dataclasses.replace(made_up.scan(), classes=("cat", "dog"))
    with pytest.raises(ValueError, match="got target 10"):
        dataclasses.replace(made_up.scan(), verdict=dataclasses.replace(made_up.scan().verdict, target=10))
    bad = dataclasses.replace(made_up.game().submissions[0], true_classes=(10,))
    with pytest.raises(ValueError, match="there are 10 classes"):
        dataclasses.replace(made_up.game(), submissions=(bad,))
