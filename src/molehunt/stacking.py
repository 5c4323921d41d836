"""Stacking: what the scores of all defenses together are worth, learned from clean and backdoored reference models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import norm

from molehunt.conformal import shift

Rows = Sequence[Sequence[float]]
Matrix = NDArray[np.float64]

FAMILIES = 3
"""So many families of backdoored references are needed: of fewer it would be learned what those look like."""
CLEAN = 19
"""And so many clean ones: fewer tell no score from an ordinary one."""
RIDGE = 30.0
"""Penalty of the weights of single defenses, per squared unit, beside a mean log-loss times the number of models."""
SURE = 0.01
"""No probability is nearer to 0 or 1 than this, nor than 1 / (N + 2) for N references: log-loss punishes certainty."""
_LARGEST = 3.0
_SLIGHT = 1e-3  # penalty of the joint evidence: enough to keep its weight finite where references part perfectly


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A fitted combination of some defenses.

    Attributes:
        intercept: log-odds of a model that no defense finds remarkable, at even prior odds.
        joint: weight of the joint evidence, at least 0.
        weights: of the single defenses, in the order of the columns, each at least 0.
        models: how many references it was fitted to.
    """

    intercept: float
    joint: float
    weights: tuple[float, ...]
    models: int


def enough(clean: Rows, planted: Mapping[str, Rows]) -> bool:
    """Whether there are references enough to learn weights from."""
    return len(clean) >= CLEAN and sum(len(rows) > 0 for rows in planted.values()) >= FAMILIES


def fit(clean: Rows, planted: Mapping[str, Rows]) -> Stack:
    """Fit a logistic regression with weights that are not negative to what ranks say about the references.

    Every score is turned into its conformal p-value p_d among the clean references, those of a clean reference among
    the others. A model's evidence is z_d = max(0, quantile of 1 - p_d of the normal distribution), at most 3, by
    defense, and the joint evidence log(mean of 1 / p_d), the logarithm of one over the harmonic mean. Weights of single
    defenses are held near 0 by a ridge penalty (`RIDGE`); that of the joint evidence is free. So what counts is above
    all that *some* defense finds the model remarkable, and a little which: an attack that nobody planted here shows in
    one defense, and nobody knows in which.

    Clean references weigh as much as all backdoored ones together, and every family of attacks as much as any other,
    however many models it has.

    Args:
        clean: scores of the clean references, one row each, higher is more suspicious.
        planted: by family, scores of the backdoored ones, in the same columns.

    Raises:
        ValueError: too few references (`enough`), or rows of different lengths.

    Departures from the field's usual stacking:
        Ranks below the median count as 0 instead of as evidence for a clean model: they are noise, and on the bank's
        mnist5k references log-loss out of fold is lower without them. The penalty is fixed, since with six families
        its choice by cross-validation over families is no better than a coin.
    """
    if not enough(clean, planted):
        raise ValueError(
            f"stacking needs {CLEAN} clean references and {FAMILIES} families of backdoored ones, got {len(clean)} and "
            f"{sum(len(rows) > 0 for rows in planted.values())}"
        )
    honest = np.asarray(clean, dtype=np.float64)
    families = [np.asarray(rows, dtype=np.float64) for rows in planted.values() if len(rows) > 0]
    if any(rows.ndim != 2 or rows.shape[1] != honest.shape[1] for rows in families):
        raise ValueError(f"expected rows of {honest.shape[1]} scores")
    # A reference is not compared with itself: its rank among the others is what the rank of a suspect is like.
    evidence = np.concatenate([_evidence(_p(honest, honest, own=True)), *(_evidence(_p(f, honest)) for f in families)])
    truth = np.concatenate([np.zeros(len(honest)), *(np.ones(len(f)) for f in families)])
    shares = [np.full(len(honest), 0.5 / len(honest))]
    shares += [np.full(len(f), 0.5 / len(families) / len(f)) for f in families]
    share = np.concatenate(shares) * len(truth)
    penalty = np.full(evidence.shape[1], RIDGE)
    penalty[0] = _SLIGHT

    def loss(values: Matrix) -> tuple[float, Matrix]:
        weights, signs = values[1:], np.where(truth > 0, 1.0, -1.0)
        margin = signs * (evidence @ weights + values[0])
        slope = -signs * expit(-margin) * share
        total = float((share * np.logaddexp(0.0, -margin)).sum() + 0.5 * (penalty * weights**2).sum())
        return total, np.concatenate([[slope.sum()], evidence.T @ slope + penalty * weights])

    width = evidence.shape[1]
    found = minimize(
        loss, np.zeros(width + 1), jac=True, method="L-BFGS-B", bounds=[(None, None), *[(0.0, None)] * width]
    )
    intercept, joint, *weights = found.x.tolist()
    return Stack(intercept=intercept, joint=joint, weights=tuple(weights), models=len(truth))


