"""From ranks to probabilities: conformal p-values against reference models, and what a p-value is worth.

Nothing is assumed about the distribution of a score: a suspect is ranked among clean models that were trained and
examined in the same way. If it is clean too, every rank is equally likely. docs/reference/verdict.md derives the rest.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from molehunt.defenses._statistics import MAD_TO_SIGMA

STRENGTHS = tuple(0.505 + 0.01 * i for i in range(50))
"""How well the defenses may separate backdoored from clean models (AUC): from coin tossing to perfect, evenly."""
INDICATIVE = 19
"""An assumed null distribution counts as no more than so many reference models."""


def conformal(score: float, references: Sequence[float]) -> float:
    """Conformal p-value (1 + #{references >= score}) / (n + 1) of a raw score, in [1 / (n + 1), 1].

    Small is suspicious. Ties count against suspicion. If the suspect is clean and exchangeable with the n clean
    references, the p-value is at most u with probability at most u, for every u.

    Raises:
        ValueError: no references, or a number that is not finite.
    """
    if not references:
        raise ValueError("there are no reference scores to compare with")
    if not all(map(math.isfinite, [score, *references])):
        raise ValueError(f"scores must be finite, got {score} and references {list(references)}")
    return (1 + sum(r >= score for r in references)) / (len(references) + 1)


def combined(scores: Sequence[float], references: Sequence[Sequence[float]]) -> float:
    """One conformal p-value from several dependent scores of a suspect, exact for finitely many references.

    Suspect and references are pooled; every model gets, per defense, its share of pooled models that score at least
    as high, and the harmonic mean of its shares. The answer is the share of pooled models whose harmonic mean is at
    most the suspect's. Since the pool treats all its members alike, the answer is valid however the scores depend on
    each other. With one score it equals `conformal`.

    Args:
        scores: m raw scores of the suspect.
        references: n rows of m raw scores.

    Raises:
        ValueError: no scores, no references, rows of another length, or numbers that are not finite.

    Reference:
        Wilson, "The harmonic mean p-value for combining dependent tests", PNAS 2019, for the statistic alone.
    """
    rows = [list(row) for row in references]
    if not scores or not rows or any(len(row) != len(scores) for row in rows):
        raise ValueError(f"expected rows of {len(scores)} >= 1 scores, got lengths {sorted({len(r) for r in rows})}")
    pool = torch.tensor([list(scores), *rows], dtype=torch.float64)
    if not bool(torch.isfinite(pool).all()):
        raise ValueError("scores must be finite")
    # Counts, not shares: sums of 1 / count are equal for equal counts, so ties stay ties.
    counts = (pool.unsqueeze(0) >= pool.unsqueeze(1)).sum(1).double()
    evidence = (1.0 / counts).sort(1).values.sum(1)
    return float((evidence >= evidence[0] - 1e-12).double().mean())


def chance(count: int, references: int, strength: float) -> float:
    """Probability that exactly `count` of n clean references score at least as high as a backdoored model.

    Let U be the share of all clean models that score at least as high as the backdoored one. Its density is taken as
    a u^(a-1), Beta(a, 1) with a = 1 / strength - 1, which is the member of that family with AUC = strength; given U,
    the count is binomial. So the answer is a C(n, count) B(count + a, n - count + 1). For a clean model U is uniform
    and the answer 1 / (n + 1).

    Raises:
        ValueError: a count outside 0..n, or a strength outside [0.5, 1).
    """
    if not 0 <= count <= references or not 0.5 <= strength < 1.0:
        raise ValueError(f"expected 0 <= count <= n and 0.5 <= strength < 1, got {count}, {references}, {strength}")
    a = 1.0 / strength - 1.0
    choose = math.lgamma(references + 1) - math.lgamma(count + 1) - math.lgamma(references - count + 1)
    spread = math.lgamma(count + a) + math.lgamma(references - count + 1) - math.lgamma(references + 1 + a)
    return a * math.exp(choose + spread)


def posterior(
    p_value: float,
    references: int,
    *,
    prior: float = 0.5,
    planted: Mapping[str, Sequence[float]] | None = None,
) -> float:
    """Probability that a model is backdoored, given its conformal p-value among n clean references.

    What may be hidden is of one of the families of attacks that are known from planted reference models, or of a
    family that nobody here has met; all of these are equally likely, however many models each of them has. How strong
    the defenses are against a family is not known: before anything else every AUC between 0.5 and 1 counts the same
    (`STRENGTHS`). The p-values of a known family's models weigh these strengths for that family alone, so that many
    loud backdoors say nothing about a quiet one. The answer is Bayes' rule with `chance` under both hypotheses,
    clipped to [1 / (N + 2), 1 - 1 / (N + 2)] for N reference models in all, and to [0.01, 0.99].

    Args:
        p_value: (1 + count) / (n + 1), as `conformal` and `combined` give it.
        references: n, the clean references behind it.
        prior: share of backdoored models among those that are asked about, in (0, 1).
        planted: by family, p-values of its known-backdoored reference models among the same n clean ones; a family
            without any counts as not known.

    Raises:
        ValueError: a prior outside (0, 1), or a p-value that n references cannot give.
    """
    if not 0.0 < prior < 1.0:
        raise ValueError(f"the prior must lie strictly between 0 and 1, got {prior}")
    count = _count(p_value, references)
    known = [[_count(p, references) for p in values] for values in (planted or {}).values() if values]
    likelihoods = [_likelihood(count, references, counts) for counts in (*known, [])]
    factor = math.fsum(likelihoods) / len(likelihoods) * (references + 1)
    least = max(0.01, 1.0 / (references + sum(map(len, known)) + 2))
    return min(1.0 - least, max(least, prior * factor / (prior * factor + 1.0 - prior)))


def _likelihood(count: int, references: int, known: Sequence[int]) -> float:
    """Probability of a count for one more backdoored model of a family whose models had the known counts."""
    # Logarithms: a hundred planted models would underflow the plain product.
    logs = [math.fsum(math.log(chance(k, references, s)) for k in known) for s in STRENGTHS]
    weights = [math.exp(value - max(logs)) for value in logs]
    terms = (w * chance(count, references, s) for w, s in zip(weights, STRENGTHS, strict=True))
    return math.fsum(terms) / math.fsum(weights)


def _count(p_value: float, references: int) -> int:
    """References that score at least as high, out of a conformal p-value."""
    count = round(p_value * (references + 1)) - 1
    if references < 1 or not 0 <= count <= references or abs((count + 1) / (references + 1) - p_value) > 1e-9:
        raise ValueError(f"{references} references cannot give the p-value {p_value}")
    return count


def shift(p: float, *, old: float, new: float) -> float:
    """Restate a probability under another prior: logit p + logit new - logit old.

    Raises:
        ValueError: a number outside (0, 1).
    """
    if not all(0.0 < value < 1.0 for value in (p, old, new)):
        raise ValueError(f"p and priors must lie strictly between 0 and 1, got {p}, {old}, {new}")
    odds = p / (1 - p) * new / (1 - new) * (1 - old) / old
    return odds / (1.0 + odds)


@cache
def index_null(classes: int) -> Tensor:
    """Sorted anomaly indices of simulated clean models: `classes` independent normal log norms each.

    Simulated once per process and number of classes, always with the same draws. Real networks have classes that are
    easier to reach than others, so their indices tend to be larger: what follows from this is *indicative*.

    Raises:
        ValueError: fewer than three classes, for which a robust deviation says nothing.
    """
    if classes < 3:
        raise ValueError(f"an anomaly index needs at least 3 classes, got {classes}")
    rng = torch.Generator().manual_seed(classes)
    draws = max(2_000, min(20_000, 4_000_000 // classes))
    return _indices(torch.randn(draws, classes, generator=rng, dtype=torch.float64)).sort().values


def _indices(norms: Tensor) -> Tensor:
    """Anomaly index (N,) of the smallest of K norms (N, K), all rows at once."""
    middle = norms.quantile(0.5, dim=1, keepdim=True)
    deviation = MAD_TO_SIGMA * (norms - middle).abs().quantile(0.5, dim=1)
    return (middle.squeeze(1) - norms.min(1).values) / deviation


def indicative(index: float, classes: int) -> float:
    """p-value of Neural Cleanse's anomaly index where no reference models exist, in steps of 1 / 20.

    The share of simulated clean models (`index_null`) with at least this index, rounded up to what `INDICATIVE`
    reference models could have shown: an assumption is not worth more than a few real models.
    """
    null = index_null(classes)
    exceed = len(null) - int(torch.searchsorted(null, torch.tensor(index, dtype=null.dtype)))
    share = (1 + exceed) / (len(null) + 1)
    return math.ceil(share * (INDICATIVE + 1) - 1e-12) / (INDICATIVE + 1)
