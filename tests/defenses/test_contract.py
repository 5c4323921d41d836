"""What every defense promises, over all of `DEFENSES`: a new entry is tested without a new test."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from molehunt import plugins
from molehunt.defenses import DEFENSES, available
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.runner import name_of
from molehunt.suspect import Access, Suspect
from molehunt.testing import DEFENSE_CHECKS, Trial, check_defense, planted


@functools.cache
def trial(name: str) -> Trial:
    """One trial per defense, so that its answers are computed once for all checks."""
    return Trial(DEFENSES[name]())


ASLEEP = "clean pictures never wake the channel of the planted trigger, so no gradient reaches it"
LEARNED = "a twentieth of a small set is enough poison for every network to learn, whatever noise lies on it"
OF_ALL = "a backdoor of all classes is what is usual for its target; it looks for those of some classes alone"
CANNOT = {
    ("pruning_detection", "ranks_the_planted_above_the_twin"): "its score means what a calibration makes of it",
    ("fine_tuning", "repairs"): ASLEEP,
    ("super_fine_tuning", "repairs"): ASLEEP,
    ("gradient_shaping", "repairs"): "a tenth of a small set is enough poison to be learned under any clipping",
    ("pair_inversion", "names_the_target"): OF_ALL,
    ("pair_inversion", "recovers_a_working_trigger"): OF_ALL,
    ("rab", "ranks_the_planted_above_the_twin"): LEARNED,
    ("rab", "names_the_target"): LEARNED,
    ("rab", "finds_stamped_pictures"): LEARNED,
    ("rab", "repairs"): LEARNED,
}
"""Promises that a method does not keep on the planted suspects, and why; each is told on the page of the method."""


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(
            name,
            check,
            marks=[pytest.mark.xfail(strict=True, raises=AssertionError, reason=CANNOT[name, check])]
            if (name, check) in CANNOT
            else [],
        )
        for name in DEFENSES
        for check in DEFENSE_CHECKS
    ],
)
def test_every_defense(name: str, check: str) -> None:
    DEFENSE_CHECKS[check](trial(name))


@pytest.mark.parametrize("name", DEFENSES)
def test_every_finding_carries_the_name_of_its_entry(name: str) -> None:
    assert name_of(DEFENSES[name]()) == name
    need = DEFENSES[name].needs[0]
    assert DEFENSES[name]()(planted(grants=need).suspect, Run()).defense == name


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Answers the same whatever it sees.

    Score: `score`, which means nothing.

    Attributes:
        score: the answer.

    Reference:
        None.

    Departures from the paper:
        None.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)
    score: float = 0.0

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        run.check()
        return Finding(defense="constant", score=self.score)


@dataclass(frozen=True, kw_only=True)
class Random(Constant):
    __doc__ = Constant.__doc__

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        run.check()
        return Finding(defense="random", score=float(torch.rand(())))


@dataclass(frozen=True, kw_only=True)
class NoOp(Constant):
    __doc__ = Constant.__doc__

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        run.check()
        return Finding(defense="no_op", repaired=suspect.model.state_dict())


@dataclass(frozen=True, kw_only=True)
class Wrecker(Constant):
    __doc__ = Constant.__doc__

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        run.check()
        return Finding(defense="wrecker", repaired={k: v * 0 for k, v in suspect.model.state_dict().items()})


@dataclass(frozen=True, kw_only=True)
class Backwards(Constant):
    __doc__ = Constant.__doc__
    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN, Access.INPUTS}),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        run.check()
        assert suspect.inputs is not None
        return Finding(defense="backwards", input_scores=-suspect.inputs[:, :, -1, -1].mean(1))


@dataclass(frozen=True, kw_only=True)
class Deaf(Constant):
    __doc__ = Constant.__doc__

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        return Finding(defense="deaf", score=float(suspect.model(torch.ones(1, *suspect.task.shape))[0].max()))


@dataclass(frozen=True, kw_only=True)
class Careless(Constant):
    __doc__ = Constant.__doc__

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        run.check()
        suspect.model.train()
        return Finding(defense="careless", score=float(suspect.model(torch.ones(1, *suspect.task.shape))[0].max()))


class Undocumented(Constant):
    """Nothing."""


@pytest.mark.parametrize(
    ("defense", "broken"),
    [
        (Constant(score=0.0), "ranks_the_planted_above_the_twin"),
        (Constant(score=1.0), "ranks_the_planted_above_the_twin"),
        (Random(), "repeats_itself"),
        (NoOp(), "repairs: the trigger worked on 100%, after the repair on 100%"),
        (Wrecker(), "repairs: the repair costs"),
        (Backwards(), "finds_stamped_pictures: input_scores: AUC 0.0"),
        (Deaf(), "stops_when_told"),
        (Careless(), "between training and eval mode"),
        (Undocumented(), "documents_itself"),
    ],
)
def test_a_defense_that_breaks_the_contract_fails(defense: Any, broken: str) -> None:
    with pytest.raises(AssertionError, match=broken):
        check_defense(defense)


class EntryPoint:
    def __init__(self, name: str, what: type) -> None:
        self.name, self.value, self._what = name, f"somewhere:{what.__name__}", what

    def load(self) -> type:
        return self._what


def plug_in(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    def entry_points(*, group: str) -> list[EntryPoint]:
        return list(points) if group == "molehunt.defenses" else []

    monkeypatch.setattr(plugins, "entry_points", entry_points)


def test_an_installed_package_adds_a_defense(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, EntryPoint("constant", Constant))
    assert available() == {**DEFENSES, "constant": Constant}
    assert "constant" not in DEFENSES


def test_a_plug_in_may_not_take_a_name_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, EntryPoint("strip", Constant))
    with pytest.raises(ValueError, match="may not replace a built-in defense: 'strip'"):
        available()
    plug_in(monkeypatch, EntryPoint("mine", Constant), EntryPoint("mine", NoOp))
    with pytest.raises(ValueError, match="two plug-ins have one name: 'mine'"):
        available()
