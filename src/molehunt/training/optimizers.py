"""Optimizers for a recipe: torch's SGD and AdamW, and our own orthogonalized steps for convolutions."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from molehunt.training.recipes import Recipe


class Muon(torch.optim.Optimizer):
    """Momentum steps that are orthogonalized per weight, and scaled to the weight's own size.

    The momentum of a weight, seen as a matrix of filters, is replaced by the nearest orthogonal matrix, so that all
    directions move alike. After each step the weight has the norm again that it had at the first one: what counts
    before a batch norm is the direction alone.

    Args:
        weights: tensors of at least two dimensions, the first one counts the filters.
        lr: size of a step, relative to the weight's norm.
        momentum: share of the old momentum that is kept, in [0, 1); Nesterov's form.
        stacked: the first dimension counts networks that share no number: each is stepped as if it were alone.

    Reference:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.

    Departures from the paper:
        The polynomial is evaluated on the small Gram matrix of the filters, which gives the same step for a third of
        the work; the norm of a weight is held at its first value.
    """

    def __init__(self, weights: Iterable[Tensor], *, lr: float, momentum: float, stacked: bool = False) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})
        self.stacked = stacked

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, so no loss to return
        """Make one step with the gradients at hand; a closure is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                alone = weight.unbind(0) if self.stacked else (weight,)
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                    state["norm"] = torch.stack([one.norm() for one in alone])
                momentum = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                steps = weight.grad.add(momentum, alpha=group["momentum"])
                for one, raw, norm in zip(
                    alone, steps.unbind(0) if self.stacked else (steps,), state["norm"], strict=True
                ):
                    step = orthogonalize(raw.flatten(1)).view_as(one)
                    one.sub_(step * (group["lr"] * norm / step.norm().clamp(min=1e-12)))
                    one.mul_(norm / one.norm().clamp(min=1e-12))


# A few odd polynomials a s + b s^3 + c s^5, one after the other, take singular values in (0, 1] near 1. These are the
# coefficients of the reference, made for steepness at zero: they end within about 0.3 of 1, which is enough.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 4) -> Tensor:
    """Return a matrix with the same singular vectors, all singular values brought near 1.

    Args:
        matrix: (m, n) float.
        steps: number of polynomials; small singular values need more.

    Returns:
        (m, n), float32. A zero matrix stays zero.
    """
    g = matrix.float()
    if g.shape[0] > g.shape[1]:
        tall: Tensor = orthogonalize(g.T, steps).T
        return tall
    g = g / g.norm().clamp(min=1e-12)
    # Every iterate is Q g for a polynomial Q of g g^T, and all such polynomials commute: work on Q, which is m x m.
    gram = g @ g.T
    a, b, c = _COEFFICIENTS
    eye = torch.eye(len(g), device=g.device)
    q = eye
    for _ in range(steps):
        squared = gram if q is eye else q @ gram @ q
        q = (a * eye + b * squared + c * squared @ squared) @ q
    out: Tensor = q @ g
    return out


def make_optimizers(model: nn.Module, recipe: Recipe, *, stacked: bool = False) -> list[torch.optim.Optimizer]:
    """Make the optimizers that a recipe asks for, over all parameters that take gradients.

    Weight decay is for weights of two or more dimensions only: a bias or a norm's scale has no redundant size.

    Args:
        model: what is trained.
        recipe: which optimizers, with which settings.
        stacked: the first dimension of every parameter counts networks; see `molehunt.training.stack`.

    Raises:
        ValueError: no parameter takes gradients.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model takes gradients; call model.requires_grad_(True) first")
    optimizers: list[torch.optim.Optimizer] = []
    extra = 1 if stacked else 0
    if recipe.optimizer == "muon":
        filters = [p for p in parameters if p.dim() == 4 + extra]
        if filters:
            optimizers.append(Muon(filters, lr=recipe.muon_lr, momentum=recipe.muon_momentum, stacked=stacked))
        parameters = [p for p in parameters if p.dim() != 4 + extra]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1 + extra], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1 + extra], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        return optimizers
    if recipe.optimizer == "adamw":
        # beta2 .98 and not .999: trainings here last hundreds of steps, not tens of thousands. Not fused, which would
        # be a tenth faster: with it an interrupted training of channels-last weights did not resume to the same bits.
        optimizers.append(torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.98), foreach=True))
    else:
        nesterov = recipe.momentum > 0
        optimizers.append(
            torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, foreach=True)
        )
    return optimizers
