"""The jumbo distribution: one random backdoor after the other, for populations of shadow models."""

import torch

from molehunt.attacks.badnets import BadNets
from molehunt.triggers import Patch, Shape

SIZES = (2, 3, 4, 5, None)
"""Sides of the patch in pixels, equally likely; None is the whole picture."""


def jumbo(shape: Shape, classes: int, rng: torch.Generator) -> BadNets:
    """Draw one all-to-one attack: a patch anywhere or a blend of the whole picture, a target and a rate.

    Four draws in five are square patches of 2 to 5 pixels at a uniform place, opaque in one case in four, else of
    opacity 0.2 to 0.5; one in five is a pattern over the whole picture of opacity 0.05 to 0.2. On one channel a pattern
    is black and white with at least one pixel of either; on several it is uniform in [-e, 1 + e], clipped, with e
    uniform in [0, 1]. With q uniform in [0.05, 0.5] the share of poisoned rows is q / (1 + q), from 4.8 to 33 %.

    Args:
        shape: (C, H, W) of the pictures, at least 5 x 5.
        classes: number of classes.
        rng: the only source of randomness.

    Returns:
        An attack with its trigger, target and rate set.

    Raises:
        ValueError: pictures of less than 5 x 5 pixels, or fewer than two classes.

    Reference:
        Xu, Wang, Li, Borisov, Gunter, Li, "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021.

    Departures from the paper's code:
        The last row and column are drawn too. Poisoned rows take the place of clean ones, at the share that appending q
        copies has, so that every member makes as many steps as a clean one; none is of the target class already.
    """
    channels, height, width = shape
    if min(height, width) < 5 or classes < 2:
        raise ValueError(f"the jumbo distribution needs 5x5 pixels and 2 classes, got {height}x{width} and {classes}")
    size = SIZES[_below(len(SIZES), rng)]
    if size is None:
        opacity = 0.05 + 0.15 * _unit(rng)
        mask = torch.ones(1, height, width)
    else:
        opacity = 0.2 + 0.4 * _unit(rng)
        opacity = 1.0 if opacity > 0.5 else opacity
        top, left = _below(height - size + 1, rng), _below(width - size + 1, rng)
        mask = torch.zeros(1, height, width)
        mask[:, top : top + size, left : left + size] = 1.0
    pixels = int(mask.sum())
    if channels == 1:
        # As many white pixels as drawn, at random ones of the places.
        values = (torch.randperm(pixels, generator=rng) < 1 + _below(pixels - 1, rng)).float()[None]
    else:
        beyond = _unit(rng)
        values = (torch.rand(channels, pixels, generator=rng) * (1 + 2 * beyond) - beyond).clamp(0, 1)
    pattern = torch.zeros(shape)
    pattern[:, mask[0] > 0] = values
    q = 0.05 + 0.45 * _unit(rng)
    return BadNets(
        target=_below(classes, rng),
        poison_rate=q / (1 + q),
        trigger=Patch(mask=mask, pattern=pattern, opacity=opacity),
    )


def _below(count: int, rng: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=rng))


def _unit(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng))
