"""What a scan would have caught: for every family of attacks, the share of known backdoors that these defenses see."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from molehunt import stacking
from molehunt.calibration import Population
from molehunt.conformal import combined, conformal
from molehunt.fusion import uncovered
from molehunt.reliability import exact_interval

LEVEL = 0.05
"""Share of clean models that may be accused."""


@dataclass(frozen=True, kw_only=True)
class Caught:
    """How many backdoored reference models of one family are caught.

    Attributes:
        family: of the attacks, such as `badnets`.
        caught, of: models that are, and all that have the scores.
        least, most: exact interval (Clopper and Pearson, 95 %) of the share, in [0, 1].
    """

    family: str
    caught: int
    of: int
    least: float
    most: float


@dataclass(frozen=True, kw_only=True)
class Power:
    """What a set of defenses catches among backdoors whose truth is known.

    Attributes:
        defenses: whose scores were combined, by name.
        level: share of clean models that may be accused.
        clean: clean references that a model is ranked among.
        families: one entry per family, the one that is caught least first.
    """

    defenses: tuple[str, ...]
    level: float
    clean: int
    families: tuple[Caught, ...]

    @property
    def caught(self) -> int:
        """How many models of all families are caught."""
        return sum(one.caught for one in self.families)

    @property
    def of(self) -> int:
        """How many there are."""
        return sum(one.of for one in self.families)

    def words(self) -> str:
        """Say it in a sentence."""
        parts = ", ".join(f"{one.family} {one.caught} of {one.of}" for one in self.families)
        return (
            f"At {self.level:.0%} false alarms these {len(self.defenses)} defenses catch {self.caught} of {self.of} "
            f"backdoors of the reference models: {parts}."
        )


def power(population: Population, defenses: Sequence[str], level: float = LEVEL) -> Power | None:
    """Count, by family, the backdoored references that would be accused if `level` of the clean ones were.

    What is compared is what a verdict rests on: the log-odds of `stacking` where there are references enough, else the
    combined conformal p-value. The share speaks for backdoors like those of the bank, on this network and by this
    recipe; what nobody planted there is not in it.

    Args:
        population: the references.
        defenses: names of those whose scores are combined.
        level: share of clean models that may be accused, in (0, 1).

    Returns:
        The shares; None where there are too few clean references to rank at that level, or no backdoored ones.

    Raises:
        ValueError: no defenses, or a level outside (0, 1).
    """
    if not defenses:
        raise ValueError("the power of no defenses cannot be told")
    if not 0.0 < level < 1.0:
        raise ValueError(f"the level must lie strictly between 0 and 1, got {level}")
    names = tuple(sorted(defenses))
    clean = population.table(names)
    planted = population.families(names)
    if not planted or (len(clean) + 1) * level < 1.0:
        return None
    found = [
        _caught(family, sum(p <= level for p in values), len(values))
        for family, values in _p_values(clean, planted).items()
    ]
    found.sort(key=lambda one: (one.caught / one.of, one.family))
    return Power(defenses=names, level=level, clean=len(clean), families=tuple(found))


def _p_values(clean: list[list[float]], planted: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    """Conformal p-values of the backdoored references, by family."""
    if not stacking.enough(clean, planted):
        return {family: [combined(row, clean) for row in rows] for family, rows in planted.items()}
    honest, families = stacking.standing(stacking.fit(clean, planted), clean, planted)
    return {family: [conformal(value, honest) for value in values] for family, values in families.items()}


def unused(population: Population, here: Power, others: Iterable[str], level: float = LEVEL) -> str | None:
    """Say in a sentence what asking more defenses would buy; None where nothing can be said.

    Args:
        population: the references.
        here: what those that were asked catch.
        others: names of those that were not.
        level: as in `power`.
    """
    more = sorted(name for name in set(others) - set(here.defenses) if uncovered(name, population) is None)
    all_ = power(population, [*here.defenses, *more], level) if more else None
    if all_ is None:
        return None
    gains = {one.family: one for one in here.families}
    best = max(all_.families, key=lambda one: one.caught / one.of - _share(gains.get(one.family)))
    words = f"With {', '.join(more)} as well {all_.caught} of {all_.of} would be caught in place of {here.caught}"
    if (before := gains.get(best.family)) is None or best.caught <= before.caught:
        return f"{words}."
    return f"{words}; of {best.family} {best.caught} of {best.of} in place of {before.caught}."


def _share(one: Caught | None) -> float:
    return 0.0 if one is None else one.caught / one.of


def _caught(family: str, caught: int, of: int) -> Caught:
    least, most = exact_interval(caught, of)
    return Caught(family=family, caught=caught, of=of, least=least, most=most)
