"""The privacy that noisy, clipped gradients give, counted by Opacus where that is installed."""

import importlib
import math
import warnings

ADVICE = "the accountant of Opacus is not installed: pip install 'molehunt[dp]'"


def epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    """Return an upper bound of epsilon for the subsampled Gaussian mechanism, over all steps together.

    It holds for Poisson sampling, where each sample enters each batch on its own, and neighbors that differ by one
    sample. What else was computed from the data is not in it.

    Args:
        sigma: noise multiplier: standard deviation of the noise on the sum of gradients over the clip norm; positive.
        rate: probability that a sample enters a batch, in (0, 1].
        steps: number of steps.
        delta: in (0, 1).

    Raises:
        ValueError: a value out of range.
        ImportError: Opacus is not installed.

    Reference:
        Mironov, Talwar, Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism", 2019.
    """
    if not (sigma > 0 and 0 < rate <= 1 and steps >= 0 and 0 < delta < 1):
        raise ValueError(
            "expected sigma > 0, rate in (0, 1], steps >= 0 and delta in (0, 1), "
            f"got {sigma}, {rate}, {steps} and {delta}"
        )
    try:
        rdp = importlib.import_module("opacus.accountants.analysis.rdp")
    except ImportError as error:
        raise ImportError(ADVICE) from error
    if steps == 0:
        return 0.0
    orders = [1 + k / 10 for k in range(1, 100)] + list(range(11, 65)) + [128, 256, 512]
    with warnings.catch_warnings():
        # The best order may be the first or the last one; the bound holds nevertheless.
        warnings.simplefilter("ignore", UserWarning)
        spent = rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=steps, orders=orders)
        found, _ = rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)
    # Below zero the conversion says no more than that nothing is lost.
    return max(0.0, float(found)) if math.isfinite(float(found)) else math.inf
