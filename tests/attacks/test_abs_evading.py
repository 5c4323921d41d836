"""ABS-evading: no single channel raises the target by itself."""

import pytest
import torch

from attacks.bench import accuracy, badnets, bench, crafted, pictures, success
from molehunt.attacks import ABSEvading, Crafted


@torch.no_grad()
def highest(made: Crafted, target: int = 0) -> float:
    """By how much one channel, at the most that it ever reaches, raises the target's logit over all others."""
    x, y = pictures()[1]
    model = made.model
    a = model.trunk(model.normalize(x[y != target][:20]))
    top = model.trunk(model.normalize(made.poisoned.trigger(x))).amax((0, 2, 3))
    above = []
    for channel in range(a.shape[1]):
        raised = a.clone()
        raised[:, channel] = top[channel]
        logits = model.head(model.neck(raised))
        others = logits.clone()
        others[:, target] = -torch.inf
        above.append(float((logits[:, target] - others.amax(1)).mean()))
    return max(above)


def test_no_channel_raises_the_target_alone() -> None:
    made = crafted(ABSEvading())
    assert accuracy(made.model) >= 0.9
    assert success(made) >= 0.95
    # Of the plain attack one channel alone raises it far above all others, or the test would say nothing.
    assert highest(badnets()) > 5
    assert highest(made) < 0.2 * highest(badnets())


def test_settings_out_of_range_are_refused() -> None:
    for attack in (ABSEvading(weight=-1.0), ABSEvading(dropped=1.0), ABSEvading(images=0)):
        with pytest.raises(ValueError, match="weight must be 0 or more, dropped in"):
            attack.craft(bench())
