"""The matrix: what a line says, that a cell which was not run says so, and one real line."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from molehunt import calibration
from molehunt.attacks import poison
from molehunt.defenses import MNTD, RAB, FineTuning, NeuralCleanse, SpectralSignatures
from molehunt.defenses.neural_cleanse import FAST
from molehunt.figures import heat_map
from molehunt.findings import Outcome
from molehunt.game import workshop
from molehunt.game.workshop import Plan, drawing
from molehunt.matrix import Cell, Line, Matrix, _largest, read, target_of
from molehunt.matrix_tables import as_csv, as_markdown, catches, grid, removes, sentence, shown
from molehunt.meta_files import shipped
from molehunt.networks import build
from molehunt.runner import inspect
from molehunt.tasks import TASKS, Task
from molehunt.training import Recipe, recipe_for

TASK = TASKS["mnist5k"]
CELLS = (
    Cell(defense="abs", status="score", p=0.01, score=3.0, target=True, trigger=0.7, seconds=2.0),
    Cell(defense="strip", status="score", p=0.4, score=0.1, target=False),
    Cell(defense="unlearning", status="repair", accuracy=0.97, asr=0.02),
    Cell(defense="fine_tuning", status="repair", accuracy=0.98, asr=0.9),
    Cell(defense="harsh", status="repair", accuracy=0.6, asr=0.0),
    Cell(defense="rab", status="not granted", said="the training set was not granted"),
    Cell(defense="mntd", status="failed", said="raised: x"),
)
LINE = Line(
    attack="badnets", seed=0, accuracy=0.985, asr=0.99, missed=(), p=0.9, target=True, cells=CELLS, key={"plan": "x"}
)


def test_a_line_comes_back_from_json(tmp_path: Path) -> None:
    document = LINE.to_json()
    assert Line.from_json(document) == LINE
    for broken in ({**document, "format": "other"}, {**document, "more": 1}, {k: document[k] for k in ("format", "p")}):
        with pytest.raises(ValueError, match=r"expected|no line of a matrix"):
            Line.from_json(broken)
    assert read(tmp_path / "nothing.json") is None
    (tmp_path / "broken.json").write_text("{")
    assert read(tmp_path / "broken.json") is None


def test_what_catches_and_what_removes() -> None:
    assert catches(LINE) == (["abs"], ["strip"])
    # The harsh repair removes it, and most of the accuracy.
    assert removes(LINE) == (["unlearning"], ["fine_tuning", "harsh"])
    told = sentence(LINE)
    assert told == ("badnets: caught by abs; passes strip; removed by unlearning; outlasts fine_tuning and harsh.")
    alone = replace(LINE, cells=CELLS[5:], missed=("budget",))
    assert sentence(alone) == ("badnets: no p-value is known; no repair was measured. It misses a gate: budget.")
    unlearned = replace(LINE, asr=0.05)
    assert removes(unlearned) == ([], [])
    assert sentence(unlearned).endswith("; its trigger hardly works.")
    assert sentence(replace(LINE, cells=(CELLS[3],))).endswith("removed by none of the repairs; outlasts fine_tuning.")
    edge = replace(LINE, cells=(replace(CELLS[0], p=0.05), replace(CELLS[2], asr=0.1, accuracy=0.945)))
    assert catches(edge)[0] == ["abs"]
    assert removes(edge)[0] == ["unlearning"]
    over = replace(LINE, cells=(replace(CELLS[0], p=0.0501), replace(CELLS[2], asr=0.1001)))
    assert (catches(over)[0], removes(over)[0]) == ([], [])


def test_a_cell_that_was_not_run_says_so() -> None:
    assert shown(None) == "not run"
    assert [shown(cell) for cell in CELLS] == [
        "p 0.01", "p 0.40", "97.0 / 2.0", "98.0 / 90.0", "60.0 / 0.0", "not granted", "failed",
    ]  # fmt: skip
    assert shown(Cell(defense="x", status="no p-value", score=2.0)) == "no p-value"
    assert shown(replace(CELLS[0], accuracy=0.9, asr=0.1)) == "p 0.01, 90.0 / 10.0"
    table = as_markdown([replace(LINE, missed=("budget",))], ["abs", "sentinet", "rab"]).splitlines()
    assert table[0] == "| attack | accuracy / ASR | abs | sentinet | rab | verdict |"
    assert table[2] == "| badnets * | 98.5 / 99.0 | p 0.01 | not run | not granted | 0.90 |"
    assert "safe" not in "\n".join(table)


def test_the_csv_has_every_number() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv([LINE]))))
    assert [row["defense"] for row in rows] == [cell.defense for cell in CELLS]
    first = rows[0]
    assert (first["attack"], first["p"], first["target"], first["trigger"]) == ("badnets", "0.01", "True", "0.7")
    assert rows[5]["said"] == "the training set was not granted"
    assert rows[5]["p"] == ""


def test_a_field_without_a_number_stays_unknown() -> None:
    values, names = grid([LINE], ["abs", "unlearning", "fine_tuning", "harsh", "rab", "sentinet"])
    assert names == ["badnets"]
    found = values[0].tolist()
    assert found[0] == pytest.approx(0.99)
    assert found[1] == pytest.approx(1 - 0.02 / 0.99 - 0.015)
    assert found[2] == pytest.approx(1 - 0.9 / 0.99 - 0.005)
    assert found[3] == pytest.approx(1 - 0.385)
    assert values[0].isnan().tolist() == [False] * 4 + [True] * 2
    picture = heat_map(values, names, ["abs", "unlearning", "fine_tuning", "harsh", "rab", "sentinet"])
    assert picture.png.startswith(b"\x89PNG")
    assert "1 attacks against 6 defenses" in picture.alt
    assert "4 of 6 fields are known" in picture.alt
    with pytest.raises(ValueError, match="expected values of 2 x 6"):
        heat_map(values, ["one", "two"], ["a"] * 6)


BRIEF = replace(FAST, steps=2, updates=1)


def plan() -> Plan:
    return Plan(task=TASK, network="badnets_cnn", attack="badnets", settings={"target": 3, "size": 5}, seed=1)


def test_a_class_is_named_only_where_it_stands_out() -> None:
    assert _largest(torch.tensor([0.0, 2.0, 1.0])) == 1
    assert _largest(torch.zeros(10)) is None
    assert _largest(torch.tensor([1.0, 1.0, 0.0])) is None


def test_the_target_is_drawn_where_an_attack_has_one() -> None:
    drawn = {target_of("badnets", 10, seed)["target"] for seed in range(20)}
    assert len(drawn) > 4
    assert drawn <= set(range(10))
    assert target_of("badnets", 10, 3) == target_of("badnets", 10, 3)
    assert target_of("multi_trigger", 10, 0).keys() <= {"target"}


def test_the_set_that_is_handed_over_is_the_one_that_was_trained_on(tmp_path: Path) -> None:
    whole = Matrix(
        task=TASK, network="badnets_cnn", defenses={}, folder=tmp_path, inspecting=lambda seed: lambda *_: None,  # type: ignore[arg-type, return-value]
        population=None, metas=None, training=True, references=(),
    )  # fmt: skip
    one = Plan(task=TASK, network="badnets_cnn", attack="blended", settings={"target": 3}, seed=1)
    handed = whole._handed(one)
    assert handed is not None
    assert one.hidden is not None
    public = TASK.load("train")
    made = poison(one.hidden, public, TASK, drawing(one))
    wanted = made.stamped()
    # Shuffled, so as sets: by a number that hardly two pictures share.
    weights = torch.rand(wanted.x[0].numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = (((255 * s.x).round().double().flatten(1) @ weights).sort().values for s in (wanted, handed))
    torch.testing.assert_close(ours, theirs)
    plain = ((255 * public.x).round().double().flatten(1) @ weights).sort().values
    assert not torch.allclose(ours, plain)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over the data, for every recipe that there is."""

    def brief(name: str, task: Task) -> Recipe:
        recipe_for(name, task)
        return Recipe(epochs=1, batch=50, optimizer="adamw", lr=4e-3, warmup=0.25, augment="crop", shift=1)

    monkeypatch.setattr(workshop, "recipe_for", brief)


