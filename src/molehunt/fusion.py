"""Scores of one model beside those of reference models: one p-value, one probability, and who contributed what."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from molehunt import stacking
from molehunt.calibration import Population
from molehunt.conformal import combined, conformal, posterior

COVERAGE = 0.8
"""Share of the clean reference models that must have a score of a defense for it to join the combination."""


@dataclass(frozen=True, kw_only=True)
class Fused:
    """What the scores of one model say beside those of its references.

    Attributes:
        p: probability that something is hidden, in (0, 1); the prior where nothing could be compared.
        p_value: combined conformal p-value, in [1 / (clean + 1), 1]; None where nothing could be compared.
        p_values: conformal p-value by defense.
        clean, planted: reference models behind `p`: those with a score of every defense that joined.
        start: log-odds, at this prior, of a model that no defense finds remarkable; None where no weights were learned.
        contributions: by defense, by how much it raised them; they sum to the log-odds of `p` before it is clipped.
        dropped: defenses that had to be left out, because no clean reference has a score of all.
    """

    p: float
    p_value: float | None
    p_values: Mapping[str, float]
    clean: int
    planted: int
    start: float | None = None
    contributions: Mapping[str, float] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def fuse(scores: Mapping[str, float], population: Population, *, prior: float = 0.5) -> Fused:
    """Turn raw scores of one model into p-values and one probability.

    Args:
        scores: by defense, each in the settings of the population and with a score of at least one clean reference.
        population: the references, without the model.
        prior: share of backdoored models among those that are asked about, in (0, 1).

    Raises:
        ValueError: a defense that scored no clean reference, a score that is not finite, or a prior outside (0, 1).
    """
    p_values = {d: conformal(s, population.column(d)) for d, s in scores.items()}
    used, dropped = sorted(scores), []
    while used and not population.table(used):
        # Each has scores of most references, but no reference has all of them: give up the sparsest.
        sparse = min(used, key=lambda d: (len(population.column(d)), d))
        del p_values[sparse]
        used.remove(sparse)
        dropped.append(sparse)
    if not used:
        return Fused(p=prior, p_value=None, p_values={}, clean=0, planted=0, dropped=tuple(dropped))
    clean, families = population.table(used), population.families(used)
    p_value = combined([scores[d] for d in used], clean)
    start, parts = None, dict[str, float]()
    if stacking.enough(clean, families):
        stack = stacking.fit(clean, families)
        ranks = [conformal(scores[d], column) for d, column in zip(used, zip(*clean, strict=True), strict=True)]
        p = stacking.probability(stack, ranks, prior=prior)
        start = stack.intercept + math.log(prior / (1.0 - prior))
        parts = dict(zip(used, stacking.contributions(stack, ranks), strict=True))
    else:
        planted = {a: [combined(row, clean) for row in rows] for a, rows in families.items()}
        p = posterior(p_value, len(clean), prior=prior, planted=planted)
    return Fused(
        p=p,
        p_value=p_value,
        p_values=p_values,
        clean=len(clean),
        planted=sum(map(len, families.values())),
        start=start,
        contributions=parts,
        dropped=tuple(dropped),
    )


def uncovered(defense: str, population: Population) -> str | None:
    """Say why a defense has too few clean references to compare with; None if it has enough (`COVERAGE`)."""
    have, of = len(population.column(defense)), len(population.clean)
    if defense not in population.defenses or have == 0:
        return "no clean reference model has a score of it"
    if have < COVERAGE * of:
        return f"only {have} of {of} clean reference models have a score of it"
    return None
