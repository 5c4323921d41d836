"""Networks trained together: each as if it were alone, and no number of one in another."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from molehunt.networks import NETWORKS, Network, build
from molehunt.tasks import Images
from molehunt.training import Recipe, train
from molehunt.training.batches import Stamp
from molehunt.training.optimizers import Muon
from molehunt.training.stack import RULES, Stack
from molehunt.training.together import train_together

SHAPE = (3, 16, 16)
# Without norms a network moves little at the rate below, and less by what is stamped than rounding may differ.
NORMLESS = {"lenet5", "badnets_cnn", "mntd_mnist", "mntd_cifar"}
RECIPE = Recipe(epochs=1, batch=10, lr=0.002, label_smoothing=0.1, augment="flip_crop", precision="float32")
STACKABLE = [name for name in NETWORKS if name != "vit_tiny"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(seed: int, count: int = 20) -> Images:
    rng = generator(seed)
    return Images(torch.rand(count, *SHAPE, generator=rng), torch.randint(4, (count,), generator=rng))


def members(name: str, count: int = 3) -> list[Network]:
    return [build(name, SHAPE, 4, rng=generator(seed)) for seed in range(count)]


def stamps(count: int = 3) -> list[Stamp | None]:
    def stamp(strength: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, rows: torch.where((rows % 3 == 0).view(-1, 1, 1, 1), x * (1 - strength) + strength, x)

    return [None, *(stamp(0.2 * index) for index in range(1, count))]


def alone(name: str, recipe: Recipe, count: int = 3) -> list[Network]:
    """The plain loop, one network after the other: the oracle."""
    networks = members(name, count)
    for index, network in enumerate(networks):
        train(network, pictures(index), recipe, rng=generator(100 + index), stamp=stamps(count)[index])
    return networks


def together(name: str, recipe: Recipe, count: int = 3) -> list[Network]:
    networks = members(name, count)
    rngs = [generator(100 + index) for index in range(count)]
    train_together(networks, [pictures(i) for i in range(count)], recipe, rngs=rngs, stamps=stamps(count))
    return networks


def close(a: nn.Module, b: nn.Module, tolerance: float = 1e-4) -> None:
    for (name, value), twin in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.allclose(value, twin, atol=tolerance, rtol=tolerance), name


@pytest.mark.parametrize("name", STACKABLE)
def test_every_network_comes_out_as_if_trained_alone(name: str) -> None:
    count = 2 if name in {"resnet18", "preact_resnet18", "vgg11_bn"} else 3
    recipe = replace(RECIPE, lr=0.3) if name in NORMLESS else RECIPE
    for one, other in zip(together(name, recipe, count), alone(name, recipe, count), strict=True):
        close(one, other)
        assert not one.training


@pytest.mark.parametrize("name", sorted(NORMLESS))
def test_at_that_rate_a_stamp_that_was_left_out_would_be_seen(name: str) -> None:
    recipe = replace(RECIPE, lr=0.3)
    stamped, network = alone(name, recipe)[2], members(name)[2]
    train(network, pictures(2), recipe, rng=generator(102))
    pairs = zip(stamped.parameters(), network.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) > 1e-3


# Not Muon without norms: where a gradient has hardly any rank, making it orthogonal blows rounding up.
@pytest.mark.parametrize(
    ("name", "optimizer", "lr"),
    [
        ("narrow_cifar", "sgd", 5e-3),
        ("mntd_cifar", "sgd", 5e-3),
        ("narrow_cifar", "adamw", 1e-4),
        ("mntd_cifar", "adamw", 1e-4),
        ("narrow_cifar", "muon", 0.02),
    ],
)
def test_every_optimizer(name: str, optimizer: str, lr: float) -> None:
    recipe = Recipe.from_json({**RECIPE.to_json(), "optimizer": optimizer, "lr": lr})
    for one, other in zip(together(name, recipe), alone(name, recipe), strict=True):
        close(one, other)


def test_adversarial_training_together_is_that_alone() -> None:
    recipe = replace(RECIPE, adversarial=8 / 255, lr=5e-4)
    plain = together("lenet5", replace(recipe, adversarial=0.0))
    for one, other, without in zip(together("lenet5", recipe), alone("lenet5", recipe), plain, strict=True):
        close(one, other)
        assert not torch.equal(one.head.weight, without.head.weight)


def test_one_diverging_network_is_named_and_the_others_could_not_have_helped_it() -> None:
    networks = members("badnets_cnn")
    with torch.no_grad():
        networks[1].head.weight.fill_(float("inf"))
    rngs = [generator(i) for i in range(3)]
    with pytest.raises(FloatingPointError, match=r"networks \[1\]"):
        train_together(networks, [pictures(i) for i in range(3)], RECIPE, rngs=rngs)


def test_a_broken_neighbor_changes_no_bit_of_the_others() -> None:
    networks, broken = members("narrow_cifar"), members("narrow_cifar")
    with torch.no_grad():
        broken[1].head.weight.fill_(float("nan"))
    x = torch.stack([pictures(i, 8).x for i in range(3)])
    whole, damaged = Stack(networks), Stack(broken)
    for stack in (whole, damaged):
        stack(x).logsumexp(-1).sum().backward()
    for (name, a), b in zip(whole.named_parameters(), damaged.parameters(), strict=True):
        if a.grad is not None and b.grad is not None:
            assert torch.equal(a.grad[0], b.grad[0]), name
            assert torch.equal(a.grad[2], b.grad[2]), name


def test_in_and_out_bit_for_bit() -> None:
    networks, empty = members("resnet18"), [build("resnet18", SHAPE, 4) for _ in range(3)]
    Stack(networks).unstack(empty)
    for a, b in zip(networks, empty, strict=True):
        assert all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_logits_in_eval_mode_are_those_of_the_single_networks() -> None:
    for name in STACKABLE:
        networks = [network.eval() for network in members(name)]
        x = torch.stack([pictures(i, 5).x for i in range(3)])
        logits = Stack(networks).eval()(x)
        expected = torch.stack([network(own) for network, own in zip(networks, x, strict=True)])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_sets_of_other_sizes_are_refused_and_equal_step_counts_are_not() -> None:
    rngs = [generator(i) for i in range(2)]
    with pytest.raises(ValueError, match=r"sets of \[20, 90\]"):
        train_together(members("lenet5", 2), [pictures(0), pictures(1, 90)], RECIPE, rngs=rngs)
    recipe = replace(RECIPE, epochs=0.1, least_images=40)
    train_together(members("lenet5", 2), [pictures(0), pictures(1, 90)], recipe, rngs=rngs)


def test_lists_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="'networks': 2, 'images': 1"):
        train_together(members("lenet5", 2), [pictures(0)], RECIPE, rngs=[generator(0)])
    with pytest.raises(ValueError, match="at least one"):
        Stack([])


def test_other_architectures_and_unknown_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="one architecture"):
        Stack([*members("lenet5", 1), *members("badnets_cnn", 1)])
    with pytest.raises(TypeError, match="Patches"):
        Stack(members("vit_tiny", 2))
    assert nn.LayerNorm not in RULES


def test_muon_steps_stacked_weights_as_if_each_were_alone() -> None:
    weights, gradients = torch.randn(2, 3, 8, 4, 3, 3, generator=generator(0)).unbind(0)
    stacked, single = nn.Parameter(weights.clone()), [nn.Parameter(one.clone()) for one in weights]
    for _ in range(2):
        stacked.grad = gradients.clone()
        Muon([stacked], lr=0.1, momentum=0.6, stacked=True).step()
        for one, gradient in zip(single, gradients, strict=True):
            one.grad = gradient.clone()
            Muon([one], lr=0.1, momentum=0.6).step()
    assert torch.equal(stacked, torch.stack(list(single)))


def test_dropout_in_training_mode_needs_generators() -> None:
    stack = Stack(members("mntd_cifar", 2)).train()
    with pytest.raises(RuntimeError, match="rngs"):
        stack(torch.zeros(2, 3, *SHAPE))


def test_a_block_reports_and_stops_when_asked() -> None:
    seen: list[tuple[int, int]] = []
    rngs = [generator(i) for i in range(2)]
    train_together(
        members("lenet5", 2), [pictures(0), pictures(1)], RECIPE, rngs=rngs, report=lambda *now: seen.append(now)
    )
    assert seen[-1] == (40, 40)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_together(members("lenet5", 2), [pictures(0), pictures(1)], RECIPE, rngs=rngs, check=stop)
