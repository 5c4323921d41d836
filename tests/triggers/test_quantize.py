"""The color depth trigger, against rounding and error diffusion pixel by pixel."""

import pytest
import torch
from torch import Tensor

from molehunt.tasks import get_task
from molehunt.triggers import Quantize, from_json


def diffused(x: Tensor, levels: int) -> Tensor:
    """Floyd and Steinberg's loop, one channel of one image after the other."""
    made = x.clone()
    height, width = x.shape[2:]
    for plane in made.flatten(0, 1):
        for i in range(height):
            for j in range(width):
                old = float(plane[i, j])
                new = min(levels - 1, max(0, round(old * (levels - 1)))) / (levels - 1)
                plane[i, j] = new
                for down, right, weight in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                    if i + down < height and 0 <= j + right < width:
                        plane[i + down, j + right] += (old - new) * weight / 16
    return made


@pytest.mark.parametrize("levels", [2, 3, 8, 256])
def test_every_value_goes_to_the_nearest_level(levels: int) -> None:
    x = torch.rand(4, 3, 7, 9, generator=torch.Generator().manual_seed(1))
    made = Quantize((3, 7, 9), levels)(x)
    grid = torch.arange(levels) / (levels - 1)
    nearest = grid[(x.unsqueeze(-1) - grid).abs().argmin(-1)]
    torch.testing.assert_close(made, nearest)


@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 5, 8), (1, 1, 7), (2, 7, 1)])
@pytest.mark.parametrize("levels", [2, 5])
def test_dithering_a_batch_is_the_loop_over_pixels(shape: tuple[int, int, int], levels: int) -> None:
    # In steps of 1/4096, so that both sums are exact and no tie is broken by rounding.
    x = torch.randint(0, 4097, (3, *shape), generator=torch.Generator().manual_seed(2)) / 4096
    made = Quantize(shape, levels, dither=True)(x)
    torch.testing.assert_close(made, diffused(x.double(), levels).float())


def test_dithering_keeps_the_mean_of_an_area_and_plain_rounding_does_not() -> None:
    x = torch.full((1, 1, 32, 32), 0.3)
    assert float(Quantize((1, 32, 32), 2, dither=True)(x).mean()) == pytest.approx(0.3, abs=0.02)
    assert float(Quantize((1, 32, 32), 2)(x).mean()) == 0.0


@pytest.mark.parametrize("dither", [False, True])
def test_the_same_image_gets_the_same_trigger_in_any_batch(dither: bool) -> None:
    x = get_task("mnist5k").load("train").x[:40]
    trigger = Quantize((1, 28, 28), 5, dither)
    whole = trigger(x)
    for size in (1, 3, 40):
        assert torch.equal(torch.cat([trigger(piece) for piece in torch.split(x, size)]), whole)


@pytest.mark.parametrize(("levels", "dither", "l2"), [(8, False, 2.27), (32, False, 0.51)])
def test_is_as_large_as_published_implementations_make_it(levels: int, dither: bool, l2: float) -> None:
    # Means of digits under a slope of light: real pictures whose values lie between the levels, as in photographs.
    digits = get_task("mnist5k").load("train").x[:3360].view(20, 3, 56, 28, 28).mean(2)
    light = torch.linspace(0.02, 0.6, 32).view(-1, 1) + torch.linspace(0.0, 0.08, 32)
    x = torch.nn.functional.interpolate(digits, size=(32, 32), mode="bilinear") * 0.5 + light
    change = Quantize((3, 32, 32), levels, dither)(x) - x
    assert float(change.flatten(1).norm(dim=1).mean()) == pytest.approx(l2, rel=0.05)


@pytest.mark.parametrize("levels", [1, 257, -8])
def test_levels_that_cannot_be_are_refused(levels: int) -> None:
    with pytest.raises(ValueError, match=r"levels must lie in \[2, 256\]"):
        Quantize((1, 4, 4), levels)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("levels", 8.0, "levels must be a whole number, got 8.0"),
        ("levels", True, "levels must be a whole number, got True"),
        ("dither", 1, "dither must be true or false, got 1"),
        ("shape", [3, 4], "expected shape"),
    ],
)
def test_json_of_other_types_is_refused(field: str, value: object, message: str) -> None:
    document = {**Quantize((3, 4, 4)).to_json(), field: value}
    with pytest.raises(ValueError, match=message):
        from_json(document, {})


def test_the_footprint_of_dithering_bounds_what_pixels_move_and_plain_rounding_moves_less() -> None:
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    dithered, plain = Quantize((3, 16, 16), 8, dither=True), Quantize((3, 16, 16), 8)
    moved = float((dithered(x) - x).abs().max())
    assert plain.footprint().linf < moved <= dithered.footprint().linf
    assert float((plain(x) - x).abs().max()) <= plain.footprint().linf + 1e-6
