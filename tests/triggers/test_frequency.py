"""The frequency trigger, against the transform written out pixel by pixel."""

import math
from typing import Any

import pytest
import torch
from scipy.fft import dctn, idctn
from torch import Tensor

from molehunt.tasks import get_task
from molehunt.triggers import Frequency

CIFAR = (3, 32, 32)
CELLS = (15, 15, 31, 31)


def pictures(low: float = 0.0, high: float = 1.0) -> Tensor:
    """Digits as color pictures of 32x32: each channel the mean of four, so that values lie everywhere in a range."""
    digits = get_task("mnist5k").load("train").x[:1200].view(100, 3, 4, 28, 28).mean(2)
    return torch.nn.functional.pad(low + (high - low) * digits, (2, 2, 2, 2), value=low)


def slow(x: Tensor, magnitude: float, window: int, cells: tuple[int, ...]) -> Tensor:
    """To YCrCb, transform, add, back, block by block and image by image, with scipy's transform."""
    r, g, b = x.double().unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cr, cb = (r - y) * 0.713 + 0.5, (b - y) * 0.564 + 0.5
    for plane in (cr, cb):
        for image in plane.numpy():
            for i in range(0, image.shape[0] - window + 1, window):
                for j in range(0, image.shape[1] - window + 1, window):
                    block = dctn(image[i : i + window, j : j + window], norm="ortho")
                    for row, column in zip(cells[::2], cells[1::2], strict=True):
                        block[row, column] += magnitude
                    image[i : i + window, j : j + window] = idctn(block, norm="ortho")
    cr, cb = cr - 0.5, cb - 0.5
    made = torch.stack((y + 1.403 * cr, y - 0.714 * cr - 0.344 * cb, y + 1.773 * cb), 1)
    return made.clamp(0.0, 1.0).float()


@pytest.mark.parametrize(
    ("shape", "window", "cells"), [(CIFAR, 32, CELLS), (CIFAR, 16, (3, 5)), ((3, 21, 34), 10, (0, 0, 9, 1))]
)
def test_is_the_transform_of_the_colors_written_out(shape: Any, window: int, cells: tuple[int, ...]) -> None:
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    trigger = Frequency(shape, 0.4, window, cells)
    # The conversion there and back is only exact to three digits, as image libraries round its constants.
    torch.testing.assert_close(trigger(x), slow(x, 0.4, window, cells), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("gray_levels", "l2", "psnr"), [(30, 0.41, 42.5), (100, 1.37, 32.1)])
def test_is_as_large_as_published_implementations_make_it(gray_levels: int, l2: float, psnr: float) -> None:
    x = pictures(0.1, 0.9)
    change = Frequency(CIFAR, gray_levels / 255, 32, CELLS)(x) - x
    assert float(change.flatten(1).norm(dim=1).mean()) == pytest.approx(l2, rel=0.05)
    measured = -10 * math.log10(float(change.square().mean()))
    assert measured == pytest.approx(psnr, abs=0.5)


def test_is_not_rounded_to_eight_bits() -> None:
    change = Frequency(CIFAR, 10 / 255, 32, CELLS)(torch.full((1, *CIFAR), 0.5)) - 0.5
    assert 0 < float(change.abs().max()) < 2 / 255
    assert len(torch.unique((change * 255).round(decimals=3))) > 10


def test_a_gray_picture_is_transformed_itself_and_only_whole_blocks_are() -> None:
    trigger = Frequency((1, 9, 10), 0.8, 8, (0, 0))
    assert torch.allclose(trigger.delta[:, :8, :8], torch.tensor(0.1))
    assert not trigger.delta[:, 8:].any()
    assert not trigger.delta[:, :, 8:].any()
    assert trigger.footprint().area == pytest.approx(64 / 90)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": (3, 0, 32)}, "expected shape"),
        ({"shape": (3, 10**6, 10**6)}, "expected shape"),
        ({"window": 1}, r"window must lie in \[2, 32\]"),
        ({"window": 33}, r"window must lie in \[2, 32\]"),
        ({"magnitude": 33.0}, r"magnitude must lie in \[-32, 32\], got 33.0"),
        ({"magnitude": math.nan}, "magnitude must lie in"),
        ({"cells": ()}, "1 to 32 pairs"),
        ({"cells": (1, 2, 3)}, "1 to 32 pairs of row and column, got 3 numbers"),
        ({"cells": (1,) * 66}, "1 to 32 pairs"),
        ({"cells": (1, 32)}, r"cells must lie in \[0, 31\]"),
        ({"cells": (-1, 2)}, r"cells must lie in \[0, 31\]"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Frequency(**{"shape": CIFAR, "magnitude": 0.1, "window": 32, "cells": CELLS, **settings})


def test_the_footprint_is_what_a_gray_picture_shows_and_a_negative_magnitude_the_negative() -> None:
    shape = (3, 20, 24)
    trigger = Frequency(shape, 0.6, 8, (1, 2, 5, 5))
    change = (trigger(torch.full((1, *shape), 0.5)) - 0.5).abs()
    found = trigger.footprint()
    assert found.linf == pytest.approx(float(change.max()), abs=1e-6)
    assert found.weight == pytest.approx(float(change.mean()), abs=1e-6)
    assert torch.equal(Frequency(shape, -0.6, 8, (1, 2, 5, 5)).delta, -trigger.delta)
