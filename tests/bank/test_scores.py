"""Calibration: scores are kept per model, an interrupted run gives the same file, and what changed is scored again."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from molehunt import runner
from molehunt.bank import roster
from molehunt.bank.roster import Entry
from molehunt.bank.rows import build
from molehunt.bank.scores import calibrate
from molehunt.calibration import load, save
from molehunt.defenses import Defense
from molehunt.engine import Run
from molehunt.examination import Inspect
from molehunt.findings import Finding, Outcome
from molehunt.suspect import Access, Suspect
from molehunt.training import Recipe

HURRIED = Recipe(epochs=0.1, batch=50, optimizer="adamw", lr=4e-3, augment="crop", shift=1)
LISTED = tuple(
    Entry(task="mnist5k", network="badnets_cnn", partition="calibrate", planted=planted, number=0)
    for planted in (False, True)
)


@dataclass(frozen=True, kw_only=True)
class Heavy:
    """Scores a model by the norm of its weights."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(),)
    scale: float = 1.0

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        noise = float(torch.rand((), generator=run.rng))
        norm = sum(float(p.square().sum()) for p in suspect.model.parameters())
        return Finding(defense="heavy", score=self.scale * norm + noise)


@contextmanager
def inspecting(seed: int) -> Iterator[Inspect]:
    def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        return runner.inspect(defense, suspect, name=name, seed=seed)

    yield inspect


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOLEHUNT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roster, "recipe_for", lambda *_: HURRIED)
    build(LISTED, tmp_path / "bank")
    return tmp_path / "bank"


def test_an_interrupted_run_goes_on_and_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    def stop(name: str, scores: object) -> None:
        raise KeyboardInterrupt(name, scores)

    defenses = {"heavy": Heavy()}
    save(calibrate(LISTED, folder, defenses, inspecting), tmp_path / "whole.json")
    for path in (folder / "scores").iterdir():
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        calibrate(LISTED, folder, defenses, inspecting, report=stop)
    fresh: list[str] = []
    save(
        calibrate(LISTED, folder, defenses, inspecting, report=lambda name, _: fresh.append(name)),
        tmp_path / "cut.json",
    )
    assert fresh == [LISTED[1].name]
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    found = load(tmp_path / "whole.json")
    # The backdoor of a model that hardly trained does not work, so it is no reference of either kind.
    assert [m.seed for m in found.models] == [LISTED[0].seed]
    assert len(found.column("heavy")) == 1
    assert found.versions["block"] == "1"


def test_other_settings_and_other_weights_are_scored_again(folder: Path) -> None:
    fresh: list[str] = []
    again = partial(calibrate, LISTED[:1], folder, inspecting=inspecting, report=lambda name, _: fresh.append(name))
    before = again({"heavy": Heavy()}).column("heavy")
    after = again({"heavy": Heavy(scale=2.0)}).column("heavy")
    assert after[0] > 1.5 * before[0]
    assert len(fresh) == 2
    path = folder / f"{LISTED[0].name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "0" * 64}))
    again({"heavy": Heavy(scale=2.0)})
    assert len(fresh) == 3


def test_what_cannot_be_calibrated_is_said(folder: Path) -> None:
    untrained = replace(LISTED[0], number=1)
    with pytest.raises(ValueError, match="calibrate-clean-001 first: run molehunt bank build"):
        calibrate((*LISTED, untrained), folder, {"heavy": Heavy()}, inspecting)
    with pytest.raises(ValueError, match="no defense gave a score"):
        calibrate(LISTED, folder, {}, inspecting)
    with pytest.raises(ValueError, match="no models to score"):
        calibrate((), folder, {"heavy": Heavy()}, inspecting)
    (folder / "scores" / f"{LISTED[0].name}.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no scores"):
        calibrate(LISTED, folder, {"heavy": Heavy()}, inspecting)
