import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molehunt.defenses._filters import Filters
from molehunt.defenses._inversion import Schedule, stamp
from molehunt.defenses._maximization import (
    OTHERS,
    Aim,
    Kind,
    Patches,
    drive,
    harden,
    maximize,
    penalty_level,
)

RULE = Schedule(steps=12, updates=1, batch=3, rate=0.1, betas=(0.9, 0.999))
SIZE = 6


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 5, channels: int = 2, side: int = 9, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, side, side, generator=rng(seed))


class Net(nn.Module):
    """Two hidden layers to look at: a convolution of four channels and a linear layer of six."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2)
        self.second = nn.Linear(64, 6)
        self.head = nn.Linear(6, 3)
        draw = rng(1)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.second(self.first(x).relu().flatten(1)).relu()))

    @property
    def hidden(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second}


def aim_of(*wanted: tuple[str, int, int]) -> Aim:
    return Aim(
        layers=tuple(layer for layer, _, _ in wanted),
        channels=torch.tensor([channel for _, channel, _ in wanted]),
        targets=torch.tensor([target for _, _, target in wanted]),
        scales=torch.arange(1.0, len(wanted) + 1.0),
    )


AIM = aim_of(("second", 4, 0), ("first", 1, 2), ("second", 0, 1), ("first", 3, 0))
BATCHES = torch.stack([torch.randperm(5, generator=rng(i))[:3] for i in range(12)])


def start(kind: str, rows: int = 4) -> Kind:
    if kind == "patches":
        return Patches.start(pictures(), SIZE, rows, rng(4))
    filters = Filters.start(pictures(), 0.9, rows)
    filters.free[0] += 0.1 * torch.randn(filters.free[0].shape, generator=rng(5))
    return filters


KINDS = pytest.mark.parametrize("kind", ["patches", "filters"])


# -------------------------------------------------------------------------------------------- masks


def test_the_penalty_is_none_up_to_the_size_and_jumps_at_two_counts() -> None:
    for count, level in ((0, 0.0), (9, 0.0), (10, 1.0), (24, 1.0), (25, 2.0), (36, 2.0)):
        mask = torch.full((2, 1, 6, 6), 0.01)  # exactly at the bound does not count
        mask[1].view(-1)[:count] = 0.0101
        assert penalty_level(mask, 9).tolist() == [0.0, level]


def test_a_hard_mask_is_binary_and_never_larger_than_allowed() -> None:
    mask = torch.tensor([[0.9, 0.5, 0.51, 0.7], [0.1, 0.2, 0.5, 0.3]]).view(2, 1, 2, 2)
    assert harden(mask, 2).flatten(1).tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]
    assert harden(mask, 4).flatten(1).tolist() == [[1, 0, 1, 1], [0, 0, 0, 0]]
    assert int(harden(torch.full((1, 1, 4, 4), 0.8), 5).sum()) == 5


def test_searches_begin_with_a_square_somewhere_and_a_pattern_in_range() -> None:
    found = Patches.start(pictures(), 9, 20, rng(2))
    assert found.mask.shape == (20, 1, 9, 9)
    for mask in found.mask:
        inside = (mask[0] > 0.9).nonzero()
        assert len(inside) == 9
        assert (inside.amax(0) - inside.amin(0)).tolist() == [2, 2]
    assert len({tuple((mask[0] > 0.9).nonzero()[0].tolist()) for mask in found.mask}) > 5
    assert float(found.pattern.min()) >= 0.0
    assert float(found.pattern.max()) <= 1.0
    assert not torch.equal(found.pattern[0], found.pattern[1])
    again = Patches.start(pictures(), 9, 20, rng(2))
    assert torch.equal(again.free[0], found.free[0])
    assert Patches.start(pictures(side=4), 30, 1, rng(2)).mask.shape == (1, 1, 4, 4)


def test_without_a_mask_the_pictures_are_the_images_to_the_bit() -> None:
    x = pictures()
    assert torch.equal(stamp(x, torch.zeros(1, 1, 9, 9), torch.rand(1, 2, 9, 9, generator=rng()))[0], x)


def test_under_the_penalty_exactly_as_many_pixels_as_have_room_go_on_growing() -> None:
    patches = Patches(pictures(), 5, [torch.zeros(2, 1, 9, 9), torch.rand(2, 2, 9, 9, generator=rng())])
    worth = torch.randn(2, 1, 9, 9, generator=rng(3)).abs()
    worth[1] *= 1e-4  # another unit, as of another layer
    order = worth.flatten(1).argsort(1, descending=True)
    # Pixels covered, and how many go on growing: the level is 0, 1 and 2, and at 2 only half as many have room.
    for covered, grows in ((0, 81), (5, 81), (6, 5), (17, 5), (18, 2), (81, 2)):
        patches.free[0] = torch.full((2, 1, 9, 9), -3.0)
        patches.free[0].view(2, -1)[:, :covered] = 0.0
        falls, _ = patches.slopes(patches.leaves(), [-worth, torch.zeros(2, 2, 9, 9)])
        up, down = (falls < 0).flatten(1), (falls > 0).flatten(1)
        assert up.sum(1).tolist() == [grows, grows]
        assert down.sum(1).tolist() == [max(0, 80 - grows)] * 2  # the first one without room stands still
        for row in range(2):
            assert bool(up[row][order[row, :grows]].all())


def test_pixels_that_are_worth_nothing_shrink_under_the_penalty() -> None:
    patches = Patches(pictures(), 5, [torch.full((1, 1, 9, 9), 2.0), torch.zeros(1, 2, 9, 9)])
    worth = torch.full((1, 1, 9, 9), -1.0)
    worth[0, 0, 0, 0] = 2.0
    falls, _ = patches.slopes(patches.leaves(), [-worth, torch.zeros(1, 2, 9, 9)])
    assert (falls.flatten() < 0).nonzero().flatten().tolist() == [0]
    nothing, _ = patches.slopes(patches.leaves(), [torch.zeros(1, 1, 9, 9), torch.zeros(1, 2, 9, 9)])
    assert float(nothing.abs().max()) == 0.0


def test_the_slope_before_the_tanh_is_that_of_autograd() -> None:
    free = torch.linspace(-2.9, 1.0, 81).view(1, 1, 9, 9)
    patches = Patches(pictures(), 81, [free.clone(), torch.zeros(1, 2, 9, 9)])  # room for all: no penalty
    weights = torch.randn(1, 1, 9, 9, generator=rng())
    leaf = free.clone().requires_grad_()
    ((leaf.tanh() / 2 + 0.5) * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    found, _ = patches.slopes(patches.leaves(), [weights, torch.zeros(1, 2, 9, 9)])
    torch.testing.assert_close(found, leaf.grad)


# ---------------------------------------------------------------------------------------- the drive


def layers_width(layer: str) -> int:
    return {"first": 4, "second": 6}[layer]


def test_pre_and_post_activation_both_count_and_other_channels_a_little() -> None:
    """A peer counts the positive part twice; then nothing wakes a channel that is asleep."""
    layers: Any = {"a": nn.Linear(1, 3)}
    out = torch.tensor([[-2.0, 10.0, -5.0], [-4.0, 30.0, 5.0]])  # one row, two images
    aim = Aim(("a",), torch.tensor([0]), torch.tensor([1]), torch.tensor([2.0]))
    assert float(drive({"a": out}, layers, aim)) == pytest.approx((3.0 + OTHERS * 22.5) / 2.0)
    awake = aim._replace(channels=torch.tensor([2]))
    # Means: -pre is 0, -post is -2.5; the others put out 20.
    assert float(drive({"a": out}, layers, awake)) == pytest.approx((-2.5 + OTHERS * 20.0) / 2.0)


def test_every_row_drives_its_own_channel_of_its_own_layer() -> None:
    model, x = Net(), pictures(12)
    outputs = {"first": model.first(x), "second": model.second(model.first(x).relu().flatten(1))}
    found = drive(outputs, model.hidden, AIM)
    for row, (layer, channel) in enumerate(zip(AIM.layers, AIM.channels.tolist(), strict=True)):
        a = outputs[layer][3 * row : 3 * row + 3].reshape(3, layers_width(layer), -1)
        own, rest = a[:, channel], torch.cat((a[:, :channel], a[:, channel + 1 :]), 1)
        others = rest.relu().mean((0, 2)).sum()
        expected = (-own.mean() - own.relu().mean() + OTHERS * others) / AIM.scales[row]
        torch.testing.assert_close(found[row], expected)


def test_tokens_are_positions_of_a_linear_layer() -> None:
    layers: Any = {"a": nn.Linear(1, 3)}
    out = torch.randn(2 * 2, 5, 3, generator=rng())  # two rows, two images, five tokens
    aim = Aim(("a", "a"), torch.tensor([2, 0]), torch.tensor([0, 0]), torch.ones(2))
    own = torch.stack((out[:2, :, 2], out[2:, :, 0]))
    others = out.view(2, 2, 5, 3).relu().mean((1, 2)).sum(1) - own.relu().mean((1, 2))
    torch.testing.assert_close(drive({"a": out}, layers, aim), -(own + own.relu()).mean((1, 2)) + OTHERS * others)


# --------------------------------------------------------------------------------------- the search


@KINDS
@pytest.mark.parametrize("limit", [1, 7, 500])
@pytest.mark.parametrize("logit", [0.0, 0.5])
def test_rows_searched_together_are_rows_searched_alone(kind: str, limit: int, logit: float) -> None:
    model = Net()
    together = maximize(model, model.hidden, AIM, start(kind), BATCHES, RULE, limit=limit, logit=logit)
    for row in range(4):
        only = torch.tensor([row])
        alone = maximize(model, model.hidden, AIM.keep(only), start(kind).keep(only), BATCHES, RULE, logit=logit)
        for a, b in zip(together.free, alone.free, strict=True):
            torch.testing.assert_close(a[only], b, rtol=0, atol=1e-5)
    for a, b in zip(together.free, start(kind).free, strict=True):
        assert not torch.allclose(a, b, atol=0.02)


@KINDS
def test_the_search_lowers_its_loss_and_stays_within_bounds(kind: str) -> None:
    model, x = Net(), pictures()

    def loss(now: Kind) -> Tensor:
        drawn, cost = now.render(now.leaves(), torch.arange(5))
        flat = drawn.flatten(0, 1)
        outputs = {"first": model.first(flat), "second": model.second(model.first(flat).relu().flatten(1))}
        return drive(outputs, model.hidden, AIM) + (cost if kind == "filters" else 0.0)

    begin = start(kind)
    if isinstance(begin, Filters):
        begin.floor = -1.0  # where the thousandfold price comes and goes, the loss of a step says little
    before = [v.clone() for v in begin.free]
    ended = maximize(model, model.hidden, AIM, begin, BATCHES.repeat(5, 1), RULE)
    assert bool((loss(ended) < loss(begin)).all())
    assert all(torch.equal(a, b) for a, b in zip(begin.free, before, strict=True)), "the start was changed"
    assert not any(layer._forward_hooks for layer in model.hidden.values())
    if isinstance(ended, Patches):
        assert float(ended.mask.min()) > 0.0
        assert float(ended.mask.max()) < 1.0
        assert float(ended.pattern.min()) >= 0.0
        assert float(ended.pattern.max()) <= 1.0
        covered = (ended.mask > 0.5).flatten(1).sum(1)
        assert bool((covered <= 2 * SIZE).all()), covered
    assert x.shape == (5, 2, 9, 9)


def test_the_pixels_that_are_worth_most_are_found() -> None:
    """One channel sums three pixels of the picture; the search begins elsewhere and ends on them."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(81, 2))
    layer: Any = model[1]
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, [10, 40, 77]] = torch.tensor([1.0, -1.0, 2.0])
        layer.bias.zero_()
    model.requires_grad_(False)
    x = 0.4 + 0.2 * pictures(4, 1)
    aim = Aim(("1",), torch.tensor([0]), torch.tensor([0]), torch.ones(1))
    ended = maximize(model, {"1": layer}, aim, Patches.start(x, 3, 1, rng(8)), torch.arange(4).expand(100, -1), RULE)
    assert isinstance(ended, Patches)
    assert harden(ended.mask, 3).flatten().nonzero().flatten().tolist() == [10, 40, 77]
    assert ended.pattern.flatten()[[10, 40, 77]].tolist() == [1.0, 0.0, 1.0]


