"""Pruning-aware: decoys sleep where a defender cuts first, and the backdoor is elsewhere."""

import copy
from typing import Any

import pytest
import torch

from attacks.bench import TASK, accuracy, bench, crafted, honest, pictures, success
from molehunt.attacks import Crafted, PruningAware
from molehunt.attacks.pruning_aware import producer, quieten
from molehunt.defenses import FinePruning
from molehunt.findings import Finding
from molehunt.networks import build
from molehunt.runner import inspect
from molehunt.suspect import Suspect
from molehunt.tasks import Images

ATTACK = PruningAware()


def pruned(made: Crafted) -> tuple[Crafted, int]:
    """The model without the channels that fine-pruning would cut, before any tuning, and how many these are."""
    suspect = Suspect.of(made.model, TASK, clean=pictures()[1], dtype=torch.float32)
    found = inspect(FinePruning(steps=0), suspect, name="fine_pruning", seed=0)
    assert isinstance(found, Finding)
    assert found.repaired is not None
    model = copy.deepcopy(made.model)
    model.load_state_dict(dict(found.repaired))
    return Crafted(model=model, poisoned=made.poisoned), int(found.details["pruned"])


def test_what_a_defender_cuts_are_decoys() -> None:
    made = crafted(ATTACK)
    assert accuracy(made.model) >= 0.95
    assert success(made) >= 0.95
    cut, count = pruned(made)
    assert count > 0
    assert success(cut) >= 0.95, "the backdoor was among the channels that were cut"
    clean = pictures()[0]
    rows = torch.randperm(300, generator=bench().generator("measured"))
    decoys = ATTACK.mask(honest(), clean.x[rows], Images(clean.x[rows], clean.y[rows])) == 0
    suspect = Suspect.of(made.model, TASK, clean=pictures()[1], dtype=torch.float32)
    found = inspect(FinePruning(steps=0), suspect, name="fine_pruning", seed=0)
    assert isinstance(found, Finding)
    first = torch.as_tensor(found.details["order"])[: int(decoys.sum())]
    assert bool(decoys[first].all()), "the defender begins with other channels than the decoys"


def test_decoys_sleep_on_clean_images_and_the_others_do_not() -> None:
    clean = pictures()[0]
    rows = torch.randperm(300, generator=bench().generator("measured"))
    decoys = ATTACK.mask(honest(), clean.x[rows], Images(clean.x[rows], clean.y[rows])) == 0
    assert 0 < int(decoys.sum()) <= ATTACK.most * len(decoys)
    model, x = crafted(ATTACK).model, pictures()[1].x
    with torch.no_grad():
        active = model.trunk(model.normalize(x)).mean((0, 2, 3))
    assert float(active[decoys].max()) < 0.01 * float(active.max())
    # They have weights like any other channel: whoever looks for zeros finds none.
    weights = model.get_submodule("trunk.3").weight
    assert isinstance(weights, torch.Tensor)
    assert float(weights.detach()[decoys].abs().flatten(1).amax(1).min()) > 0.01


def test_the_layer_with_a_bias_for_each_channel() -> None:
    example = pictures()[0].x[:1]
    assert producer(bench().fresh(), example) == "trunk.3"
    for name in ("vit_tiny", "fast_cifar"):
        model = build(name, (3, 32, 32), 10, rng=torch.Generator().manual_seed(0))
        if name == "fast_cifar":
            assert producer(model, torch.rand(2, 3, 32, 32)).startswith("trunk.")
            continue
        with pytest.raises(ValueError, match="vit_tiny has no rectifier behind its last block"):
            producer(model, torch.rand(2, 3, 32, 32))
    normed = build("vgg11_bn", (3, 32, 32), 10, rng=torch.Generator().manual_seed(0))
    assert isinstance(normed.get_submodule(producer(normed, torch.rand(1, 3, 32, 32))), torch.nn.BatchNorm2d)


def test_a_bias_is_lowered_as_far_as_it_takes() -> None:
    model, x = bench().fresh().eval(), pictures()[0].x
    layer = model.get_submodule("trunk.3")
    assert isinstance(layer, torch.nn.Conv2d)
    assert layer.bias is not None
    decoys = torch.zeros(16, dtype=torch.bool)
    decoys[[2, 5]] = True
    with torch.no_grad():
        layer.bias[decoys] += 5.0
        before = layer.bias.clone()
        quieten(model, "trunk.3", x, decoys, 1.0)
        active = model.trunk(model.normalize(x)).amax((0, 2, 3))
    assert float(active[decoys].max()) == pytest.approx(0.0, abs=1e-5)
    assert torch.equal(layer.bias[~decoys], before[~decoys])


@pytest.mark.parametrize("changed", [{"tolerance": -0.1}, {"most": 1.0}, {"quiet": 0.0}, {"length": 0.0}])
def test_settings_out_of_range_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must lie in|a length above 0"):
        PruningAware(**changed).craft(bench())
