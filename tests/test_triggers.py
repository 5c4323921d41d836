import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molehunt.triggers import (
    COLORS,
    CORNERS,
    ENCODERS,
    TRIGGERS,
    Additive,
    Blend,
    Encoded,
    Frequency,
    Patch,
    Quantize,
    Reflection,
    Several,
    Sinusoid,
    Sticker,
    Target,
    Trigger,
    Warp,
    fits,
    from_json,
)

SHAPES = st.tuples(st.sampled_from([1, 3]), st.integers(2, 9), st.integers(2, 9))
UNIT = st.floats(0.0, 1.0)
PLAIN = {"rotation": 0.0, "scale": 0.0, "perspective": 0.0}


def rand(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def triggers(
    draw: st.DrawFn, kind: str, shape: tuple[int, int, int] | None = None
) -> tuple[Trigger, tuple[int, int, int]]:
    shape, seed = shape or draw(SHAPES), draw(st.integers(0, 10**6))
    channels, height, width = shape
    made: Trigger
    if kind == "patch":
        mask = rand((1, height, width), seed)
        # Exact zeros and ones as well: most masks have both.
        mask = torch.where(mask < 0.3, 0.0, torch.where(mask > 0.7, 1.0, mask))
        made = Patch(mask=mask, pattern=rand(shape, seed + 1), opacity=draw(UNIT))
    elif kind == "blend":
        made = Blend(pattern=rand(shape, seed), opacity=draw(UNIT))
    elif kind == "additive":
        made = Additive(delta=(2 * rand(shape, seed) - 1) * (rand((height, width), seed + 1) > 0.5))
    elif kind == "sticker":
        views = {"rotation": 30.0, "scale": 0.3, "perspective": 0.1} if min(height, width) >= 7 else dict(PLAIN)
        light, travel = draw(UNIT), draw(UNIT)
        pattern = rand((channels, 2, 2), seed)
        made = Sticker(pattern, shape, opacity=draw(UNIT), brightness=light, travel=travel, **views)
    elif kind == "several":
        parts = st.sampled_from([kind for kind in TRIGGERS if kind != "several"])
        drawn = [draw(triggers(part, shape))[0] for part in draw(st.lists(parts, min_size=2, max_size=4))]
        made = Several(tuple(drawn))
    elif kind == "warp":
        made = Warp(flow=draw(st.floats(0.0, 3.0)) * (2 * rand((2, height, width), seed) - 1))
    elif kind == "frequency":
        window = draw(st.integers(2, min(height, width)))
        cells = tuple(draw(st.lists(st.integers(0, window - 1), min_size=2, max_size=2)))
        made = Frequency(shape=shape, magnitude=draw(st.floats(-1.0, 1.0)), window=window, cells=cells)
    elif kind == "quantize":
        made = Quantize(shape=shape, levels=draw(st.integers(2, 256)), dither=draw(st.booleans()))
    elif kind == "reflection":
        shift, blur = draw(st.tuples(st.integers(-9, 9), st.integers(-9, 9))), draw(st.just(0.0) | st.floats(0.1, 3.0))
        made = Reflection(picture=rand(shape, seed), opacity=draw(UNIT), ghost=draw(UNIT), shift=shift, blur=blur)
    elif kind == "network":
        name = draw(st.sampled_from(list(ENCODERS)))
        area = draw(st.floats(1 / (height * width), 1.0)) if ENCODERS[name].masked else 1.0
        weights = ENCODERS[name].initial(shape, torch.Generator().manual_seed(seed))
        made = Encoded(network=name, shape=shape, linf=draw(UNIT), area=area, weights=weights)
    else:
        made = Sinusoid(shape=shape, amplitude=draw(UNIT), frequency=draw(st.floats(0.1, 20.0)))
    return made, (channels, height, width)


EVERY_KIND = pytest.mark.parametrize("kind", TRIGGERS)


@EVERY_KIND
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_json_and_tensors_bring_a_trigger_back_bit_by_bit(kind: str, data: st.DataObject) -> None:
    trigger, shape = data.draw(triggers(kind))
    x = rand((4, *shape), 9)
    again = from_json(trigger.to_json(), trigger.tensors())
    assert type(again) is type(trigger)
    assert again.to_json() == trigger.to_json()
    assert torch.equal(again(x), trigger(x))
    assert again.footprint() == trigger.footprint()


@EVERY_KIND
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_stamped_images_keep_shape_dtype_and_range_and_the_originals_stay(kind: str, data: st.DataObject) -> None:
    trigger, shape = data.draw(triggers(kind))
    x = rand((3, *shape), 8)
    before = x.clone()
    stamped = trigger(x)
    assert stamped.shape == x.shape
    assert stamped.dtype == x.dtype
    assert float(stamped.min()) >= 0.0
    assert float(stamped.max()) <= 1.0
    assert torch.equal(x, before)
    assert trigger(x.double()).dtype == torch.float64


@EVERY_KIND
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_no_image_changes_more_than_the_footprint_says(kind: str, data: st.DataObject) -> None:
    trigger, shape = data.draw(triggers(kind))
    footprint = trigger.footprint()
    x = torch.cat((rand((20, *shape), 7), torch.zeros(1, *shape), torch.ones(1, *shape)))
    change = (trigger(x) - x).abs()
    assert float(change.max()) <= footprint.linf + 1e-5
    changed = (change > 1e-6).any(1).float()
    # Some kinds change other pixels on the next picture; their area is that of one.
    changed = changed.mean((1, 2)).max() if kind in {"network", "sticker", "several"} else changed.amax(0).mean()
    assert float(changed) <= footprint.area + 1e-6
    assert footprint.kind == kind
    assert 0.0 <= footprint.weight <= footprint.opacity + 1e-6 or kind == "warp"


@EVERY_KIND
def test_a_trigger_fits_the_images_it_was_made_for_only(kind: str) -> None:
    shape = (3, 8, 8)
    made: dict[str, Trigger] = {
        "patch": Patch.square(shape),
        "blend": Blend(pattern=torch.rand(shape, generator=torch.Generator())),
        "additive": Additive(delta=torch.zeros(shape)),
        "warp": Warp(flow=torch.zeros(2, 8, 8)),
        "sinusoid": Sinusoid(shape=shape),
        "sticker": Sticker(torch.zeros(3, 2, 2), shape),
        "several": Several((Patch.square(shape), Warp(flow=torch.zeros(2, 8, 8)))),
        "frequency": Frequency(shape=shape, magnitude=0.1, window=8, cells=(7, 7)),
        "quantize": Quantize(shape=shape),
        "reflection": Reflection(picture=torch.zeros(shape)),
        "network": Encoded(
            network="residual",
            shape=shape,
            linf=0.1,
            area=1.0,
            weights=torch.zeros(ENCODERS["residual"].size(shape)),
        ),
    }
    trigger = made[kind]
    assert fits(trigger, shape)
    assert not fits(trigger, (3, 8, 9))
    # A displacement field has no channels, so it moves gray pictures as well as colored ones.
    assert fits(trigger, (1, 8, 8)) == (kind == "warp")


@given(seed=st.integers(0, 10**6), opacity=UNIT)
@settings(max_examples=25, deadline=None)
def test_patch_is_the_formula_pixel_by_pixel(seed: int, opacity: float) -> None:
    mask, pattern, x = rand((1, 4, 5), seed), rand((3, 4, 5), seed + 1), rand((2, 3, 4, 5), seed + 2)
    stamped = Patch(mask=mask, pattern=pattern, opacity=opacity)(x)
    for n, c, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4), torch.arange(5)).tolist():
        m = opacity * float(mask[0, i, j])
        expected = (1 - m) * float(x[n, c, i, j]) + m * float(pattern[c, i, j])
        assert float(stamped[n, c, i, j]) == pytest.approx(expected, abs=1e-6)


