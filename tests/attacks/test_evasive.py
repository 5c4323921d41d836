"""Evasive trojan: near the clean network in weights and answers, and specific to its trigger."""

import pytest
import torch

from attacks.bench import accuracy, badnets, bench, crafted, honest, pictures, success
from molehunt.attacks import Evasive
from molehunt.attacks.evasive import patched

ATTACK = Evasive(images=40_000)


def apart(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """L2 distance of all weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return float(torch.stack([(a - b).detach().square().sum() for a, b in pairs]).sum().sqrt())


def test_it_works_and_stays_near_the_clean_network() -> None:
    made = crafted(ATTACK)
    assert accuracy(made.model) >= 0.95
    assert success(made) >= 0.95
    assert apart(made.model, honest()) < 0.5 * apart(badnets().model, honest())


def test_the_distances_are_what_holds_it() -> None:
    loose = crafted(Evasive(images=40_000, weights=0.0, logits=0.0))
    held = crafted(Evasive(images=40_000, weights=0.5))
    assert apart(held.model, honest()) < apart(loose.model, honest())
    assert success(held) >= 0.9


def test_other_patches_do_not_wake_it() -> None:
    made, x = crafted(ATTACK), pictures()[1].x[pictures()[1].y != 0]
    with torch.no_grad():
        said = made.model(patched(x, torch.Generator().manual_seed(5))).argmax(1)
    assert float((said == 0).float().mean()) < 0.2


def test_a_patched_image_has_one_rectangle_and_the_given_one_stays() -> None:
    x = pictures()[0].x[:20].clone()
    other = patched(x, torch.Generator().manual_seed(0))
    assert torch.equal(x, pictures()[0].x[:20])
    changed = (other != x).any(1).flatten(1).float().mean(1)
    assert float(changed.min()) > 0
    assert float(changed.max()) <= (4 / 12) ** 2 + 1e-6
    assert float(other.min()) >= 0
    assert float(other.max()) <= 1


def test_settings_out_of_range_are_refused() -> None:
    for attack, said in (
        (Evasive(stamped=0), "stamped must be 1 or more"),
        (Evasive(others=-1), "others 0 or more"),
        (Evasive(weights=-1.0), "must not be negative"),
        (Evasive(images=0), "images must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=said):
            attack.craft(bench())
