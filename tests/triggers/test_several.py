from typing import Any

import pytest
import torch

from molehunt.triggers import Blend, Patch, Several, Trigger, Warp, from_json

SHAPE = (3, 8, 8)
CORNERS = ("upper left", "upper right", "lower left", "lower right")
PATCHES = tuple(Patch.square(SHAPE, size=2, color="white", corner=corner) for corner in CORNERS)


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1)) * 0.9


def test_each_picture_gets_exactly_the_trigger_of_its_choice() -> None:
    several, x = Several(PATCHES), pictures(200)
    stamped, choice = several(x), several.choice(x)
    assert set(choice.tolist()) == {0, 1, 2, 3}
    for i in range(200):
        assert torch.equal(stamped[i : i + 1], PATCHES[int(choice[i])](x[i : i + 1]))


def test_the_parts_are_chosen_equally_often() -> None:
    shares = Several(PATCHES).choice(pictures(4000)).bincount(minlength=4) / 4000
    assert float((shares - 0.25).abs().max()) < 0.03


def test_the_footprint_is_the_worst_of_the_parts_and_lists_them() -> None:
    parts: tuple[Trigger, ...] = (
        PATCHES[0],
        Blend(pattern=torch.rand(SHAPE, generator=torch.Generator()), opacity=0.1),
    )
    footprint = Several((*parts, Warp(flow=torch.full((2, 8, 8), 0.5)))).footprint()
    assert footprint.area == 1.0
    assert footprint.linf == 1.0
    assert footprint.opacity == 1.0
    assert footprint.weight == pytest.approx(0.1)
    assert footprint.displacement == pytest.approx(0.5**0.5)
    assert footprint.parts[:2] == tuple(part.footprint() for part in parts)


@pytest.mark.parametrize("count", [0, 1, 17])
def test_too_few_or_too_many_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"several triggers are 2 to 16, got {count}"):
        Several((PATCHES[0],) * count)


def test_nesting_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be several triggers itself"):
        Several((PATCHES[0], Several(PATCHES)))


def nested(depth: int) -> dict[str, Any]:
    document: dict[str, Any] = {"kind": "patch", "opacity": 1.0}
    for _ in range(depth):
        document = {"kind": "several", "triggers": [document, document]}
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"kind": "several"}, "has the field triggers"),
        ({"kind": "several", "triggers": [], "more": 1}, "has the field triggers"),
        ({"kind": "several", "triggers": []}, "a list of 2 to 16 triggers"),
        ({"kind": "several", "triggers": "patches"}, "a list of 2 to 16 triggers"),
        ({"kind": "several", "triggers": ["patch", "patch"]}, "a list of 2 to 16 triggers"),
        ({"kind": "several", "triggers": [{"kind": "patch", "opacity": 1.0}] * 17}, "a list of 2 to 16 triggers"),
        ({"kind": "several", "triggers": [{"kind": "patch", "opacity": 1.0}] * 2}, "a patch has the tensors"),
        ({"kind": "several", "triggers": [{"kind": "unknown"}] * 2}, "unknown trigger kind 'unknown'"),
        (nested(2), "cannot be several triggers itself"),
        (nested(20), "cannot be several triggers itself"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_documents_are_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(document, {})


@pytest.mark.parametrize("name", ["mask", "2.mask", "-1.mask", "00.mask", "1e0.mask", "0"])
def test_tensors_that_belong_to_no_part_are_refused(name: str) -> None:
    several = Several(PATCHES[:2])
    tensors = {**several.tensors(), name: torch.zeros(1, 8, 8)}
    with pytest.raises(ValueError, match="belongs to none of the 2 triggers"):
        from_json(several.to_json(), tensors)


def test_it_fits_where_all_of_its_parts_do() -> None:
    mixed = Several((Warp(flow=torch.zeros(2, 8, 8)), Warp(flow=torch.zeros(2, 8, 8))))
    assert mixed.fits((1, 8, 8))
    assert not Several((*mixed.triggers, PATCHES[0])).fits((1, 8, 8))