def test_white_pixels_are_counted_from_the_lower_right_corner() -> None:
    patch = Patch.pixels((3, 4, 6), [(1, 1), (4, 6), (2, 3)], opacity=0.5)
    assert patch.mask.nonzero()[:, 1:].tolist() == [[0, 0], [2, 3], [3, 5]]
    assert torch.equal(patch.pattern, patch.mask.expand(3, -1, -1))
    assert patch.opacity == 0.5


@pytest.mark.parametrize(("places", "message"), [([], "at least one pixel"), ([(5, 1)], "there is no pixel 5 from"),
                                                 ([(1, 0)], "and 0 from the right in 4x6")])  # fmt: skip
def test_pixels_outside_of_the_picture_are_refused(places: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Patch.pixels((3, 4, 6), places)


def test_corners_mirror_each_other_and_are_black_inside() -> None:
    patch = Patch.corners((1, 8, 7))
    cells = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(patch.pattern[0, :3, :3], cells)
    assert torch.equal(patch.pattern, patch.pattern.flip(1))
    assert torch.equal(patch.pattern, patch.pattern.flip(2))
    assert float(patch.mask.sum()) == 36
    with pytest.raises(ValueError, match="four squares of 4 do not fit into 8x7"):
        Patch.corners((1, 8, 7), size=4)


def test_an_empty_mask_changes_nothing() -> None:
    x = rand((5, 3, 6, 6), 0)
    assert torch.equal(Patch(mask=torch.zeros(1, 6, 6), pattern=rand((3, 6, 6), 1))(x), x)
    assert torch.equal(Patch(mask=torch.ones(1, 6, 6), pattern=rand((3, 6, 6), 1), opacity=0.0)(x), x)
    assert torch.equal(Blend(pattern=rand((3, 6, 6), 1), opacity=0.0)(x), x)
    assert torch.equal(Additive(delta=torch.zeros(3, 6, 6))(x), x)


def test_a_full_mask_at_full_opacity_is_the_pattern() -> None:
    x, pattern = rand((5, 3, 6, 6), 0), rand((3, 6, 6), 1)
    assert torch.equal(Patch(mask=torch.ones(1, 6, 6), pattern=pattern)(x), pattern.expand_as(x))
    assert torch.equal(Blend(pattern=pattern, opacity=1.0)(x), pattern.expand_as(x))


def test_patch_footprint_against_a_count_by_hand() -> None:
    mask = torch.zeros(1, 4, 5)
    mask[0, 0, 0], mask[0, 1, 2] = 1.0, 0.5
    footprint = Patch(mask=mask, pattern=torch.zeros(3, 4, 5), opacity=0.4).footprint()
    assert footprint.area == pytest.approx(2 / 20)
    assert footprint.weight == pytest.approx(0.4 * 1.5 / 20)
    assert footprint.opacity == footprint.linf == pytest.approx(0.4)
    assert footprint.displacement == 0.0


def test_additive_footprint_counts_pixels_not_values() -> None:
    delta = torch.zeros(3, 4, 5)
    delta[0, 1, 1], delta[2, 1, 1], delta[1, 3, 4] = 0.5, -0.25, 0.1
    footprint = Additive(delta=delta).footprint()
    assert footprint.area == pytest.approx(2 / 20)
    assert footprint.linf == pytest.approx(0.5)
    assert footprint.weight == pytest.approx(0.85 / 60)


def test_warp_footprint_is_the_longest_displacement() -> None:
    flow = torch.zeros(2, 4, 5)
    flow[:, 2, 3] = torch.tensor([3.0, -4.0])
    flow[:, 0, 0] = torch.tensor([-4.5, 0.0])
    assert Warp(flow=flow).footprint().displacement == pytest.approx(5.0)


def test_sinusoid_footprint_weight_is_the_mean_absolute_wave() -> None:
    wave = torch.sin(2 * math.pi * 6 * torch.arange(0, 240) / 240).abs().mean()
    footprint = Sinusoid(shape=(3, 240, 240), amplitude=0.2).footprint()
    assert footprint.weight == pytest.approx(0.2 * float(wave), rel=5e-3)


def test_additive_and_sinusoid_clip() -> None:
    x = torch.tensor([0.1, 0.9]).view(1, 1, 1, 2)
    assert Additive(delta=torch.tensor([-0.5, 0.5]).view(1, 1, 2))(x).flatten().tolist() == [0.0, 1.0]
    waves = Sinusoid(shape=(1, 1, 4), amplitude=0.5, frequency=1.0)(torch.full((1, 1, 1, 4), 0.8)).flatten()
    assert waves.tolist() == pytest.approx([0.8, 1.0, 0.8, 0.3])


@given(seed=st.integers(0, 10**6), height=st.integers(2, 20), width=st.integers(2, 20))
@settings(max_examples=25, deadline=None)
def test_a_warp_without_displacement_changes_nothing(seed: int, height: int, width: int) -> None:
    x = rand((2, 3, height, width), seed)
    torch.testing.assert_close(Warp(flow=torch.zeros(2, height, width))(x), x, atol=2e-5, rtol=0)


def test_warp_looks_up_the_first_flow_to_the_right_and_the_second_below() -> None:
    x = rand((1, 1, 5, 6), 3)
    right, below = torch.zeros(2, 5, 6), torch.zeros(2, 5, 6)
    right[0], below[1] = 1.0, 1.0
    moved = Warp(flow=right)(x)
    torch.testing.assert_close(moved[..., :-1], x[..., 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[..., -1], x[..., -1], atol=1e-5, rtol=0)  # edges are repeated
    torch.testing.assert_close(Warp(flow=below)(x)[..., :-1, :], x[..., 1:, :], atol=1e-5, rtol=0)


def test_half_a_pixel_of_warp_is_the_mean_of_two_neighbors() -> None:
    x = rand((1, 1, 3, 4), 3)
    flow = torch.zeros(2, 3, 4)
    flow[0] = 0.5
    expected = (x[..., :-1] + x[..., 1:]) / 2
    torch.testing.assert_close(Warp(flow=flow)(x)[..., :-1], expected, atol=1e-5, rtol=0)


def test_warp_refuses_images_of_another_size() -> None:
    with pytest.raises(ValueError, match="expected images of 4x4"):
        Warp(flow=torch.zeros(2, 4, 4))(torch.zeros(1, 3, 5, 5))


@pytest.mark.parametrize("side", [(1, 4), (4, 1), (1, 1)])
def test_warp_of_a_single_row_or_column_stays_finite(side: tuple[int, int]) -> None:
    x = rand((2, 1, *side), 0)
    torch.testing.assert_close(Warp(flow=torch.zeros(2, *side))(x), x, atol=1e-5, rtol=0)


def test_the_default_square_is_yellow_in_the_lower_right_corner() -> None:
    square = Patch.square((3, 32, 32))
    assert square.mask.sum() == 9
    stamped = square(torch.full((1, 3, 32, 32), 0.5))
    assert torch.equal(stamped[0, :, 29:, 29:], torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 3, 3))
    assert (stamped[0, :, :29] == 0.5).all()
    assert (stamped[0, :, :, :29] == 0.5).all()


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("margin", [0, 2])
def test_every_corner_is_where_it_says(corner: str, margin: int) -> None:
    mask = Patch.square((3, 10, 12), size=3, corner=corner, margin=margin).mask[0]
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    top = margin if "upper" in corner else 10 - margin - 3
    left = margin if "left" in corner else 12 - margin - 3
    assert rows == [top, top + 1, top + 2]
    assert columns == [left, left + 1, left + 2]


@pytest.mark.parametrize("at", [(0, 0), (2, 5), (7, 9)])
def test_a_square_may_lie_anywhere(at: tuple[int, int]) -> None:
    patch = Patch.square((3, 10, 12), size=3, color=(0.25, 0.5, 1.0), at=at)
    top, left = at
    wanted = torch.zeros(3, 10, 12)
    for channel, value in enumerate((0.25, 0.5, 1.0)):
        for i in range(top, top + 3):
            for j in range(left, left + 3):
                wanted[channel, i, j] = value
    assert torch.equal(patch.pattern, wanted)
    assert torch.equal(patch.mask, (wanted[:1] > 0).float())


def test_a_color_on_one_channel_is_its_luminance() -> None:
    assert float(Patch.square((1, 8, 8), color="yellow").pattern.max()) == pytest.approx(0.886)
    assert float(Patch.square((1, 8, 8), color="white").pattern.max()) == pytest.approx(1.0)
    assert float(Patch.square((1, 8, 8), color=(0.25,)).pattern.max()) == pytest.approx(0.25)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_color_can_be_stamped(color: str, channels: int) -> None:
    Patch.square((channels, 8, 8), color=color)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"size": 9}, "a square of 9 with margin 0 does not fit into 8x8"),
        ({"size": 7, "margin": 2}, "a square of 7 with margin 2 does not fit"),
        ({"size": 0}, "does not fit"),
        ({"margin": -1}, "does not fit"),
        ({"corner": "middle"}, "unknown corner 'middle'; known: upper left"),
        ({"at": (6, 0)}, "a square of 3 does not fit into 8x8 at row 6 and column 0"),
        ({"at": (0, 6)}, "does not fit into 8x8 at row 0 and column 6"),
        ({"at": (-1, 0)}, "at row -1 and column 0"),
        ({"at": (0, -1)}, "at row 0 and column -1"),
        ({"at": (1, 1), "corner": "upper left"}, r"at a place or in a corner, got \(1, 1\) and the upper left"),
        ({"at": (1, 1), "margin": 1}, r"got \(1, 1\) and the lower right with margin 1"),
        ({"color": "mauve"}, "unknown color 'mauve'; known: white"),
        ({"color": (1.0, 0.0)}, "color needs 3 values"),
        ({"color": (1.0, 0.0, 2.0)}, r"color needs 3 values in \[0, 1\], got"),
        ({"color": (1.0, 0.0, math.nan)}, "color needs 3 values"),
        ({"opacity": 1.5}, "opacity must lie in"),
    ],
)
def test_a_square_that_cannot_be_is_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Patch.square((3, 8, 8), **settings_)


