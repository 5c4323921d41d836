"""`molehunt bank`: builds, resumes, lists, shows, and refuses what it does not know."""

import json
from pathlib import Path
from typing import Any

import pytest

from commands import dying
from molehunt.cli import main


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    dying.hurry(monkeypatch)


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Every row by its file, but for the seconds, in which no two trainings agree."""
    return {path.name: json.loads(path.read_text()) | {"seconds": 0} for path in sorted(folder.glob("*/*.json"))}


def test_builds_once_then_lists_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bank", "build", "--partition", "develop", "--most", "1", "--folder", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "2/2" in said.err
    assert "misses attack success" in said.err
    assert "blended" in said.out
    assert main(command) == 0
    assert "Training 0 of 2 models" in capsys.readouterr().err
    assert main(["bank", "show", "develop-planted-000", "--folder", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "blended"
    assert [gate["name"] for gate in shown["gates"]] == ["attack success", "budget", "clean accuracy"]
    assert shown["backdoored"] is False
    assert main(["bank", "show", "develop-clean-000", "--folder", str(tmp_path)]) == 0
    assert "backdoored" not in json.loads(capsys.readouterr().out)


def test_killed_in_the_middle_it_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    command = ["bank", "build", "--partition", "develop", "--most", "2", "--folder"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    # Both banks have one cache, and what lies there must not stand in for a training that was cut short.
    for path in (tmp_path / "cache" / "bank").iterdir():
        path.unlink()
    cut = tmp_path / "cut"
    assert dying.killed(dying.start(tmp_path, *command, str(cut), dies="molehunt.bank.rows:3"))
    assert rows(cut).keys() == {"develop-clean-000.json", "develop-planted-000.json"}
    assert list(cut.glob("*/.part-*")), "it was not killed while it wrote"
    done = dying.start(tmp_path, *command, str(cut))
    assert done.returncode == 0, done.stderr
    assert "Training 2 of 4 models" in done.stderr
    assert rows(cut) == rows(tmp_path / "whole")


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
