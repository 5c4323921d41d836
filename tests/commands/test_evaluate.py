"""`molehunt evaluate`: a defense from the working folder is judged, resumed, and run again when its code changes."""

from pathlib import Path

import pytest

from molehunt.bank import roster, rows
from molehunt.cli import main
from molehunt.training import Recipe

HURRIED = Recipe(epochs=0.1, batch=50, optimizer="adamw", lr=4e-3, augment="crop", shift=1)
CODE = """
from dataclasses import dataclass
from typing import ClassVar

from molehunt.findings import Finding


@dataclass(frozen=True, kw_only=True)
class Heavy:
    needs: ClassVar = (frozenset(),)

    def __call__(self, suspect, run):
        return Finding(defense="heavy", score=sum(float(p.square().sum()) for p in suspect.model.parameters()))
"""


def test_a_defense_of_ones_own_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(roster, "recipe_for", lambda *_: HURRIED)
    monkeypatch.setattr(rows, "WORKS", 0.0)
    (tmp_path / "heavy_for_test.py").write_text(CODE)
    assert main(["bank", "build", "--partition", "evaluate", "--most", "2"]) == 0
    capsys.readouterr()
    command = ["evaluate", "heavy_for_test:Heavy", "--most", "2"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "4/4" in said.err
    assert "on 2 clean and 2 backdoored models" in said.out
    assert "shuffled labels" in said.out
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == said.out
    assert "1/4" not in again.err
    (tmp_path / "heavy_for_test.py").write_text(CODE + "# changed\n")
    assert main(command) == 0
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("magic", "unknown defense 'magic'; known: "),
        ("nowhere_at_all:Heavy", "nowhere_at_all cannot be imported"),
        ("json:dumps", "json:dumps is no defense"),
        ("strip", "not trained yet, evaluate-clean-000 first"),
    ],
)
def test_what_cannot_be_judged_is_said(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", name, "--folder", str(tmp_path)]) == 3
    assert said in capsys.readouterr().err
