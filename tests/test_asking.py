"""Who is asked, in which order, and that a repair is not asked where it could not be taken."""

import time
from collections.abc import Iterable

import pytest
import torch

from molehunt.asking import FIRST, LAST, NOT_ASKED, Budget, ask
from molehunt.defenses import DEFENSES, REPAIRS, SCORELESS, Defense, scoring, without_repairs
from molehunt.findings import Abstention, Failure, Finding, Outcome, Verdict
from molehunt.game.rules import ROUNDS
from molehunt.suspect import Suspect
from molehunt.testing import planted

KNOWN = {name: DEFENSES[name]() for name in ("fine_pruning", "neural_cleanse", "fine_tuning")}


def asked(p: float, *, every_repair: bool = False) -> tuple[list[str], Verdict]:
    order: list[str] = []

    def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        order.append(name)
        return Finding(defense=name, repaired={}) if name in REPAIRS else Finding(defense=name, score=1.0)

    def fuse(outcomes: Iterable[Outcome]) -> Verdict:
        return Verdict(p=p, q=torch.full((10,), 0.1), outcomes=tuple(outcomes))

    return order, ask(planted().suspect, KNOWN, inspect, fuse, every_repair=every_repair)


def test_repairs_come_last_where_one_may_be_taken() -> None:
    order, verdict = asked(0.2)
    assert order == ["neural_cleanse", "fine_pruning", "fine_tuning"]
    assert all(isinstance(outcome, Finding) for outcome in verdict.outcomes)


def test_repairs_are_granted_the_triggers_that_the_others_recovered() -> None:
    case, seen = planted(), {}

    def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        seen[name] = suspect.candidates
        trigger = case.trigger if name == "neural_cleanse" else None
        return Finding(defense=name, score=1.0, trigger=trigger, target=None if trigger is None else 3)

    def fuse(outcomes: Iterable[Outcome]) -> Verdict:
        return Verdict(p=0.9, q=torch.full((10,), 0.1), outcomes=tuple(outcomes))

    ask(case.suspect, {name: DEFENSES[name]() for name in ("neural_cleanse", "unlearning")}, inspect, fuse)
    assert seen["neural_cleanse"] is None
    (candidate,) = seen["unlearning"] or ()
    assert (candidate.trigger, candidate.target, candidate.defense) == (case.trigger, 3, "neural_cleanse")

    # Where nobody could look there is no empty set of candidates either.
    ask(case.suspect, {"unlearning": DEFENSES["unlearning"]()}, inspect, fuse)
    assert seen["unlearning"] is None


def test_below_that_they_are_not_asked_and_the_verdict_says_so() -> None:
    order, verdict = asked(0.19)
    assert order == ["neural_cleanse"]
    silent = [o for o in verdict.outcomes if isinstance(o, Abstention)]
    assert [o.defense for o in silent] == ["fine_pruning", "fine_tuning"]
    assert all(o.reason.startswith(f"{NOT_ASKED}: p is 0.190") for o in silent)


def test_where_every_repair_is_wanted_p_does_not_matter() -> None:
    order, verdict = asked(0.01, every_repair=True)
    assert sorted(order) == sorted(KNOWN)
    assert all(isinstance(outcome, Finding) for outcome in verdict.outcomes)


@pytest.mark.parametrize("name", ROUNDS)
def test_only_the_round_about_removals_asks_every_repair(name: str) -> None:
    assert ROUNDS[name].repairs_all == (name == "I")


def test_who_scores_and_who_repairs() -> None:
    every = {name: kind() for name, kind in DEFENSES.items()}
    scorers = {"abs", "mntd", "neural_cleanse", "pair_inversion", "pruning_detection", "rab", "sentinet", "strip"}
    assert set(scoring(every)) == scorers == set(every) - SCORELESS
    assert set(every) - set(without_repairs(every)) == REPAIRS


