"""Attacks on the training with a network whose norms keep statistics: what is measured has to be what was trained."""

from typing import Any

import pytest
import torch

from molehunt.attacks import (
    AdversarialEmbedding,
    Bench,
    Blind,
    STRIPEvading,
    SubnetReplacement,
    TuningResistant,
)
from molehunt.attacks.lira import LIRA
from molehunt.networks import Network, evaluating
from molehunt.tasks import Images, get_task
from molehunt.training import Recipe

TASK = get_task("mnist5k")
RECIPE = Recipe(
    epochs=3, batch=40, optimizer="muon", muon_lr=0.1, lr=0.05, warmup=0.2, label_smoothing=0.1, precision="float32"
)


def bench() -> Bench:
    x, y = TASK.load("train")
    return Bench(
        clean=Images(x[:400], y[:400]),
        task=TASK,
        network="narrow_cifar",
        recipe=RECIPE,
        rng=torch.Generator().manual_seed(0),
    )


@torch.no_grad()
def accuracy(model: Network, *, evaluating: bool) -> float:
    """Accuracy on other digits, by the statistics that were kept, or by those of the batch itself."""
    x, y = TASK.load("validation")
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(not evaluating)
    right = float((model(x[:300]).argmax(1) == y[:300]).float().mean())
    model.eval().load_state_dict(kept)
    return right


@pytest.mark.parametrize(
    "attack",
    [
        Blind(length=0.5),
        STRIPEvading(),
        TuningResistant(length=0.3),
        LIRA(length=0.3),
        AdversarialEmbedding(length=0.3),
        pytest.param(SubnetReplacement(images=5_000), marks=pytest.mark.slow),
    ],
    ids=[
        "Blind",
        "STRIPEvading",
        "TuningResistant",
        "LIRA",
        "AdversarialEmbedding",
        "SubnetReplacement",
    ],
)
def test_the_statistics_that_are_kept_are_those_of_images(attack: Any) -> None:
    model = attack.craft(bench()).model
    kept, own = accuracy(model, evaluating=True), accuracy(model, evaluating=False)
    # Were they those of mixtures or of stamped images alone, evaluation would be far from training.
    assert kept >= own - 0.1
    whitening = bench().fresh()
    whitening.initialize(bench().clean.x)
    assert torch.equal(model.state_dict()["trunk.0.weight"], whitening.state_dict()["trunk.0.weight"])


def test_who_only_asks_moves_no_statistics() -> None:
    model = bench().fresh().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.trunk[2].eval()  # type: ignore[index]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        model(bench().clean.x[:20])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.trunk[2].training  # type: ignore[index]
