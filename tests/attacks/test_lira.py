"""LIRA: an invisible trigger that a network draws, learned with the classifier."""

import pytest
import torch

from attacks.bench import bench, crafted, honest, pictures, success
from molehunt.attacks import LIRA
from molehunt.attacks.lira import draw
from molehunt.triggers import Encoded

ATTACK = LIRA()


def test_it_works_within_its_bound_and_on_no_other_network() -> None:
    made = crafted(ATTACK)
    trigger, (x, y) = made.poisoned.trigger, pictures()[1]
    assert isinstance(trigger, Encoded)
    assert success(made) >= 0.95
    change = (trigger(x) - x).abs()
    assert 0 < float(change.max()) <= 0.1 + 1e-6
    with torch.no_grad():
        sent = honest()(trigger(x[y != 0])).argmax(1) == 0
    assert float(sent.float().mean()) < 0.2


def test_the_trigger_of_the_seal_is_the_one_that_was_trained_with() -> None:
    trigger, x = crafted(ATTACK).poisoned.trigger, pictures()[1].x[:20]
    assert isinstance(trigger, Encoded)
    torch.testing.assert_close(draw(x, trigger.weights, 0.1, (3, 12, 12)), trigger(x), atol=1e-5, rtol=0.0)


def test_settings_out_of_range_are_refused() -> None:
    for attack in (LIRA(linf=0.0), LIRA(alpha=1.0), LIRA(lr=0.0)):
        with pytest.raises(ValueError, match="linf must lie in"):
            attack.craft(bench())
