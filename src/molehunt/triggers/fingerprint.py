"""Numbers that look random and follow from what is in a picture, so that the same picture always gets the same ones."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

PRIME = 1_048_573  # the largest below 2^20
BATCH = 256  # pictures at once: few enough to stay in the cache as float64


def draws(x: Tensor, count: int) -> Tensor:
    """Draw numbers for each picture from its content alone, at 8 bits per value.

    A weighted sum of the values modulo a prime. All terms are whole and all sums below 2^53, so that float64 holds
    them exactly: no batch size, thread count or device changes a result.

    Args:
        x: (N, C, H, W) in [0, 1].
        count: numbers per picture, k.

    Returns:
        float64 (N, k) in [0, 1). Pictures that differ in any value get unrelated numbers.
    """
    weights = _weights(math.prod(x.shape[1:]), count).to(x.device)
    parts = torch.split(x.detach().flatten(1), BATCH)
    sums = [(part.to(torch.float64) * 255).round_() @ weights for part in parts]
    return torch.cat(sums).remainder_(PRIME) / PRIME


@functools.lru_cache(maxsize=8)
def _weights(length: int, count: int) -> Tensor:
    """Whole numbers (length, count), as float64, from a mixing function: the same on every machine and version."""
    bits = min(24, 44 - max(1, length).bit_length())  # 255 takes 8 bits of the 53
    index = np.arange(1, length * count + 1, dtype=np.uint64)
    # The finalizer of SplitMix64; unsigned arrays wrap around in silence, as it needs.
    mixed = index * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    kept = (mixed >> np.uint64(64 - bits)).astype(np.float64)
    return torch.from_numpy(kept.reshape(length, count))