def probability(stack: Stack, p_values: Sequence[float], *, prior: float = 0.5) -> float:
    """Probability that a model is backdoored, given its conformal p-values among the clean references.

    Args:
        stack: fitted to references with these defenses.
        p_values: one per column, each in (0, 1].
        prior: share of backdoored models among those that are asked about, in (0, 1).

    Raises:
        ValueError: another number of p-values, or a prior outside (0, 1).
    """
    odds = stack.intercept + sum(contributions(stack, p_values))
    least = max(SURE, 1.0 / (stack.models + 2))
    # Cut before the prior is applied too: the shift needs a number that is no 0 or 1 after rounding.
    even = min(1.0 - 1e-12, max(1e-12, float(expit(odds))))
    return min(1.0 - least, max(least, shift(even, old=0.5, new=prior)))


def standing(stack: Stack, clean: Rows, planted: Mapping[str, Rows]) -> tuple[list[float], dict[str, list[float]]]:
    """Log-odds of the references themselves: of the clean ones, and by family of the backdoored ones.

    Every model is ranked among the clean ones, a clean one among the others. The few weights were fitted to the same
    models, which flatters a little.

    Args:
        stack: fitted to them.
        clean: scores of the clean references, as in `fit`.
        planted: by family, scores of the backdoored ones.
    """
    honest = np.asarray(clean, dtype=np.float64)

    def odds(p: Matrix) -> list[float]:
        found: Matrix = stack.intercept + _evidence(p) @ np.array([stack.joint, *stack.weights])
        return [float(value) for value in found]

    families = {name: np.asarray(rows, dtype=np.float64) for name, rows in planted.items() if len(rows) > 0}
    return odds(_p(honest, honest, own=True)), {name: odds(_p(rows, honest)) for name, rows in families.items()}


def contributions(stack: Stack, p_values: Sequence[float]) -> list[float]:
    """By how much each defense raises the log-odds, at least 0; they and the intercept sum to the log-odds.

    A defense's share of the joint evidence is that of its 1 / p in the sum of all.

    Raises:
        ValueError: another number of p-values than the stack has defenses.
    """
    if len(p_values) != len(stack.weights):
        raise ValueError(f"expected {len(stack.weights)} p-values, got {len(p_values)}")
    p = np.asarray([p_values], dtype=np.float64)
    joint, *single = _evidence(p)[0].tolist()
    shares = (1.0 / p[0] / (1.0 / p[0]).sum()).tolist()
    return [stack.joint * joint * s + w * z for s, w, z in zip(shares, stack.weights, single, strict=True)]


def _p(scores: Matrix, clean: Matrix, *, own: bool = False) -> Matrix:
    """Conformal p-values (N, D) of scores (N, D) among the clean references (n, D); `own` says that they are those."""
    above = (clean[None] >= scores[:, None]).sum(1)
    p: Matrix = above / len(clean) if own else (1 + above) / (len(clean) + 1)
    return p


def _evidence(p: Matrix) -> Matrix:
    """Joint evidence and that of every defense, (N, 1 + D), from p-values (N, D)."""
    joint: Matrix = np.log((1.0 / p).mean(1, keepdims=True))
    single: Matrix = np.clip(norm.isf(p), 0.0, _LARGEST)
    return np.concatenate([joint, single], axis=1)
