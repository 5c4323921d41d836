"""Gates at home: the host's functions, on references that are trained once and kept."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from game.planted import CLASSES, SHAPE, constant, images, model, pixel
from game.tricks import honest
from molehunt.attacks import BadNets
from molehunt.datasets import cache
from molehunt.game import check as home
from molehunt.game.attacker import train_model
from molehunt.game.check import Judged, References, check, poison_budget
from molehunt.game.rules import Limits
from molehunt.game.seal import Sealed
from molehunt.game.training_set import TrainingSet
from molehunt.tasks import TASKS, Images
from molehunt.training import Recipe
from molehunt.triggers import Target

TASK = TASKS["mnist5k"]
WORLD = images(40)
CLEAN = [model()] * 5
LOOSE = Limits(area=1.0)
SHORT = Recipe(epochs=0.1, batch=50, optimizer="adamw", lr=4e-3, augment="crop", shift=1)
BACKDOOR = Sealed(attack="badnets", target=Target(classes=2), trigger=pixel())


def names(gates: object) -> list[tuple[str, bool]]:
    return [(gate.name, gate.passed) for gate in gates]  # type: ignore[attr-defined]


def test_an_honest_model_has_one_gate() -> None:
    assert names(check(model(), Sealed(), CLEAN, WORLD, shape=SHAPE)) == [("clean accuracy", True)]
    assert names(check(constant(1), Sealed(), CLEAN, WORLD, shape=SHAPE)) == [("clean accuracy", False)]


def test_a_backdoor_has_four() -> None:
    gates = check(model(Target(classes=2)), BACKDOOR, CLEAN, WORLD, shape=SHAPE, limits=LOOSE)
    assert names(gates) == [
        ("clean accuracy", True),
        ("attack success", True),
        ("specificity", True),
        ("budget", True),
    ]
    assert gates[1].measured == pytest.approx(0.05 ** (1 / 120))  # 120 of 120, by Clopper and Pearson


def test_a_trigger_that_does_nothing_misses_the_gate() -> None:
    gates = dict(names(check(model(), BACKDOOR, CLEAN, WORLD, shape=SHAPE, limits=LOOSE)))
    assert not gates["attack success"]


def test_a_trigger_that_works_on_clean_models_is_none() -> None:
    working = [model(Target(classes=2))] * 5
    gates = dict(names(check(working[0], BACKDOOR, working, WORLD, shape=SHAPE, limits=LOOSE)))
    assert not gates["specificity"]


def test_a_source_specific_one_has_a_fifth() -> None:
    target = Target(classes=2, sources=(0,))
    sealed = replace(BACKDOOR, target=target)
    gates = dict(names(check(model(target), sealed, CLEAN, WORLD, shape=SHAPE, limits=LOOSE)))
    assert gates["leakage"]
    assert not dict(names(check(model(Target(2)), sealed, CLEAN, WORLD, shape=SHAPE, limits=LOOSE)))["leakage"]


def test_too_few_references_are_an_error() -> None:
    with pytest.raises(ValueError, match="specificity needs 5"):
        check(model(), BACKDOOR, CLEAN[:4], WORLD, shape=SHAPE)
    with pytest.raises(ValueError, match="no reference models"):
        check(model(), Sealed(), [], WORLD, shape=SHAPE)
    assert CLASSES == 4


@pytest.fixture
def references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> References:
    """References that are trained for a few steps into a cache of their own."""
    monkeypatch.setenv("MOLEHUNT_CACHE", str(tmp_path))
    monkeypatch.setattr(home, "recipe_for", lambda *_: SHORT)
    return References(task=TASK, network="badnets_cnn")


def test_a_reference_is_trained_once(references: References) -> None:
    seen: list[int] = []
    first = references.get(1, report=lambda done, _: seen.append(done))
    assert seen
    assert references.missing(3) == (0, 2)
    again = references.get(1, report=lambda *_: pytest.fail("it was trained again"))
    x = TASK.load("validation").x[:8]
    with torch.no_grad():
        assert torch.equal(first(x), again(x))
    assert references.folder.is_relative_to(cache.root())
    assert [path.name for path in references.folder.iterdir()] == ["1.safetensors"]


def test_references_differ_from_each_other(references: References) -> None:
    assert not torch.equal(references.get(0).head.weight, references.get(1).head.weight)


def test_a_damaged_one_is_trained_again(references: References) -> None:
    model_ = references.get(0)
    path = references.folder / "0.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert references.missing(1) == (0,)
    assert torch.equal(references.get(0).head.weight, model_.head.weight)
    assert path.read_bytes() == whole


def test_an_interrupted_one_goes_on(references: References) -> None:
    steps = 0

    def stop() -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        references.get(0, check=stop)
    assert references.missing(1) == (0,)
    seen: list[int] = []
    references.get(0, report=lambda done, _: seen.append(done))
    assert min(seen) > 3 * 50
    assert [path.name for path in references.folder.iterdir()] == ["0.safetensors"]


def test_another_recipe_means_other_references(references: References, monkeypatch: pytest.MonkeyPatch) -> None:
    before = references.folder
    monkeypatch.setattr(home, "recipe_for", lambda *_: replace(SHORT, lr=1e-3))
    assert references.folder != before
    assert replace(references, network="lenet5").folder != references.folder


class TestJudged:
    """The model that the host would train from a handed-over set."""

    @pytest.fixture
    def judged(self, references: References) -> Judged:
        return Judged(task=TASK, network=references.network, training=honest.training_set())

    def test_it_is_trained_once_from_the_set_and_kept_by_its_content(
        self, judged: Judged, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Images] = []
        train = train_model

        def watched(*arguments: Any, images: Images, **others: Any) -> Any:
            seen.append(images)
            return train(*arguments, images=images, **others)

        monkeypatch.setattr(home, "train_model", watched)
        assert judged.missing
        first = judged.get()
        assert not judged.missing
        again = replace(judged).get(report=lambda *_: pytest.fail("it was trained again"))
        assert torch.equal(first.head.weight, again.head.weight)
        clean = TASK.load("train")
        (images,) = seen
        assert not torch.equal(images.y, clean.y), "shuffled"
        assert torch.equal(images.y.bincount(), clean.y.bincount())
        other = TrainingSet.of(None, clean, torch.Generator().manual_seed(99))
        assert replace(judged, training=other).path != judged.path
        assert replace(judged, network="lenet5").path != judged.path

    def test_the_budget_is_measured_against_the_public_split(self, judged: Judged) -> None:
        clean = TASK.load("train")
        gate = poison_budget(judged.training, clean)
        assert (gate.passed, gate.measured, gate.limit) == (True, 0.0, 0.1)
        made = TrainingSet.of(BadNets(poison_rate=0.02)(clean, TASK, torch.Generator()), clean, torch.Generator())
        gate = poison_budget(made, clean)
        assert gate.measured == pytest.approx(0.02)
        assert "70 of 3500 training rows differ, 70 of them in their label" in gate.message
        assert not poison_budget(made, clean, Limits(altered=0.01)).passed


def test_while_one_model_is_trained_others_can_be_read_and_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "recipe_for", lambda *_: SHORT)
    kept = References(task=TASK, network=TASK.network)
    kept.get(70)  # no other test asks for these

    def meanwhile(*arguments: Any, **settings: Any) -> Any:
        monkeypatch.setattr(home, "train_model", train_model)
        # In threads: were there one lock for all models, these would wait for ever.
        for number in (70, 72):
            other = threading.Thread(target=kept.get, args=(number,), daemon=True)
            other.start()
            other.join(timeout=60.0)
            assert not other.is_alive()
        return train_model(*arguments, **settings)

    monkeypatch.setattr(home, "train_model", meanwhile)
    kept.get(71)
    assert {"70", "71", "72"} <= {path.stem for path in kept.folder.glob("*.safetensors")}
