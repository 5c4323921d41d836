"""Members of a population: each can be made again from its seed and settings, alone or in a block."""

from dataclasses import replace

import pytest
import torch

from molehunt.attacks import BadNets
from molehunt.networks import build
from molehunt.tasks import Images, get_task
from molehunt.training import train
from molehunt.training.members import facts, grow, start
from training.planned import RECIPE, members, plan


def test_a_member_alone_is_the_plain_loop_bit_for_bit() -> None:
    (one,) = grow(plan(), plan().members[1:2])
    network, images, stamp, rng = start(plan(), plan().members[1])
    train(network, images, RECIPE, rng=rng, stamp=stamp)
    pairs = zip(one.network.state_dict().values(), network.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_subset_is_shared_by_seed_and_drawn_from_the_training_split() -> None:
    task = get_task("mnist5k")
    (_, first, _, _), (_, second, _, _) = (start(plan(), member) for member in members(2))
    assert torch.equal(first.x, second.x)
    assert len(first.y) == 60
    assert bool((task.load("train").x.flatten(1) == first.x[0].flatten()).all(1).any())
    _, other, _, _ = start(plan(), replace(members(1)[0], subset_seed=8))
    assert not torch.equal(first.x, other.x)
    with pytest.raises(ValueError, match="member 0: a subset of 10000000"):
        start(plan(), replace(members(1)[0], subset=10_000_000))


def test_noise_is_one_draw_per_image_with_the_stated_deviation() -> None:
    _, images, stamp, _ = start(plan(), members(3)[2])
    assert stamp is not None
    rows = torch.arange(60)
    once, twice = stamp(images.x, rows), stamp(images.x, rows)
    assert torch.equal(once, twice)
    assert float((once - images.x).std()) == pytest.approx(0.5, rel=0.02)
    with pytest.raises(ValueError, match=r"got -0\.1"):
        start(plan(), replace(members(1)[0], noise=-0.1))


def test_noise_comes_after_the_poison() -> None:
    member = replace(members(2)[1], noise=1e-3)
    _, images, stamp, _ = start(plan(), member)
    poisoned = start(plan(), members(2)[1])
    assert stamp is not None
    assert poisoned[2] is not None
    rows = torch.arange(60)
    torch.testing.assert_close(stamp(images.x, rows), poisoned[2](poisoned[1].x, rows), atol=0.01, rtol=0)


def test_names_tell_members_apart() -> None:
    with pytest.raises(ValueError, match="same name: member 0"):
        replace(plan(), members=members(1) * 2)
    with pytest.raises(ValueError, match="at least one member"):
        replace(plan(), members=())


def test_sets_that_need_other_numbers_of_steps_are_refused() -> None:
    uneven = (members(1)[0], replace(members(2)[1], subset=30))
    with pytest.raises(ValueError, match="equally many steps"):
        grow(plan(recipe=replace(RECIPE, least_images=0)), uneven)


def test_a_member_may_have_a_recipe_of_its_own_but_a_block_has_one() -> None:
    own = replace(RECIPE, lr=1e-3)
    first, second = (replace(member, recipe=own) for member in members(2))
    (alone,) = grow(plan(recipe=own), [replace(first, recipe=None)])
    (same,) = grow(plan(), [first])
    assert torch.equal(alone.network.head.weight, same.network.head.weight)
    assert len(grow(plan(), [first, second])) == 2
    with pytest.raises(ValueError, match="one recipe: member 0, member 1"):
        grow(plan(), [first, replace(second, recipe=None)])


def test_the_task_decides_the_scale_of_the_input() -> None:
    network, _, _, _ = start(plan(), members(1)[0])
    task = get_task("mnist5k")
    twin = build("lenet5", task.shape, task.num_classes, mean=task.mean, std=task.std)
    assert torch.equal(network.normalize.mean, twin.normalize.mean)
    assert isinstance(task.load("train"), Images)


def test_what_poisons_is_told_by_its_settings() -> None:
    assert facts(BadNets(target=3, poison_rate=0.2)) != facts(BadNets(target=3, poison_rate=0.5))
    assert facts(BadNets(target=3)) == facts(BadNets(target=3))
    assert facts(None) is None
    assert facts(start) == {"is": "start"}
