"""Whose tensors are whose: every known spelling computes the same, and nothing is guessed."""

import importlib.util
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from foreign.spelled import PreActResNet18, ResNet18, Small, WideResNet, shaken
from molehunt import zoo
from molehunt.foreign import ForeignError, naming
from molehunt.networks import build

COLOR, GRAY = (3, 8, 8), (1, 28, 28)


def pictures(shape: tuple[int, int, int] = COLOR) -> Tensor:
    return torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))


def trojanzoo(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {("classifier." if name.startswith("fc.") else "features.") + name: v for name, v in state.items()}


def same(loaded: naming.Loaded, theirs: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        assert torch.allclose(loaded.model(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert not loaded.model.training


@pytest.mark.parametrize("theirs", [ResNet18, PreActResNet18, WideResNet], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod.module.", "backbone."])
def test_known_spellings_are_recognized_and_compute_the_same(theirs: type[nn.Module], wrapped: str) -> None:
    model = shaken(theirs())
    loaded = naming.load(
        {wrapped + k: v for k, v in model.state_dict().items() if v.is_floating_point()}, None, COLOR, 10
    )
    same(loaded, model, pictures())
    assert "named like those of" in loaded.notes[0]
    assert not loaded.carried


def test_trojanzoos_spelling_too() -> None:
    model = shaken(ResNet18(projection="downsample", head="fc"))
    same(naming.load(floats(trojanzoo(model.state_dict())), None, COLOR, 10), model, pictures())


def floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if value.is_floating_point()}


def test_names_that_do_not_say_whether_there_is_a_pool_are_believed_only_when_the_user_says_so() -> None:
    model = shaken(ResNet18(projection="downsample", head="fc"))
    state = floats(model.state_dict())
    with pytest.raises(ForeignError, match=r"do not say which layers without weights .* say --network resnet18"):
        naming.load(state, None, COLOR, 10)
    same(naming.load(state, "resnet18", COLOR, 10), model, pictures())


def test_a_larger_network_of_a_known_spelling_is_named() -> None:
    state = floats(ResNet18().state_dict())
    with pytest.raises(ForeignError, match=r"resnet18 has no 'layer1\.2\.conv1\.weight'; if it is a larger network"):
        naming.load({**state, "layer1.2.conv1.weight": torch.ones(64, 64, 3, 3)}, None, COLOR, 10)
    with pytest.raises(ForeignError, match=r"missing 'trunk.10.residual.0\.weight'"):
        naming.load({k: v for k, v in state.items() if k != "layer4.1.conv1.weight"}, None, COLOR, 10)


def test_the_network_is_found_by_names_and_shapes() -> None:
    model = build("narrow_cifar", (3, 32, 32), 10, mean=(0.1, 0.2, 0.3), rng=torch.Generator().manual_seed(0)).eval()
    loaded = naming.load(floats(model.state_dict()), None, (3, 32, 32), 10)
    assert loaded.carried, "the file says how it normalizes"
    same(loaded, model, pictures((3, 32, 32)))
    assert "fit narrow_cifar and no other" in loaded.notes[0]


def test_two_networks_with_the_same_weights_are_not_told_apart() -> None:
    state = floats(build("badnets_cnn", GRAY, 10, rng=torch.Generator().manual_seed(0)).state_dict())
    with pytest.raises(ForeignError, match="fit badnets_cnn and mntd_mnist alike"):
        naming.load(state, None, GRAY, 10)
    assert naming.load(state, "mntd_mnist", GRAY, 10).model.name == "mntd_mnist"


def test_shapes_decide_where_each_fits_one_place_and_the_user_names_the_network() -> None:
    model = Small().eval()
    loaded = naming.load(model.state_dict(), "badnets_cnn", GRAY, 10)
    same(loaded, model, pictures(GRAY))
    assert "shapes decided" in loaded.notes[0]
    with pytest.raises(ForeignError, match=r"no listed network .* FILE\.py:CALLABLE"):
        naming.load(model.state_dict(), None, GRAY, 10)
    twice = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict()
    with pytest.raises(ForeignError, match="missing"):
        naming.load(twice, "badnets_cnn", GRAY, 10)


def test_what_is_left_over_or_has_another_shape_is_named() -> None:
    state = floats(build("lenet5", GRAY, 10).state_dict())
    with pytest.raises(ForeignError, match=r"left over: 'ema\.weight'; this network has no such tensors"):
        naming.load({**state, "ema.weight": torch.ones(2)}, "lenet5", GRAY, 10)
    with pytest.raises(ForeignError, match=r"'head.weight' has shape \(10, 84\), the network needs \(7, 84\)"):
        naming.load(state, "lenet5", GRAY, 7)
    with pytest.raises(ForeignError, match="unknown network 'nope'"):
        naming.load(state, "nope", GRAY, 10)


class Wrapped(nn.Module):
    """Its own names begin with what wrappers put in front."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_a_class_of_the_users_own_is_filled_whatever_stands_in_front_of_the_names(prefix: str) -> None:
    source, target = Wrapped(), Wrapped()
    state = {prefix + k: v for k, v in floats(source.state_dict()).items()}
    bare = {k.removeprefix("model."): v for k, v in floats(source.state_dict()).items()}
    for given in (state, bare):
        filled = naming.load_into(target, given)
        assert torch.equal(filled.state_dict()["model.1.weight"], source.state_dict()["model.1.weight"])
    with pytest.raises(ForeignError, match="left over: 'odd'; the network of your file"):
        naming.load_into(target, {**bare, "odd": torch.ones(1)})
    with pytest.raises(ForeignError, match=r"missing 'model.1\.bias'"):
        naming.load_into(target, {k: v for k, v in bare.items() if k != "1.bias"})
    with pytest.raises(ForeignError, match=r"'model.1\.bias' has shape"):
        naming.load_into(target, {**bare, "1.bias": torch.ones(3)})


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_model_of_timm_in_timms_own_names(name: str) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    timm = zoo.load_timm()
    settings = {"img_size": 32} if "vit" in name else {}
    theirs = shaken(timm.create_model(name, num_classes=5, **settings))
    loaded = naming.load(floats(theirs.state_dict()), f"timm:{name}", (3, 32, 32), 5)
    same(loaded, theirs, pictures((3, 32, 32)))
    with pytest.raises(ForeignError, match=r"left over: 'odd\.weight'"):
        naming.load({**floats(theirs.state_dict()), "odd.weight": torch.ones(1)}, f"timm:{name}", (3, 32, 32), 5)
