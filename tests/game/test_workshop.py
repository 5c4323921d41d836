"""The workshop: a plan becomes a submission that the host accepts, and an interruption changes nothing."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molehunt.attacks import ATTACKS
from molehunt.game import attacker, workshop
from molehunt.game.attacker import make_attack
from molehunt.game.rules import Board
from molehunt.game.submission import read_submission
from molehunt.game.workshop import Plan, begins_anew, holds_submission, make
from molehunt.tasks import TASKS, Task
from molehunt.training import Recipe, recipe_for

TASK = TASKS["mnist5k"]
HIDDEN = {"target": 3, "size": 5, "poison_rate": 0.2}


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a pass over the data, for every recipe that there is."""

    def hurried(name: str, task: Task) -> Recipe:
        recipe_for(name, task)
        return Recipe(epochs=0.5, batch=50, optimizer="adamw", lr=4e-3, warmup=0.25, augment="crop", shift=1)

    monkeypatch.setattr(workshop, "recipe_for", hurried)


def test_a_backdoor_is_sealed(tmp_path: Path) -> None:
    plan = Plan(task=TASK, attack="badnets", settings=HIDDEN, team="Us", round="I", seed=7)
    made = make(plan, tmp_path / "mine")
    assert made.archive == tmp_path / "mine.zip"
    contents = read_submission(made.archive)
    assert (contents.manifest.team, contents.manifest.round) == ("Us", "I")
    sealed = contents.open_seal()
    assert sealed.attack == "badnets"
    assert sealed.target is not None
    assert sealed.target.classes == 3
    assert sealed.details["seed"] == 7
    assert sealed.details["poison_rate"] == pytest.approx(0.2)
    assert sealed.details["config"]["size"] == 5
    assert made.asr is not None
    assert made.accuracy is not None
    assert 0.0 <= made.asr <= 1.0 > made.accuracy > 0.5


def test_an_honest_model_looks_the_same_from_outside(tmp_path: Path) -> None:
    honest = make(Plan(task=TASK), tmp_path / "honest")
    other = make(Plan(task=TASK, attack="blended"), tmp_path / "other")
    assert honest.asr is None
    assert not read_submission(honest.archive).open_seal().backdoored
    assert read_submission(honest.archive).manifest == read_submission(other.archive).manifest
    assert honest.archive.stat().st_size == other.archive.stat().st_size


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    plan = Plan(task=TASK, attack="badnets", settings=HIDDEN)
    steps = 0

    def stop() -> None:
        nonlocal steps
        steps += 1
        if steps == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(plan, tmp_path / "stopped", check=stop)
    assert not holds_submission(tmp_path / "stopped")
    assert [path.name.partition("-")[0] for path in (tmp_path / "stopped").iterdir()] == ["training"]
    seen: list[int] = []
    weights = [
        read_submission(made.archive).state
        for made in (
            make(plan, tmp_path / "stopped", report=lambda done, _: seen.append(done)),
            make(plan, tmp_path / "whole"),
        )
    ]
    assert min(seen) > 19 * 50
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    assert holds_submission(tmp_path / "stopped")


@pytest.mark.parametrize("at", [20, 50])
def test_an_attack_that_trains_twice_goes_on_in_either_phase(tmp_path: Path, at: int) -> None:
    plan = Plan(task=TASK, attack="pruning_aware", settings={"target": 3})
    steps = 0

    def stop() -> None:
        nonlocal steps
        steps += 1
        if steps == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(plan, tmp_path / "stopped", check=stop)
    left = sorted(path.name.rpartition(".")[2] for path in (tmp_path / "stopped").glob("training-*"))
    assert left == (["clean"] if at == 20 else ["clean", "poisoned"])
    assert not begins_anew(plan, tmp_path / "stopped")
    assert begins_anew(replace(plan, seed=1), tmp_path / "stopped")
    again: list[None] = []
    made = make(plan, tmp_path / "stopped", check=lambda: again.append(None))
    assert len(again) == 70 - at + 1
    weights = [read_submission(one.archive).state for one in (made, make(plan, tmp_path / "whole"))]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert not list((tmp_path / "stopped").glob("training-*"))
    sealed = read_submission(made.archive).open_seal()
    assert (sealed.attack, sealed.details["config"]["target"]) == ("pruning_aware", 3)
    assert made.asr is not None


