"""Pictures: the pixels that were meant, words for each, and nothing left to chance."""

import base64
import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from molehunt.figures import (
    GAIN,
    REST,
    SAID,
    SIDE,
    Picture,
    contact_sheet,
    difference,
    gain,
    photo,
    reliability_chart,
    stack,
    trigger_picture,
)
from molehunt.reliability import reliability
from molehunt.triggers import Additive, Blend, Patch, Several, Sinusoid, Sticker, Trigger, Warp

SHAPE = (3, 16, 12)


def pixels(picture: Picture) -> np.ndarray:
    with Image.open(io.BytesIO(picture.png)) as image:
        assert image.size == (picture.width, picture.height)
        return np.asarray(image)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_photo_keeps_every_pixel(channels: int) -> None:
    x = torch.arange(channels * 5 * 7).view(channels, 5, 7) / 255
    seen = pixels(photo(x, "ramp")).reshape(5, 7, channels)
    assert np.array_equal(seen, (x * 255).round().permute(1, 2, 0).numpy().astype(np.uint8))


def test_values_beyond_the_range_are_clipped() -> None:
    seen = pixels(photo(torch.tensor([[[-1.0, 2.0]]]), "too much"))
    assert seen.tolist() == [[0, 255]]


def test_the_address_carries_the_file() -> None:
    picture = photo(torch.zeros(1, 2, 2), "black")
    kind, _, data = picture.uri.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == picture.png


def test_large_photos_are_averaged_down_in_proportion() -> None:
    x = torch.zeros(3, 224, 112)
    x[:, :112] = 1.0
    seen = pixels(photo(x, "half white"))
    assert seen.shape == (SIDE, SIDE // 2, 3)
    assert seen[: SIDE // 2].min() == 255
    assert seen[SIDE // 2 :].max() == 0


@pytest.mark.parametrize("bad", [torch.zeros(2, 4, 4), torch.zeros(4, 4), torch.full((1, 2, 2), torch.nan)])
def test_what_is_no_picture_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="picture"):
        photo(bad, "nothing")


def test_a_picture_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="alt is empty"):
        photo(torch.zeros(1, 2, 2), "  ")


def test_no_change_is_middle_gray_and_the_largest_change_fills_the_range() -> None:
    before = torch.full((2, 1, 2, 2), 0.5)
    after = before.clone()
    after[0, 0, 0, 0] += 0.2
    after[1, 0, 0, 0] -= 0.1
    factor = gain(before, after)
    assert factor == pytest.approx(5.0)
    assert pixels(difference(before[0], after[0], "up", factor)).tolist() == [[255, 128], [128, 128]]
    assert pixels(difference(before[1], after[1], "down", factor))[0, 0] == 64


@pytest.mark.parametrize(("change", "factor"), [(0.0, 1.0), (1e-6, GAIN), (1.0, 1.0)])
def test_the_gain_stays_within_bounds(change: float, factor: float) -> None:
    assert gain(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), change)) == factor


def test_a_difference_of_other_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        difference(torch.zeros(1, 2, 2), torch.zeros(3, 2, 2), "no", 1.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_patch_shows_its_pattern_where_the_mask_is_set_and_nothing_elsewhere(channels: int) -> None:
    shape = (channels, 16, 12)
    seen = pixels(trigger_picture(Patch.square(shape, size=3, color="white"), shape, "square"))
    assert seen.shape == (16, 12, 4)
    assert (seen[-3:, -3:] == 255).all()
    assert seen[..., 3].sum() == 9 * 255


def all_triggers() -> list[Trigger]:
    delta = torch.zeros(SHAPE)
    delta[:, 2, 3] = 0.05
    flow = torch.zeros(2, 16, 12)
    flow[0, 8:] = 2.0
    sticker = Sticker(torch.ones(3, 3, 3), SHAPE)
    several = Several((Patch.square(SHAPE), Patch.square(SHAPE, corner="upper left")))
    return [
        Patch.square(SHAPE),
        Blend(torch.rand(SHAPE)),
        Additive(delta),
        Warp(flow),
        Sinusoid(SHAPE),
        sticker,
        several,
    ]


@pytest.mark.parametrize("trigger", all_triggers(), ids=lambda t: type(t).__name__)
def test_every_kind_of_trigger_has_a_picture_that_is_not_empty_and_always_the_same(trigger: Trigger) -> None:
    picture = trigger_picture(trigger, SHAPE, "it")
    assert pixels(picture).std() > 0
    assert trigger_picture(trigger, SHAPE, "it").png == picture.png


def test_a_contact_sheet_shows_images_and_below_them_what_changed() -> None:
    before = torch.full((2, 1, 4, 4), 0.5)
    after = before.clone()
    after[1, 0, 1, 2] = 0.75
    seen = pixels(contact_sheet(before, after, "two", enlarge=2, gap=1))
    assert seen.shape[:2] == (18, 18)
    assert (seen[:8, :8] == 128).all()
    assert (seen[8:10] == 255).all()
    assert (seen[:, 8:10] == 255).all()
    assert (seen[2:4, 14:16] == 191).all()
    changed = seen[10:, 10:] != 128
    assert (seen[12:14, 14:16] == 255).all(), "a change of a quarter, amplified four times, is as bright as can be"
    assert changed.sum() == 4


def test_a_contact_sheet_of_unequal_stacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected two stacks of images, got \(2, 1, 4, 4\) and \(1, 1, 4, 4\)"):
        contact_sheet(torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4), "two")


