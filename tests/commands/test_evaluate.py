"""`molehunt evaluate`: a defense from the working folder is judged, resumed, and run again when its code changes."""

import json
import sys
from pathlib import Path

import pytest

from commands import dying
from molehunt import confinement
from molehunt import defenses as ours
from molehunt.bank import (
    rows,
    scores,  # noqa: F401 - before a test takes defenses away: it copies their table when it is first imported
)
from molehunt.bank.code import place_of
from molehunt.cli import main
from molehunt.commands.evaluate import _find
from molehunt.defenses import SCORELESS, STRIP, FinePruning, NeuralCleanse
from molehunt.game.rules import Limits

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
LENIENT = Limits(asr=0.0, accuracy_drop=1.0, leakage=1.0)
"""Gates that a model passes which hardly trained."""


@pytest.fixture
def bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """Two clean and two planted models of the evaluation part, in the working folder."""
    monkeypatch.chdir(tmp_path)
    dying.hurry(monkeypatch)
    monkeypatch.setattr(rows, "LIMITS", LENIENT)
    assert main(["bank", "build", "--partition", "evaluate", "--most", "2"]) == 0
    capsys.readouterr()
    return tmp_path / "runs" / "bank" / "mnist5k-badnets_cnn"


@pytest.mark.parametrize("walls", ["--not-isolated", "--isolated"])
def test_a_defense_of_ones_own_is_judged(
    walls: str, bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"heavy_{walls.strip('-').replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    command = ["evaluate", f"{name}:Heavy", "--most", "2", walls]
    code = main(command)
    said = capsys.readouterr()
    if code == 3 and (sys.platform != "linux" or confinement.landlock_version() < 1):
        pytest.skip(f"NOT TESTED, no walls here: {said.err}")
    assert code == 0
    assert "4/4" in said.err
    assert "on 2 clean and 2 backdoored models" in said.out
    assert "shuffled labels" in said.out
    assert "images forward" in said.out
    assert (
        "rank among the built-in defenses: unknown, no saved scores of abs, mntd, neural_cleanse, pair_inversion, "
        "pruning_detection, sentinet, strip" in said.out
    )
    assert "false alarms at 5%: unknown, 2 clean models of the calibration part are not trained" in said.out
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == said.out
    assert "1/4" not in again.err


def test_other_code_is_scored_anew(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "heavy_that_changes:Heavy", "--most", "2", "--not-isolated"]
    for text in (CODE, f"{CODE}# changed\n"):
        (tmp_path / "heavy_that_changes.py").write_text(text)
        assert main(command) == 0
        assert "4/4" in capsys.readouterr().err


def test_its_place_among_the_built_in_ones(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ours, "DEFENSES", {"strip": STRIP, "neural_cleanse": NeuralCleanse})
    monkeypatch.setattr("molehunt.bank.rivals.DEFENSES", {"strip": STRIP, "neural_cleanse": NeuralCleanse})
    (tmp_path / "heavy_in_rank.py").write_text(CODE)
    assert main(["evaluate", "strip", "--most", "2", "--not-isolated"]) == 0
    assert "strip judges triggers that abs and neural_cleanse look for" in capsys.readouterr().err
    saved = sorted((bank / place_of("strip", STRIP)).glob("evaluate-*"))
    assert len({json.loads(path.read_text())["scores"]["strip"] for path in saved}) > 1
    assert main(["evaluate", "heavy_in_rank:Heavy", "--most", "2", "--not-isolated"]) == 0
    said = capsys.readouterr().out
    assert "of 2, beside strip" in said
    assert "no saved scores of neural_cleanse: molehunt evaluate NAME" in said
    # Scores of a model with other weights are none of the model that is there.
    whole = saved[0].read_text()
    saved[0].write_text(json.dumps(json.loads(whole) | {"weights": "0" * 64}))
    assert main(["evaluate", "heavy_in_rank:Heavy", "--most", "2", "--not-isolated"]) == 0
    assert "unknown, no saved scores of strip, neural_cleanse" in capsys.readouterr().out
    saved[0].write_text(whole)
    # Scores of three models are no scores of all four.
    next((bank / place_of("strip", STRIP)).glob("*planted*")).unlink()
    assert main(["evaluate", "heavy_in_rank:Heavy", "--most", "2", "--not-isolated"]) == 0
    assert "unknown, no saved scores of strip, neural_cleanse" in capsys.readouterr().out


def test_false_alarms_are_counted_beside_the_calibration_part(
    bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "heavy_with_alarms.py").write_text(CODE)
    command = ["evaluate", "heavy_with_alarms:Heavy", "--most", "2", "--not-isolated"]
    assert main(["bank", "build", "--partition", "calibrate", "--most", "2"]) == 0
    assert main(command) == 0
    said = capsys.readouterr()
    assert "6/6" in said.err
    assert "calibrate-planted" not in said.err.partition("Scoring")[2]
    assert "2 clean models of the calibration part are too few" in said.out
    assert "on 2 clean and 2 backdoored models" in said.out


def test_the_lines_about_rank_alarms_and_cost() -> None:
    from molehunt.bank.judgement import alarms
    from molehunt.commands.evaluate import _alarms, _cost, _rank

    assert _rank(0.8, {"a": 0.9, "b": 0.7, "c": None}) == (
        "rank among the built-in defenses: 2 of 3, beside a 0.900, b 0.700; "
        "no saved scores of c: molehunt evaluate NAME"
    )
    assert _rank(0.9, {"a": 0.9}) == "rank among the built-in defenses: 1 of 2, beside a 0.900"
    found = alarms([float(i) for i in range(39)], [37.5, 1.0, 2.0])
    assert _alarms(found, 39, 0) == (
        "false alarms at 5%: 1 of 3 clean models, beside 39 of the calibration part; chance gives 0 to 1 (95 %): "
        "as it should be"
    )
    costs = [{"seconds": s, "forward": 10, "backward": 0, "peak_bytes": 2**20 * s} for s in (1, 2, 9)]
    assert _cost(costs) == (
        "cost per model (median): 2.00 s, 10 images forward and 0 backward; at most 9 MiB of memory"
    )


class TestWhichCodeCounts:
    """Scores of other code lie elsewhere, and all code of a package counts."""

    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        import sys

        monkeypatch.syspath_prepend(tmp_path)
        folder = tmp_path / "plugin_for_test"
        (folder / "inner").mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "inner" / "__init__.py").write_text("")
        (folder / "inner" / "heavy.py").write_text(CODE)
        (folder / "helper.py").write_text("x = 1\n")
        for name in [name for name in sys.modules if name.startswith("plugin_for_test")]:
            monkeypatch.delitem(sys.modules, name)
        return folder

    NAME = "plugin_for_test.inner.heavy:Heavy"

    @pytest.mark.parametrize("changed", ["helper.py", "inner/heavy.py", "new.py", "table.json"])
    def test_any_file_of_its_package(self, changed: str, package: Path) -> None:
        before = _find(self.NAME).place
        assert _find(self.NAME).place == before
        path = package / changed
        path.write_text((path.read_text() if path.exists() else "") + "\n")
        assert _find(self.NAME).place != before

    def test_a_file_that_moved(self, package: Path) -> None:
        before = _find(self.NAME).place
        (package / "helper.py").rename(package / "other.py")
        assert _find(self.NAME).place != before

    def test_what_python_compiled_does_not_count(self, package: Path) -> None:
        before = _find(self.NAME).place
        (package / "__pycache__").mkdir(exist_ok=True)
        (package / "__pycache__" / "helper.pyc").write_bytes(b"compiled")
        assert _find(self.NAME).place == before

    def test_its_folder_is_where_others_import_it_from(self, package: Path) -> None:
        assert _find(self.NAME).folders == (package.parent.resolve(),)
        assert _find("strip").folders == ()

    def test_of_ours_the_file_counts_and_what_it_imports_from_beside_it(self) -> None:
        from molehunt.bank.code import _files, digest

        def names(kind: type) -> set[str]:
            return {path.name for _, path in _files(kind)}

        # A new defense, or a change of another one, leaves the scores of these valid.
        assert names(STRIP) == {"strip.py"}
        assert names(NeuralCleanse) == {"neural_cleanse.py", "_inversion.py", "_statistics.py"}
        assert names(FinePruning) == {"fine_pruning.py", "_channels.py", "_fresh.py", "_held_out.py"}
        assert digest(STRIP) != digest(NeuralCleanse)
        assert place_of("strip", STRIP) != place_of("neural_cleanse", NeuralCleanse)

    def test_of_ours_what_is_imported_indirectly_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from molehunt.bank import code

        (tmp_path / "one.py").write_text("from molehunt.defenses._two import x\n")
        (tmp_path / "_two.py").write_text("def f():\n    from molehunt.defenses._three import y\n")
        (tmp_path / "_three.py").write_text("y = 1\n")
        (tmp_path / "_other.py").write_text("z = 1\n")
        monkeypatch.setattr("inspect.getfile", lambda _: str(tmp_path / "one.py"))
        before = code.digest(STRIP)
        (tmp_path / "_other.py").write_text("z = 2\n")
        assert code.digest(STRIP) == before
        (tmp_path / "_three.py").write_text("y = 2\n")
        assert code.digest(STRIP) != before


def test_references_in_another_number_format_are_refused(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "heavy_elsewhere.py").write_text(CODE)
    command = ["evaluate", "heavy_elsewhere:Heavy", "--most", "2", "--not-isolated"]
    assert main(["bank", "build", "--partition", "calibrate", "--most", "2"]) == 0
    assert main(command) == 0
    for path in bank.glob("scores-heavy_elsewhere*/calibrate-*"):
        kept = json.loads(path.read_text())
        path.write_text(json.dumps({**kept, "dtype": "another"}))
    capsys.readouterr()
    assert main(command) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "scored in another number format than the evaluation part: another" in said


@pytest.mark.parametrize("name", sorted(SCORELESS))
def test_who_has_no_score_is_refused_before_anything_is_scored(
    name: str, bank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", name, "--most", "1", "--not-isolated"]) == 3
    assert f"{name} has no score of a model" in capsys.readouterr().err


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