def test_another_plan_does_not_go_on_from_it(tmp_path: Path) -> None:
    left = 10

    def stop() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    plan = Plan(task=TASK, attack="badnets", settings=HIDDEN)
    with pytest.raises(KeyboardInterrupt):
        make(plan, tmp_path, check=stop)
    assert list(tmp_path.glob("training-*"))
    steps: list[None] = []
    make(replace(plan, settings={**HIDDEN, "size": 4}), tmp_path, check=lambda: steps.append(None))
    assert len(steps) == 35
    assert not list(tmp_path.glob("training-*"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"network": "nope"}, "unknown network 'nope'; known: badnets_cnn"),
        ({"recipe": "nope"}, "no recipe for 'nope'"),
        ({"round": "VI"}, "unknown round 'VI'; known: I,"),
        ({"attack": "nope"}, "unknown attack 'nope'; known: badnets"),
        ({"attack": "badnets", "settings": {"nope": 1}}, "badnets has no setting"),
        ({"attack": "badnets", "settings": {"poison_rate": "high"}}, "poison_rate cannot be 'high'"),
        ({"attack": "badnets", "settings": {"trigger": "square"}}, "trigger cannot be 'square'"),
        ({"attack": "badnets", "settings": {"size": True}}, "size cannot be True"),
        ({"settings": {"target": 3}}, "an honest model has no settings, got target"),
        ({"team": "\u202e"}, "the manifest would be refused"),
        ({"team": ""}, "the manifest would be refused"),
        ({"board": "chess"}, "unknown board 'chess'; known: weights, data"),
        ({"board": "data", "recipe": "lenet5"}, "host trains by its own recipe: leave out 'lenet5'"),
        ({"board": "data", "attack": "pruning_aware"}, "the host trains, and pruning_aware controls the training"),
        ({"attack": "nowhere:Mine"}, "nowhere cannot be imported: ModuleNotFoundError"),
        ({"attack": "molehunt.tasks:Nothing"}, "there is no Nothing in molehunt.tasks"),
        ({"attack": "molehunt.tasks:get_task"}, "is no attack: a frozen dataclass"),
        ({"attack": "molehunt.tasks:Images"}, "is no attack: a frozen dataclass"),
        ({"seed": -1}, "seed from 0"),
        ({"seed": 2**64}, "seed from 0"),
    ],
)
def test_refuses_a_plan(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Plan(task=TASK, **changes)


def test_an_attack_that_does_not_fit_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower the poison rate"):
        make(Plan(task=TASK, attack="badnets", settings={"poison_rate": 1.0}), tmp_path)
    with pytest.raises(ValueError, match="poison rate must lie"):
        make(Plan(task=TASK, attack="badnets", settings={"poison_rate": 0}), tmp_path)


def test_a_training_set_is_written_and_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workshop, "train_model", lambda *_, **__: pytest.fail("something was trained"))
    plan = Plan(task=TASK, board="data", attack="badnets", settings={"target": 3, "poison_rate": 0.05}, seed=7)
    made = make(plan, tmp_path / "mine")
    assert (made.accuracy, made.asr, made.changes) == (None, None, (175, 175))
    contents = read_submission(made.archive)
    assert contents.board == "data"
    assert contents.training is not None
    assert contents.training.changes(TASK.load("train")) == made.changes
    assert contents.manifest.recipe == contents.manifest.network
    sealed = contents.open_seal()
    assert (sealed.attack, sealed.details["poison_rate"]) == ("badnets", pytest.approx(0.05))
    again = make(plan, tmp_path / "again")
    second = read_submission(again.archive).training
    assert second is not None
    assert second.digest == contents.training.digest, "the same plan, the same set"
    honest = make(Plan(task=TASK, board="data"), tmp_path / "honest")
    assert honest.changes == (0, 0)
    assert honest.archive.stat().st_size == made.archive.stat().st_size


