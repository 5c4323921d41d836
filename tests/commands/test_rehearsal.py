"""`molehunt check --defend`: what a round would say and pay, by the host's own functions."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from game.tricks import honest
from molehunt import calibration, checkpoints
from molehunt.calibration import Population
from molehunt.cli import main
from molehunt.commands import rehearsal as command
from molehunt.defenses import Defense
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.game import check as home
from molehunt.game import rehearsal, submission
from molehunt.game.rules import Board, get_round
from molehunt.game.seal import Sealed
from molehunt.networks import build
from molehunt.suspect import Access, Suspect
from molehunt.tasks import DEFENDER, Images, Split, Task
from molehunt.tensor_file import encode
from molehunt.triggers import Patch, Target

Out = pytest.CaptureFixture[str]
CALLS: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """Names the white square without looking. Score: 1. Reference: none. Departures: none."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        CALLS.append("oracle")
        trigger = Patch.square(suspect.task.shape, color="white")
        return Finding(defense="strip", score=float(len(CALLS)), trigger=trigger, target=3)


@dataclass(frozen=True, kw_only=True)
class Bookkeeper:
    """Counts the training set. Score: rows. Reference: none. Departures: none."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.TRAINING}),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        assert suspect.training is not None
        CALLS.append("bookkeeper")
        return Finding(defense="rab", score=float(len(suspect.training.y) + len(CALLS)))


@pytest.fixture
def references(hurried: None, monkeypatch: pytest.MonkeyPatch) -> home.References:
    """Five equal references; defenses that are known, and no shipped scores of clean models."""
    CALLS.clear()
    known: dict[str, type[Defense]] = {"strip": Oracle, "rab": Bookkeeper}
    monkeypatch.setattr(command, "DEFENSES", known)
    monkeypatch.setattr(calibration, "shipped", lambda *_: None)
    kept = home.References(task=honest.TASK, network="badnets_cnn")
    kept.get(0)
    for number in range(1, 5):
        shutil.copy(kept.folder / "0.safetensors", kept.folder / f"{number}.safetensors")
    return kept


def submitted(folder: Path, kept: home.References, sealed: Sealed) -> str:
    manifest = honest.HANDED.model_copy(update={"network": kept.network, "recipe": kept.network})
    submission.write_submission(folder, kept.get(0), manifest, sealed)
    return str(folder)


def test_a_missed_gate_earns_nothing_and_what_is_missing_is_said(
    tmp_path: Path, references: home.References, capsys: Out
) -> None:
    mine = submitted(tmp_path / "mine", references, honest.backdoor())
    assert main(["check", mine, "--defend", "II"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Dress rehearsal of round II: statistical detection" in said
    assert "Recovered a trigger for “3”" in said
    assert "points: 0, because of the missed gates; else" in said
    # On the weights board; spectral signatures play on the other one.
    assert "Not there yet, and so not rehearsed: abs." in said
    assert CALLS == ["oracle"] * 6, "five references, then the submission"

    assert main(["check", mine, "--defend", "II"]) == 1
    assert CALLS == ["oracle"] * 7, "what was said about references is kept"
    assert "How do clean models score" in capsys.readouterr().err


def test_an_honest_model_scores_nobody(tmp_path: Path, references: home.References, capsys: Out) -> None:
    assert main(["check", submitted(tmp_path / "mine", references, Sealed()), "--defend", "II"]) == 0
    said = capsys.readouterr().out
    assert "An honest model scores nobody" in said
    assert "points:" not in said


def test_on_the_data_board_defenses_see_the_merged_set(
    tmp_path: Path, references: home.References, capsys: Out
) -> None:
    manifest = honest.HANDED.model_copy(update={"network": "badnets_cnn", "recipe": "badnets_cnn"})
    submission.write_training_set(tmp_path / "set", honest.training_set(), manifest, Sealed())
    assert main(["check", str(tmp_path / "set"), "--defend", "IV"]) == 0
    assert "rab" in capsys.readouterr().out
    assert CALLS.count("bookkeeper") == 6


def test_a_round_whose_defenses_are_not_there_is_said_to_be_so(
    tmp_path: Path, references: home.References, capsys: Out
) -> None:
    assert main(["check", submitted(tmp_path / "mine", references, Sealed()), "--defend", "IV"]) == 0
    said = capsys.readouterr().out
    assert "Not there yet, and so not rehearsed: mntd." in said
    assert not CALLS


def test_an_unknown_round_is_refused_before_anything_is_read(tmp_path: Path, capsys: Out) -> None:
    assert main(["check", str(tmp_path), "--defend", "VI"]) == 3
    assert "unknown round 'VI'" in capsys.readouterr().err


def test_a_stopped_rehearsal_goes_on(
    tmp_path: Path, references: home.References, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    mine = submitted(tmp_path / "mine", references, Sealed())
    call = Oracle.__call__

    def stop(self: Oracle, suspect: Suspect, run: Run) -> Finding:
        if len(CALLS) == 3:
            raise KeyboardInterrupt
        return call(self, suspect, run)

    monkeypatch.setattr(Oracle, "__call__", stop)
    assert main(["check", mine, "--defend", "II"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(Oracle, "__call__", call)
    assert main(["check", mine, "--defend", "II"]) == 0
    assert CALLS == ["oracle"] * 6


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Judges what others found. Score: how many. Reference: none. Departures: none."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CANDIDATES}),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        raise NotImplementedError("the test answers for it")


@dataclass(frozen=True, kw_only=True)
class Searcher:
    """Names a square of some size. Score: none. Reference: none. Departures: none."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)
    size: int = 3

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        raise NotImplementedError("the test answers for it")


