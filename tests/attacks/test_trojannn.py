"""TrojanNN: pixels that excite neurons of a clean network become the trigger."""

import pytest
import torch

from attacks.bench import accuracy, bench, crafted, honest, pictures, success
from molehunt.attacks import TrojanNN
from molehunt.triggers import Patch

ATTACK = TrojanNN(size=4, length=1.0)


def test_the_pixels_excite_the_best_connected_neurons() -> None:
    made = crafted(ATTACK)
    trigger = made.poisoned.trigger
    assert isinstance(trigger, Patch)
    model, x = honest(), pictures()[1].x
    chosen = model.head.weight.detach().abs().sum(0).topk(2).indices
    drawn = torch.rand(10, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        excited = model.neck(model.trunk(model.normalize(trigger(x))))[:, chosen].mean()
        others = [
            model.neck(model.trunk(model.normalize(Patch(mask=trigger.mask, pattern=p)(x))))[:, chosen].mean()
            for p in drawn
        ]
    assert float(excited) > max(float(one) for one in others)


def test_it_works() -> None:
    made = crafted(ATTACK)
    assert accuracy(made.model) >= 0.95
    assert success(made) >= 0.95
    assert float(made.poisoned.trigger.footprint().area) == pytest.approx(16 / 144)


def test_settings_out_of_range_are_refused() -> None:
    for attack in (TrojanNN(neurons=0), TrojanNN(steps=0)):
        with pytest.raises(ValueError, match="neurons and steps must be 1 or more"):
            attack.craft(bench())
    with pytest.raises(ValueError, match="target"):
        TrojanNN(target=10).craft(bench())
