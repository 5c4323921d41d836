"""Populations of shadow models, and the meta-classifiers that learn from them, made once and kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from molehunt import meta_training, shadows
from molehunt.attacks import BadNets
from molehunt.metas import Settings, digest
from molehunt.shadows import JumboDraw, Shadows
from molehunt.tasks import get_task
from molehunt.training import Recipe
from molehunt.training.layout import Layout

RECIPE = Recipe(epochs=1, batch=50, lr=0.01, optimizer="adamw", precision="float32")
SMALL = Shadows(task="mnist5k", network="lenet5", count=3, images=100, recipe=RECIPE)
SETTINGS = Settings(queries=3, hidden=4, passes=2)
LAYOUT = Layout(block=2)


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLEHUNT_CACHE", str(tmp_path))


def test_every_second_model_is_backdoored_by_an_attack_of_its_own() -> None:
    members = SMALL.plan.members
    assert [m.poison is not None for m in members] == [False, True] * 3
    assert len({m.seed for m in members}) == len({m.subset_seed for m in members}) == 6
    task, targets = get_task("mnist5k"), SMALL.targets()
    assert targets[::2].tolist() == [-1, -1, -1]
    for member, target in zip(members[1::2], targets[1::2].tolist(), strict=True):
        assert isinstance(member.poison, JumboDraw)
        attack = member.poison.attack(task)
        assert isinstance(attack, BadNets)
        assert attack.target == target


def test_a_longer_population_begins_like_a_shorter_and_another_seed_is_another_one() -> None:
    longer = replace(SMALL, count=5)
    assert [m.seed for m in longer.plan.members][:6] == [m.seed for m in SMALL.plan.members]
    assert {m.seed for m in replace(SMALL, seed=1).plan.members}.isdisjoint(m.seed for m in SMALL.plan.members)
    others = (replace(SMALL, seed=1), replace(SMALL, count=4), replace(SMALL, images=90))
    assert len({one.folder for one in (SMALL, *others)}) == 4


def test_models_and_meta_classifiers_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    made = SMALL.metas(2, SETTINGS, layout=LAYOUT, report=lambda *now: told.append(now))
    assert len(made) == 2
    assert digest(made[:1]) != digest(made[1:])
    assert told[0] == ("shadow models", 0, 6)
    assert ("shadow models", 6, 6) in told
    assert [now for now in told if now[0] == "meta-classifier 2"][-1] == ("meta-classifier 2", 12, 12)
    assert {title for title, _, _ in told} == {"shadow models", "meta-classifier 1", "meta-classifier 2"}
    assert all(not p.requires_grad for meta in made for p in meta.parameters())

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(shadows, "train_population", never)
    assert digest(SMALL.metas(2, SETTINGS)) == digest(made)


def test_an_interrupted_run_keeps_what_is_finished_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SMALL.metas(2, SETTINGS, layout=LAYOUT)
    again = replace(SMALL)
    for path in again.folder.glob("meta-*"):
        path.unlink()
    fit, calls = meta_training.fit, 0

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(shadows, "fit", dying)
    with pytest.raises(KeyboardInterrupt):
        again.metas(2, SETTINGS)
    assert len(list(again.folder.glob("meta-*"))) == 1
    assert digest(again.metas(2, SETTINGS)) == digest(whole)
    assert calls == 3


def test_a_broken_file_is_trained_again() -> None:
    made = SMALL.metas(1, SETTINGS, layout=LAYOUT)
    (path,) = SMALL.folder.glob("meta-*")
    path.write_bytes(path.read_bytes()[:-10])
    assert digest(SMALL.metas(1, SETTINGS)) == digest(made)


def test_two_folders_of_pictures_share_nothing(tmp_path: Path) -> None:
    folders = []
    for name, shade in (("a", 40), ("b", 200)):
        for kind in ("cat", "dog"):
            (tmp_path / name / kind).mkdir(parents=True)
            for number in range(12):
                picture = Image.new("L", (16, 16), min(255, shade + 3 * number + (10 if kind == "dog" else 0)))
                picture.save(tmp_path / name / kind / f"{number}.png")
        folders.append(Shadows(task=f"folder:{tmp_path / name}", network="lenet5", count=1, recipe=RECIPE).folder)
    assert folders[0] != folders[1]


def test_a_secret_seed_makes_other_meta_classifiers_of_the_same_models() -> None:
    public = SMALL.metas(1, SETTINGS, layout=LAYOUT)
    before = sorted(SMALL.folder.glob("block-*"))
    assert digest(SMALL.metas(1, SETTINGS, seed=12345)) != digest(public)
    assert sorted(SMALL.folder.glob("block-*")) == before


def test_other_settings_are_other_meta_classifiers() -> None:
    one = SMALL.metas(1, SETTINGS, layout=LAYOUT)
    other = SMALL.metas(1, replace(SETTINGS, per_class=False))
    assert one[0].settings.per_class
    assert not other[0].settings.per_class
    assert len(list(SMALL.folder.glob("meta-*"))) == 2


def test_what_backdoored_shadows_learn_is_a_backdoor() -> None:
    """Not only labels that are wrong: the trigger of the draw works on the model that was poisoned with it."""
    recipe = replace(RECIPE, epochs=4)
    grown = Shadows(task="mnist5k", network="lenet5", count=1, images=3000, recipe=recipe).grow(layout=LAYOUT)
    task = get_task("mnist5k")
    held = task.load("validation")
    member = grown[1].member
    assert isinstance(member.poison, JumboDraw)
    made = member.poison(held, task, torch.Generator().manual_seed(0))
    other = held.y != member.poison.target(task)
    rates = []
    with torch.no_grad():
        for one in grown:
            said = one.network(made.trigger(held.x[other])).argmax(1)
            rates.append(float((said == member.poison.target(task)).double().mean()))
    assert rates[1] > rates[0] + 0.3


def test_no_population_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one model of either kind"):
        replace(SMALL, count=0)
    with pytest.raises(ValueError, match="at least one meta-classifier"):
        SMALL.metas(0)
