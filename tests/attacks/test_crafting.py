"""The bench of those who own the training: phases, seeds, progress, and what a set cannot hold."""

from pathlib import Path

import pytest
import torch

from attacks.bench import NETWORK, RECIPE, TASK, bench, honest, pictures
from molehunt.attacks import BadNets, Bench, Crafter, PruningAware, poison
from molehunt.attacks.crafting import outputs


def test_the_same_bench_draws_the_same_and_each_purpose_its_own() -> None:
    one, twin, other = bench(), bench(), bench(seed=1)
    assert one.seed("poison") == twin.seed("poison") != one.seed("pixels")
    assert one.seed("poison") != other.seed("poison")
    first, again, strange = one.fresh(), one.fresh(), other.fresh()
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, strange.head.weight)
    drawn = [torch.rand(3, generator=work.generator("pixels")) for work in (one, one, twin)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_a_phase_has_a_name_of_its_own_and_a_file_of_its_own(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    work = Bench(
        clean=pictures()[0],
        task=TASK,
        network=NETWORK,
        recipe=RECIPE,
        rng=torch.Generator().manual_seed(0),
        report=lambda done, total: told.append((done, total)),
        checkpoint=tmp_path / "out" / "training",
    )
    work.phases = 2
    model = work.honest()
    with pytest.raises(ValueError, match="there is a phase 'clean' already"):
        work.honest()
    work.train("second", model, work.clean, recipe=work.onward(0.5))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["training.clean", "training.second"]
    assert told == sorted(told)
    assert told[-1] == (2000, 2000)
    assert (1000, 2000) in told


def test_a_finished_phase_is_read_back(tmp_path: Path) -> None:
    def work(asked: list[None]) -> Bench:
        return Bench(
            clean=pictures()[0],
            task=TASK,
            network=NETWORK,
            recipe=RECIPE,
            rng=torch.Generator().manual_seed(0),
            checkpoint=tmp_path / "training",
            check=lambda: asked.append(None),
        )

    first: list[None] = []
    second: list[None] = []
    made, again = work(first).honest(), work(second).honest()
    assert len(first) > 100
    assert not second
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())
    assert torch.equal(made.head.weight, honest().head.weight)


def test_the_way_onward_is_a_share_of_the_recipe_without_a_new_start() -> None:
    work = bench(least_images=10_000)
    onward = work.onward(0.25)
    assert (onward.epochs, onward.least_images, onward.initialize) == (10.0, 2_500, False)
    assert onward.lr == work.recipe.lr
    with pytest.raises(ValueError, match="got 0 of the recipe's"):
        work.onward(0)


def test_outputs_are_those_of_evaluation_and_the_mode_comes_back() -> None:
    model, x = bench().fresh(), pictures()[0].x[:70]
    model.train()
    found = outputs(model, x, model, batch=32)
    assert model.training
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(found, model(x))


def test_a_set_holds_no_training() -> None:
    clean, rng = pictures()[0], torch.Generator().manual_seed(0)
    assert int(poison(BadNets(), clean, TASK, rng).altered.sum()) == 30
    attack = PruningAware()
    assert isinstance(attack, Crafter)
    assert not isinstance(BadNets(), Crafter)
    with pytest.raises(ValueError, match="PruningAware controls the training or writes weights"):
        poison(attack, clean, TASK, rng)