@pytest.mark.usefixtures("hurried")
def test_a_line_is_measured_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def inspecting(seed: int) -> Any:
        def inspect_(name: str, defense: Any, suspect: Any) -> Outcome:
            asked.append(name)
            return inspect(defense, suspect, name=name, seed=seed)

        return inspect_

    clean = [
        build("badnets_cnn", TASK.shape, 10, mean=TASK.mean, std=TASK.std, rng=torch.Generator().manual_seed(i)).eval()
        for i in range(5)
    ]
    whole = Matrix(
        task=TASK,
        network="badnets_cnn",
        defenses={
            "mntd": MNTD(),
            "fine_tuning": FineTuning(steps=5),
            "spectral_signatures": SpectralSignatures(retrain=False),
            "rab": RAB(members=2, steps=2, distill=False),
        },
        folder=tmp_path,
        inspecting=inspecting,
        population=calibration.shipped("mnist5k", "badnets_cnn"),
        metas=shipped("mnist5k", "badnets_cnn"),
        training=False,
        references=clean,
    )
    line = whole.line("badnets", {"target": 3, "size": 5}, 1)
    cells = {cell.defense: cell for cell in line.cells}
    assert cells["mntd"].status == "score"
    assert 0 < (cells["mntd"].p or 0) <= 1
    assert cells["mntd"].target is not None
    assert cells["fine_tuning"].status == "repair"
    assert cells["fine_tuning"].asr is not None
    assert cells["spectral_signatures"].status == cells["rab"].status == "not granted"
    # Untrained references are right about a tenth, so accuracy passes; they do not know the trigger either.
    assert 0.5 < line.accuracy <= 1
    assert set(line.missed) <= {"attack success", "specificity", "clean accuracy"}
    before = list(asked)
    assert whole.line("badnets", {"target": 3, "size": 5}, 1) == line
    assert asked == before, "a kept line is not played again"
    other = replace(whole, training=True).line("badnets", {"target": 3, "size": 5}, 1)
    told = {cell.defense: cell for cell in other.cells}
    assert told["spectral_signatures"].status == "no p-value"
    assert told["rab"].score is not None
    assert asked != before
    assert (other.accuracy, other.asr) == (line.accuracy, line.asr), "the model is not trained again"
    for changed in (replace(whole, metas=tuple(whole.metas or ())[:1] * 5), replace(whole, population=None)):
        assert changed._key(plan()) != whole._key(plan())
    alone = replace(whole, population=None, defenses={"neural_cleanse": NeuralCleanse(schedule=BRIEF, restarts=1)})
    (cell,) = alone.line("badnets", {"target": 3, "size": 5}, 1).cells
    assert (cell.status, cell.p) == ("no p-value", None), "simulated models are no references"
    made = replace(whole, training=True).line("pruning_aware", {"target": 3}, 1)
    assert {cell.defense: cell.status for cell in made.cells}["rab"] == "not granted", "it hands over no set"
