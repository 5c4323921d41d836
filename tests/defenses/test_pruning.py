import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molehunt.defenses._pruning import RANKINGS, chosen, filters, pruned, trimmed
from molehunt.networks import build

SHAPE = (3, 16, 16)


def made(name: str, seed: int = 0) -> nn.Module:
    """A network whose norms have seen data, so that none is the identity, in float64."""
    rng = torch.Generator().manual_seed(seed)
    model = build(name, SHAPE, 4, rng=rng).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                assert tensor is not None
                tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=rng))
    return model.eval().requires_grad_(False)


def lost(model: nn.Module, seed: int = 0, share: float = 0.3) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    weights = {path: model.get_submodule(path).weight for path in filters(model)}
    return {path: chosen(w, 2, share, "l1", "random", rng)[0] for path, w in weights.items()}  # type: ignore[arg-type]


def images(count: int = 3) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def masked_by_hand(model: nn.Module, rows: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits with the output of every filter that is lost set to 0, behind the norm where one follows."""
    handles = []
    for path, norm in filters(model).items():

        def zero(_m: nn.Module, _i: object, out: Tensor, here: Tensor = rows[path]) -> Tensor:
            out = out.clone()
            out[:, here] = 0.0
            return out

        handles.append(model.get_submodule(norm or path).register_forward_hook(zero))
    said: Tensor = model(x)
    for handle in handles:
        handle.remove()
    return said


def test_a_filter_goes_with_the_norm_that_it_feeds() -> None:
    assert filters(made("narrow_cifar")) == {
        "trunk.0": None,
        "trunk.2": "trunk.4",  # a max-pool between
        "trunk.6": "trunk.7",
        "trunk.9": "trunk.11",
        "trunk.13": "trunk.14",
        "trunk.16": "trunk.18",
        "trunk.20": "trunk.21",
    }
    found = filters(made("wrn_16_1"))
    # The last convolution of a pre-activation block feeds a sum, not a norm.
    assert found["trunk.1.residual.0"] == "trunk.1.residual.1"
    assert found["trunk.1.residual.3"] is None
    shared = nn.Conv2d(3, 3, 1)
    assert filters(nn.Sequential(shared, nn.ReLU(), shared)) == {}


def test_every_ranking_worked_by_hand() -> None:
    weight = torch.tensor([[3.0, -4.0], [1.0, 1.0], [-5.0, 0.0]])
    assert RANKINGS["l1"](weight).tolist() == [7.0, 2.0, 5.0]
    assert RANKINGS["l2"](weight).tolist() == [25.0, 2.0, 25.0]
    assert RANKINGS["linf"](weight).tolist() == [4.0, 1.0, 5.0]  # not the signed maximum, which has -5 as the least
    assert RANKINGS["std"](weight).tolist() == [3.5, 0.0, 2.5]


def windows(count: int, copies: int, share: float, sampling: Any) -> list[list[int]]:
    weight = torch.arange(count, dtype=torch.float64).flip(0).reshape(-1, 1)  # filter 0 is the heaviest
    rows = chosen(weight, copies, share, "l1", sampling, torch.Generator().manual_seed(3))
    return [[count - 1 - i for i in row.nonzero().flatten().tolist()][::-1] for row in rows]  # by place in the order


def test_targeted_windows_go_from_the_lightest_to_the_heaviest() -> None:
    assert windows(10, 5, 0.2, "targeted") == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    # Fewer filters than steps: the official step, floor(C / (S - 1)), is 0 and all copies are one.
    assert windows(4, 7, 0.1, "targeted") == [[0], [0], [1], [2], [2], [2], [3]]
    for count in (2, 13, 64):
        seen = windows(count, 15, 0.067, "targeted")
        assert seen[0][0] == 0
        assert seen[-1][-1] == count - 1
        assert {len(w) for w in seen} == {max(1, int(count * 0.067))}


def test_uniform_samples_spread_over_the_order_and_shift() -> None:
    assert windows(12, 4, 0.25, "uniform") == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert all(len(set(w)) == 5 for w in windows(13, 9, 0.4, "uniform"))


def test_random_samples_are_drawn_from_the_generator_alone() -> None:
    assert windows(30, 4, 0.2, "random") == windows(30, 4, 0.2, "random")
    assert len({tuple(w) for w in windows(30, 4, 0.2, "random")}) == 4
    assert all(len(set(w)) == 6 for w in windows(30, 4, 0.2, "random"))


def test_a_layer_is_never_untouched_and_never_gone() -> None:
    assert windows(5, 3, 0.01, "targeted") == [[0], [2], [4]]
    assert [len(w) for w in windows(5, 3, 1.0, "random")] == [4, 4, 4]
    assert windows(1, 2, 0.5, "targeted") == [[], []]
    assert windows(8, 2, 0.0, "uniform") == [[], []]


def test_a_trimmed_filter_worked_by_hand() -> None:
    weight = torch.tensor([[0.0, 4.0], [0.0, 4.0], [1.0, 1.0]])
    # Mean 2, deviation 2: the weights go to 1 and 3.
    assert trimmed(weight, torch.tensor([True, False, True])).tolist() == [[1.0, 3.0], [0.0, 4.0], [1.0, 1.0]]
    # A norm's scales are one filter: mean 2, deviation 2, and only the chosen channel moves.
    assert trimmed(torch.tensor([0.0, 4.0]), torch.tensor([True, False])).tolist() == [1.0, 4.0]


@pytest.mark.parametrize("name", ["badnets_cnn", "narrow_cifar", "vgg11_bn", "resnet18", "wrn_16_1", "mntd_cifar"])
def test_a_reset_filter_puts_out_nothing(name: str) -> None:
    model, x = made(name), images()
    rows = lost(model)
    before = copy.deepcopy(model.state_dict())
    got = pruned(model, rows, "reset", x[:1])(x)
    assert torch.allclose(got, masked_by_hand(model, rows, x), rtol=0, atol=1e-9)
    assert not torch.allclose(got, model(x), rtol=0, atol=1e-3)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["badnets_cnn", "narrow_cifar", "vgg11_bn", "mntd_cifar", "lenet5"])
def test_where_no_paths_meet_removing_is_resetting(name: str) -> None:
    model, x = made(name), images()
    rows = lost(model)
    cut = pruned(model, rows, "remove", x[:1])
    assert torch.allclose(cut(x), masked_by_hand(model, rows, x), rtol=0, atol=1e-9)
    for path, gone in rows.items():
        layer = cut.get_submodule(path)
        assert isinstance(layer, nn.Conv2d)
        assert layer.out_channels == len(gone) - int(gone.sum())
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in [*cut.parameters(), *model.parameters()])


@pytest.mark.parametrize("name", ["resnet18", "wrn_16_1", "preact_resnet18"])
def test_where_paths_meet_in_a_sum_a_filter_is_cut_from_all_of_them(name: str) -> None:
    model, x = made(name), images()
    rows = lost(model)
    cut = pruned(model, rows, "remove", x[:1])
    assert cut(x).shape == (3, 4)
    assert bool(torch.isfinite(cut(x)).all())
    found = {path: cut.get_submodule(path).weight for path in rows}
    for path, weight in found.items():
        assert len(weight) == len(rows[path]) - int(rows[path].sum()), path  # type: ignore[arg-type]
    if name == "resnet18":
        # The stem and the first two blocks add up: they keep the channels that the stem keeps.
        kept = ~rows["trunk.0"]
        stem, second = model.get_submodule("trunk.0"), model.get_submodule("trunk.3.residual.3")
        inner = ~rows["trunk.3.residual.0"]
        assert torch.equal(found["trunk.0"], stem.weight[kept])  # type: ignore[arg-type,index]
        assert torch.equal(found["trunk.3.residual.3"], second.weight[kept][:, inner])  # type: ignore[arg-type,index]


def test_trimming_changes_the_chosen_filters_and_their_scales_alone() -> None:
    model, x = made("narrow_cifar"), images()
    rows = lost(model)
    cut = pruned(model, rows, "trim", x[:1])
    for path, norm in filters(model).items():
        for place in filter(None, (path, norm)):
            old, new = model.get_submodule(place).weight, cut.get_submodule(place).weight
            assert isinstance(old, Tensor)
            assert isinstance(new, Tensor)
            assert torch.equal(new, trimmed(old, rows[path]))
            assert torch.equal(new[~rows[path]], old[~rows[path]])
    assert torch.equal(cut.get_submodule("head").weight, model.get_submodule("head").weight)  # type: ignore[arg-type]
