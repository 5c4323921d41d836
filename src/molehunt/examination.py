"""Run the defenses over one suspect, in the order in which they help each other."""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import replace

from molehunt.defenses import Defense
from molehunt.findings import Candidate, Finding, Outcome
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images

Inspect = Callable[[str, Defense, Suspect], Outcome]


def divide(clean: Images, share: float = 0.8) -> tuple[Images, Images]:
    """Part clean images: what the defenses see, and what the fusion keeps to measure their answers."""
    cut = int(share * len(clean.y))
    return Images(clean.x[:cut], clean.y[:cut]), Images(clean.x[cut:], clean.y[cut:])


def judges_candidates(defense: Defense, grants: Set[Access]) -> bool:
    """Whether a defense has to wait for candidates: no other evidence that it accepts is granted."""
    return not any(need <= grants - {Access.CANDIDATES} for need in defense.needs) and any(
        Access.CANDIDATES in need for need in defense.needs
    )


def candidates(outcomes: Mapping[str, Outcome]) -> tuple[Candidate, ...]:
    """Collect the triggers that defenses recovered, without a word about how sure they were.

    One that works on some classes alone is left out: who judges candidates stamps pictures of all classes.
    """
    found = []
    for name, outcome in outcomes.items():
        if not isinstance(outcome, Finding) or outcome.sources is not None:
            continue
        if outcome.trigger is not None and outcome.target is not None:
            found.append(Candidate(trigger=outcome.trigger, target=outcome.target, defense=name))
    return tuple(found)


def informed(suspect: Suspect, outcomes: Mapping[str, Outcome]) -> Suspect:
    """Grant what was recovered as candidates, beside those that the suspect came with.

    Where nobody could look for triggers, and the suspect came without candidates, none are granted, not even an empty
    set of them: those that only judge candidates then abstain.
    """
    if not searched(outcomes) and suspect.candidates is None:
        return suspect
    return replace(suspect, candidates=(suspect.candidates or ()) + candidates(outcomes))


def searched(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Names of the defenses that looked for triggers and finished, in order: they name one, or a score by class.

    One that scores training samples has its class scores from them, and one that asks meta-classifiers from those;
    neither has looked for a trigger. One that searches by single classes has, but hands none on.

    That none of them named a trigger is evidence. One that failed or abstained found nothing either, but that is none.
    """
    return sorted(
        name
        for name, outcome in outcomes.items()
        if isinstance(outcome, Finding)
        and outcome.sources is None
        and (
            outcome.trigger is not None
            or (outcome.class_scores is not None and outcome.sample_scores is None and "metas" not in outcome.record)
        )
    )


def examine(suspect: Suspect, defenses: Mapping[str, Defense], inspect: Inspect) -> Iterator[tuple[str, Outcome]]:
    """Yield every defense's outcome: first those that find triggers, then those that judge what was found.

    The record of a finding about candidates says in `producers` who looked for them: the more have looked, the higher
    the largest score among candidates, so scores after other producers are not comparable. See `informed` for what they
    are granted.

    Args:
        suspect: the model and the evidence; its candidates, if any, are kept and the recovered ones added.
        defenses: what to run, by name.
        inspect: runs one defense and never raises for what the defense did: `runner.inspect` or an isolated one.
    """
    outcomes: dict[str, Outcome] = {}
    waiting: dict[str, Defense] = {}
    for name, defense in defenses.items():
        if judges_candidates(defense, suspect.grants):
            waiting[name] = defense
            continue
        outcomes[name] = inspect(name, defense, suspect)
        yield name, outcomes[name]
    producers, knowing = searched(outcomes), informed(suspect, outcomes)
    for name, defense in waiting.items():
        outcome = inspect(name, defense, knowing)
        if isinstance(outcome, Finding):
            outcome = replace(outcome, record={**outcome.record, "producers": producers})
        yield name, outcome
