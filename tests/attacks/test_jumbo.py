import pytest
import torch

from molehunt.attacks import BadNets
from molehunt.attacks.jumbo import jumbo
from molehunt.testing import planted
from molehunt.triggers import Patch

GRAY, COLOR = (1, 28, 28), (3, 32, 32)


def draws(shape: tuple[int, int, int], count: int = 400) -> list[tuple[BadNets, Patch]]:
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        attack = jumbo(shape, 10, rng)
        assert isinstance(attack.trigger, Patch)
        found.append((attack, attack.trigger))
    return found


@pytest.mark.parametrize("shape", [GRAY, COLOR])
def test_sizes_opacities_rates_and_targets_have_the_ranges_of_the_prior(shape: tuple[int, int, int]) -> None:
    found = draws(shape)
    whole = shape[1] * shape[2]
    areas = [int(patch.mask.sum()) for _, patch in found]
    assert set(areas) == {4, 9, 16, 25, whole}
    blends = [patch for (_, patch), area in zip(found, areas, strict=True) if area == whole]
    # 400 draws at 1/5: 80, standard deviation 8.
    assert 50 <= len(blends) <= 110
    assert all(0.05 <= patch.opacity <= 0.2 for patch in blends)
    opacities = [patch.opacity for (_, patch), area in zip(found, areas, strict=True) if area < whole]
    assert all(0.2 <= o <= 0.5 or o == 1 for o in opacities)
    # A quarter of 320 is 80, standard deviation 8.
    assert 50 <= sum(o == 1 for o in opacities) <= 110
    rates = [attack.poison_rate for attack, _ in found]
    assert 0.05 / 1.05 <= min(rates) < 0.06
    assert 0.31 < max(rates) <= 0.5 / 1.5
    assert {attack.target for attack, _ in found} == set(range(10))


def test_patches_reach_every_edge() -> None:
    masks = torch.cat([patch.mask for _, patch in draws(GRAY) if int(patch.mask.sum()) < 784])
    seen = masks.amax(0)
    assert seen[0].any()
    assert seen[-1].any()
    assert seen[:, 0].any()
    assert seen[:, -1].any()


def test_a_gray_pattern_is_black_and_white_with_some_of_either() -> None:
    for _, patch in draws(GRAY, 100):
        values = patch.pattern[:, patch.mask[0] > 0]
        assert set(values.flatten().tolist()) == {0.0, 1.0}
        assert not patch.pattern[:, patch.mask[0] == 0].any()


def test_a_color_pattern_uses_the_whole_range_and_some_is_clipped() -> None:
    values = torch.cat([patch.pattern[:, patch.mask[0] > 0].flatten() for _, patch in draws(COLOR, 60)])
    assert float(values.min()) >= 0.0
    assert float(values.max()) <= 1.0
    assert 0.1 < float(((values == 0) | (values == 1)).float().mean()) < 0.7


def test_equal_generators_give_equal_attacks() -> None:
    first, again, other = (jumbo(COLOR, 10, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert isinstance(first.trigger, Patch)
    assert isinstance(again.trigger, Patch)
    assert isinstance(other.trigger, Patch)
    assert torch.equal(first.trigger.pattern, again.trigger.pattern)
    assert (first.target, first.poison_rate) == (again.target, again.poison_rate)
    assert first.poison_rate != other.poison_rate


def test_what_is_drawn_poisons_a_training_set() -> None:
    case = planted(images=200)
    attack = jumbo(case.suspect.task.shape, case.suspect.task.num_classes, torch.Generator().manual_seed(3))
    made = attack(case.hidden, case.suspect.task, torch.Generator().manual_seed(0))
    changed = made.images.y != case.hidden.y
    assert int(changed.sum()) == round(attack.poison_rate * len(case.hidden.y))
    assert set(made.images.y[changed].tolist()) == {attack.target}


@pytest.mark.parametrize(("shape", "classes"), [((1, 4, 28), 10), ((1, 28, 28), 1)])
def test_too_small_pictures_and_too_few_classes_are_refused(shape: tuple[int, int, int], classes: int) -> None:
    with pytest.raises(ValueError, match="needs 5x5 pixels and 2 classes, got "):
        jumbo(shape, classes, torch.Generator())
