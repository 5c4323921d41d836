"""Who looks first, what the others are granted, and that a defense that failed has found nothing out."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from molehunt import calibration
from molehunt.combine import verdict
from molehunt.defenses import MNTD, STRIP, Defense
from molehunt.engine import Run
from molehunt.examination import examine, searched
from molehunt.findings import Abstention, Candidate, Failure, Finding, Outcome
from molehunt.runner import inspect
from molehunt.suspect import Access, Suspect
from molehunt.testing import planted


@dataclass(frozen=True, kw_only=True)
class Finder:
    """Looks for triggers: names one, finds nothing, or fails."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)
    does: str = "finds"

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        if self.does == "fails":
            raise RuntimeError("no memory left")
        if self.does == "repairs":
            return Finding(defense="finder", repaired=suspect.model.state_dict())
        scores = torch.zeros(suspect.classes)
        if self.does == "nothing":
            return Finding(defense="finder", score=0.0, class_scores=scores)
        return Finding(defense="finder", score=9.0, class_scores=scores, target=3, trigger=planted(target=3).trigger)


def asked(does: str | None, suspect: Suspect | None = None) -> dict[str, Outcome]:
    """STRIP stands first, so that the order is not the one of the dictionary."""
    defenses: dict[str, Defense] = {"strip": STRIP()}
    if does is not None:
        defenses["finder"] = Finder(does=does)
    if suspect is None:
        suspect = replace(planted().suspect, candidates=None, inputs=None)
    return dict(examine(suspect, defenses, lambda name, d, s: inspect(d, s, name=name, seed=0)))


def test_who_finds_triggers_is_asked_before_who_judges_them() -> None:
    outcomes = asked("finds")
    assert list(outcomes) == ["finder", "strip"]
    strip = outcomes["strip"]
    assert isinstance(strip, Finding)
    assert [row["defense"] for row in strip.details["candidates"]] == ["finder"]
    assert strip.record["producers"] == ["finder"]


def test_that_a_search_found_nothing_is_evidence() -> None:
    strip = asked("nothing")["strip"]
    assert isinstance(strip, Finding)
    assert (strip.details["candidates"], strip.score) == ([], -0.01)
    assert strip.record["producers"] == ["finder"]


def test_a_search_that_failed_is_no_evidence() -> None:
    outcomes = asked("fails")
    assert isinstance(outcomes["finder"], Failure)
    assert isinstance(outcomes["strip"], Abstention), "it must not call a model clean that nobody has looked at"


def test_where_nobody_looks_for_triggers_nobody_judges_them() -> None:
    assert isinstance(asked(None)["strip"], Abstention)
    assert isinstance(asked("repairs")["strip"], Abstention)


def test_candidates_that_came_with_the_suspect_are_judged_whoever_looks() -> None:
    case = planted(target=3)
    given = (Candidate(trigger=case.trigger, target=3, defense="host"),)
    strip = asked("fails", replace(case.suspect, candidates=given, inputs=None))["strip"]
    assert isinstance(strip, Finding)
    assert [row["defense"] for row in strip.details["candidates"]] == ["host"]
    assert strip.record["producers"] == []


def test_who_has_searched() -> None:
    outcomes: dict[str, Outcome] = {
        "b": Finding(defense="b", class_scores=torch.zeros(3)),
        "a": Finding(defense="a", trigger=planted().trigger, target=0),
        "scored": Finding(defense="scored", score=1.0),
        "failed": Failure(defense="failed", kind="raised", message=""),
        "abstained": Abstention(defense="abstained", reason=""),
    }
    assert searched(outcomes) == ["a", "b"]


def test_a_scan_whose_search_failed_cannot_tell() -> None:
    """As in the shipped population, STRIP's lowest score would be that of the cleanest model of all."""
    population = calibration.shipped("mnist5k", "badnets_cnn")
    assert population is not None
    failed = Failure(defense="neural_cleanse", kind="memory", message="no memory left")
    answer = verdict([failed, asked("fails")["strip"]], population, classes=10)
    assert answer.details["could_not_tell"] is True
    assert answer.p == 0.5


def test_who_scores_training_samples_has_looked_for_no_trigger() -> None:
    classes = torch.tensor([0.1, 0.9])
    outcomes = {
        "abs": Finding(defense="abs", score=0.0, class_scores=classes),
        "spectral_signatures": Finding(
            defense="spectral_signatures", class_scores=classes, sample_scores=torch.zeros(5)
        ),
    }
    assert searched(outcomes) == ["abs"]


def test_who_asks_meta_classifiers_has_looked_for_no_trigger() -> None:
    suspect = planted(grants=[Access.CLEAN, Access.METAS]).suspect
    found = inspect(MNTD(), suspect, seed=0)
    assert isinstance(found, Finding)
    assert found.class_scores is not None
    assert searched({"mntd": found}) == []
    assert searched({"mntd": replace(found, record={})}) == ["mntd"], "known by its record"