@KINDS
def test_dropped_rows_end_where_they_are_and_the_others_go_on_as_if_nothing_had_been(kind: str) -> None:
    model = Net()
    seen = []

    def chooser(now: Kind, aim: Aim) -> Tensor:
        seen.append((len(now.free[0]), aim.layers))
        return torch.tensor([1, 3])

    ticks: list[int] = []
    ended = maximize(
        model, model.hidden, AIM, start(kind), BATCHES, RULE, drop=(5, chooser), tick=lambda: ticks.append(1)
    )
    whole = maximize(model, model.hidden, AIM, start(kind), BATCHES, RULE)
    short = maximize(model, model.hidden, AIM, start(kind), BATCHES[:5], RULE)
    assert seen == [(4, AIM.layers)]
    assert len(ticks) == 12
    for a, b, c in zip(ended.free, whole.free, short.free, strict=True):
        torch.testing.assert_close(a[[1, 3]], b[[1, 3]], rtol=0, atol=1e-6)
        torch.testing.assert_close(a[[0, 2]], c[[0, 2]], rtol=0, atol=1e-6)
        assert not torch.allclose(a[[0, 2]], b[[0, 2]], atol=1e-3)


def test_the_weight_of_the_logit_is_that_of_a_cross_entropy() -> None:
    """A channel that nothing reaches leaves the cross-entropy alone to search."""
    model = Net()
    with torch.no_grad():
        model.second.weight[5].zero_()
    aim = aim_of(("second", 5, 2))
    begin = Filters.start(pictures(), -1.0, 1)
    still = maximize(model, model.hidden, aim, begin, BATCHES, RULE)
    moved = maximize(model, model.hidden, aim, begin, BATCHES, RULE, logit=1.0)

    def share(now: Kind) -> float:
        drawn, _ = now.render(now.leaves(), torch.arange(5))
        return float(model(drawn.flatten(0, 1)).log_softmax(1)[:, 2].mean())

    assert share(moved) > share(begin) + 1e-3
    assert share(moved) > share(still) + 1e-3
    assert math.isfinite(share(moved))
