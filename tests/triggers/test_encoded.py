"""Triggers that a listed network draws: bounded whatever its weights are, and always the same on the same image."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molehunt.game.seal import Sealed, seal, unseal
from molehunt.tasks import TASKS
from molehunt.triggers import ENCODERS, Encoded, Target, from_json
from molehunt.triggers.encoders import LARGEST, drawn, strongest

SHAPE = (3, 10, 9)


def weights(name: str, shape: tuple[int, int, int] = SHAPE, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * ENCODERS[name].initial(shape, torch.Generator().manual_seed(seed))


def make(name: str, **changes: Any) -> Encoded:
    arguments = {"network": name, "shape": SHAPE, "linf": 0.1, "area": 0.1 if ENCODERS[name].masked else 1.0}
    arguments["weights"] = weights(name)
    return Encoded(**{**arguments, **changes})


def images(count: int, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(7))


EVERY = pytest.mark.parametrize("name", ENCODERS)


@EVERY
@given(
    seed=st.integers(0, 10**6), linf=st.floats(0, 1), area=st.floats(0.02, 1), scale=st.sampled_from([1e-3, 1.0, 30.0])
)
@settings(max_examples=25, deadline=None)
def test_the_bounds_hold_whatever_the_weights_are(name: str, seed: int, linf: float, area: float, scale: float) -> None:
    wild = weights(name, seed=seed, scale=scale).clamp(-LARGEST, LARGEST)
    trigger = make(name, linf=linf, area=area if ENCODERS[name].masked else 1.0, weights=wild)
    x = torch.cat((images(5), torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE)))
    change = (trigger(x) - x).abs()
    assert torch.isfinite(change).all()
    assert float(change.max()) <= linf + 1e-6
    assert int((change > 0).any(1).sum((1, 2)).max()) <= trigger.pixels


@EVERY
def test_the_largest_weights_that_are_allowed_make_pictures_and_no_nan(name: str) -> None:
    for fill in (LARGEST, -LARGEST):
        trigger = make(name, linf=1.0, weights=torch.full_like(weights(name), fill))
        made = trigger(torch.cat((images(3), torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE))))
        assert bool(((made >= 0) & (made <= 1)).all())


@EVERY
@pytest.mark.parametrize("size", [1, 5, 32, 33])
def test_the_same_image_gets_the_same_trigger_in_any_batch_and_layout(name: str, size: int) -> None:
    trigger, x = make(name), images(67)
    whole = trigger(x)
    pieces = [trigger(p.contiguous(memory_format=torch.channels_last)) for p in torch.split(x, size)]
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-6, rtol=0)


@EVERY
def test_each_image_gets_a_trigger_of_its_own_and_may_be_given_that_of_another(name: str) -> None:
    trigger, x = make(name, linf=1.0), images(8)
    change = trigger(x) - x
    assert float((change[0] - change[1]).abs().max()) > 1e-3
    assert torch.equal(trigger.transplant(x, x), trigger(x))
    gray = torch.full_like(x, 0.5)
    assert not torch.equal(trigger.transplant(gray, x), trigger(gray))
    assert len(trigger(x[:0])) == 0


def test_the_residual_network_adds_what_the_formula_says() -> None:
    trigger, x = make("residual"), images(32)
    named = ENCODERS["residual"].unpack(trigger.weights, SHAPE)
    torch.testing.assert_close(trigger(x), (x + 0.1 * drawn(named, "pattern", x).tanh()).clamp(0, 1))


def test_the_masked_network_replaces_the_strongest_pixels() -> None:
    trigger, x = make("masked", linf=1.0, area=0.3), images(32)
    named = ENCODERS["masked"].unpack(trigger.weights, SHAPE)
    mask = strongest(drawn(named, "mask", x), 27)
    assert (mask.sum((1, 2, 3)) == 27).all()
    pattern = 0.5 * (1 + drawn(named, "pattern", x).tanh())
    torch.testing.assert_close(trigger(x), x * (1 - mask) + mask * pattern)


def test_marks_the_strongest_even_where_all_are_equal() -> None:
    assert int(strongest(torch.zeros(2, 1, 4, 4), 5).sum()) == 10


@EVERY
def test_weights_are_counted_and_named_in_one_order(name: str) -> None:
    encoder = ENCODERS[name]
    vector = torch.arange(encoder.size(SHAPE), dtype=torch.float32)
    pieces = encoder.unpack(vector, SHAPE)
    assert {k: tuple(v.shape) for k, v in pieces.items()} == encoder.layout(SHAPE)
    assert torch.equal(torch.cat([v.flatten() for v in pieces.values()]), vector)


@EVERY
@pytest.mark.parametrize("task", ["mnist", "cifar10"])
def test_the_weights_fit_into_the_sealed_part(name: str, task: str) -> None:
    shape = TASKS[task].shape
    trigger = make(name, shape=shape, weights=weights(name, shape))
    sealed = unseal(seal(Sealed(attack="a", target=Target(1), trigger=trigger), TASKS[task]), TASKS[task])
    assert sealed.trigger is not None
    assert torch.equal(sealed.trigger(images(3, shape)), trigger(images(3, shape)))


SIZE = ENCODERS["residual"].size(SHAPE)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("residual", {"network": "anything"}, "unknown encoder 'anything'; known: residual, masked"),
        ("residual", {"shape": (3, 10**6, 10**6)}, "expected shape"),
        ("residual", {"shape": (3, 4096, 4096)}, r"has weights \(8412611,\), got \(\d+,\)"),
        ("residual", {"linf": 1.01}, "linf must lie in"),
        ("residual", {"linf": math.nan}, "linf must lie in"),
        ("residual", {"area": 0.5}, "a residual encoder has no mask, so its area is 1, got 0.5"),
        ("masked", {"area": 0.01}, "is less than one pixel"),
        ("masked", {"area": 1.5}, "area must lie in"),
        ("residual", {"weights": torch.zeros(SIZE - 1)}, rf"has weights \({SIZE},\), got \({SIZE - 1},\)"),
        ("residual", {"weights": torch.zeros(1, SIZE)}, r"has weights"),
        ("residual", {"weights": torch.zeros(SIZE).long()}, "weights must be floating point"),
        ("residual", {"weights": torch.full((SIZE,), math.nan)}, "not finite"),
        ("residual", {"weights": torch.full((SIZE,), math.inf)}, "not finite"),
        ("residual", {"weights": torch.full((SIZE,), 101.0)}, r"weights must lie in \[-100.0, 100.0\]"),
    ],
)
def test_a_network_that_cannot_be_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **changes)


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"network": 3}, None, "network must be a text, got 3"),
        ({"network": "residual\n"}, None, "unknown encoder"),
        ({"linf": "0.1"}, None, "linf must be a number"),
        ({"code": "import os"}, None, "a network has the fields"),
        ({}, {}, r"a network has the tensors \['weights'\], got \[\]"),
        ({}, {"weights": torch.zeros(SIZE), "bias": torch.zeros(1)}, "a network has the tensors"),
        ({}, {"weights": torch.zeros(10)}, "has weights"),
    ],
)
def test_what_strangers_write_is_refused(
    changes: dict[str, Any], tensors: dict[str, Tensor] | None, message: str
) -> None:
    trigger = make("residual")
    with pytest.raises(ValueError, match=message):
        from_json({**trigger.to_json(), **changes}, trigger.tensors() if tensors is None else tensors)


def test_a_transplanted_trigger_lies_over_the_image_that_it_came_to() -> None:
    trigger = make("masked", linf=0.1)
    x, source = images(6), images(6).flip(0) * 0.5
    there = trigger.transplant(x, source)
    assert float((there - x).abs().max()) <= 0.1 + 1e-6
    changed, own = (there != x).any(1), (trigger(source) != source).any(1)
    # The mask is drawn from the source; a pixel that has its goal already shows no change.
    assert not bool((changed & ~own).all(0).any())
    whole = make("masked", linf=1.0)
    torch.testing.assert_close(
        whole.transplant(x, source)[own.unsqueeze(1).expand_as(x)],
        whole(source)[own.unsqueeze(1).expand_as(x)],
    )


def convolved(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """A 3x3 convolution with a border of zeros, window by window."""
    count, channels, height, width = x.shape
    wide = x.new_zeros(count, channels, height + 2, width + 2)
    wide[:, :, 1:-1, 1:-1] = x
    rows = [
        [
            torch.einsum("ncij,ocij->no", wide[:, :, i : i + 3, j : j + 3], weight) + bias
            for j in range(0, width, stride)
        ]
        for i in range(0, height, stride)
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def enlarged(x: Tensor, height: int, width: int) -> Tensor:
    """Each pixel repeated."""
    i = [k * x.shape[2] // height for k in range(height)]
    j = [k * x.shape[3] // width for k in range(width)]
    return x[:, :, i][:, :, :, j]


@pytest.mark.parametrize(("name", "part"), [("residual", "pattern"), ("masked", "pattern"), ("masked", "mask")])
def test_the_layers_are_what_the_list_says(name: str, part: str) -> None:
    """Sealed weights mean something only as long as no layer changes."""
    rng = torch.Generator().manual_seed(3)
    drawn_ = weights(name, seed=2) + 0.1 * torch.randn(ENCODERS[name].size(SHAPE), generator=rng)
    named, x = ENCODERS[name].unpack(drawn_.double(), SHAPE), images(3).double()

    def layer(number: int, value: Tensor, stride: int = 1) -> Tensor:
        return convolved(value, named[f"{part}.{number}.weight"], named[f"{part}.{number}.bias"], stride)

    fine = layer(0, 2 * x - 1).relu()
    coarse = layer(1, fine, 2).relu()
    assert coarse.shape[2:] == (5, 5)
    if name == "residual":
        message = enlarged(named["message"].unsqueeze(0), 5, 5).expand(3, -1, -1, -1)
        coarse = torch.cat((coarse, message), 1)
    back = enlarged(layer(2, coarse).relu(), 10, 9)
    wanted = layer(4, layer(3, torch.cat((fine, back), 1)).relu())
    torch.testing.assert_close(drawn(named, part, x), wanted)


@EVERY
def test_training_starts_from_weights_of_the_usual_size(name: str) -> None:
    encoder = ENCODERS[name]
    found = encoder.unpack(weights(name, scale=1.0), SHAPE)
    for key, tensor in found.items():
        if key.endswith("bias"):
            assert not tensor.any(), key
        elif key == "message":
            assert set(tensor.flatten().tolist()) == {-1.0, 1.0}
        elif tensor.numel() > 1000:
            fan_in = tensor[0].numel()
            assert float(tensor.std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.1), key
    assert torch.equal(weights(name, seed=4), weights(name, seed=4))
    assert float((weights(name, seed=4) - weights(name, seed=5)).abs().mean()) > 0.05, "other seeds, other weights"


@pytest.mark.parametrize("pixels", range(1, 91))
def test_a_share_of_whole_pixels_loses_none_and_others_are_rounded_down(pixels: int) -> None:
    assert make("masked", area=pixels / 90).pixels == pixels
    assert make("masked", area=min(1.0, (pixels + 0.5) / 90)).pixels == pixels
