"""Normalizations, as people write them."""

import pytest
import torch

from molehunt.foreign import ForeignError, pixels
from molehunt.foreign.pixels import candidates
from molehunt.tasks import TASKS

CIFAR, MNIST = TASKS["cifar10"], TASKS["mnist"]


@pytest.mark.parametrize(
    ("text", "black", "white"),
    [
        ("none", 0.0, 1.0),
        ("signed", -1.0, 1.0),
        ("bytes", 0.0, 255.0),
        ("0.5/0.25", -2.0, 2.0),
        ("bytes:127.5/51", -2.5, 2.5),
        ("0.5,0.5,0.5/0.5", -1.0, 1.0),
    ],
)
def test_black_and_white_become(text: str, black: float, white: float) -> None:
    layer = pixels(text, CIFAR).layer(3)
    x = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    assert torch.allclose(layer(x)[0], torch.tensor(black))
    assert torch.allclose(layer(x)[1], torch.tensor(white))


def test_the_tasks_own_and_two_sequences() -> None:
    assert pixels("task", CIFAR).mean == CIFAR.mean
    own = pixels(([0.1, 0.2, 0.3], [1.0]), CIFAR)
    assert own.name == "0.1,0.2,0.3/1"
    assert pixels(own.name, CIFAR) == own, "what the report calls it can be typed"


@pytest.mark.parametrize(
    "text", ["nope", "0.5", "0.5/0.5/0.5", "0.5/0", "0.5/-1", "nan/1", "1/inf", "/", "a/b", "bytes:"]
)
def test_what_is_no_normalization_is_refused(text: str) -> None:
    with pytest.raises(ForeignError, match="expected"):
        pixels(text, CIFAR)


def test_color_does_not_fit_gray() -> None:
    with pytest.raises(ForeignError, match="'imagenet' is for 3 channels, the network is given 1"):
        pixels("imagenet", MNIST).layer(1)
    assert {p.name for p in candidates(MNIST, 1)} == {"none", "task", "signed", "bytes"}
    assert {p.name for p in candidates(CIFAR, 3)} == {"none", "task", "signed", "bytes", "imagenet", "cifar10"}
