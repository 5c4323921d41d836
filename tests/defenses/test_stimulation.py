import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from molehunt.defenses._stimulation import (
    Channel,
    channels_at_once,
    elevation,
    elevations,
    hidden_layers,
    largest,
    passes,
    sections,
    shortlist,
    stimulate,
    suspicious,
    width_of,
)
from molehunt.networks import NETWORKS, Network, anatomy, build

SHAPE = (3, 16, 16)
LEVELS = (0.0, 1.0, 2.5)


def pictures(count: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def network(name: str) -> Network:
    return build(name, shape_of(name), 5, rng=torch.Generator().manual_seed(3)).eval()


def shape_of(name: str) -> tuple[int, int, int]:
    """Small pictures for large networks."""
    return (3, 8, 8) if "resnet" in name else SHAPE


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def small(channels: int = 13) -> nn.Module:
    """Thirteen channels, a rectifier, a hidden layer, a head."""
    return drawn(
        nn.Sequential(
            nn.Conv2d(3, channels, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(9 * channels, 7), nn.ReLU(),
            nn.Linear(7, 4),
        )
    )  # fmt: skip


def layers_of(model: nn.Module) -> dict[str, Any]:
    shape = model.shape if isinstance(model, Network) else SHAPE
    return hidden_layers(anatomy(model, pictures(1, shape)))


@torch.no_grad()
def slowly(model: nn.Module, path: str, channel: int, value: float, x: Tensor) -> Tensor:
    """Logits (B, K) with one channel set to one value: the whole model, by a hook that writes into a copy."""

    def hook(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        changed = output.clone()
        if isinstance(module, nn.Conv2d):
            changed[:, channel] = value
        else:
            changed[..., channel] = value
        return changed

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        return torch.as_tensor(model(x))
    finally:
        handle.remove()


# ----------------------------------------------------------------------------------------- sections


@pytest.mark.parametrize("name", NETWORKS)
def test_the_sections_of_a_network_are_the_network(name: str) -> None:
    model, x = network(name), pictures(2, shape_of(name))
    a = x
    with torch.no_grad():
        for path, section in sections(model):
            assert model.get_submodule(path) is section
            a = section(a)
        assert torch.equal(a, model(x))
    assert len(sections(model)) > 3


def test_a_module_that_occurs_twice_is_run_twice() -> None:
    act, rng = nn.Sigmoid(), torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), act, nn.Flatten(), nn.Linear(12, 6), act, nn.Linear(6, 5))
    x = torch.rand(2, 1, 4, 4, generator=rng)
    a = x
    with torch.no_grad():
        for _, section in sections(model):
            a = section(a)
        assert torch.equal(a, model(x))
    assert len(sections(model)) == 6


def test_what_does_not_run_part_by_part_is_left_whole() -> None:
    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for module in (*self, *self):
                x = module(x)
            return x

    class Other(Network):
        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(super().forward(x)) + 1.0

    twice = Twice(nn.Linear(2, 2))
    assert sections(twice) == [("", twice)]
    inner = nn.Sequential(nn.ReLU(), twice)
    assert sections(nn.Sequential(nn.Identity(), inner))[1:] == [("1.0", inner[0]), ("1.1", twice)]
    model = network("badnets_cnn")
    other = Other(
        name="other", shape=SHAPE, classes=5, normalize=model.normalize, trunk=model.trunk, neck=model.neck,
        head=model.head,
    )  # fmt: skip
    assert sections(other) == [("", other)]


@pytest.mark.parametrize("name", ["badnets_cnn", "resnet18", "vit_tiny"])
def test_hidden_layers_are_all_convolutions_and_linear_layers_but_the_head(name: str) -> None:
    model = network(name)
    kinds = (nn.Conv2d, nn.Linear)
    expected = {path for path, module in model.named_modules() if isinstance(module, kinds)} - {"head"}
    assert layers_of(model).keys() == expected


# -------------------------------------------------------------------------------------- stimulation


@pytest.mark.parametrize("name", NETWORKS)
def test_stimulation_in_any_network_is_what_a_hook_on_the_whole_of_it_gives(name: str) -> None:
    model, x = network(name), pictures(2, shape_of(name))
    layers, parts = layers_of(model), sections(model)
    paths = list(layers)
    values = torch.tensor([0.0, 1.5])
    for path in dict.fromkeys((paths[0], paths[len(paths) // 2], paths[-2], paths[-1])):
        index = next(i for i, (part, _) in enumerate(parts) if path == part or path.startswith(f"{part}."))
        h = x
        with torch.no_grad():
            for _, section in parts[:index]:
                h = section(h)
        channels = torch.tensor([width_of(layers[path]) - 1, 0])
        found = stimulate(parts[index:], h, path, layers[path], channels, values)
        assert found.shape == (2, 2, 2, 5)
        for g, n in itertools.product(range(2), range(2)):
            expected = slowly(model, path, int(channels[g]), float(values[n]), x)
            torch.testing.assert_close(found[g, n], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 45, 10_000])
def test_every_channel_is_visited_once_whatever_the_batch(limit: int) -> None:
    """Thirteen channels, five at once or one or all: a peer left out those beyond a multiple of eight."""
    model, x = small(), pictures(3)
    layers = layers_of(model)
    calls = []
    found = elevations(model, layers, x, LEVELS, limit=limit, tick=lambda: calls.append(1))
    assert {path: tuple(a.shape) for path, a in found.items()} == {"0": (13, 3, 4), "3": (7, 3, 4)}
    at_once = channels_at_once(LEVELS, 3, limit)
    assert at_once == {1: 1, 45: 5, 10_000: 1111}[limit]
    assert len(calls) == passes(layers, at_once) == {1: 20, 45: 5, 10_000: 2}[limit]
    tops = largest(model, layers, x)
    for path, a in found.items():
        for c in range(len(a)):
            at = [slowly(model, path, c, level * tops[path], x) for level in LEVELS]
            expected = torch.stack(at[1:]).amax(0) - at[0]
            torch.testing.assert_close(a[c], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["0", "3"])
def test_a_channel_set_to_the_value_that_it_has_anyway_changes_nothing(path: str) -> None:
    model, x = small(), pictures(4)
    layer: Any = model.get_submodule(path)
    with torch.no_grad():
        layer.weight[2].zero_()
        layer.bias[2] = 0.7
        h = x if path == "0" else model[:3](x)  # type: ignore[index]
        index = int(path)
        found = stimulate(sections(model)[index:], h, path, layer, torch.tensor([2]), torch.tensor([0.7, 0.0]))
        torch.testing.assert_close(found[0, 0], model(x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[0, 1], model(x), atol=1e-3)


def test_where_the_rest_is_linear_the_logits_are_lines_with_the_sum_of_the_weights_as_slope() -> None:
    model = drawn(nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Flatten(), nn.Linear(6 * 16, 5))).double()
    x, values = pictures(3).double(), torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    layer: Any = model.get_submodule("0")
    found = stimulate(sections(model), x, "0", layer, torch.arange(6), values)
    head: Any = model.get_submodule("2")
    slope = head.weight.view(5, 6, 16).sum(2).T.float()  # (channels, classes)
    steps = (found[:, 1:] - found[:, :1]) / values[1:].view(1, -1, 1, 1)
    torch.testing.assert_close(steps, slope[:, None, None].expand_as(steps).double(), check_dtype=False, rtol=1e-4, atol=1e-5)  # noqa: E501  # fmt: skip
    top = largest(model, {"0": layer}, x)["0"]
    lifted = elevations(model, {"0": layer}, x, (0.0, 1.0, 2.0))["0"]
    # The highest of two points on a line through 0.
    expected = torch.maximum(slope, 2 * slope)[:, None].expand(-1, 3, -1) * top
    torch.testing.assert_close(lifted, expected.float(), rtol=1e-4, atol=1e-5)


def test_elevation_is_at_least_the_rise_to_any_one_value() -> None:
    nsf = torch.randn(4, 5, 3, 6, generator=torch.Generator().manual_seed(0))
    lifted = elevation(nsf)
    assert lifted.shape == (4, 3, 6)
    for level in range(1, 5):
        assert bool((lifted >= nsf[:, level] - nsf[:, 0]).all())
    # The first value is the reference and no candidate for the maximum.
    nsf[:, 1:] -= 100.0
    assert float(elevation(nsf).max()) < 0


def test_the_images_and_the_weights_are_not_written_to_and_no_hook_stays() -> None:
    model, x = network("wrn_16_1"), pictures(2)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before = x.clone()
    layers = {path: layer for path, layer in layers_of(model).items() if path.startswith("trunk.3.")}
    elevations(model, layers, x, (0.0, 1.0), limit=64)
    assert torch.equal(x, before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())

    def stop() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        elevations(model, layers, x, (0.0, 1.0), limit=64, tick=stop)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_pass_that_fails_leaves_no_hook() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.inside(x))

    block = Block()
    with pytest.raises((IndexError, RuntimeError)):
        stimulate([("block", block)], torch.zeros(1, 2), "block.inside", block.inside, torch.tensor([7]), torch.ones(2))
    assert not block.inside._forward_hooks


def test_windows_folded_into_the_batch_belong_to_their_image() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(8, 3)
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            halves = x.flatten(1)[:, :16].reshape(-1, 8)  # (2 B, 8)
            return torch.as_tensor(self.head(self.inside(halves).relu().reshape(len(x), 6)))

    model, x = drawn(Windows()), pictures(3)
    layer: Any = model.get_submodule("inside")
    found = stimulate(sections(model), x, "inside", layer, torch.arange(3), torch.tensor([0.0, 2.0]))
    for c, n in itertools.product(range(3), range(2)):
        torch.testing.assert_close(found[c, n], slowly(model, "inside", c, 2.0 * n, x), rtol=1e-5, atol=1e-6)


def test_the_largest_activation_is_that_of_the_layer_over_all_images_and_channels() -> None:
    model, x = small(), pictures(5)
    layer: Any = model.get_submodule("0")
    assert largest(model, {"0": layer}, x)["0"] == pytest.approx(float(layer(x).detach().max()))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(-3.0)
        layer.bias[1] = 2.0
    assert largest(model, {"0": layer}, x)["0"] == 2.0
    with torch.no_grad():
        layer.bias[1] = -1.0
    assert largest(model, {"0": layer}, x)["0"] == 3.0  # nothing positive: the largest magnitude
    with torch.no_grad():
        layer.bias.zero_()
    assert largest(model, {"0": layer}, x)["0"] == 1.0


# ---------------------------------------------------------------------------------------- candidates


def test_a_planted_channel_is_the_first_of_the_ranking() -> None:
    model, x = network("badnets_cnn"), pictures(10)
    with torch.no_grad():
        hidden = model.neck[2]  # type: ignore[index]
        model.head.weight[3, 100] = 100.0
        hidden.bias[100] = -50.0  # asleep on every image
    lifted = elevations(model, layers_of(model), x, (0.0, 1.6, 3.2))
    y = torch.arange(10) % 5
    found = [channel for path, a in lifted.items() for channel in suspicious(path, a, y, 2)]
    ranked = shortlist(found, 20, 3)
    assert ranked[0][:3] == ("neck.2", 100, 3)
    values = [channel.value for channel in ranked]
    assert values == sorted(values, reverse=True)
    assert len({(channel.layer, channel.channel) for channel in ranked}) == 20


def lifted_of(rows: list[list[float]]) -> Tensor:
    """Elevations (1, B, K) of one channel."""
    return torch.tensor([rows])


def test_a_channel_needs_one_class_on_nearly_all_images_and_its_value_is_the_smallest_lead() -> None:
    rows = [[0.0, 5.0, 1.0], [0.0, 4.0, 1.5], [0.0, 9.0, 1.0], [0.0, 7.0, 5.0], [2.0, 1.0, 0.0]]
    y = torch.tensor([0, 0, 2, 2, 0])
    (found,) = suspicious("a", lifted_of(rows), y, 1)
    assert found == Channel("a", 0, 1, 2.0)  # 4.0, 2.5, 8.0 and 2.0; the last image disagrees
    assert suspicious("a", lifted_of(rows), y, 0) == []
    assert suspicious("a", lifted_of([*rows, [3.0, 1.0, 0.0]]), torch.tensor([0, 0, 2, 2, 0, 0]), 1) == []


def test_images_of_the_class_itself_vote_but_do_not_set_the_value() -> None:
    rows = [[0.0, 5.0, 1.0], [0.0, 4.0, 3.9], [0.0, 9.0, 1.0]]
    (found,) = suspicious("a", lifted_of(rows), torch.tensor([0, 1, 2]), 0)
    assert found.value == 4.0  # not the 0.1 of the image that is of class 1 anyway
    assert suspicious("a", lifted_of(rows), torch.tensor([1, 1, 1]), 0) == []


def test_channels_that_move_nothing_or_give_no_numbers_are_no_candidates() -> None:
    y = torch.tensor([0, 1, 2])
    assert suspicious("a", torch.zeros(2, 3, 3), y, 0) == []
    for bad in (torch.nan, torch.inf, -torch.inf):
        rows = torch.tensor([[0.0, 5.0, 1.0]] * 3)
        rows[1, 0] = bad
        assert suspicious("a", rows[None], y, 1) == []


@given(seed=st.integers(0, 10_000), classes=st.integers(3, 8))
@settings(max_examples=40, deadline=None)
def test_only_differences_matter_and_classes_have_no_order(seed: int, classes: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    lifted = torch.randn(6, 5, classes, generator=rng)
    lifted[:, :, seed % classes] += 2.0
    y = torch.randint(classes, (5,), generator=rng)
    found = suspicious("a", lifted, y, 2)
    # One number for all logits of an image.
    shifted = suspicious("a", lifted + torch.randn(6, 5, 1, generator=rng), y, 2)
    assert [c[:3] for c in shifted] == [c[:3] for c in found]
    assert [c.value for c in shifted] == pytest.approx([c.value for c in found], abs=1e-5)
    order = torch.randperm(classes, generator=rng)
    place = order.argsort()
    moved = suspicious("a", lifted[..., order], place[y], 2)
    assert [(c.channel, c.target, c.value) for c in moved] == [
        (c.channel, int(place[c.target]), c.value) for c in found
    ]


def test_half_of_the_places_are_shared_among_layers_and_the_rest_goes_to_the_best() -> None:
    loud = [Channel("loud", c, 0, 100.0 - c) for c in range(30)]
    quiet = [Channel(f"quiet {i}", c, 1, 1.0 + i + 0.1 * c) for i in range(2) for c in range(5)]
    found = shortlist([*quiet, *loud], 20, 3)
    assert Counter(channel.layer for channel in found) == {"loud": 14, "quiet 1": 3, "quiet 0": 3}
    assert [c.value for c in found] == sorted((c.value for c in found), reverse=True)
    assert found[0] == loud[0]  # a peer sorted the other way round and took the least elevated
    assert {c.channel for c in found if c.layer == "quiet 1"} == {4, 3, 2}


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5), count=st.integers(1, 20), per_layer=st.integers(1, 4)
)
@settings(max_examples=60, deadline=None)
def test_a_shortlist_is_full_where_it_can_be_and_has_the_best_of_all(
    sizes: list[int], count: int, per_layer: int
) -> None:
    found = [Channel(str(i), c, 0, (7 * i + 3 * c) % 11 + 1.0) for i, size in enumerate(sizes) for c in range(size)]
    kept = shortlist(found, count, per_layer)
    assert len(kept) == min(count, len(found)) == len({c[:2] for c in kept})
    if found:
        assert kept[0].value == max(c.value for c in found)
