"""Populations: each member can be made again, an interrupted run loses nothing, and folders are not mixed up."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molehunt.attacks import BadNets
from molehunt.engine import Local
from molehunt.networks import build
from molehunt.tasks import Images, get_task
from molehunt.training import Recipe, train
from molehunt.training.layout import Layout, Trial, measure, rate
from molehunt.training.population import (
    Grown,
    Member,
    Plan,
    cut,
    facts,
    grow,
    place,
    read_block,
    start,
    train_population,
)

RECIPE = Recipe(epochs=1, least_images=60, batch=20, optimizer="adamw", lr=2e-3, precision="float32")
LAYOUT = Layout(block=2)


def members(count: int = 5) -> tuple[Member, ...]:
    kinds: list[dict[str, Any]] = [{}, {"poison": BadNets(target=3, poison_rate=0.2)}, {"noise": 0.5}]
    return tuple(
        Member(name=f"member {i}", seed=i, subset=60, subset_seed=7, **kinds[i % len(kinds)]) for i in range(count)
    )


def plan(count: int = 5, recipe: Recipe = RECIPE) -> Plan:
    return Plan(task="mnist5k", network="lenet5", recipe=recipe, members=members(count))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@dataclass
class Dying:
    """An engine whose process is killed after some blocks."""

    blocks: int

    def map(self, function: Any, items: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == self.blocks:
                raise KeyboardInterrupt
            yield function(item)


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    whole = list(train_population(plan(), tmp_path / "whole", layout=LAYOUT))
    with pytest.raises(KeyboardInterrupt):
        list(train_population(plan(), tmp_path / "cut", layout=LAYOUT, engine=Dying(1)))
    assert len(contents(tmp_path / "cut")) == 1
    seen: list[tuple[int, int]] = []
    resumed = list(train_population(plan(), tmp_path / "cut", report=lambda *now: seen.append(now)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert [one.member.name for one in resumed] == [one.member.name for one in whole] == [m.name for m in members()]


def test_a_finished_population_is_read_and_not_trained_again(tmp_path: Path) -> None:
    list(train_population(plan(), tmp_path, layout=LAYOUT))
    again = list(train_population(plan(), tmp_path, engine=Dying(0)))
    assert len(again) == 5
    assert all(not one.network.training and len(one.losses) and one.seconds > 0 for one in again)


def test_members_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    few = replace(RECIPE, least_images=40, lr=1e-4)
    for one in train_population(plan(recipe=few), tmp_path, layout=LAYOUT):
        network, images, stamp, rng = start(plan(recipe=few), one.member)
        train(network, images, few, rng=rng, stamp=stamp)
        for mine, plain in zip(one.network.state_dict().values(), network.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize(
    "other",
    [
        replace(plan(), network="badnets_cnn"),
        replace(plan(), recipe=replace(RECIPE, lr=1e-3)),
        replace(plan(), members=tuple(replace(m, seed=m.seed + 1) for m in members())),
        replace(plan(), members=(members()[0], replace(members()[1], poison=BadNets(target=3, poison_rate=0.5)))),
    ],
)
def test_a_folder_of_another_population_is_refused_before_anything_is_trained(tmp_path: Path, other: Plan) -> None:
    list(train_population(plan(), tmp_path, layout=LAYOUT))
    with pytest.raises(ValueError, match="another population"):
        list(train_population(other, tmp_path, engine=Dying(0)))


def test_a_run_does_not_go_on_in_another_number_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(train_population(plan(), tmp_path, layout=LAYOUT, engine=Dying(1)))
    monkeypatch.setattr("molehunt.training.population.place", lambda _: "cuda bfloat16")
    with pytest.raises(ValueError, match="was trained on cpu float32, this would go on on cuda bfloat16"):
        list(train_population(plan(), tmp_path, engine=Dying(0)))
    assert len(contents(tmp_path)) == 1
    monkeypatch.undo()
    list(train_population(plan(), tmp_path))
    # A finished population is only read, wherever it was trained.
    monkeypatch.setattr("molehunt.training.population.place", lambda _: "cuda bfloat16")
    assert len(list(train_population(plan(), tmp_path, engine=Dying(0)))) == 5


def test_the_place_is_that_of_the_recipe() -> None:
    assert place(RECIPE) == "cpu float32"
    assert place(replace(RECIPE, precision="fast")).startswith(("cpu ", "cuda "))


def test_blocks_are_cut_where_recipes_or_sizes_change(tmp_path: Path) -> None:
    own = replace(RECIPE, lr=1e-3)
    mixed = [replace(m, recipe=own) if i in {1, 2} else m for i, m in enumerate(members(5))]
    whole = replace(plan(), members=tuple(mixed))
    assert [[m.seed for m in block] for block in cut(whole, 4)] == [[0], [1, 2], [3, 4]]
    sized = replace(plan(recipe=replace(RECIPE, least_images=0)), members=tuple(
        replace(m, subset=30 if i == 1 else 60) for i, m in enumerate(members(3))
    ))  # fmt: skip
    assert [[m.seed for m in block] for block in cut(sized, 4)] == [[0], [1], [2]]
    assert [[m.seed for m in block] for block in cut(replace(sized, recipe=RECIPE), 2)] == [[0, 1], [2]]
    assert len(list(train_population(sized, tmp_path, layout=Layout(block=2)))) == 3


def test_before_the_first_block_another_layout_may_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(train_population(plan(2), tmp_path, layout=LAYOUT, engine=Dying(0)))
    assert Layout.read(tmp_path / "layout.json") == LAYOUT
    list(train_population(plan(2), tmp_path, layout=Layout(block=1)))
    assert Layout.read(tmp_path / "layout.json") == Layout(block=1)
    assert len(contents(tmp_path)) == 2


@dataclass
class Ahead:
    """An engine whose workers finish everything before anybody reads; it says when it was closed."""

    closed: bool = False

    def map(self, function: Any, items: Iterable[Any]) -> Iterator[Any]:
        done = [function(item) for item in items]
        try:
            yield from done
        finally:
            self.closed = True


def test_progress_reaches_its_end_when_workers_are_ahead_and_work_ends_with_the_caller(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    engine = Ahead()
    list(train_population(plan(), tmp_path / "a", layout=LAYOUT, engine=engine, report=lambda *now: seen.append(now)))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
    engine = Ahead()
    stops = iter([False, True])

    def check() -> None:
        if next(stops):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        list(train_population(plan(), tmp_path / "b", layout=LAYOUT, engine=engine, check=check))
    # While the traceback lives nothing is collected as garbage.
    assert engine.closed
    assert stopped.tb


def test_another_layout_than_the_one_begun_with_is_refused(tmp_path: Path) -> None:
    list(train_population(plan(2), tmp_path, layout=LAYOUT))
    with pytest.raises(ValueError, match="blocks of 2 with 1 threads, not 1 with 1"):
        list(train_population(plan(2), tmp_path, layout=Layout(block=1)))
    assert Layout.read(tmp_path / "layout.json") == LAYOUT


@pytest.mark.parametrize("broken", [b"", b"not safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_broken_block_is_named_and_not_overwritten(tmp_path: Path, broken: bytes) -> None:
    list(train_population(plan(2), tmp_path, layout=LAYOUT))
    path = tmp_path / "block-00000.safetensors"
    path.write_bytes(broken)
    with pytest.raises(ValueError, match="block-00000"):
        list(train_population(plan(2), tmp_path, layout=LAYOUT))
    assert path.read_bytes() == broken


def test_a_broken_layout_is_named(tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text('{"block": 0}')
    with pytest.raises(ValueError, match=r"layout\.json holds no layout"):
        list(train_population(plan(2), tmp_path))
    with pytest.raises(ValueError, match="at least 1 for threads, got 0"):
        Layout(threads=0)


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


def test_blocks_are_stopped_between_when_asked(tmp_path: Path) -> None:
    calls: list[None] = []

    def stop() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(train_population(plan(), tmp_path, layout=LAYOUT, check=stop))
    assert len(contents(tmp_path)) == 1


def test_processes_give_the_bytes_of_this_process(tmp_path: Path) -> None:
    list(train_population(plan(4), tmp_path / "local", layout=LAYOUT, engine=Local()))
    list(train_population(plan(4), tmp_path / "spread", layout=replace(LAYOUT, processes=2)))
    assert contents(tmp_path / "local") == contents(tmp_path / "spread")


def test_read_gives_what_was_grown(tmp_path: Path) -> None:
    (grown,) = list(train_population(plan(1), tmp_path, layout=Layout()))
    (again,) = read_block(tmp_path / "block-00000.safetensors", plan(1), plan(1).members)
    assert isinstance(grown, Grown)
    assert (grown.losses, grown.seconds) == (again.losses, again.seconds)


def test_the_fastest_layout_is_the_one_with_the_highest_rate() -> None:
    layout, rates = measure("lenet5", (1, 28, 28), 10, RECIPE, seconds=0.05, cores=1, blocks=(1, 3))
    assert set(rates) == {"1 x 1 x 1", "3 x 1 x 1"}
    assert rates[f"{layout.block} x {layout.processes} x {layout.threads}"] == max(rates.values())


def test_a_rate_counts_the_images_of_all_networks_and_restores_the_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    trial = Trial(network="lenet5", shape=(1, 28, 28), classes=10, recipe=RECIPE, block=2, threads=before, seconds=0.01)
    try:
        assert rate(trial) > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


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
