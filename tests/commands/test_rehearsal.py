"""`molehunt check --defend`: what a round would say and pay, by the host's own functions."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from game.tricks import honest
from molehunt import calibration
from molehunt.calibration import Population
from molehunt.cli import main
from molehunt.commands import rehearsal as command
from molehunt.defenses import Defense
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.game import check as home
from molehunt.game import rehearsal, submission
from molehunt.game.rules import get_round
from molehunt.game.seal import Sealed
from molehunt.suspect import Access, Suspect
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
        return Finding(defense="spectral_signatures", score=float(len(suspect.training.y) + len(CALLS)))


@pytest.fixture
def references(hurried: None, monkeypatch: pytest.MonkeyPatch) -> home.References:
    """Five equal references; defenses that are known, and no shipped scores of clean models."""
    CALLS.clear()
    known: dict[str, type[Defense]] = {"strip": Oracle, "spectral_signatures": Bookkeeper}
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
    assert main(["check", str(tmp_path / "set"), "--defend", "II"]) == 0
    assert "spectral_signatures" in capsys.readouterr().out
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
