"""`molehunt calibrate`: one file of scores, the same however it was made, that `molehunt scan` compares with."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from commands import dying
from molehunt import calibration, checkpoints, defenses, meta_files, runner
from molehunt.bank import read_rows, regrow, scores
from molehunt.bank.roster import Entry, entries
from molehunt.calibration import load
from molehunt.cli import main
from molehunt.commands.evaluation import Elsewhere
from molehunt.conformal import conformal
from molehunt.defenses import ABS, STRIP, NeuralCleanse
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.metas import Meta, Settings, digest
from molehunt.suspect import Access, Suspect
from molehunt.tasks import get_task

LISTED = entries("mnist5k", "badnets_cnn", "calibrate", most=2)
FAST = ["--most", "2", "--defense", "strip", "--not-isolated"]
PLACE = "scores-abs+neural_cleanse+strip"  # who judges triggers needs somebody to look for them


@pytest.fixture
def bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four models that are hardly trained, in the default folder of the working folder."""
    dying.hurry(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["bank", "build", "--partition", "calibrate", "--most", "2"]) == 0
    return tmp_path / "runs" / "bank" / "mnist5k-badnets_cnn"


def scored(bank: Path) -> dict[str, dict[str, Any]]:
    """What lies on disk of every model, but for seconds and bytes of memory."""
    return {path.name: json.loads(path.read_text()) | {"costs": {}} for path in (bank / PLACE).glob("*.json")}


def again(bank: Path) -> None:
    """Take the scores away."""
    for path in (bank / PLACE).iterdir():
        path.unlink()


