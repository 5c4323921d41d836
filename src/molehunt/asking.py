"""Ask defenses about a model and fuse what they say: repairs come last, and only where one may be taken."""

from collections.abc import Callable, Iterable, Mapping

from molehunt.defenses import Defense, without_repairs
from molehunt.examination import Inspect, examine, informed
from molehunt.findings import Abstention, Outcome, Verdict
from molehunt.repair import REPAIR_FROM
from molehunt.suspect import Suspect

NOT_ASKED = "not asked"
"""How the reason of an abstention begins where a repair was not asked."""


def ask(
    suspect: Suspect,
    defenses: Mapping[str, Defense],
    inspect: Inspect,
    fuse: Callable[[Iterable[Outcome]], Verdict],
    *,
    every_repair: bool = False,
) -> Verdict:
    """Return the verdict of all defenses; its outcomes are those of all of them.

    Where p stays below `repair.REPAIR_FROM` the submitted weights stand whatever a repair would answer, and repairs
    train: so the built-in ones are not asked, and their outcome is an abstention that says so.

    Args:
        suspect: the model and the evidence.
        defenses: whom to ask, by name.
        inspect: runs one of them, as in `examination.examine`.
        fuse: makes a verdict of outcomes.
        every_repair: ask all repairs of every model.
    """
    if every_repair:
        return fuse(dict(examine(suspect, defenses, inspect)).values())
    asked = without_repairs(defenses)
    outcomes: dict[str, Outcome] = dict(examine(suspect, asked, inspect))
    repairs = {name: defense for name, defense in defenses.items() if name not in asked}
    verdict = fuse(outcomes.values())
    if not repairs:
        return verdict
    if verdict.p >= REPAIR_FROM:
        # Some repairs work on the triggers that the others recovered.
        knowing = informed(suspect, outcomes)
        outcomes |= {name: inspect(name, defense, knowing) for name, defense in repairs.items()}
    else:
        why = f"{NOT_ASKED}: p is {verdict.p:.3f}, and below {REPAIR_FROM} the submitted weights stand"
        outcomes |= {name: Abstention(defense=name, reason=why) for name in repairs}
    return fuse(outcomes.values())