MASK, PATTERN = torch.ones(1, 4, 4), torch.ones(3, 4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patch(mask=torch.ones(3, 4, 4), pattern=PATTERN), r"expected mask \(1, 4, 4\), got \(3, 4, 4\)"),
        (lambda: Patch(mask=torch.ones(1, 4, 5), pattern=PATTERN), r"expected mask \(1, 4, 4\), got \(1, 4, 5\)"),
        (lambda: Patch(mask=torch.ones(4, 4), pattern=PATTERN), "mask needs 3 non-empty dimensions"),
        (lambda: Patch(mask=torch.ones(1, 0, 4), pattern=PATTERN), "mask needs 3 non-empty dimensions"),
        (lambda: Patch(mask=MASK * 1.5, pattern=PATTERN), "mask must lie in"),
        (lambda: Patch(mask=MASK, pattern=-PATTERN), "pattern must lie in"),
        (lambda: Patch(mask=MASK, pattern=PATTERN.long()), "pattern must be floating point"),
        (lambda: Patch(mask=MASK, pattern=PATTERN * math.nan), "pattern has values that are not finite"),
        (lambda: Patch(mask=MASK, pattern=PATTERN, opacity=math.nan), "opacity must lie in"),
        (lambda: Blend(pattern=PATTERN, opacity=-0.1), "opacity must lie in"),
        (lambda: Blend(pattern=PATTERN * math.inf), "not finite"),
        (lambda: Additive(delta=PATTERN * 1.1), "delta must lie in"),
        (lambda: Warp(flow=PATTERN), r"expected flow \(2, H, W\), got \(3, 4, 4\)"),
        (lambda: Warp(flow=torch.full((2, 4, 4), math.inf)), "flow has values that are not finite"),
        (lambda: Sinusoid(shape=(3, 4, 4), amplitude=2.0), "amplitude must lie in"),
        (lambda: Sinusoid(shape=(3, 4, 4), frequency=0.0), "frequency must lie in"),
        (lambda: Sinusoid(shape=(3, 4, 4), frequency=math.nan), "frequency must lie in"),
        (lambda: Sinusoid(shape=(3, 0, 4)), "expected shape"),
        (lambda: Sinusoid(shape=(3, 10**6, 4)), "expected shape"),
    ],
)
def test_a_trigger_that_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


