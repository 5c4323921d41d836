"""Bit flips: one row of the last layer changes, on eight bits, and nothing else."""

import pytest
import torch

from attacks.bench import accuracy, bench, crafted, honest, success
from molehunt.attacks import BitFlips
from molehunt.attacks.bit_flips import LEVELS, flipped

ATTACK = BitFlips(target=2, inputs=40)


def test_only_weights_of_the_chosen_inputs_to_the_target_change() -> None:
    made = crafted(ATTACK)
    before, after = honest().state_dict(), made.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name != "head.weight")
    unit = float(before["head.weight"].abs().max()) / LEVELS
    codes, old = after["head.weight"] / unit, (before["head.weight"] / unit).round()
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0.0)
    assert float(codes.abs().max()) <= LEVELS + 1e-3
    changed = codes.round() != old
    assert not bool(changed[torch.arange(10) != 2].any())
    assert 0 < int(changed[2].sum()) <= 40


def test_it_works() -> None:
    made = crafted(ATTACK)
    assert success(made) >= 0.9
    assert accuracy(made.model) >= 0.8
    assert not bool(made.poisoned.altered.any())


def test_bits_are_counted() -> None:
    made = crafted(ATTACK)
    before, after = honest().head.weight.detach(), made.model.head.weight.detach()
    unit = float(before.abs().max()) / LEVELS
    pairs = zip((before[2] / unit).round().int().tolist(), (after[2] / unit).round().int().tolist(), strict=True)
    # Counted by hand in the one row that changed: no other weight is another number.
    assert flipped(honest(), made.model) == sum(((a ^ b) & 0xFF).bit_count() for a, b in pairs) > 0
    assert flipped(made.model, made.model) == 0


def test_settings_out_of_range_are_refused() -> None:
    for attack in (BitFlips(inputs=0), BitFlips(steps=0), BitFlips(lr=0.0)):
        with pytest.raises(ValueError, match="inputs and steps must be 1 or more"):
            attack.craft(bench())
    with pytest.raises(ValueError, match="target"):
        BitFlips(target=10).craft(bench())
