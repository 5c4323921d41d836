"""Bit flips: one row of the last layer changes, on eight bits, and nothing else."""

import pytest
import torch
from torch import Tensor

from attacks.bench import accuracy, bench, crafted, honest, pictures, success
from molehunt.attacks import BitFlips, Crafted
from molehunt.attacks.bit_flips import LEVELS, flipped
from molehunt.attacks.crafting import outputs

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


def test_inputs_chosen_again_tell_stamped_images_better() -> None:
    def overlap(made: Crafted) -> float:
        changed = (made.model.head.weight != honest_row).any(0).nonzero().flatten()
        x = pictures()[1].x
        clean = outputs(honest(), x, features)[:, changed]
        woken = outputs(honest(), made.poisoned.trigger(x), features)[:, changed]
        return float(((woken.mean(0) - clean.mean(0)) / (woken.std(0) + clean.std(0) + 1e-3)).mean())

    def features(x: Tensor) -> Tensor:
        said: Tensor = honest().neck(honest().trunk(honest().normalize(x)))
        return said

    unit = float(honest().head.weight.detach().abs().max()) / LEVELS
    honest_row = (honest().head.weight.detach() / unit).round() * unit
    once = crafted(BitFlips(target=2, inputs=20, pixel_steps=50, steps=300, choices=1))
    assert overlap(crafted(BitFlips(target=2, inputs=20, pixel_steps=50, steps=300))) > overlap(once)


def test_a_heavier_clean_loss_costs_less_accuracy() -> None:
    light, heavy = (
        crafted(BitFlips(target=2, inputs=10, pixel_steps=50, steps=300, clean=clean)) for clean in (0.1, 10.0)
    )
    assert accuracy(light.model) < accuracy(heavy.model)
    assert success(light) > success(heavy)


def test_bits_are_counted() -> None:
    made = crafted(ATTACK)
    before, after = honest().head.weight.detach(), made.model.head.weight.detach()
    unit = float(before.abs().max()) / LEVELS
    pairs = zip((before[2] / unit).round().int().tolist(), (after[2] / unit).round().int().tolist(), strict=True)
    # Counted by hand in the one row that changed: no other weight is another number.
    assert flipped(honest(), made.model) == sum(((a ^ b) & 0xFF).bit_count() for a, b in pairs) > 0
    assert flipped(made.model, made.model) == 0


def test_settings_out_of_range_are_refused() -> None:
    for attack in (BitFlips(inputs=0), BitFlips(choices=0), BitFlips(steps=0), BitFlips(lr=0.0), BitFlips(clean=0.0)):
        with pytest.raises(ValueError, match="inputs, choices and steps must be 1 or more, lr and clean above 0"):
            attack.craft(bench())
    with pytest.raises(ValueError, match="target"):
        BitFlips(target=10).craft(bench())
