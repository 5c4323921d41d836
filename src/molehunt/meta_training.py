"""How meta-classifiers are trained on shadow models: on clean and poisoned ones, or on clean ones alone."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.metas import Meta, active

Check = Callable[[], None]


def fit(
    meta: Meta, networks: Sequence[nn.Module], targets: Tensor, rng: torch.Generator, check: Check = lambda: None
) -> list[float]:
    """Train a meta-classifier on shadow models, in place.

    Args:
        meta: with fresh weights.
        networks: shadow models, in evaluation mode and without gradients on their weights; left as they are.
        targets: int64 (S,), the target class of a poisoned one, -1 of a clean one. Without `per_class` any other number
            from 0 stands for "poisoned" too.
        rng: draws their order.
        check: called at every step; raises to stop.

    Returns:
        Mean loss of every pass.

    Raises:
        ValueError: as many targets as networks are needed, of both kinds; a network that is not frozen.
    """
    poisoned = targets >= 0
    if len(targets) != len(networks) or not bool(poisoned.any()) or bool(poisoned.all()):
        raise ValueError(
            f"clean and poisoned shadow models are needed, one target each; got {len(networks)} models, "
            f"{len(targets)} targets, {int(poisoned.sum())} poisoned"
        )
    _frozen(networks)
    settings = meta.settings
    labels = poisoned.float()
    if settings.per_class:
        labels = F.one_hot(targets.clamp_min(0), meta.classes).float() * poisoned.unsqueeze(1)
    # As much for what is a target as for what is none, however many of either there are.
    weight = (1.0 - labels).sum() / labels.sum()
    optimizer = torch.optim.Adam(meta.learning(), lr=settings.lr)
    losses = []
    for _ in range(settings.passes):
        total = 0.0
        for rows in torch.split(torch.randperm(len(networks), generator=rng), settings.batch):
            check()
            with torch.set_grad_enabled(settings.tune):
                answers = torch.stack([meta.answers(networks[row]) for row in rows.tolist()])
            loss = F.binary_cross_entropy_with_logits(meta(answers), labels[rows], pos_weight=weight)
            _step(meta, optimizer, loss)
            total += float(loss.detach()) * len(rows)
        losses.append(total / len(networks))
    return losses


NU = 0.1
"""Share of clean shadow models that the one-class variant may leave outside."""


def fit_one_class(
    meta: Meta, networks: Sequence[nn.Module], rng: torch.Generator, check: Check = lambda: None
) -> list[float]:
    """Train on clean shadow models alone: they should score low, and whatever answers otherwise higher.

    A one-class support vector machine on the hidden units, without a bias behind them: half the squared norms of both
    layers, plus what falls short of a margin r, the tenth percentile of what was seen so far. The sign is turned at the
    end, so that scores are higher for what is unlike the shadows. It looks to one side alone: what answers like the
    shadows, only more so, scores low. With log-softmax, whose numbers are all negative, that is what it learns; use
    another kind of features.

    Raises:
        ValueError: no networks, or one that is not frozen; `per_class`, which needs targets.
    """
    if not len(networks) or meta.settings.per_class:
        raise ValueError("the one-class variant needs clean shadow models, and has no score per class")
    _frozen(networks)
    with torch.no_grad():
        meta.head.bias.zero_()
    # A bias would rise with the margin for ever, and say nothing of any model.
    meta.head.bias.requires_grad_(False)
    optimizer = torch.optim.Adam(meta.learning(), lr=meta.settings.lr)
    losses, margin = [], 0.0
    seen: list[float] = []
    for _ in range(meta.settings.passes):
        total = 0.0
        for row in torch.randperm(len(networks), generator=rng).tolist():
            check()
            with torch.set_grad_enabled(meta.settings.tune):
                answers = meta.answers(networks[row])
            score = meta(answers.unsqueeze(0))[0]
            seen.append(float(score.detach()))
            size = 0.5 * (meta.head.weight.square().sum() + meta.hidden.weight.square().sum())
            loss = size + (margin - score).relu() / NU - margin
            _step(meta, optimizer, loss)
            total += float(loss.detach())
            margin = float(torch.tensor(seen).quantile(NU))
        losses.append(total / len(networks))
    with torch.no_grad():
        meta.head.weight.neg_()
    return losses


def _step(meta: Meta, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimizer.step()
    if meta.settings.clip:
        with torch.no_grad():
            meta.queries.clamp_(0.0, 1.0)


def _frozen(networks: Sequence[nn.Module]) -> None:
    for index, network in enumerate(networks):
        if active(network) or any(p.requires_grad for p in network.parameters()):
            raise ValueError(f"shadow model {index} is not frozen: evaluation mode, and no gradients on its weights")
