"""Who is asked, in which order, and that a repair is not asked where it could not be taken."""

from collections.abc import Iterable

import pytest
import torch

from molehunt.asking import NOT_ASKED, ask
from molehunt.defenses import DEFENSES, REPAIRS, SCORELESS, Defense, scoring, without_repairs
from molehunt.findings import Abstention, Finding, Outcome, Verdict
from molehunt.game.rules import ROUNDS
from molehunt.suspect import Suspect
from molehunt.testing import planted

KNOWN = {name: DEFENSES[name]() for name in ("fine_pruning", "neural_cleanse", "fine_tuning")}


def asked(p: float, **how: bool) -> tuple[list[str], Verdict]:
    order: list[str] = []

    def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        order.append(name)
        return Finding(defense=name, repaired={}) if name in REPAIRS else Finding(defense=name, score=1.0)

    def fuse(outcomes: Iterable[Outcome]) -> Verdict:
        return Verdict(p=p, q=torch.full((10,), 0.1), outcomes=tuple(outcomes))

    return order, ask(planted().suspect, KNOWN, inspect, fuse, **how)


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
    scorers = {"abs", "mntd", "neural_cleanse", "pruning_detection", "rab", "sentinet", "strip"}
    assert set(scoring(every)) == scorers == set(every) - SCORELESS
    assert set(every) - set(without_repairs(every)) == REPAIRS
