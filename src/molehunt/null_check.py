"""Whether clean models that no calibration has seen score as the calibration's clean models do."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scipy.stats import betabinom, ks_2samp

from molehunt.calibration import Population
from molehunt.conformal import conformal
from molehunt.fusion import fuse, uncovered

LEVEL = 0.05
DIFFERENT = 0.01
"""A corrected p-value up to this says that the two groups of clean models score differently."""


@dataclass(frozen=True, kw_only=True)
class Alarms:
    """How many clean models were called suspicious, and how many one expects.

    Attributes:
        count: fresh clean models whose conformal p-value is at most the level.
        models: fresh clean models with a p-value.
        low, high: the counts between which 95 % of all draws of calibration and fresh models lie, at least.
        references: clean models behind every p-value.
        level: p-value up to which a model counts as suspicious.
    """

    count: int
    models: int
    low: int
    high: int
    references: int
    level: float

    @property
    def expected(self) -> bool:
        """Whether the count lies between the two; false where nothing could have been counted (`possible`)."""
        return self.possible and self.low <= self.count <= self.high

    @property
    def possible(self) -> bool:
        """Whether there is a model, and so many references that one of them could have reached the level."""
        return self.models > 0 and _reach(self.references, self.level) > 0


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """One defense on two groups of clean models.

    Attributes:
        defense: its name.
        calibration, fresh: how many models of each group have a score.
        distance: largest difference of the two cumulative distributions (Kolmogorov and Smirnov), in [0, 1].
        p_value: exact two-sided p-value of it, in (0, 1]; equal scores make it larger than it should be, never smaller.
        corrected: the p-value after Holm's correction for the number of defenses, in (0, 1].
        alarms: false positives of this defense alone.
    """

    defense: str
    calibration: int
    fresh: int
    distance: float
    p_value: float
    corrected: float
    alarms: Alarms


@dataclass(frozen=True, kw_only=True)
class NullCheck:
    """What fresh clean models say about a calibration.

    Attributes:
        level: of the false positives, in (0, 1).
        defenses: one entry per defense, by name.
        alarms: false positives of all defenses combined.
        left_out: by defense that could not be checked, why: it has too few scores on either side.
    """

    level: float
    defenses: tuple[Likeness, ...]
    alarms: Alarms
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether no defense tells the groups apart (`DIFFERENT`), and the combined alarms are as many as expected.

        False if a defense could not be checked, or if no alarm could have been raised: too few references for the
        level, or no fresh model that every defense scored.
        """
        return not self.left_out and self.alarms.expected and all(d.corrected > DIFFERENT for d in self.defenses)


def null_check(known: Population, fresh: Population, *, level: float = LEVEL) -> NullCheck:
    """Compare a calibration's clean models with clean models that it has not seen.

    Args:
        known: the calibration; its planted models are not looked at.
        fresh: other models, scored in the same settings; only the clean ones are looked at.
        level: conformal p-value up to which a model counts as a false positive, in (0, 1).

    Raises:
        ValueError: another task, network, number format or settings of a defense; a seed that both groups share; no
            defense that scored both; or a level outside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"the level must lie strictly between 0 and 1, got {level}")
    for what in ("task", "network", "dtype"):
        if getattr(known, what) != getattr(fresh, what):
            raise ValueError(
                f"calibration and fresh models differ in {what}: {getattr(known, what)!r}, {getattr(fresh, what)!r}"
            )
    if both := {m.seed for m in known.clean} & {m.seed for m in fresh.clean}:
        raise ValueError(f"a fresh model is none of the calibration's, but both have the seed {min(both)}")
    left_out = {}
    for name in sorted({*known.defenses, *fresh.defenses}):
        if why := uncovered(name, known):
            left_out[name] = f"calibration: {why}"
        elif why := uncovered(name, fresh):
            left_out[name] = f"fresh models: {why}"
    names = [name for name in sorted(known.defenses) if name not in left_out]
    if not names:
        raise ValueError(
            f"no defense scored both groups: {sorted(known.defenses)} the calibration's, {sorted(fresh.defenses)} the "
            "fresh ones"
        )
    if other := [d for d in names if known.defenses[d] != fresh.defenses.get(d)]:
        raise ValueError(f"{other[0]} scored the two groups in different settings")
    with warnings.catch_warnings():
        # Where rounding takes an exact p-value beyond 1, scipy gives up on it, warns, and answers 1.
        warnings.filterwarnings("ignore", message="ks_2samp: Exact calculation unsuccessful", category=RuntimeWarning)
        tests = [ks_2samp(known.column(d), fresh.column(d)) for d in names]
    corrected = holm([float(t.pvalue) for t in tests])
    return NullCheck(
        level=level,
        defenses=tuple(
            Likeness(
                defense=name,
                calibration=len(known.column(name)),
                fresh=len(fresh.column(name)),
                distance=float(test.statistic),
                p_value=float(test.pvalue),
                corrected=value,
                alarms=count_alarms(
                    [conformal(s, known.column(name)) for s in fresh.column(name)], len(known.column(name)), level
                ),
            )
            for name, test, value in zip(names, tests, corrected, strict=True)
        ),
        alarms=_combined(known, fresh, names, level),
        left_out=left_out,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, so that the chance of any false one stays below the level.

    The smallest is multiplied by their number, the next by one less, and so on; none may fall below the one before.

    Args:
        p_values: in [0, 1].

    Returns:
        The corrected p-values in [0, 1], in the same order.

    Reference:
        Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = least
    return corrected


def expected_alarms(references: int, models: int, level: float = LEVEL, share: float = 0.95) -> tuple[int, int]:
    """Return between which counts the false positives lie among models that share their references.

    With k the number of ranks that reach the level, the share of all clean models above the references' k-th highest
    score is Beta(k, n + 1 - k); so the count among m models is beta-binomial, and wider than a binomial one: all m are
    compared with the same n references.

    Args:
        references: n, clean references behind every p-value.
        models: m, clean models that were compared with them.
        level: conformal p-value up to which a model counts, in (0, 1).
        share: of the draws that lie between the two, at least; half of the rest on either side, at most.

    Returns:
        Lowest and highest count. (0, 0) where n references cannot give a p-value that small.
    """
    reach = _reach(references, level)
    if reach == 0:
        return 0, 0
    spread = betabinom(models, reach, references + 1 - reach)
    return int(spread.ppf((1.0 - share) / 2)), int(spread.ppf((1.0 + share) / 2))


def _reach(references: int, level: float) -> int:
    """Number of ranks among the references whose p-value is at most the level."""
    return math.floor(level * (references + 1) + 1e-9)


def count_alarms(p_values: Sequence[float], references: int, level: float = LEVEL) -> Alarms:
    """Count the p-values that reach a level, beside what chance gives; see `expected_alarms`."""
    low, high = expected_alarms(references, len(p_values), level)
    # Ranks are fractions: 5 / 100 as a float must reach 0.05.
    count = sum(p <= level + 1e-9 for p in p_values)
    return Alarms(count=count, models=len(p_values), low=low, high=high, references=references, level=level)


def _combined(known: Population, fresh: Population, names: Sequence[str], level: float) -> Alarms:
    """Count the fresh models whose combined p-value reaches the level, among those that every defense scored."""
    fused = [fuse(dict(zip(names, row, strict=True)), known) for row in fresh.table(names)]
    p_values = [f.p_value for f in fused if f.p_value is not None]
    # References that lack a score of some defense take no part, for any fresh model alike.
    return count_alarms(p_values, fused[0].clean if fused else 0, level)