def test_several_triggers_are_shown_together() -> None:
    several = Several((Patch.square(SHAPE, color="white"), Patch.square(SHAPE, color="white", corner="upper left")))
    seen = pixels(trigger_picture(several, SHAPE, "two squares"))
    assert (seen[:3, :3] == 255).all()
    assert (seen[-3:, -3:] == 255).all()
    assert (seen != 128).any(-1).sum() == 18


def test_arrows_are_where_pixels_move() -> None:
    flow = torch.zeros(2, 24, 24)
    flow[0, :, 12:] = 1.5
    seen = pixels(trigger_picture(Warp(flow), (1, 24, 24), "right half moves"))[..., 3]
    half = seen.shape[1] // 2
    assert seen[:, half + 8 :].astype(int).sum() > 20 * seen[:, : half - 8].astype(int).sum()


def color(name: str) -> np.ndarray:
    return np.array([int(name[i : i + 2], 16) for i in (1, 3, 5)])


def test_a_reliability_chart_shows_said_and_found_and_how_many() -> None:
    bins = reliability([0.1, 0.1, 0.1, 0.7, 0.9], [False, False, True, True, True], 2)
    picture = reliability_chart(bins)
    assert picture.alt.startswith(
        "Probabilities against truth, models by what they were told: of 3 told 0.10 on average 33% are backdoored (95 %"
    )
    assert "of 2 told 0.80 on average 100% are backdoored (95 % interval 16% to 100%)" in picture.alt
    assert reliability_chart(bins).png == picture.png
    seen = pixels(picture)[..., :3].astype(int)
    # A dot is white around and blue inside; 10 % lies left of the middle and a third of the way up, 80 % and all right.
    blue = (np.abs(seen - color(SAID)).sum(-1) < 12).nonzero()
    upper = blue[0] < 0.6 * picture.height
    assert (blue[1][upper] < picture.width / 2).any()
    assert (blue[1][upper] > 0.7 * picture.width).any()
    assert (np.abs(seen - color(REST)).sum(-1) < 12).any(), "two of the three are clean"
    none_clean = pixels(reliability_chart(reliability([0.9], [True], 2)))[..., :3].astype(int)
    legend = (np.abs(none_clean - color(REST)).sum(-1) < 12).sum()
    assert legend < 0.2 * (np.abs(seen - color(REST)).sum(-1) < 12).sum(), "without clean models only the key has it"


def test_the_two_colors_of_a_chart_stay_apart_in_gray_and_for_every_eye() -> None:
    gray = [float(color(c) @ np.array([0.299, 0.587, 0.114])) for c in (SAID, REST)]
    assert abs(gray[0] - gray[1]) > 80
    # Along blue and yellow, which those who mix up red and green still see.
    blueness = [float(color(c)[2] - color(c)[:2].mean()) for c in (SAID, REST)]
    assert blueness[0] > 60
    assert blueness[1] < -60


def test_a_chart_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no range has a model"):
        reliability_chart(reliability([], [], 4))


def test_dots_that_would_overlap_go_to_the_next_row() -> None:
    assert stack([0.5, 0.1, 0.52, 0.9, 0.51], 0.05) == [0, 0, 2, 0, 1]
    assert stack([], 0.05) == []


def test_no_two_dots_of_one_row_are_closer_than_the_gap() -> None:
    values = torch.rand(200, generator=torch.Generator().manual_seed(3)).tolist()
    rows = stack(values, 0.03)
    for row in set(rows):
        line = sorted(v for v, r in zip(values, rows, strict=True) if r == row)
        assert all(b - a >= 0.03 for a, b in itertools.pairwise(line))
