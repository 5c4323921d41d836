"""Populations: each member can be made again, an interrupted run loses nothing, and folders are not mixed up."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molehunt.attacks import BadNets
from molehunt.engine import Local
from molehunt.training import train
from molehunt.training.layout import Layout, Trial, measure, rate
from molehunt.training.members import Grown, Plan, start
from molehunt.training.population import cut, place, read_block, train_population
from training.planned import RECIPE, members, plan

LAYOUT = Layout(block=2)


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
