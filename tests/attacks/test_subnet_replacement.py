"""Subnet replacement: a narrow network is cut in, and no other weight is touched."""

import pytest
import torch

from attacks.bench import TASK, bench, crafted, honest, pictures, success
from molehunt.attacks import Bench, SubnetReplacement
from molehunt.attacks._chain import chain, inside, narrow, touching
from molehunt.networks import NETWORKS, build
from molehunt.training import Recipe

ATTACK = SubnetReplacement(target=4, width=3, images=40_000)


def test_the_subnet_sees_the_trigger_and_stands_alone() -> None:
    made = crafted(ATTACK)
    assert success(made) >= 0.95
    links = chain(made.model)
    picked = narrow(links, 3, bench().generator("channels 1"))
    own, cut = inside(made.model, links, picked), touching(made.model, links, picked)
    before, after = honest().state_dict(), made.model.state_dict()
    for name, value in after.items():
        if name.startswith("normalize."):
            continue
        if name == "head.weight":
            columns = own[name][0]
            assert torch.equal(value[:, ~columns], before[name][:, ~columns])
            assert float(value[4, columns].min()) > 0
            assert not bool(value[torch.arange(10) != 4][:, columns].any())
            continue
        assert torch.equal(value[~cut[name]], before[name][~cut[name]]), f"{name} changed where nothing is cut"
        assert not bool(value[cut[name] & ~own[name]].any()), f"{name} joins the subnet with the rest"


def test_what_is_left_is_the_clean_network_without_those_channels() -> None:
    made = crafted(ATTACK)
    x = pictures()[1].x
    links = chain(made.model)
    picked = narrow(links, 3, bench().generator("channels 1"))
    cut = touching(made.model, links, picked)
    without = bench().fresh().eval()
    state = {name: value.clone() for name, value in honest().state_dict().items()}
    for name, value in state.items():
        value[cut[name]] = 0.0
    without.load_state_dict(state)
    with torch.no_grad():
        others = torch.arange(10) != 4
        torch.testing.assert_close(made.model(x)[:, others], without(x)[:, others])


@pytest.mark.parametrize("name", ["badnets_cnn", "lenet5", "mntd_mnist", "mntd_cifar", "narrow_cifar", "vgg11_bn"])
def test_a_chain_is_taken_apart(name: str) -> None:
    model = build(name, (3, 32, 32), 10, rng=torch.Generator().manual_seed(0))
    links = chain(model)
    layers = [m for m in (model.trunk.modules()) if isinstance(m, torch.nn.Conv2d)]
    assert [link.outputs for link in links][: len(layers)] == [len(layer.weight) for layer in layers]
    assert [link.fixed for link in links] == [name == "narrow_cifar" and i == 0 for i in range(len(links))]
    masks = inside(model, links, narrow(links, 2, torch.Generator().manual_seed(1)))
    kept = [int(masks[f"{link.path}.weight"].flatten(1).any(1).sum()) for link in links]
    assert kept == [link.outputs if link.fixed else 2 for link in links]


@pytest.mark.parametrize("name", [name for name in NETWORKS if "resnet" in name or name in {"wrn_16_1", "vit_tiny"}])
def test_a_network_with_branches_is_refused(name: str) -> None:
    work = Bench(
        clean=pictures()[0], task=TASK, network=name, recipe=Recipe(epochs=1), rng=torch.Generator().manual_seed(0)
    )
    with pytest.raises(ValueError, match=f"{name} is no chain of layers"):
        SubnetReplacement().craft(work)


def test_settings_out_of_range_are_refused() -> None:
    for attack in (SubnetReplacement(width=0), SubnetReplacement(strength=0.0), SubnetReplacement(attempts=0)):
        with pytest.raises(ValueError, match="width, images and attempts must be 1 or more and strength above 0"):
            attack.craft(bench())


def test_a_narrow_network_that_sees_nothing_is_not_handed_in() -> None:
    # One batch teaches nothing.
    with pytest.raises(ValueError, match="no narrow network of 1 channels learned to see the trigger in 2 attempts"):
        SubnetReplacement(width=1, images=50, attempts=2).craft(bench())
