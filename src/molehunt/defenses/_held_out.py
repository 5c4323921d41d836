"""Clean images that a repair trains on, and those held out to say what it costs."""

import torch
from torch import Tensor

from molehunt.tasks import Images

HAIR = 1e-9
"""Slack of a comparison of shares: 0.9 - 0.04 must allow an accuracy of 0.86."""


def split(clean: Images, held_out: float, rng: torch.Generator) -> tuple[Images, Images]:
    """Images to tune on, and a share of them held out to measure accuracy; disjoint by index, neither is empty."""
    size = min(len(clean.y) - 1, max(1, round(held_out * len(clean.y))))
    order = torch.randperm(len(clean.y), generator=rng).to(clean.y.device)
    held, rest = order[:size], order[size:]
    return Images(clean.x[rest], clean.y[rest]), Images(clean.x[held], clean.y[held])


def turns(y: Tensor) -> Tensor:
    """How many images of the same class stand before each: int64 (N,), so that sorting by it takes classes in turns.

    Args:
        y: classes (N,), on the CPU.
    """
    turn = torch.zeros(len(y), dtype=torch.int64)
    for label in torch.unique(y):
        mine = (y == label).nonzero().flatten()
        turn[mine] = torch.arange(len(mine))
    return turn
