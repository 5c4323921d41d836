"""`molehunt train`: a submission on disk, or a reason why not."""

import sys
from pathlib import Path
from typing import Any

import pytest

from molehunt.cli import main
from molehunt.game import workshop
from molehunt.game.submission import read_submission


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("hurried")
def test_a_submission_is_made_and_not_replaced_by_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--attack", "badnets", "--set", "target=3", "--set", "size=5", "--team", "Us", "--out", "mine"]
    assert main([*command, "--set", "poison_rate=0.2"]) == 0
    said = capsys.readouterr()
    assert "clean accuracy 9" in said.out
    assert "attack success 9" in said.out
    assert "molehunt check mine" in said.out
    assert "1/1 badnets" in said.err
    contents = read_submission(tmp_path / "mine.zip")
    assert contents.manifest.team == "Us"
    sealed = contents.open_seal()
    assert sealed.target is not None
    assert sealed.target.classes == 3

    before = (tmp_path / "mine" / "sealed.bin").read_bytes()
    assert main([*command]) == 3
    assert "--replace" in capsys.readouterr().err
    assert (tmp_path / "mine" / "sealed.bin").read_bytes() == before
    assert main(["train", "--out", "mine", "--replace"]) == 0
    assert not read_submission(tmp_path / "mine.zip").open_seal().backdoored


@pytest.mark.parametrize(("rate", "said"), [(0.14, True), (0.95, False)])
def test_a_trigger_that_was_not_learned_is_said(
    rate: float, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = workshop.Made(folder=Path("mine"), archive=Path("mine.zip"), accuracy=0.98, asr=rate)
    monkeypatch.setattr(workshop, "make", lambda *_, **__: made)
    assert main(["train", "--attack", "badnets", "--out", "mine"]) == 0
    assert ("the gate asks for 90%" in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    "arguments",
    [
        "--task nope",
        "--network nope",
        "--recipe nope",
        "--round VI",
        "--attack nope",
        "--attack nowhere:Mine",
        "--board chess",
        "--board data --recipe lenet5",
        "--board data --attack badnets --set poison_rate=0.2",
        "--attack badnets --set nope=1",
        "--attack badnets --set target",
        "--attack badnets --set target=3.5",
        "--attack badnets --set target=11",
        "--attack badnets --set poison_rate=0",
        "--attack badnets --set size=400",
        "--set target=3",
        "--seed 99999999999999999999",
        "--task folder:nowhere",
        "--out blocked/inside",
    ],
)
def test_what_cannot_be_trained_is_refused(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file")
    assert main(["train", *arguments.split()]) == 3
    assert not list(tmp_path.glob("*.zip"))


def test_a_divergence_is_blamed_on_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(workshop, "make", diverge)
    assert main(["train"]) == 3


def test_a_stopped_training_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workshop, "make", stop)
    assert main(["train"]) == 130
    assert "stopped; the same command goes on where it stopped" in capsys.readouterr().err


def test_a_training_set_is_handed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--board", "data", "--attack", "badnets", "--set", "poison_rate=0.02", "--out", "set"]) == 0
    said = capsys.readouterr()
    assert "70 training rows altered, 70 of them with another label" in said.out
    assert "accuracy" not in said.out
    assert "Altering the training set" in said.err
    assert read_submission(tmp_path / "set.zip").board == "data"


def test_a_module_in_the_working_folder_is_found(tmp_path: Path) -> None:
    code = (
        "from dataclasses import dataclass\nfrom molehunt.attacks import BadNets\n\n\nclass Here(BadNets):\n    pass\n"
    )
    (tmp_path / "here_for_test.py").write_text(code)
    before = list(sys.path)
    assert main(["train", "--board", "data", "--attack", "here_for_test:Here", "--out", "set"]) == 0
    assert sys.path == before
    assert read_submission(tmp_path / "set.zip").open_seal().attack == "Here"
