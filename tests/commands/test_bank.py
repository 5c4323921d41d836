"""`molehunt bank`: builds, resumes, lists, shows, and refuses what it does not know."""

import json
from pathlib import Path

import pytest

from molehunt.bank import roster as module
from molehunt.cli import main
from molehunt.training import Recipe

HURRIED = Recipe(epochs=0.1, batch=50, optimizer="adamw", lr=4e-3, augment="crop", shift=1)


def test_builds_once_then_lists_and_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "recipe_for", lambda *_: HURRIED)
    command = ["bank", "build", "--partition", "develop", "--most", "1", "--folder", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "2/2" in said.err
    assert "blended" in said.out
    assert main(command) == 0
    assert "Training 0 of 2 models" in capsys.readouterr().err
    assert main(["bank", "show", "develop-planted-000", "--folder", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "blended"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--network", "vit_tiny"], "no bank of 'vit_tiny'"),
        (["build", "--partition", "test"], "unknown partition 'test'"),
        (["list", "--task", "nothing"], "unknown task 'nothing'"),
        (["show", "nobody"], "no model 'nobody'"),
        (["show", "develop-clean-000"], "not trained yet: molehunt bank build"),
    ],
)
def test_what_is_unknown_is_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bank", *arguments, "--folder", str(tmp_path)]) == 3
    assert said in capsys.readouterr().err
