"""`molehunt check`: gates passed, gates missed, and what is refused before anything is trained."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from game.tricks import Trick, all_archives, honest, parameters
from molehunt.cli import main
from molehunt.game import check as home
from molehunt.game import submission
from molehunt.game.seal import Sealed


@pytest.fixture
def _nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "train_model", lambda *_, **__: pytest.fail("a reference was trained"))


def submitted(folder: Path, sealed: Sealed | None = None) -> Path:
    """A submission of an untrained network."""
    submission.write_submission(folder, honest.model(), honest.MANIFEST, sealed or Sealed())
    return folder


@pytest.mark.usefixtures("_nothing_is_trained")
@pytest.mark.parametrize("trick", parameters(all_archives()))
def test_hostile_archives_are_refused(trick: Trick, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(trick.make(tmp_path))]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    assert said.err.isprintable() or set(said.err) - {"\n"} == {c for c in said.err if c.isprintable()}


@pytest.mark.usefixtures("_nothing_is_trained")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "cannot open"),
        (["mine", "--network", "resnet18"], "accepted here: resnet18"),
        (["mine", "--task", "mnist"], "expected 'mnist'"),
        (["mine", "--task", "nope"], "unknown task"),
    ],
)
def test_other_submissions_than_asked_for_are_refused(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    submitted(tmp_path / "mine")
    assert main(["check", *arguments]) == 3
    assert says in capsys.readouterr().err


@pytest.mark.usefixtures("hurried")
def test_gates_are_measured_against_references_that_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = home.References(task=honest.TASK, network="badnets_cnn")
    kept.get(0)
    for number in range(1, 5):  # equal ones do: how references differ is not what is tested here
        shutil.copy(kept.folder / "0.safetensors", kept.folder / f"{number}.safetensors")
    (kept.folder / "4.safetensors").write_bytes(b"damaged")

    manifest = honest.MANIFEST.model_copy(update={"network": "badnets_cnn", "team": "[red]\u0301"})
    mine = tmp_path / "mine"
    submission.write_submission(mine, kept.get(0), manifest, Sealed())
    archive = submission.pack(mine)
    assert main(["check", str(mine)]) == 0
    said = capsys.readouterr()
    assert "Every gate passed" in said.out
    assert "[red]" in said.out
    assert "1/1 reference 5: trained" in said.err

    monkeypatch.setattr(home, "train_model", lambda *_, **__: pytest.fail("a reference was trained again"))
    assert main(["check", str(archive)]) == 0
    assert capsys.readouterr().err == ""

    # A trigger that does nothing: sealed honestly, but no backdoor.
    submission.write_submission(mine, kept.get(0), manifest, honest.backdoor())
    assert main(["check", str(mine)]) == 1
    said = capsys.readouterr()
    assert "Missed: attack success." in said.out
    for gate in ("clean accuracy", "attack success", "specificity", "budget"):
        assert gate in said.out
    assert "≥ 90.0 %" in said.out


@pytest.mark.usefixtures("hurried")
def test_a_training_set_is_trained_from_once_and_refused_where_its_trigger_does_not_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = home.References(task=honest.TASK, network="badnets_cnn")
    kept.get(0)
    for number in range(1, 5):
        shutil.copy(kept.folder / "0.safetensors", kept.folder / f"{number}.safetensors")
    manifest = honest.HANDED.model_copy(update={"network": "badnets_cnn", "recipe": "badnets_cnn"})
    mine = tmp_path / "mine"
    submission.write_training_set(mine, honest.training_set(), manifest, Sealed())
    assert main(["check", str(submission.pack(mine))]) == 0
    said = capsys.readouterr()
    assert "the judged model: trained" in said.err
    assert "altered rows" in said.out
    assert "0 of 3500 training rows differ" in said.out

    # The same set with a trigger that it does not teach: sealed, but no backdoor.
    monkeypatch.setattr(home, "train_model", lambda *_, **__: pytest.fail("something was trained again"))
    submission.write_training_set(mine, honest.training_set(), manifest, honest.backdoor())
    assert main(["check", str(mine)]) == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert "Missed: attack success." in said.out
    assert "The host refuses this set" in said.out


def test_a_mistake_of_ours_is_no_missed_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr(submission, "read_submission", broken)
    assert main(["check", str(tmp_path)]) == 70