def test_killed_in_the_middle_it_goes_on_to_the_same_file(bank: Path, tmp_path: Path) -> None:
    assert main(["calibrate", *FAST, "--out", "whole.json"]) == 0
    whole = scored(bank)
    again(bank)
    command = ["calibrate", *FAST, "--out", "cut.json"]
    assert dying.killed(dying.start(tmp_path, *command, dies="molehunt.bank.scores:3"))
    assert scored(bank).keys() == {"calibrate-clean-000.json", "calibrate-planted-000.json"}
    assert list((bank / PLACE).glob(".part-*")), "it was not killed while it wrote"
    assert not (tmp_path / "cut.json").exists()
    done = dying.start(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert "calibrate-clean-000" not in done.stderr
    assert scored(bank) == whole
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_part_of_the_defenses_leaves_what_all_of_them_scored(bank: Path) -> None:
    (bank / "scores").mkdir()
    (bank / "scores/calibrate-clean-000.json").write_text("whole")
    assert main(["calibrate", *FAST, "--most", "1"]) == 0
    assert (bank / "scores/calibrate-clean-000.json").read_text() == "whole"
    assert set(load(Path("mnist5k-badnets_cnn.json")).defenses) == {"abs", "neural_cleanse", "strip"}


def test_meta_classifiers_of_a_file_are_asked_and_the_calibration_says_which(
    bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = get_task("mnist5k")
    made = Meta(task.shape, 10, task.mean, task.std, Settings(), torch.Generator().manual_seed(5))
    meta_files.save([made], tmp_path / "mine", {"task": "mnist5k", "network": "badnets_cnn"})
    command = ["calibrate", "--most", "2", "--defense", "mntd", "--not-isolated"]
    assert main([*command, "--metas", "mine", "--out", "mine.json"]) == 0
    assert load(Path("mine.json")).defenses["mntd"]["metas"] == digest([made])
    assert main([*command, "--defense", "rab", "--out", "public.json"]) == 0
    public = meta_files.shipped("mnist5k", "badnets_cnn")
    assert public is not None
    assert load(Path("public.json")).defenses["mntd"]["metas"] == digest(public)
    assert "not asked, for no model comes with what they need: rab" in capsys.readouterr().err
    assert main(["calibrate", "--most", "2", "--defense", "rab", "--not-isolated"]) == 3
    assert "no model of a bank comes with what is needed" in " ".join(capsys.readouterr().err.split())


def test_fresh_models_for_a_null_check(bank: Path) -> None:
    assert main(["bank", "build", "--partition", "evaluate", "--most", "1"]) == 0
    command = ["calibrate", "--partition", "evaluate", "--most", "1", "--defense", "neural_cleanse", "--not-isolated"]
    assert main(command) == 0
    (model,) = load(Path("mnist5k-badnets_cnn-evaluate.json")).clean
    assert model.seed == entries("mnist5k", "badnets_cnn", "evaluate", most=1)[0].seed


def test_two_jobs_give_what_one_gives(bank: Path, tmp_path: Path) -> None:
    assert main(["calibrate", *FAST, "--out", "one.json"]) == 0
    one = scored(bank)
    again(bank)
    done = dying.start(tmp_path, "calibrate", *FAST, "--jobs", "2", "--out", "two.json")
    assert done.returncode == 0, done.stderr
    assert "4/4" in done.stderr
    assert scored(bank) == one
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()


def test_another_process_runs_defenses_as_this_one_does(bank: Path) -> None:
    entry, task = LISTED[0], get_task("mnist5k")
    (row,) = read_rows([entry], bank)
    suspect = Suspect.of(regrow(entry, row), task, clean=task.secret(entry.seed)[0], candidates=())
    sent = pickle.loads(pickle.dumps(Elsewhere(isolated=False, seconds=60.0)))
    found = sent(entry.seed)("strip", STRIP(), suspect)
    expected = runner.inspect(STRIP(), suspect, name="strip", seed=entry.seed)
    assert isinstance(found, Finding)
    assert isinstance(expected, Finding)
    assert found.score == expected.score


@dataclass(frozen=True, kw_only=True)
class Sick:
    """Fails on all models but one."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        if float(next(suspect.model.parameters()).detach().sum()) != self.healthy():
            raise RuntimeError("sick")
        return Finding(defense="sick", score=1.0)

    @staticmethod
    def healthy() -> float:
        """Sum of the first weights of the one model on which it works."""
        entry = LISTED[0]
        (row,) = read_rows([entry], Path("runs/bank/mnist5k-badnets_cnn"))
        return float(next(regrow(entry, row).parameters()).detach().sum())


def test_failures_are_counted_and_tried_again(
    bank: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(defenses, "available", lambda: {"sick": Sick})
    command = ["calibrate", "--most", "2", "--not-isolated"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "sick failed on 3 of 4 models; the same command tries them again" in said.out
    assert said.err.count("sick failed") == 3
    assert main(command) == 0
    said = capsys.readouterr()
    assert "calibrate-clean-000" not in said.err
    assert said.err.count("sick failed") == 3
    found = load(Path("mnist5k-badnets_cnn.json"))
    assert [model.scores["sick"] for model in found.clean] == [1.0, None]


def test_the_file_is_what_scan_compares_with(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *FAST, "--out", "scores.json"]) == 0
    entry: Entry = LISTED[1]
    (row,) = read_rows([entry], bank)
    checkpoints.write(regrow(entry, row).state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(defenses, "available", lambda: {"strip": STRIP, "abs": ABS, "neural_cleanse": NeuralCleanse})
    capsys.readouterr()
    scan = ["scan", "model.safetensors", "--task", "mnist5k", "--network", "badnets_cnn", "--json", "-"]
    main([*scan, "--references", "scores.json"])
    found = json.loads(capsys.readouterr().out)
    (strip,) = [one for one in found["defenses"] if one["defense"] == "strip"]
    column = load(Path("scores.json")).column("strip")
    assert len(column) == found["details"]["references"]["clean"] == 2
    assert strip["p_value"] == conformal(strip["score"], column)
    # Without the file other models are compared with: those that come with the package.
    main(scan)
    other = json.loads(capsys.readouterr().out)
    assert other["details"]["references"]["clean"] != 2
    assert other["p"] != found["p"]


def test_a_picture_shows_how_well_probabilities_hold(
    bank: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", *FAST, "--picture", "held.png"]
    # No backdoor works in a model that hardly trained: there is nothing to draw, but the scores are kept.
    assert main(command) == 3
    assert "reliability needs clean and planted models, got 2 clean and 0 planted" in capsys.readouterr().err
    assert len(load(Path("mnist5k-badnets_cnn.json")).clean) == 2
    assert not Path("held.png").exists()
    monkeypatch.setattr(scores, "population", lambda *_: calibration.shipped("mnist5k", "badnets_cnn"))
    assert main(command) == 0
    assert "of 89 told 0.02 on average 2% are backdoored" in " ".join(capsys.readouterr().out.split())
    assert Path("held.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command[:-1], "nowhere/held.png"]) == 3
    assert "there is no folder nowhere" in capsys.readouterr().err


def test_the_help_of_scan_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "--help"]) == 0
    assert "molehunt calibrate" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--network", "vit_tiny"], "no bank of 'vit_tiny'"),
        (["--defense", "magic"], "unknown defense 'magic'; known: "),
        (["--out", "nowhere/scores.json"], "there is no folder nowhere"),
        ([], "198 models are not trained yet, calibrate-clean-000 first: run molehunt bank build"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *arguments]) == 3
    assert said in capsys.readouterr().err
    assert not (tmp_path / "mnist5k-badnets_cnn.json").exists()