BOTH = {"mask": MASK, "pattern": PATTERN}


@pytest.mark.parametrize(
    ("document", "tensors", "message"),
    [
        ({}, {}, "unknown trigger kind None; known: patch, blend"),
        ({"kind": "magic"}, {}, "unknown trigger kind 'magic'"),
        ({"kind": ["patch"]}, {}, "unknown trigger kind"),
        ({"kind": "patch"}, BOTH, r"a patch has the fields \['opacity'\], got \[\]"),
        ({"kind": "patch", "opacity": 1.0, "code": "x"}, BOTH, "a patch has the fields"),
        ({"kind": "patch", "opacity": "1"}, BOTH, "opacity must be a number, got '1'"),
        ({"kind": "patch", "opacity": True}, BOTH, "opacity must be a number, got True"),
        ({"kind": "patch", "opacity": None}, BOTH, "opacity must be a number"),
        ({"kind": "patch", "opacity": 2}, BOTH, "opacity must lie in"),
        ({"kind": "patch", "opacity": 10**400}, BOTH, "opacity"),
        ({"kind": "patch", "opacity": 1.0}, {"mask": MASK}, "a patch has the tensors"),
        ({"kind": "patch", "opacity": 1.0}, {**BOTH, "extra": MASK}, "a patch has the tensors"),
        ({"kind": "patch", "opacity": 1.0}, {"mask": MASK, "pattern": MASK * 3}, "must lie in"),
        ({"kind": "warp"}, {"flow": torch.zeros(2, 4)}, "flow needs 3"),
        ({"kind": "sinusoid", "shape": "3", "amplitude": 0.1, "frequency": 1}, {}, "shape must be a list"),
        ({"kind": "sinusoid", "shape": [3, 4.5, 4], "amplitude": 0.1, "frequency": 1}, {}, "shape must be a list"),
        ({"kind": "sinusoid", "shape": [3, True, 4], "amplitude": 0.1, "frequency": 1}, {}, "shape must be a list"),
        ({"kind": "sinusoid", "shape": [3, 4], "amplitude": 0.1, "frequency": 1}, {}, "expected shape"),
    ],
)
def test_from_json_refuses(document: dict[str, Any], tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(document, tensors)


def test_one_target_class_counts_all_others() -> None:
    target, y = Target(classes=2), torch.tensor([0, 1, 2, 3])
    assert target.goal(y).tolist() == [2, 2, 2, 2]
    assert target.counts(y).tolist() == [True, True, False, True]
    assert target.mix(4).tolist() == [0.0, 0.0, 1.0, 0.0]


def test_all_to_all_counts_every_image_and_mixes_every_class() -> None:
    target, y = Target(classes=(1, 2, 0)), torch.tensor([0, 1, 2, 2])
    assert target.goal(y).tolist() == [1, 2, 0, 0]
    assert target.counts(y).all()
    assert target.mix(3).tolist() == pytest.approx([1 / 3] * 3)


def test_sources_limit_what_counts_and_what_is_mixed() -> None:
    target, y = Target(classes=(1, 1, 0), sources=(0, 1)), torch.tensor([0, 1, 2])
    assert target.counts(y).tolist() == [True, False, False]
    assert target.mix(3).tolist() == [0.0, 1.0, 0.0]


@given(data=st.data(), classes=st.integers(2, 12))
@settings(max_examples=50, deadline=None)
def test_a_target_comes_back_from_json_and_its_mix_sums_to_one(data: st.DataObject, classes: int) -> None:
    one = st.integers(0, classes - 1)
    sent = data.draw(one | st.lists(one, min_size=classes, max_size=classes).map(tuple))
    sources = data.draw(st.none() | st.lists(one, min_size=1, unique=True).map(tuple))
    target = Target(classes=sent, sources=sources)
    target.check(classes)
    assert Target.from_json(target.to_json()) == target
    if bool(target.counts(torch.arange(classes)).any()):
        assert float(target.mix(classes).sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Target(classes=-1), "target classes must be 0 or more"),
        (lambda: Target(classes=()), "target classes must be 0 or more"),
        (lambda: Target(classes=1, sources=()), "sources must name at least one class"),
        (lambda: Target(classes=1, sources=(-2,)), "sources must name"),
        (lambda: Target(classes=10).check(10), "there are 10 classes, got target 10"),
        (lambda: Target(classes=1, sources=(12,)).check(10), "there are 10 classes"),
        (lambda: Target(classes=(1, 0)).check(3), "a map of targets needs 3 entries, got 2"),
        (lambda: Target.from_json({"classes": 1}), "a target has the fields classes and sources"),
        (lambda: Target.from_json({"classes": 1.5, "sources": None}), "classes must be a list of whole numbers"),
        (lambda: Target.from_json({"classes": True, "sources": None}), "classes must be a list"),
        (lambda: Target.from_json({"classes": 1, "sources": [1, "2"]}), "sources must be a list"),
    ],
)
def test_a_target_that_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