def test_an_answer_is_used_again_only_where_all_that_it_depends_on_is_the_same(
    references: home.References, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def inspect(name: str, defense: Defense, suspect: Suspect) -> Finding:
        asked.append(name)
        if not isinstance(defense, Searcher):
            return Finding(defense=name, score=1.0)
        trigger = Patch.square(suspect.task.shape, size=defense.size, color="white")
        return Finding(defense=name, score=1.0, trigger=trigger, target=3)

    def ask(board: Board = "weights", size: int = 3) -> list[str]:
        asked.clear()
        defenses: dict[str, Defense] = {"searcher": Searcher(size=size), "judge": Judge()}
        rehearsal.population(references, 1, defenses, board, inspect, lambda _: None)
        return list(asked)

    both = ["searcher", "judge"]
    assert ask() == both
    assert ask() == []
    assert ask(size=4) == both, "another candidate is judged"
    assert ask("data") == both, "another board shows more"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 64)
        assert ask() == both
    with monkeypatch.context() as patch:
        patch.setattr("molehunt.__version__", "9.9")
        assert ask() == both
    with monkeypatch.context() as patch:
        patch.setattr(rehearsal, "DEFENDER", 100)
        assert ask() == both, "other clean images"
    assert ask() == []
    other = build(references.network, honest.TASK.shape, 10, rng=torch.Generator().manual_seed(1))
    path = references.folder / "0.safetensors"
    path.write_bytes(b"".join(encode(checkpoints.canonical(other.state_dict()))))
    assert ask() == both, "another reference"


@dataclass(frozen=True, kw_only=True)
class Large(Task):
    """A task with a validation split of its own."""

    def load(self, split: Split) -> Images:
        y = torch.tensor([0] * 2000 + [1] * 3000)
        return Images(torch.arange(5000.0).view(-1, 1, 1, 1) / 5000, y)


def test_defenders_see_as_many_images_as_at_the_host() -> None:
    task = Large(
        name="large", shape=(1, 1, 1), classes=("a", "b"), augment="none", network="none", mean=(0.5,), std=(0.5,)
    )
    drawn = rehearsal.clean_images(task)
    assert torch.bincount(drawn.y).tolist() == [400, 600]
    assert len(set(drawn.x.flatten().tolist())) == DEFENDER == 1000
    assert torch.equal(drawn.x, rehearsal.clean_images(task).x)
    assert 0 < int(drawn.y[:100].sum()) < 100, "the classes are mixed, so that both parts have all of them"
    assert rehearsal.clean_images(honest.TASK) is honest.TASK.load("validation")


def test_the_submission_is_judged_with_as_many_images_as_at_the_host(
    references: home.References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "DEFENDER", 100)
    contents = submission.read_submission(Path(submitted(tmp_path / "mine", references, Sealed())))
    seen: list[int] = []

    def inspect(name: str, defense: Defense, suspect: Suspect) -> Finding:
        assert suspect.clean is not None
        seen.append(len(suspect.clean.y))
        return Finding(defense=name, score=1.0)

    known, defenses = Population(task="mnist5k", network="badnets_cnn"), {"strip": Oracle()}
    rehearsal.rehearse(contents, references.get(0), None, get_round("II"), defenses, (), known, inspect)
    rehearsal.population(references, 1, defenses, "weights", inspect, lambda _: None)
    assert seen == [80, 80]


def test_the_points_are_the_hosts(references: home.References, tmp_path: Path) -> None:
    """A perfect answer leaves nothing: B, T and R as they are worked by hand in the tests of scoring."""
    trigger = Patch.square(honest.TASK.shape, color="white")
    sealed = Sealed(attack="badnets", target=Target(3), trigger=trigger)
    contents = submission.read_submission(Path(submitted(tmp_path / "mine", references, sealed)))
    round_ = get_round("II")
    defenses, missing = rehearsal.cast(round_, "weights", {"strip": Oracle})
    assert missing == ("abs",)
    known = Population(task="mnist5k", network="badnets_cnn")

    def inspect(name: str, defense: Defense, suspect: Suspect) -> Finding:
        return Finding(defense=name, score=1.0, trigger=trigger, target=3, class_scores=torch.eye(10)[3])

    done = rehearsal.rehearse(contents, references.get(0), None, round_, defenses, missing, known, inspect)
    w, points = round_.weights, done.points
    assert points.trigger is not None
    assert points.hit is not None
    by_hand = w.detection * (1 - done.verdict.p) + w.target * (1 - points.hit) + w.trigger * (1 - points.trigger)
    assert done.attack == pytest.approx(by_hand)
