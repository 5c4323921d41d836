"""`molehunt train`: a submission on disk, or a reason why not."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from commands.pictures import two_kinds
from molehunt.attacks import BadNets
from molehunt.cli import main
from molehunt.game import workshop
from molehunt.game.submission import read_submission
from molehunt.tasks import get_task

OWN = """
from dataclasses import dataclass

import torch

from molehunt.attacks import BadNets


@dataclass(frozen=True, kw_only=True)
class Mine:
    target: int = 0

    def __call__(self, clean, task, rng):
        made = BadNets(target=self.target, poison_rate=0.02)(clean, task, rng)
        {body}
        return made
"""
LINE = 1 + OWN[: OWN.index("{body}")].count("\n")


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


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module for an attack of one's own in the working folder, and another one that it may import."""
    for name in ("own_for_test", "helper_for_test"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "helper_for_test.py").write_text("def first(of):\n    return of[0]\n")
    return tmp_path / "own_for_test.py"


@pytest.mark.parametrize("board", ["weights", "data"])
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise NotImplementedError('not yet')", f"Mine raised NotImplementedError at own_for_test.py:{LINE}: not yet"),
        ("raise ValueError('not so')", f"Mine raised ValueError at own_for_test.py:{LINE}: not so"),
        ("torch.zeros(2) @ torch.zeros(3)", f"Mine raised RuntimeError at own_for_test.py:{LINE}: "),
        ("made = BadNets(size='4')(clean, task, rng)", f"Mine raised TypeError at own_for_test.py:{LINE}: "),
        ("import nowhere", f"Mine raised ModuleNotFoundError at own_for_test.py:{LINE}: No module named 'nowhere'"),
        ("import helper_for_test as h; h.first([])", "Mine raised IndexError at helper_for_test.py:2: list index"),
        ("raise SystemExit(1)", f"Mine raised SystemExit at own_for_test.py:{LINE}: 1"),
        ("raise RuntimeError", f"Mine raised RuntimeError at own_for_test.py:{LINE}\n"),
        ("return None", "Mine returned NoneType in place of molehunt.attacks.Poisoned"),
        ("made.images.y[0] = 10", "Mine returned labels from 0 to 10, expected 0 to 9"),
    ],
)
def test_what_goes_wrong_in_an_attack_of_ones_own_is_not_called_a_mistake_of_ours(
    body: str, says: str, board: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own.write_text(OWN.replace("{body}", body))
    assert main(["train", "--board", board, "--attack", "own_for_test:Mine", "--out", "mine"]) == 3
    said = capsys.readouterr().err
    assert says in said
    assert "mistake in Molehunt" not in said


def test_an_attack_of_ones_own_that_cannot_be_made_is_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own.write_text(OWN.replace("target: int = 0", "target: int").replace("{body}", ""))
    assert main(["train", "--attack", "own_for_test:Mine", "--out", "mine"]) == 3
    assert "own_for_test:Mine cannot be made: TypeError: " in capsys.readouterr().err


def test_a_mistake_of_ours_stays_one(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("ours")

    own.write_text(OWN.replace("{body}", ""))
    with monkeypatch.context() as patch:
        patch.setattr(workshop, "write_training_set", fail)
        assert main(["train", "--board", "data", "--attack", "own_for_test:Mine", "--out", "mine"]) == 70
    monkeypatch.setattr(BadNets, "__call__", fail)
    assert main(["train", "--board", "data", "--attack", "badnets", "--out", "other"]) == 70
    assert capsys.readouterr().err.count("This is a mistake in Molehunt") == 2


def test_an_attack_of_ones_own_may_import_when_it_is_called(own: Path) -> None:
    own.write_text(OWN.replace("{body}", "import helper_for_test as h; h.first([1])"))
    before = list(sys.path)
    assert main(["train", "--board", "data", "--attack", "own_for_test:Mine", "--out", "mine"]) == 0
    assert sys.path == before


@pytest.mark.usefixtures("hurried")
def test_a_training_with_changed_code_begins_anew_and_says_so(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "training-0123456789abcdef.safetensors").write_bytes(b"of other code")
    own.write_text(OWN.replace("{body}", ""))
    assert main(["train", "--attack", "own_for_test:Mine", "--out", "mine"]) == 0
    assert "The unfinished training in mine has other settings or other code" in capsys.readouterr().err
    assert main(["train", "--attack", "own_for_test:Mine", "--out", "mine", "--replace"]) == 0
    assert "begins anew" not in capsys.readouterr().err


def test_for_a_folder_the_next_command_names_the_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_kinds(tmp_path / "two kinds")
    command = ["train", "--task", "folder:two kinds", "--board", "data", "--out", "my set"]
    assert main([*command, "--attack", "badnets", "--set", "target=1"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    task = get_task("folder:two kinds")
    words = shlex.split(line.removeprefix("next:"))
    assert words == ["molehunt", "check", "my set", "--task", task.name]
    assert read_submission(tmp_path / words[2], task=get_task(words[4])).board == "data"
