"""`molehunt matrix`: tables of what was played, words for what was not, and a run that goes on."""

import csv
from pathlib import Path

import pytest

from molehunt import matrix as matrices
from molehunt.cli import main
from molehunt.game import check, workshop
from molehunt.training import Recipe

HURRIED = Recipe(epochs=0.5, batch=50, optimizer="adamw", lr=4e-3)
Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workshop, "recipe_for", lambda *_: HURRIED)
    monkeypatch.setattr(check, "recipe_for", lambda *_: HURRIED)
    monkeypatch.chdir(tmp_path)


def played(*options: str) -> int:
    """Play on the digits that need no network, with one thread, in this process."""
    return main(["matrix", "--task", "mnist5k", "--threads", "1", "--not-isolated", "--seed", "1", *options])


def test_what_was_played_is_in_the_tables_and_a_second_run_reads_it(tmp_path: Path, capsys: Out) -> None:
    some = ("--attack", "badnets", "--attack", "sig", "--defense", "mntd", "--defense", "rab")
    assert played(*some) == 0
    said, told = capsys.readouterr()
    folder = tmp_path / "matrix/mnist5k-badnets_cnn"
    assert "badnets: " in said
    assert "part.md" in said
    assert {path.name for path in folder.glob("part.*")} == {"part.csv", "part.md", "part.png"}
    rows = list(csv.DictReader((folder / "part.csv").read_text().splitlines()))
    assert [(row["attack"], row["defense"]) for row in rows] == [
        (attack, defense) for attack in ("badnets", "sig") for defense in ("mntd", "rab")
    ]
    assert [row["status"] for row in rows] == ["score", "not granted"] * 2
    assert "not granted" in (folder / "part.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*-1-*.json")}
    assert len(before) == 2
    assert "training" not in told
    assert played(*some) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*-1-*.json")} == before
    # Of another selection nothing is lost.
    assert played("--attack", "badnets", "--defense", "mntd") == 0
    assert before.keys() < set(folder.glob("*-1-*.json"))


def test_an_attack_that_cannot_be_played_costs_the_others_nothing(
    tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = matrices.Matrix.line

    def line(self: matrices.Matrix, attack: str, *rest: object, **more: object) -> matrices.Line:
        if attack == "sig":
            raise ValueError("these pictures are too small")
        return plain(self, attack, *rest, **more)  # type: ignore[arg-type]  # handed on as they are

    monkeypatch.setattr(matrices.Matrix, "line", line)
    assert played("--attack", "sig", "--attack", "badnets", "--defense", "mntd") == 0
    said, _ = capsys.readouterr()
    assert "sig: not run: these pictures are too small" in said
    assert "badnets: " in said
    assert "sig" not in (tmp_path / "matrix/mnist5k-badnets_cnn/part.md").read_text()
    assert played("--attack", "sig", "--defense", "mntd") == 3
    assert "not one attack could be played" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--attack", "nope"), "unknown attack 'nope'; known: badnets"),
        (("--defense", "nope"), "unknown defense 'nope'; known: "),
        (("--network", "nope"), "nope"),
        (("--metas", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_what_is_not_known_is_refused(options: tuple[str, ...], says: str, capsys: Out) -> None:
    assert played(*options) == 3
    assert says in capsys.readouterr().err
