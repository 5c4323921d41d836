"""The defenders' side of a game."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from molehunt import calibration, meta_files, runner
from molehunt.defenses import Defense
from molehunt.engine import Run
from molehunt.examination import divide
from molehunt.findings import Finding, Outcome
from molehunt.game import check as home
from molehunt.game import rehearsal
from molehunt.game.delivery import Delivery
from molehunt.game.entries import Settings
from molehunt.game.examiners import Examiners
from molehunt.game.referee import read_verdict
from molehunt.metas import Meta, digest
from molehunt.metas import Settings as Settings_
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


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Scores a model by the first meta-classifier that it is given."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.METAS}),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        assert suspect.metas is not None
        return Finding(defense="mntd", score=float(suspect.metas[0].queries.detach().sum()))


@pytest.mark.parametrize("own", [True, False])
def test_meta_classifiers_are_granted_a_hosts_own_before_those_of_the_package(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, public = (
        Meta(TASK.shape, 10, TASK.mean, TASK.std, Settings_(), torch.Generator().manual_seed(i)) for i in (1, 2)
    )
    monkeypatch.setattr(meta_files, "shipped", lambda *names: (public,) if names == ("mnist5k", "lenet5") else None)
    model = build("lenet5", TASK.shape, 10, mean=TASK.mean, std=TASK.std, rng=torch.Generator()).eval()
    referee: Any = SimpleNamespace(references=[model] * 5, model=lambda _: model)
    delivery = Delivery(settings=SETTINGS, folder=tmp_path, task=TASK)

    def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        return runner.inspect(defense, suspect, name=name, seed=0)

    examiners = Examiners(delivery, {"mntd": Asking()}, [inspect], Silent(), (mine,) if own else None)
    population = examiners.population(referee)
    wanted = mine if own else public
    assert population.column("mntd") == pytest.approx([float(wanted.queries.detach().sum())] * 5)
    assert population.defenses["mntd"]["metas"] == digest([wanted])
    some: Any = SimpleNamespace(id="one", weights="w", training=None, manifest=SimpleNamespace(recipe="lenet5"))
    clean, _ = TASK.secret(1)
    examiners.verdicts([some], referee, population, *divide(clean))
    verdict = read_verdict(tmp_path / "verdicts" / "one" / "verdict.json")
    assert verdict.p_values.keys() == {"mntd"}


@pytest.mark.parametrize("board", ["weights", "data"])
def test_the_shipped_calibration_counts_on_both_boards(
    board: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = object()
    monkeypatch.setattr(calibration, "shipped", lambda task, network, asked: shipped if "strip" in asked else None)
    delivery = Delivery(settings=replace(SETTINGS, board=board), folder=tmp_path, task=TASK)
    referee: Any = SimpleNamespace(references=())
    defenses: dict[str, Defense] = {"strip": Counter(), "rab": Counter()}
    assert Examiners(delivery, defenses, [], Silent()).population(referee) is shipped
    kept = home.References(task=TASK, network="lenet5")
    assert rehearsal.shipped(kept, defenses) is shipped


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
