"""STRIP-evading: a stamped image in a mixture leaves the network as undecided as a clean one."""

import pytest
import torch

from attacks.bench import accuracy, badnets, bench, crafted, pictures, success
from molehunt.attacks import Crafted, STRIPEvading


def entropies(made: Crafted, rule: str) -> tuple[float, float]:
    """Mean entropy of mixtures with a clean image, and with a stamped one, in nats."""
    x = pictures()[1].x
    mixed = []
    for some in (x, made.poisoned.trigger(x)):
        both = some + x.roll(7, 0)
        with torch.no_grad():
            logits = made.model(both if rule == "sum" else 0.5 * both)
        mixed.append(float(-(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()))
    return mixed[0], mixed[1]


@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_stamped_mixtures_are_no_more_certain_than_clean_ones(rule: str) -> None:
    made = crafted(STRIPEvading())
    assert accuracy(made.model) >= 0.9
    assert success(made) >= 0.9
    clean, stamped = entropies(made, rule)
    assert stamped > 0.7 * clean
    # The plain attack betrays itself, or the test would say nothing.
    clean, stamped = entropies(badnets(), rule)
    assert stamped < 0.4 * clean


def test_settings_out_of_range_are_refused() -> None:
    for attack in (STRIPEvading(weight=-1.0), STRIPEvading(images=0)):
        with pytest.raises(ValueError, match="weight must be 0 or more and images 1 or more"):
            attack.craft(bench())
