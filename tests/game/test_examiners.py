"""The defenders' side of a game."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from molehunt import runner
from molehunt.defenses import Defense
from molehunt.engine import Run
from molehunt.findings import Finding, Outcome
from molehunt.game.delivery import Delivery
from molehunt.game.entries import Settings
from molehunt.game.examiners import Examiners
from molehunt.networks import build
from molehunt.suspect import Access, Suspect
from molehunt.tasks import get_task

TASK = get_task("mnist5k")
# A network for which no calibration is shipped, so that the references are what scores are compared with.
SETTINGS = Settings(task="mnist5k", network="lenet5", references=5)


@dataclass(frozen=True, kw_only=True)
class Counter:
    """Scores every model alike.

    Score: 1. Reference: none. Departures: none.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        return Finding(defense="strip", score=1.0)


class Silent:
    def stage(self, title: str, total: int) -> None:
        pass

    def done(self, title: str, text: str) -> None:
        pass


def test_references_are_scored_and_not_repaired(tmp_path: Path) -> None:
    asked: list[str] = []

    def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        asked.append(name)
        return runner.inspect(defense, suspect, name=name, seed=0)

    models = [
        build("lenet5", TASK.shape, 10, mean=TASK.mean, std=TASK.std, rng=torch.Generator().manual_seed(i)).eval()
        for i in range(5)
    ]
    referee: Any = SimpleNamespace(references=models)
    delivery = Delivery(settings=SETTINGS, folder=tmp_path, task=TASK)
    defenses: dict[str, Defense] = {"strip": Counter(), "fine_tuning": Counter(), "fine_pruning": Counter()}
    population = Examiners(delivery, defenses, [inspect], Silent()).population(referee)
    assert asked == ["strip"] * 5
    assert len(population.clean) == 5
    kept = {path.stem for path in (tmp_path / "references").glob("outcomes-*/*.json")}
    assert kept == {"strip"}


def test_references_are_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [build("lenet5", TASK.shape, 10, mean=TASK.mean, std=TASK.std, rng=torch.Generator()).eval()] * 5
    referee: Any = SimpleNamespace(references=models)
    delivery = Delivery(settings=SETTINGS, folder=tmp_path, task=TASK)

    def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        return runner.inspect(defense, suspect, name=name, seed=0)

    def refuse(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        pytest.fail(f"{name} was asked again")

    first = Examiners(delivery, {"strip": Counter()}, [inspect], Silent()).population(referee)
    again = Examiners(delivery, {"strip": Counter()}, [refuse], Silent()).population(referee)
    assert first == again