class Clock:
    """Stands still but for what defenses take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def hurried(clock: Clock, seconds: float, *, slow: tuple[str, ...] = ()) -> tuple[list[str], Verdict]:
    """Every defense takes ten seconds, or with a limit that it knows as long as is left."""
    order: list[str] = []
    budget = Budget(seconds=seconds)

    def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        order.append(name)
        late = budget.left() < 10
        clock.now += min(10.0, budget.left())
        if late:
            return Failure(defense=name, kind="time", message="out of time")
        return Finding(defense=name, score=1.0)

    def fuse(outcomes: Iterable[Outcome]) -> Verdict:
        return Verdict(p=0.9, q=torch.full((10,), 0.1), outcomes=tuple(outcomes))

    names = ("pair_inversion", "strip", "abs", "neural_cleanse", "fine_tuning", "pruning_detection", "mntd")
    return order, ask(planted().suspect, {n: DEFENSES[n]() for n in names}, inspect, fuse, budget=budget)


def test_with_time_for_all_the_cheap_come_first_and_repairs_last(monkeypatch: pytest.MonkeyPatch) -> None:
    order, verdict = hurried(Clock(monkeypatch), 100.0)
    assert order == [*FIRST, "strip", *LAST, "fine_tuning"]
    assert all(isinstance(outcome, Finding) for outcome in verdict.outcomes)


def test_who_is_not_done_when_the_budget_ends_has_no_opinion(monkeypatch: pytest.MonkeyPatch) -> None:
    order, verdict = hurried(Clock(monkeypatch), 35.0)
    assert order == list(FIRST)
    said = {outcome.defense: outcome for outcome in verdict.outcomes}
    assert [name for name, outcome in said.items() if isinstance(outcome, Finding)] == list(FIRST[:3])
    for name, why in (("abs", "not done when"), ("strip", NOT_ASKED), ("fine_tuning", NOT_ASKED)):
        outcome = said[name]
        assert isinstance(outcome, Abstention)
        assert outcome.reason.startswith(why)
        assert "35 s" in outcome.reason


def test_a_defense_that_takes_too_long_by_itself_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)

    def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        return Failure(defense=name, kind="time", message="more than its own limit")

    def fuse(outcomes: Iterable[Outcome]) -> Verdict:
        return Verdict(p=0.5, q=torch.full((10,), 0.1), outcomes=tuple(outcomes))

    verdict = ask(planted().suspect, KNOWN, inspect, fuse, budget=Budget(seconds=60.0))
    assert all(isinstance(outcome, Failure) for outcome in verdict.outcomes)


def test_no_defense_gets_more_than_is_left_nor_less_than_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    budget = Budget(seconds=30.0)
    assert (budget.limit(10.0), budget.limit(600.0)) == (10.0, 30.0)
    clock.now += 29.75
    assert (budget.limit(10.0), budget.limit(600.0)) == (1.0, 1.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_budget_is_some_time(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive number of seconds"):
        Budget(seconds=seconds)


@pytest.mark.parametrize("keep", [True, False])
def test_ctrl_c_ends_the_asking_and_keeps_what_was_answered(keep: bool) -> None:
    order: list[str] = []

    def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        order.append(name)
        if len(order) == 2:
            raise KeyboardInterrupt
        return Finding(defense=name, score=1.0)

    def fuse(outcomes: Iterable[Outcome]) -> Verdict:
        return Verdict(p=0.9, q=torch.full((10,), 0.1), outcomes=tuple(outcomes))

    known = {n: DEFENSES[n]() for n in ("neural_cleanse", "abs", "pruning_detection", "fine_tuning")}
    if not keep:
        with pytest.raises(KeyboardInterrupt):
            ask(planted().suspect, known, inspect, fuse)
        return
    verdict = ask(planted().suspect, known, inspect, fuse, keep=True)
    assert order == ["neural_cleanse", "abs"], "nobody is asked after Ctrl-C"
    said = {o.defense: o.reason if isinstance(o, Abstention) else "" for o in verdict.outcomes}
    assert said == {
        "neural_cleanse": "",
        "abs": "stopped before it was done",
        "pruning_detection": f"{NOT_ASKED}: stopped before its turn came",
        "fine_tuning": f"{NOT_ASKED}: stopped before its turn came",
    }
