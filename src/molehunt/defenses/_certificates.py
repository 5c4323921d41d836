"""What smoothed votes certify: bounds of probabilities, radii, and what each statement is about.

Noise is added to the features of the training samples. Every statement here is about changed features of training
samples, at given labels; none covers labels, nor samples that were added or removed. `partition_flips` does, and is
about another kind of ensemble.
"""

import math

from scipy import special
from torch import Tensor


def clopper_pearson(count: int, votes: int, alpha: float) -> float:
    """Lower bound in [0, 1] of a class's probability by its share of hard votes, wrong with a chance of at most alpha.

    Args:
        count: votes for the class.
        votes: N, all votes, 1 or more.
        alpha: in (0, 1).

    Raises:
        ValueError: counts that cannot be, or alpha out of range.

    Reference:
        Clopper, Pearson, "The use of confidence or fiducial limits", Biometrika 1934.
    """
    _check(count, votes, alpha)
    # The beta quantile; no vote at all is no evidence.
    return float(special.betaincinv(count, votes - count + 1, alpha)) if count else 0.0


def hoeffding(mean: float, votes: int, alpha: float) -> float:
    """The same bound for a mean of soft scores in [0, 1]; looser for hard votes.

    Raises:
        ValueError: a mean outside [0, 1], no votes, or alpha out of range.
    """
    if not 0.0 <= mean <= 1.0:
        raise ValueError(f"a mean of scores lies in [0, 1], got {mean}")
    _check(0, votes, alpha)
    return max(0.0, mean - math.sqrt(math.log(1.0 / alpha) / (2.0 * votes)))


def gaussian_radius(low: float, high: float, sigma: float) -> float:
    """R: no change of training features of a total l2 norm below R changes the vote.

    The total norm of changes d_1, ..., d_n of the samples is sqrt(sum of ||d_i||^2), in the unit of sigma.

    Args:
        low: p_A, lower bound of the winner's probability, in [0, 1].
        high: p_B, upper bound of every other class's, in [0, 1].
        sigma: standard deviation of the noise, above 0.

    Returns:
        sigma / 2 (quantile(p_A) - quantile(p_B)) of the normal distribution; 0, which certifies nothing, where
        p_A <= p_B.

    Raises:
        ValueError: a probability outside [0, 1], one that is certain (p_A of 1 or p_B of 0, which would certify any
            change and which no finite evidence gives), or sigma not above 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    _check_bounds(low, high)
    if low <= high:
        return 0.0
    if low == 1.0 or high == 0.0:
        raise ValueError(f"nothing is certain: a lower bound is below 1 and an upper one above 0, got {low} and {high}")
    return sigma / 2.0 * float(special.ndtri(low) - special.ndtri(high))


def shared_radius(radius: float, samples: int) -> float:
    """The norm below which one and the same pattern on so many training samples is certified: R / sqrt(r).

    The share of poisoned samples matters through their number only: at an equal share, more data is harder.

    Raises:
        ValueError: less than one sample.
    """
    if samples < 1:
        raise ValueError(f"a pattern lies on 1 sample or more, got {samples}")
    return radius / math.sqrt(samples)


def uniform_holds(low: float, high: float, changes: Tensor, width: float) -> bool:
    """Whether changes of training features are certified under uniform noise.

    Args:
        low: p_A, as in `gaussian_radius`.
        high: p_B.
        changes: (r, d), or any shape, of all values that change, in the unit of the width.
        width: b - a of the noise U[a, b], above 0.

    Returns:
        1 - (p_A - p_B) / 2 < product over all values of (1 - |change| / width), negative factors counting as 0.

    Raises:
        ValueError: a probability outside [0, 1], or a width not above 0.
    """
    if not width > 0:
        raise ValueError(f"the width of the noise must be above 0, got {width}")
    _check_bounds(low, high)
    overlap = float((1.0 - changes.double().abs() / width).clamp_min(0.0).prod())
    return 1.0 - (low - high) / 2.0 < overlap


def partition_flips(counts: Tensor, winner: int | None = None) -> int:
    """How many training samples may be added, removed or relabeled without changing a partition vote.

    Every sample lies in one part, chosen by its pixels alone and not by its label, and every part trained one model:
    one sample more, less, or with another label changes at most one vote. A picture whose pixels change leaves one part
    and may enter another, which is two. Ties go to the smaller class.

    Args:
        counts: int64 (K,), votes by class.
        winner: the class in question; the vote's own by default.

    Returns:
        0 or more; -1 where `winner` does not win.

    Reference:
        Levine, Feizi, "Deep Partition Aggregation: Provable Defenses against General Poisoning Attacks", ICLR 2021.
    """
    best = int(counts.argmax()) if winner is None else winner
    # A smaller class needs one vote less to take over.
    ahead = [
        int(counts[best]) - int(counts[other]) - (1 if other < best else 0)
        for other in range(len(counts))
        if other != best
    ]
    least = min(ahead, default=2 * int(counts[best]))
    return -1 if least < 0 else least // 2


def _check_bounds(low: float, high: float) -> None:
    for name, value in (("low", low), ("high", high)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is a probability in [0, 1], got {value}")


def _check(count: int, votes: int, alpha: float) -> None:
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    if votes < 1 or not 0 <= count <= votes:
        raise ValueError(f"of 1 vote or more, from none to all go to a class; got {count} of {votes}")


def certified(radii: Tensor, right: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Curves over radii rho: the certified rate, mean of [R > rho], and the certified accuracy, of [R > rho and right].

    Args:
        radii: (n,) R of each input; 0 or less where the vote abstained.
        right: bool (n,), whether the vote was right.
        at: (m,) rho, 0 or more.

    Returns:
        Two float64 (m,).
    """
    beyond = radii.unsqueeze(1) > at
    return beyond.double().mean(0), (beyond & right.unsqueeze(1)).double().mean(0)
