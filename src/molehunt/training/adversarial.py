"""Fast adversarial training: one signed gradient step from a random start, inside the training loop."""

from collections.abc import Callable

import torch
from torch import Tensor


def random_start(x: Tensor, size: float, rng: torch.Generator) -> Tensor:
    """Return x moved by uniform noise in [-size, size], within [0, 1]; same shape and layout.

    Args:
        x: images in [0, 1].
        size: bound of the change of any value.
        rng: on the CPU.
    """
    noise = torch.empty(x.shape).uniform_(-size, size, generator=rng).to(x.device)
    return (x + noise).clamp_(0.0, 1.0).contiguous(memory_format=torch.channels_last)


def worsen(loss: Callable[[Tensor], Tensor], start: Tensor, x: Tensor, size: float) -> Tensor:
    """Return images within `size` of x on which the loss is higher than at the start, to first order.

    Args:
        loss: one number for images of the shape of x; its scale does not matter.
        start: where the step begins, within `size` of x.
        x: images in [0, 1].
        size: bound of the change of any value; the step is 1.25 times as long and is cut there.

    Returns:
        Images in [0, 1], without gradient.

    Reference:
        Wong, Rice, Kolter, "Fast is better than free: Revisiting adversarial training", ICLR 2020.
    """
    probe = start.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(probe), probe)
    moved = start + 1.25 * size * slope.sign()
    return torch.minimum(torch.maximum(moved, x - size), x + size).clamp_(0.0, 1.0).detach()