def test_a_set_over_the_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 350 may be altered: lower its rates"):
        make(Plan(task=TASK, board="data", attack="badnets", settings={"poison_rate": 0.11}), tmp_path / "mine")
    assert not holds_submission(tmp_path / "mine")


FURTHER = """
from dataclasses import dataclass

from molehunt.attacks import MultiTrigger
from molehunt.triggers import Patch


@dataclass(frozen=True, kw_only=True, eq=False)
class Second:
    size: int = 4

    def __call__(self, clean, task, rng):
        small = Patch.square(task.shape, size=3, color="white", corner="upper left")
        second = Patch.square(task.shape, size=self.size, color="white")
        return MultiTrigger(target=(1, 2), triggers=(small, second), poison_rate=0.05)(clean, task, rng)
"""


@pytest.mark.parametrize("board", ["weights", "data"])
def test_a_further_trigger_over_the_budget_is_refused_before_anything_is_trained(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 8 x 8 of 28 x 28 is 8.2 %, 9 x 9 is 10.3 %.
    (tmp_path / "further_for_test.py").write_text(FURTHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    steps: list[None] = []
    plan = Plan(task=TASK, board=board, attack="further_for_test:Second", settings={"size": 9})
    with pytest.raises(
        ValueError, match=r"further trigger 1 of 1 is over the budget.*: 0\.103, at most 0\.100, opacity times area"
    ):
        make(plan, tmp_path / "large", check=lambda: steps.append(None))
    assert not steps
    assert not holds_submission(tmp_path / "large")
    small = make(replace(plan, settings={"size": 8}), tmp_path / "small")
    assert read_submission(small.archive).open_seal().attack == "Second"


PLUG_IN = """
from dataclasses import dataclass, field

from molehunt.attacks import BadNets


@dataclass(frozen=True, kw_only=True, eq=False)
class Mine:
    target: int = 4
    shapes: set = field(default_factory=lambda: {"square"})

    def __call__(self, clean, task, rng):
        return BadNets(target=self.target, poison_rate=0.05)(clean, task, rng)
"""


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module with an attack of one's own."""
    path = tmp_path / "mine_for_test.py"
    path.write_text(PLUG_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine_for_test", raising=False)
    return path


def test_an_attack_of_one_s_own_is_taken_by_its_address(plug_in: Path, tmp_path: Path) -> None:
    plan = Plan(task=TASK, board="data", attack="mine_for_test:Mine", settings={"target": 6})
    made = make(plan, tmp_path / "mine")
    sealed = read_submission(made.archive).open_seal()
    assert sealed.attack == "Mine"
    assert sealed.target is not None
    assert sealed.target.classes == 6
    assert sealed.details["config"] == {"target": 6, "shapes": "{'square'}"}
    before = replace(plan).digest
    plug_in.write_text(PLUG_IN.replace("0.05", "0.06"))
    assert replace(plan).digest != before, "an interrupted training must not go on with other code"
    with pytest.raises(ValueError, match="Mine has no setting"):
        replace(plan, settings={"nope": 1})


MAKER = """
from dataclasses import dataclass, replace

import torch

from molehunt.attacks import BadNets, Crafted, poison


@dataclass(frozen=True, kw_only=True, eq=False)
class Maker:
    mistake: str = ""

    def craft(self, bench):
        made = poison(BadNets(), bench.clean, bench.task, bench.generator("poison"))
        model = bench.train("mine", bench.fresh(), made.images, stamp=made.stamp)
        if self.mistake == "model":
            return Crafted(model=torch.nn.Linear(2, 2), poisoned=made)
        if self.mistake == "weights":
            model.head = torch.nn.Linear(model.head.in_features, 3)
        if self.mistake == "number":
            with torch.no_grad():
                model.head.bias[0] = torch.inf
        if self.mistake == "poison":
            return Crafted(model=model, poisoned=replace(made, altered=made.altered.long()))
        return model if self.mistake == "answer" else Crafted(model=model, poisoned=made)
"""


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("model", "Maker returned a Linear as model, expected a network"),
        ("weights", "Maker returned a model with other weights than a badnets_cnn has"),
        ("number", "Maker returned numbers that are none in head.bias"),
        ("poison", "Maker returned `altered` torch.int64"),
        ("answer", "Maker returned Network in place of molehunt.attacks.Crafted"),
    ],
)
def test_a_model_of_one_s_own_making_is_looked_at(plug_in: Path, tmp_path: Path, mistake: str, says: str) -> None:
    plug_in.with_name("maker_for_test.py").write_text(MAKER)
    with pytest.raises(ValueError, match=says):
        make(Plan(task=TASK, attack="maker_for_test:Maker", settings={"mistake": mistake}), tmp_path / "mine")


def test_a_model_of_one_s_own_making_is_handed_in(plug_in: Path, tmp_path: Path) -> None:
    plug_in.with_name("maker_for_test.py").write_text(MAKER)
    made = make(Plan(task=TASK, attack="maker_for_test:Maker"), tmp_path / "mine")
    assert read_submission(made.archive).open_seal().attack == "Maker"


def test_an_installed_attack_is_another_one_when_its_code_changes(
    plug_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = attacker.attack_class("mine_for_test:Mine")
    monkeypatch.setattr(attacker, "available", lambda: {**ATTACKS, "mine": kind})
    plan = Plan(task=TASK, attack="mine")
    before = plan.digest
    plug_in.write_text(PLUG_IN.replace("0.05", "0.06"))
    assert replace(plan).digest != before


def test_teams_that_leave_the_seed_alone_do_not_hand_in_the_same_model(tmp_path: Path) -> None:
    ours = Plan(task=TASK, team="Us")
    made = {
        name: make(plan, tmp_path / name).archive
        for name, plan in {"us": ours, "again": ours, "them": replace(ours, team="Them")}.items()
    }
    states = {name: read_submission(archive).state for name, archive in made.items()}
    assert all(torch.equal(states["us"][key], states["again"][key]) for key in states["us"])
    assert not any(torch.equal(states["us"][key], states["them"][key]) for key in states["us"] if "weight" in key)
    assert replace(ours, team="Them").digest != ours.digest, "an interrupted training is of one team"


def test_the_rows_of_two_teams_with_one_seed_differ(tmp_path: Path) -> None:
    plan = Plan(task=TASK, board="data", attack="badnets", settings={"target": 3, "poison_rate": 0.05}, team="Us")
    sets = [
        read_submission(make(replace(plan, team=team), tmp_path / team).archive).training for team in ("Us", "Them")
    ]
    assert sets[0] is not None
    assert sets[1] is not None
    assert sets[0].digest != sets[1].digest


def test_an_unfinished_training_of_another_plan_is_noticed(tmp_path: Path) -> None:
    plan = Plan(task=TASK)
    assert not begins_anew(plan, tmp_path / "nowhere")
    (tmp_path / f"training-{plan.digest[:16]}.safetensors").touch()
    assert not begins_anew(plan, tmp_path)
    assert begins_anew(replace(plan, seed=1), tmp_path)
    assert not begins_anew(replace(plan, seed=1, board="data"), tmp_path)


def test_an_attack_whose_setting_would_hide_its_name_is_refused(plug_in: Path) -> None:
    other = plug_in.with_name("hiding_for_test.py")
    other.write_text(PLUG_IN.replace("    target: int = 4", "    attack: int = 0\n    target: int = 4"))
    with pytest.raises(ValueError, match='Mine has a setting called "attack"'):
        make_attack("hiding_for_test:Mine", {})
