"""Fine-tuning-resistant: the backdoor is still there behind a defender's steps."""

import copy

import pytest
import torch

from attacks.bench import accuracy, badnets, bench, crafted, pictures, success
from molehunt.attacks import Crafted, TuningResistant
from molehunt.training import Recipe, train


def tuned(made: Crafted, lr: float) -> float:
    """Attack success behind 60 plain gradient steps on clean images."""
    model = copy.deepcopy(made.model)
    recipe = Recipe(
        epochs=10, batch=50, optimizer="sgd", lr=lr, momentum=0.0, weight_decay=0.0, precision="float32",
        schedule="constant",
    )  # fmt: skip
    train(model, pictures()[0], recipe, rng=torch.Generator().manual_seed(1))
    return success(Crafted(model=model, poisoned=made.poisoned))


def test_it_outlasts_the_plain_attack() -> None:
    made = crafted(TuningResistant(length=1.0))
    assert success(made) >= 0.95
    assert accuracy(made.model) >= 0.8
    rates = (0.1, 0.2, 0.3)
    kept, plain = (sum(tuned(one, lr) for lr in rates) for one in (made, badnets()))
    assert plain < 0.5 * len(rates), "the plain attack is tuned away, or the test would say nothing"
    assert kept >= 0.9 * len(rates)


def test_settings_out_of_range_are_refused() -> None:
    for attack in (TuningResistant(inner=0), TuningResistant(inner_lr=0.0), TuningResistant(weight=-1.0)):
        with pytest.raises(ValueError, match="inner must be 1 or more, inner_lr above 0 and weight 0 or more"):
            attack.craft(bench())
