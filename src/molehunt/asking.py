"""Ask defenses about a model and fuse what they say: repairs come last, and only where one may be taken."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from molehunt.defenses import Defense, without_repairs
from molehunt.examination import Inspect, examine, informed
from molehunt.findings import Abstention, Failure, Outcome, Verdict
from molehunt.repair import REPAIR_FROM
from molehunt.suspect import Suspect

NOT_ASKED = "not asked"
"""How the reason of an abstention begins where a defense was not asked."""
FIRST = ("mntd", "pruning_detection", "neural_cleanse", "abs")
"""Whom to ask first where time is short: what costs least for what it tells, and those whose triggers others judge."""
LAST = ("pair_inversion",)
"""Whom to ask after those that judge triggers: it costs much and hands nothing on."""
LEAST = 0.5
"""Seconds below which nothing is begun any more."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Time for all defenses together, counted from when it is made.

    Attributes:
        seconds: in all.
        began: reading of `time.monotonic` when it was made.

    Raises:
        ValueError: no positive number of seconds.
    """

    seconds: float
    began: float = field(default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"a budget is a positive number of seconds, got {self.seconds}")

    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self.began + self.seconds - time.monotonic())

    def limit(self, seconds: float) -> float:
        """Seconds that one defense may take, of those that it would have without a budget: a second at least."""
        return max(1.0, min(seconds, self.left()))


def ask(
    suspect: Suspect,
    defenses: Mapping[str, Defense],
    inspect: Inspect,
    fuse: Callable[[Iterable[Outcome]], Verdict],
    *,
    every_repair: bool = False,
    budget: Budget | None = None,
    keep: bool = False,
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
        budget: who is not finished when it ends has no opinion. Then the order is that of `FIRST` and `LAST`. How long
            one may take is for `inspect` to limit.
        keep: Ctrl-C ends the asking, and what had been answered until then is fused; else it ends everything.
    """
    patient = _Patience(inspect, budget, keep).inspect
    if every_repair:
        return fuse(dict(examine(suspect, defenses, patient)).values())
    asked = without_repairs(defenses)
    if budget is not None:
        asked = {name: asked[name] for name in sorted(asked, key=_rank)}
    late = {name: asked[name] for name in asked if budget is not None and name in LAST}
    outcomes: dict[str, Outcome] = dict(examine(suspect, {n: d for n, d in asked.items() if n not in late}, patient))
    outcomes |= examine(suspect, late, patient)
    repairs = {name: defense for name, defense in defenses.items() if name not in asked}
    verdict = fuse(outcomes.values())
    if not repairs:
        return verdict
    if verdict.p >= REPAIR_FROM:
        # Some repairs work on the triggers that the others recovered.
        knowing = informed(suspect, outcomes)
        outcomes |= {name: patient(name, defense, knowing) for name, defense in repairs.items()}
    else:
        why = f"{NOT_ASKED}: p is {verdict.p:.3f}, and below {REPAIR_FROM} the submitted weights stand"
        outcomes |= {name: Abstention(defense=name, reason=why) for name in repairs}
    return fuse(outcomes.values())


def _rank(name: str) -> int:
    return FIRST.index(name) if name in FIRST else len(FIRST)


class _Patience:
    """Asks defenses for as long as there is time and nobody wants to stop."""

    def __init__(self, inspect: Inspect, budget: Budget | None, keep: bool) -> None:
        self._inspect, self._budget, self._keep = inspect, budget, keep
        self._stopped = False

    def inspect(self, name: str, defense: Defense, suspect: Suspect) -> Outcome:
        """Ask one defense, or say why it is not asked."""
        if self._stopped:
            return Abstention(defense=name, reason=f"{NOT_ASKED}: stopped before its turn came")
        budget = self._budget
        if budget is not None and budget.left() < LEAST:
            return Abstention(defense=name, reason=f"{NOT_ASKED}: the budget of {budget.seconds:g} s was spent")
        try:
            outcome = self._inspect(name, defense, suspect)
        except KeyboardInterrupt:
            if not self._keep:
                raise
            self._stopped = True
            return Abstention(defense=name, reason="stopped before it was done")
        if budget is not None and isinstance(outcome, Failure) and outcome.kind == "time" and budget.left() < LEAST:
            return Abstention(defense=name, reason=f"not done when the budget of {budget.seconds:g} s ended")
        return outcome
