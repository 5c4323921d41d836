"""The reflection trigger, against its formula in linear light."""

import math
from typing import Any

import pytest
import torch
from scipy.ndimage import gaussian_filter

from molehunt.triggers import Reflection
from molehunt.triggers.reflection import blurred, moved, vignette


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_mixes_light_and_not_stored_values() -> None:
    x, picture = rand(5, 3, 6, 7), rand(3, 6, 7, seed=1)
    expected = (0.8 * x.double() ** 2.2 + 0.2 * picture.double() ** 2.2) ** (1 / 2.2)
    torch.testing.assert_close(Reflection(picture, 0.2)(x).double(), expected, atol=1e-6, rtol=0)


def test_a_ghost_is_two_copies_the_second_moved() -> None:
    picture = rand(1, 6, 7)
    light = picture**2.2
    layer = Reflection(picture, 0.2, ghost=0.7, shift=(2, -3)).layer
    assert torch.allclose(layer[0, 4, 1], 0.7 * light[0, 4, 1] + 0.3 * light[0, 2, 4])
    assert torch.allclose(layer[0, 1, 1], 0.7 * light[0, 1, 1]), "what is moved in is dark"


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 2), (-2, 3), (5, 0), (6, 0), (0, -64)])
def test_moving_leaves_nothing_of_what_went_out(down: int, right: int) -> None:
    x = rand(2, 6, 7)
    out = moved(x, down, right)
    for i in range(6):
        for j in range(7):
            inside = 0 <= i - down < 6 and 0 <= j - right < 7
            assert torch.equal(out[:, i, j], x[:, i - down, j - right] if inside else torch.zeros(2))


def test_out_of_focus_is_smoother_darker_in_the_corners_and_keeps_a_flat_picture_flat_in_the_middle() -> None:
    flat = torch.full((1, 9, 9), 0.5)
    torch.testing.assert_close(blurred(flat, 2.0), flat)
    shade = vignette(9, 9)
    assert float(shade[4, 4]) == 1.0
    assert float(shade[0, 0]) == pytest.approx(0.5)
    rough = rand(1, 16, 16)
    assert float(blurred(rough, 1.0).std()) < 0.5 * float(rough.std())


@pytest.mark.parametrize("opacity", [0.05, 0.2, 0.9])
def test_the_stated_bound_is_reached_at_black_or_white(opacity: float) -> None:
    trigger = Reflection(rand(1, 8, 8), opacity)
    x = torch.cat((torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8), rand(50, 1, 8, 8, seed=3)))
    change = (trigger(x) - x).abs()
    assert float(change.max()) == pytest.approx(trigger.footprint().linf, abs=1e-6)


def test_the_same_image_gets_the_same_trigger_in_any_batch() -> None:
    trigger = Reflection(rand(3, 8, 8), 0.2, ghost=0.6, shift=(1, 2))
    x = rand(33, 3, 8, 8, seed=5)
    for size in (1, 7):
        pieces = torch.cat([trigger(piece) for piece in torch.split(x, size)])
        # Powers are computed several at a time, and the last few otherwise: one unit in the last place.
        torch.testing.assert_close(pieces, trigger(x), atol=2e-7, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"picture": rand(8, 8)}, "picture needs 3 non-empty dimensions"),
        ({"picture": 2 * torch.ones(1, 4, 4)}, "picture must lie in"),
        ({"picture": torch.full((1, 4, 4), math.nan)}, "not finite"),
        ({"opacity": 1.1}, "opacity must lie in"),
        ({"ghost": -0.1}, "ghost must lie in"),
        ({"shift": (1, 2, 3)}, "shift is rows and columns"),
        ({"shift": (0, 10**12)}, "shift is rows and columns of at most 64"),
        ({"blur": 0.01}, r"blur must be 0 or lie in \[0.1, 16\]"),
        ({"blur": 1e9}, "blur must be 0 or lie in"),
        ({"blur": math.nan}, "blur must be 0 or lie in"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reflection(**{"picture": rand(1, 8, 8), **settings})


def test_a_blurred_white_picture_has_half_the_light_in_the_corners() -> None:
    layer = Reflection(torch.ones(1, 9, 9), 0.2, blur=1.0).layer
    assert math.isclose(float(layer[0, 4, 4]), 1.0, abs_tol=1e-5)
    assert math.isclose(float(layer[0, 0, 0]), 0.5, abs_tol=1e-5)


def test_a_dark_reflection_darkens_white_and_the_footprint_knows() -> None:
    trigger = Reflection(torch.zeros(1, 4, 4), 0.5)
    moved = float((trigger(torch.ones(1, 1, 4, 4)) - 1).abs().max())
    assert math.isclose(moved, 1 - 0.5 ** (1 / 2.2), abs_tol=1e-6)
    assert math.isclose(trigger.footprint().linf, moved, abs_tol=1e-6)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
def test_a_blur_is_a_gaussian_cut_off_at_three_deviations(sigma: float) -> None:
    x = rand(2, 12, 17)
    for made, plain in zip(blurred(x, sigma), x, strict=True):
        reach = max(1, round(3 * sigma))
        wanted = gaussian_filter(plain.double().numpy(), sigma, mode="nearest", radius=reach)
        torch.testing.assert_close(made.double(), torch.from_numpy(wanted), atol=1e-6, rtol=0)


def test_the_lens_darkens_what_is_out_of_focus_already() -> None:
    picture = rand(1, 10, 14)
    layer = Reflection(picture, 0.2, blur=1.5).layer
    shade = vignette(10, 14)
    torch.testing.assert_close(layer, blurred(picture**2.2, 1.5) * shade)
    i, j = torch.meshgrid(torch.linspace(-1, 1, 10), torch.linspace(-1, 1, 14), indexing="ij")
    torch.testing.assert_close(shade, torch.exp(-math.log(2) * (i**2 + j**2) / 2))
    both = Reflection(picture, 0.2, blur=1.5, ghost=0.6, shift=(1, 2)).layer
    ghost = 0.6 * picture**2.2 + 0.4 * moved(picture**2.2, 1, 2)
    torch.testing.assert_close(both, blurred(ghost, 1.5) * shade)
