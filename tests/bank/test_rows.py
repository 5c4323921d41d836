"""Building a bank: finished models stay, an interrupted run gives the same rows, and a model can be made again."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molehunt import checkpoints
from molehunt.bank import roster as module
from molehunt.bank import rows as making
from molehunt.bank.roster import Entry
from molehunt.bank.rows import Row, _kept, backdoored, build, clean_accuracy, read_rows, regrow
from molehunt.game.answers import measure
from molehunt.game.budget import budget
from molehunt.game.gates import attack_success, leakage
from molehunt.game.rules import Limits
from molehunt.networks import Network
from molehunt.tasks import get_task
from molehunt.training import Recipe

HURRIED = Recipe(epochs=0.2, batch=50, optimizer="adamw", lr=4e-3, augment="crop", shift=1)
LISTED = tuple(
    Entry(task="mnist5k", network="badnets_cnn", partition="develop", planted=planted, number=number)
    for planted, number in ((False, 0), (True, 9), (False, 5))
)


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLEHUNT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "recipe_for", lambda *_: HURRIED)


def lasting(rows: tuple[Row, ...]) -> list[Row]:
    return [replace(row, seconds=0.0) for row in rows]


def test_an_interrupted_build_goes_on_and_gives_the_same_rows(tmp_path: Path) -> None:
    whole = build(LISTED, tmp_path / "whole")

    def stop(row: Row, done: int, total: int) -> None:
        assert (row.name, done, total) == (LISTED[0].name, 1, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(LISTED, tmp_path / "cut", report=stop)
    assert [row.name for row in read_rows(LISTED, tmp_path / "cut")] == [LISTED[0].name]
    fresh: list[str] = []
    resumed = build(LISTED, tmp_path / "cut", report=lambda row, *_: fresh.append(row.name))
    assert fresh == [entry.name for entry in LISTED[1:]]
    assert lasting(resumed) == lasting(whole)


def test_a_row_says_what_was_measured_and_the_model_can_be_made_again(tmp_path: Path) -> None:
    (row,) = build(LISTED[1:2], tmp_path)
    assert row.kind == "badnets"
    assert row.asr is not None
    assert row.images == 500
    assert [gate["name"] for gate in row.gates] == ["attack success", "budget"]
    # The patch keeps the budget; a model that saw a fifth of the images once has learned nothing.
    assert [gate["passed"] for gate in row.gates] == [False, True]
    kept = regrow(LISTED[1], row)
    _kept(LISTED[1], row.threads).unlink()
    again = regrow(LISTED[1], row)
    assert checkpoints.digest(kept.state_dict()) == checkpoints.digest(again.state_dict()) == row.weights
    assert all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), again.state_dict().values(), strict=True))
    assert not again.training
    assert _kept(LISTED[1], row.threads).exists()


class TestKeptWeights:
    """They are a cache: used where they are the row's, thrown away where not."""

    @pytest.fixture
    def row(self, tmp_path: Path) -> Row:
        return build(LISTED[:1], tmp_path)[0]

    @pytest.fixture
    def trained(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The threads of every training from here on."""
        found: list[int] = []
        train = making._train

        def counted(entry: Entry, threads: int) -> Network:
            found.append(threads)
            return train(entry, threads)

        monkeypatch.setattr(making, "_train", counted)
        return found

    def test_those_of_the_row_are_used(self, row: Row, trained: list[int]) -> None:
        regrow(LISTED[0], row)
        assert trained == []

    def test_weights_of_another_model_are_thrown_away(self, row: Row, trained: list[int]) -> None:
        path = _kept(LISTED[0], 1)
        state = checkpoints.canonical(regrow(LISTED[0], row).state_dict())
        name = next(iter(state))
        checkpoints.write(state | {name: 2 * state[name]}, path)
        assert checkpoints.digest(regrow(LISTED[0], row).state_dict()) == row.weights
        assert trained == [1]
        # What was trained is kept, so it is trained once.
        regrow(LISTED[0], row)
        assert trained == [1]

    def test_a_file_that_was_cut_short_is_thrown_away(self, row: Row, trained: list[int]) -> None:
        path = _kept(LISTED[0], 1)
        path.write_bytes(path.read_bytes()[:-100])
        assert checkpoints.digest(regrow(LISTED[0], row).state_dict()) == row.weights
        assert trained == [1]

    def test_models_of_other_numbers_of_threads_are_other_files(self, row: Row) -> None:
        assert _kept(LISTED[0], 1) != _kept(LISTED[0], 2)
        assert row.threads == 1

    def test_weights_that_cannot_be_made_again_are_an_error_that_says_why(self, row: Row) -> None:
        elsewhere = replace(row, weights="0" * 64, machine="riscv64 of another room")
        with pytest.raises(ValueError, match="develop-clean-000 came out with other weights") as caught:
            regrow(LISTED[0], elsewhere)
        said = str(caught.value)
        assert "000000000000" in said
        assert "1 thread on riscv64 of another room" in said
        assert f"1 thread on {row.machine}" in said
        assert not _kept(LISTED[0], 1).exists()


def test_a_row_of_another_recipe_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(LISTED[:1], tmp_path)
    monkeypatch.setattr(module, "recipe_for", lambda *_: replace(HURRIED, lr=1e-3))
    assert read_rows(LISTED[:1], tmp_path) == ()


def test_a_row_of_an_older_format_is_trained_again(tmp_path: Path) -> None:
    (row,) = build(LISTED[:1], tmp_path)
    old = {"name": row.name, "digest": "0" * 64, "backdoored": False}
    (tmp_path / f"{row.name}.json").write_text(json.dumps(old))
    assert read_rows(LISTED[:1], tmp_path) == ()
    assert lasting(build(LISTED[:1], tmp_path)) == lasting((row,))


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_a_file_that_is_no_row_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / f"{LISTED[0].name}.json").write_text(text)
    with pytest.raises(ValueError, match=r"develop-clean-000\.json is no row"):
        build(LISTED, tmp_path)


def test_a_row_with_a_field_too_few_is_named(tmp_path: Path) -> None:
    (row,) = build(LISTED[:1], tmp_path)
    (tmp_path / f"{row.name}.json").write_text(json.dumps({"digest": row.digest}))
    with pytest.raises(ValueError, match=r"develop-clean-000\.json is no row"):
        build(LISTED, tmp_path)


def test_threads_are_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    build(LISTED[:1], tmp_path, threads=1)
    assert torch.get_num_threads() == before


class TestWhatCountsAsBackdoored:
    """A planted model counts where the referee of a game would let it play."""

    @staticmethod
    def row(number: int, *, planted: bool = True, partition: str = "develop", **changed: Any) -> Row:
        passed = {"name": "attack success", "passed": True}
        settings: dict[str, Any] = {
            "name": f"{partition}-{'planted' if planted else 'clean'}-{number:03d}",
            "partition": partition,
            "planted": planted,
            "kind": "badnets" if planted else "plain",
            "seed": number,
            "digest": "",
            "weights": "",
            "accuracy": 0.96,
            "images": 500,
            "asr": 1.0 if planted else None,
            "gates": [passed, passed | {"name": "budget"}] if planted else [],
            "norm": 1.0,
            "recipe": {},
            "seconds": 1.0,
            "dtype": "float32",
            "threads": 1,
            "machine": "",
            "versions": {},
        }
        return Row(**settings | changed)

    def test_all_gates_have_to_be_passed(self) -> None:
        clean, fine = self.row(0, planted=False), self.row(0)
        for gate in ("attack success", "leakage", "budget"):
            missed = self.row(1, gates=[*fine.gates, {"name": gate, "passed": False}])
            assert backdoored([clean, fine, missed]) == {fine.name}

    def test_clean_accuracy_is_compared_with_plain_clean_models(self) -> None:
        clean = [self.row(i, planted=False, accuracy=0.97) for i in range(5)]
        # Harder clean models are worse at the task; they are no reason to let a backdoored one be worse.
        hard = [self.row(i, planted=False, accuracy=0.8, kind="adversarial") for i in range(5, 10)]
        dear, cheap = self.row(0, accuracy=0.90), self.row(1, accuracy=0.955)
        assert backdoored([*clean, *hard, dear, cheap]) == {cheap.name}
        gate = clean_accuracy(dear, clean)
        assert gate is not None
        assert gate.measured == pytest.approx(0.90)
        # Two points and the sampling margin below the mean of the plain ones.
        assert 0.92 < gate.limit < 0.95

    def test_the_accuracy_of_another_partition_says_nothing(self) -> None:
        elsewhere = self.row(0, planted=False, partition="evaluate")
        assert clean_accuracy(self.row(0), [elsewhere]) is None
        assert backdoored([elsewhere, self.row(0)]) == frozenset()

    def test_clean_models_never_count(self) -> None:
        assert backdoored([self.row(i, planted=False) for i in range(3)]) == frozenset()


def test_a_planted_model_that_a_referee_would_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by hand: two short trainings, and the gates of the game beside those of the row."""
    learning = replace(HURRIED, epochs=3.0, batch=25, warmup=0.25)
    monkeypatch.setattr(module, "recipe_for", lambda *_: learning)
    rows = build(LISTED[:2], tmp_path)
    assert rows[1].asr is not None
    assert rows[1].asr > 0.9
    assert backdoored(rows) == {LISTED[1].name}
    made = making.poisoned(LISTED[1])
    assert made is not None
    images = get_task("mnist5k").load("validation")
    answers = measure(regrow(LISTED[1], rows[1]), images, made.trigger)
    expected = [attack_success(answers, made.target), budget(made.trigger.footprint(), (1, 28, 28))]
    assert rows[1].gates == [asdict(gate) for gate in expected]
    # The same model, judged by a referee who wants more.
    monkeypatch.setattr(making, "LIMITS", Limits(accuracy_drop=-1.0))
    assert backdoored(rows) == frozenset()


def test_leakage_is_measured_where_there_are_sources(tmp_path: Path) -> None:
    tact = replace(LISTED[1], number=4)
    assert tact.kind == "tact"
    (row,) = build([tact], tmp_path)
    assert [gate["name"] for gate in row.gates] == ["attack success", "leakage", "budget"]
    made = making.poisoned(tact)
    assert made is not None
    answers = measure(regrow(tact, row), get_task("mnist5k").load("validation"), made.trigger)
    assert row.gates[1] == asdict(leakage(answers, made.target))
