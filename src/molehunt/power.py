"""What a scan would have caught: for every family of attacks, the share of known backdoors that these defenses see."""

from collections.abc import Sequence
from dataclasses import dataclass

from molehunt.calibration import Population
from molehunt.conformal import combined
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


def power(population: Population, defenses: Sequence[str], level: float = LEVEL) -> Power | None:
    """Count, by family, the backdoored references whose combined conformal p-value is at most `level`.

    A model is ranked among the clean references alone, so nothing was fitted to it. The share speaks for backdoors like
    those of the bank, on this network and by this recipe; what nobody planted there is not in it.

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
        _caught(family, sum(combined(row, clean) <= level for row in rows), len(rows))
        for family, rows in planted.items()
    ]
    found.sort(key=lambda one: (one.caught / one.of, one.family))
    return Power(defenses=names, level=level, clean=len(clean), families=tuple(found))


def _caught(family: str, caught: int, of: int) -> Caught:
    least, most = exact_interval(caught, of)
    return Caught(family=family, caught=caught, of=of, least=least, most=most)
