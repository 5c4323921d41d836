"""Whether probabilities keep what they promise: every reference model judged by others, and what was said by what is.

A probability is checked only on models that it was not fitted to. Here that means more than leaving out the model:
whoever knows one stamped square knows the next, so a planted model is judged by other families of attacks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from scipy.stats import beta

from molehunt.calibration import Population, Reference
from molehunt.fusion import Fused, fuse, uncovered


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A reference model, and what those that it has nothing in common with say about it.

    Attributes:
        model: the model; `model.attack` is the truth.
        said: p-values and probability; None where no defense has a score that could be compared.
    """

    model: Reference
    said: Fused | None


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Models whose probability lies in one range.

    Attributes:
        low, high: the range [low, high) in [0, 1]; the last one holds 1 too.
        count: how many models.
        mean: their mean probability, in [0, 1]; None without models.
        share: how many of them are backdoored, as a share in [0, 1]; None without models.
        least, most: exact interval (Clopper and Pearson) of that share, in [0, 1]; [0, 1] without models.
    """

    low: float
    high: float
    count: int
    mean: float | None
    share: float | None
    least: float
    most: float


KIN = (frozenset({"badnets", "tact"}), frozenset({"blended", "adap_blend"}), frozenset({"sig", "stripes"}))
"""Attack families of the bank that stamp the same kind of trigger: who has met one knows the others."""


def fitting_part(population: Population, model: Reference) -> Population:
    """Return the references that may be fitted when one model is judged.

    These are the models of other seeds, and for a planted model those of other attack families (`KIN` are one). All
    clean models of other seeds stay, for they say nothing about any attack.

    Args:
        population: the references; the model may be one of them.
        model: that is judged.
    """
    alike = next((kin for kin in KIN if model.attack in kin), frozenset({model.attack}))

    def apart(other: Reference) -> bool:
        return other.seed != model.seed and (model.attack is None or other.attack not in alike)

    return replace(population, models=tuple(filter(apart, population.models)))


def out_of_fold(population: Population, models: Sequence[Reference] | None = None, *, prior: float) -> list[Judged]:
    """Judge models with references that share neither seed nor attack family with them.

    Args:
        population: the references.
        models: those to judge, scored in the same settings; None judges the population's own.
        prior: share of backdoored models among those that are judged, in (0, 1). Their probabilities can only hold
            for a set of models that has it.

    Returns:
        One answer per model, in their order.

    Raises:
        ValueError: a prior outside (0, 1).
    """
    if not 0.0 < prior < 1.0:
        raise ValueError(f"the prior must lie strictly between 0 and 1, got {prior}")
    judged = []
    for model in population.models if models is None else models:
        part = fitting_part(population, model)
        scores = {d: s for d, s in model.scores.items() if s is not None and uncovered(d, part) is None}
        said = fuse(scores, part, prior=prior)
        judged.append(Judged(model=model, said=None if said.p_value is None else said))
    return judged


def reliability(
    p: Sequence[float], truth: Sequence[bool], bins: int | Sequence[float] = 10, *, confidence: float = 0.95
) -> tuple[Bin, ...]:
    """Compare probabilities with what came true.

    Args:
        p: (N,) probabilities in [0, 1] that something is hidden.
        truth: (N,) whether it is.
        bins: number of ranges of one width; or their edges, from 0 to 1.
        confidence: of the intervals, in (0, 1).

    Returns:
        One entry per range, from low to high, empty ones too.

    Raises:
        ValueError: another number of truths than of probabilities, a number that is no probability, or edges that do
            not rise from 0 to 1.
    """
    if len(p) != len(truth):
        raise ValueError(f"expected one truth per probability, got {len(p)} probabilities and {len(truth)} truths")
    if wrong := [value for value in p if not 0.0 <= value <= 1.0]:
        raise ValueError(f"a probability lies in [0, 1], got {wrong[0]}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"the confidence must lie strictly between 0 and 1, got {confidence}")
    if isinstance(bins, int) and bins < 1:
        raise ValueError(f"there is at least one bin, got {bins}")
    edges = [i / bins for i in range(bins + 1)] if isinstance(bins, int) else list(bins)
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"the edges of the bins must rise from 0 to 1, got {edges}")
    found = []
    for low, high in pairwise(edges):
        inside = [i for i, value in enumerate(p) if low <= value and (value < high or high == 1)]
        hits = sum(bool(truth[i]) for i in inside)
        least, most = exact_interval(hits, len(inside), confidence)
        found.append(
            Bin(
                low=low,
                high=high,
                count=len(inside),
                mean=math.fsum(p[i] for i in inside) / len(inside) if inside else None,
                share=hits / len(inside) if inside else None,
                least=least,
                most=most,
            )
        )
    return tuple(found)


def holding(population: Population, bins: int | Sequence[float] = 5) -> tuple[Bin, ...]:
    """Compare what a population's models are told out of fold with what they are.

    The prior is the share of planted models in it; models without a comparable score are left out.

    Args:
        population: clean and planted models.
        bins: as in `reliability`.

    Raises:
        ValueError: no clean or no planted model, or none could be judged.
    """
    clean, planted = len(population.clean), len(population.planted)
    if not clean or not planted:
        raise ValueError(f"reliability needs clean and planted models, got {clean} clean and {planted} planted")
    judged = [
        (a.said.p, a.model.attack is not None)
        for a in out_of_fold(population, prior=planted / (clean + planted))
        if a.said
    ]
    if not judged:
        raise ValueError(f"none of the {clean + planted} models has a score that could be compared with the others'")
    return reliability([p for p, _ in judged], [truth for _, truth in judged], bins)


def exact_interval(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of a share that covers the true one at least as often as it says, for any count.

    Args:
        hits: how many of them.
        count: of how many; 0 gives [0, 1].
        confidence: in (0, 1).

    Raises:
        ValueError: hits outside 0..count.

    Reference:
        Clopper and Pearson, "The use of confidence or fiducial limits", Biometrika 1934.
    """
    if not 0 <= hits <= count:
        raise ValueError(f"expected 0 <= hits <= count, got {hits} of {count}")
    tail = (1.0 - confidence) / 2
    least = float(beta.ppf(tail, hits, count - hits + 1)) if hits > 0 else 0.0
    most = float(beta.ppf(1.0 - tail, hits + 1, count - hits)) if hits < count else 1.0
    return least, most
