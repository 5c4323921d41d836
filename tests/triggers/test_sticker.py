import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molehunt.triggers import Sticker
from molehunt.triggers.fingerprint import draws
from molehunt.triggers.sticker import BATCH

SHAPE = (3, 20, 24)
PLAIN: dict[str, Any] = {"rotation": 0.0, "scale": 0.0, "perspective": 0.0, "brightness": 0.0}


def pictures(count: int, shape: tuple[int, int, int] = SHAPE, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def pattern(*sides: int) -> torch.Tensor:
    return torch.rand(3, *sides, generator=torch.Generator().manual_seed(2))


def test_the_plain_view_is_the_pattern_itself_somewhere() -> None:
    x, p = pictures(60), pattern(4, 3)
    stamped = Sticker(p, SHAPE, **PLAIN)(x)
    places = set()
    for before, after in zip(x, stamped, strict=True):
        rows, columns = (before != after).any(0).nonzero().unbind(1)
        top, left = int(rows.min()), int(columns.min())
        places.add((top, left))
        torch.testing.assert_close(after[:, top : top + 4, left : left + 3], p)
        rest = after.clone()
        rest[:, top : top + 4, left : left + 3] = before[:, top : top + 4, left : left + 3]
        assert torch.equal(rest, before)
    assert len(places) > 40
    assert {top for top, _ in places} <= set(range(17))
    assert max(left for _, left in places) > 16


def test_without_travel_it_stays_in_the_middle() -> None:
    x = pictures(20)
    changed = (Sticker(pattern(4, 4), SHAPE, travel=0.0, **PLAIN)(x) != x).any(1).any(0).nonzero()
    assert changed.min(0).values.tolist() == [8, 10]
    assert changed.max(0).values.tolist() == [11, 13]


def test_the_view_is_the_formula_pixel_by_pixel() -> None:
    x = pictures(3, (1, 16, 16))
    p = torch.ones(1, 4, 4)  # the same everywhere, so that what is pasted does not depend on interpolation
    sticker = Sticker(p, (1, 16, 16), rotation=40.0, scale=0.3, perspective=0.1, brightness=0.0, travel=0.0)
    stamped, drawn = sticker(x), (2 * draws(x, 7) - 1).tolist()
    for n, (turn, size, _, tilt_x, tilt_y, *_) in enumerate(drawn):
        angle, scale = math.radians(40.0 * turn), 1 + 0.3 * size
        for i in range(16):
            for j in range(16):
                y, z = i - 7.5, j - 7.5
                a = (math.cos(angle) * z + math.sin(angle) * y) / (4 * scale)
                b = (math.cos(angle) * y - math.sin(angle) * z) / (4 * scale)
                depth = max(0.1, 1 + 0.1 * (tilt_x * a + tilt_y * b))
                m = 1.0
                for u in (a / depth, b / depth):
                    m *= min(1.0, max(0.0, (0.5 - abs(u)) * 4 * scale + 0.5))
                assert float(stamped[n, 0, i, j]) == pytest.approx((1 - m) * float(x[n, 0, i, j]) + m, abs=1e-4)


def test_the_light_scales_the_pattern() -> None:
    x = pictures(200)
    plain = {**PLAIN, "brightness": 0.5}
    stamped = Sticker(torch.full((3, 2, 2), 0.5), SHAPE, travel=0.0, **plain)(x)[:, 0, 9, 11]
    wanted = 0.5 * (1 + 0.5 * (2 * draws(x, 7)[:, 2] - 1))
    torch.testing.assert_close(stamped.double(), wanted, atol=1e-5, rtol=0)
    assert float(stamped.max() - stamped.min()) > 0.45


@given(
    sides=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    rotation=st.floats(0, 45),
    scale=st.floats(0, 0.5),
    perspective=st.floats(0, 0.25),
    travel=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_no_view_changes_more_pixels_than_the_footprint_says(
    sides: tuple[int, int], rotation: float, scale: float, perspective: float, travel: float, seed: int
) -> None:
    wide = (3, 40, 44)  # the largest view of the largest pattern fits
    sticker = Sticker(pattern(*sides), wide, rotation=rotation, scale=scale, perspective=perspective, travel=travel)
    x = pictures(50, wide, seed=seed)
    stamped = sticker(x)
    assert bool(stamped.isfinite().all())
    area = (stamped != x).any(1).float().mean((1, 2)).max()
    assert float(area) <= sticker.footprint().area + 1e-6


def test_the_bound_of_the_area_is_tight_for_a_plain_view_and_near_for_others() -> None:
    assert Sticker(pattern(5, 5), SHAPE, **PLAIN).footprint().area == pytest.approx(25 / 480)
    sticker = Sticker(pattern(5, 5), SHAPE)
    area = float((sticker(pictures(2000)) != pictures(2000)).any(1).float().mean((1, 2)).max())
    assert 0.6 * sticker.footprint().area < area
    faint = replace(sticker, opacity=0.5).footprint()
    assert faint.weight == pytest.approx(0.5 * sticker.footprint().area)
    assert faint.linf == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": torch.zeros(1, 4, 4)}, r"expected pattern \(3, h, w\), got \(1, 4, 4\)"),
        ({"pattern": torch.full((3, 4, 4), 1.5)}, "pattern must lie in"),
        ({"pattern": torch.full((3, 4, 4), math.nan)}, "not finite"),
        ({"shape": (3, 5000, 5000)}, "expected shape"),
        ({"shape": (3, 4, 4)}, "the largest view of the sticker takes"),
        ({"opacity": 1.1}, "opacity must lie in"),
        ({"rotation": 46.0}, "rotation must lie in"),
        ({"rotation": math.nan}, "rotation must lie in"),
        ({"scale": 0.6}, "scale must lie in"),
        ({"perspective": 0.3}, "perspective must lie in"),
        ({"brightness": -0.1}, "brightness must lie in"),
        ({"travel": math.inf}, "travel must lie in"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Sticker(pattern(4, 4), SHAPE), **changes)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected images of shape \(3, 20, 24\), got \(3, 24, 20\)"):
        Sticker(pattern(4, 4), SHAPE)(pictures(2, (3, 24, 20)))


def test_every_position_up_to_the_far_edges_is_reached() -> None:
    x = pictures(600)
    changed = (Sticker(pattern(4, 3), SHAPE, **PLAIN)(x) != x).any(1)
    tops = {int(one.any(1).nonzero().min()) for one in changed}
    lefts = {int(one.any(0).nonzero().min()) for one in changed}
    assert tops == set(range(20 - 4 + 1))
    assert lefts == set(range(24 - 3 + 1))


def test_every_place_is_reached_and_travel_is_the_share_of_them() -> None:
    x = pictures(1500)
    for travel, tops, lefts in ((1.0, range(17), range(21)), (0.5, range(4, 13), range(5, 16))):
        changed = (Sticker(pattern(4, 4), SHAPE, travel=travel, **PLAIN)(x) != x).any(1)
        assert set(changed.any(2).int().argmax(1).tolist()) == set(tops)
        assert set(changed.any(1).int().argmax(1).tolist()) == set(lefts)


def test_a_picture_is_stamped_as_alone_in_a_batch_of_more_than_are_done_at_once() -> None:
    x = pictures(BATCH + 3, (3, 8, 8))
    sticker = Sticker(pattern(2, 2), (3, 8, 8))
    some = [0, 1, BATCH - 1, BATCH, BATCH + 2]
    assert torch.equal(sticker(x)[some], sticker(x[some]))
