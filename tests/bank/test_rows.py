"""Building a bank: finished models stay, an interrupted run gives the same rows, and a model can be made again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from molehunt import checkpoints
from molehunt.bank import roster as module
from molehunt.bank.roster import Entry
from molehunt.bank.rows import Row, _kept, build, read_rows, regrow
from molehunt.training import Recipe

HURRIED = Recipe(epochs=0.2, batch=50, optimizer="adamw", lr=4e-3, augment="crop", shift=1)
LISTED = tuple(
    Entry(task="mnist5k", network="badnets_cnn", partition="develop", planted=planted, number=number)
    for planted, number in ((False, 0), (True, 7), (False, 5))
)


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLEHUNT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "recipe_for", lambda *_: HURRIED)


def lasting(rows: tuple[Row, ...]) -> list[Row]:
    return [replace(row, seconds=0.0) for row in rows]


def test_an_interrupted_build_goes_on_and_gives_the_same_rows(tmp_path: Path) -> None:
    whole = build(LISTED, tmp_path / "whole")

    def stop(row: Row, done: int, total: int) -> None:
        assert (row.name, done, total) == (LISTED[0].name, 1, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(LISTED, tmp_path / "cut", report=stop)
    assert [row.name for row in read_rows(LISTED, tmp_path / "cut")] == [LISTED[0].name]
    fresh: list[str] = []
    resumed = build(LISTED, tmp_path / "cut", report=lambda row, *_: fresh.append(row.name))
    assert fresh == [entry.name for entry in LISTED[1:]]
    assert lasting(resumed) == lasting(whole)


def test_a_row_says_what_was_measured_and_the_model_can_be_made_again(tmp_path: Path) -> None:
    (row,) = build(LISTED[1:2], tmp_path)
    assert row.kind == "badnets"
    assert row.asr is not None
    assert row.backdoored == (row.asr >= 0.9)
    kept = regrow(LISTED[1])
    _kept(LISTED[1]).unlink()
    again = regrow(LISTED[1], threads=1)
    assert checkpoints.digest(kept.state_dict()) == checkpoints.digest(again.state_dict()) == row.weights
    assert not again.training


def test_a_row_of_another_recipe_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(LISTED[:1], tmp_path)
    monkeypatch.setattr(module, "recipe_for", lambda *_: replace(HURRIED, lr=1e-3))
    assert read_rows(LISTED[:1], tmp_path) == ()


def test_a_file_that_is_no_row_is_named(tmp_path: Path) -> None:
    (tmp_path / f"{LISTED[0].name}.json").write_text("[]")
    with pytest.raises(ValueError, match=r"develop-clean-000\.json is no row"):
        build(LISTED, tmp_path)


def test_threads_are_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    build(LISTED[:1], tmp_path, threads=1)
    assert torch.get_num_threads() == before
