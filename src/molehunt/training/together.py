"""Train several networks of one architecture in the same steps, each on its own data."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.networks import Network, default_device, fast_dtype
from molehunt.tasks import Images
from molehunt.training.adversarial import random_start, worsen
from molehunt.training.batches import Batches, Stamp
from molehunt.training.optimizers import make_optimizers
from molehunt.training.recipes import Recipe
from molehunt.training.stack import Stack
from molehunt.training.trainer import Trained, noise_generator


def train_together(
    networks: Sequence[Network],
    images: Sequence[Images],
    recipe: Recipe,
    *,
    rngs: Sequence[torch.Generator],
    stamps: Sequence[Stamp | None] | None = None,
    report: Callable[[int, int], None] | None = None,
    check: Callable[[], None] | None = None,
    device: torch.device | str | None = None,
) -> list[Trained]:
    """Train S networks in place, as S calls of `train` with the same arguments would, up to rounding.

    Every network has its own weights, images, order, augmentation, stamp and generator, and sees the very batches that
    `train` would show it; no number of one reaches another. They make the same number of steps of the same size, so
    their training sets must ask for equally many.

    Args:
        networks: S networks of one architecture.
        images: S training sets: x (N, C, H, W) in [0, 1] and labels (N,). Sets may share memory.
        recipe: how to train, the same for all.
        rngs: S generators on the CPU, each the only source of chance of its network.
        stamps: S stamps or None for none; what each puts on its batches after augmentation.
        report: called with (images done, images in all) of the whole block, at most ten times a second.
        check: called before every step; raises to stop.
        device: where to train; a GPU when there is one, else the CPU.

    Returns:
        S results in order; seconds are an equal share of the block's.

    Raises:
        ValueError: lists of different lengths, an empty set, or sets that ask for different numbers of steps.
        TypeError: a layer that cannot be stacked.
        FloatingPointError: the loss of a network is not finite; it is named by its position.
    """
    stamps = stamps or [None] * len(networks)
    lengths = {"networks": len(networks), "images": len(images), "rngs": len(rngs), "stamps": len(stamps)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"expected as many of each, got {lengths}")
    plans = {(recipe.steps(len(one.y)), min(recipe.batch, len(one.y))) for one in images if len(one.y)}
    if len(plans) != 1 or any(len(one.y) == 0 or len(one.x) != len(one.y) for one in images):
        sizes = [len(one.y) for one in images]
        raise ValueError(f"expected training sets that ask for equally many steps, got sets of {sizes} images")
    ((steps, batch),) = plans
    place = torch.device(device or default_device())
    dtype = fast_dtype(place) if recipe.precision == "fast" else torch.float32
    moved = _on(place, images)
    for network, own in zip(networks, moved, strict=True):
        network.train()
        if recipe.initialize:
            network.initialize(own.x)
    stack = Stack(networks).to(place).train()
    optimizers = make_optimizers(stack, recipe, stacked=True)
    highest = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    batches = [Batches(own, recipe, rng, stamp) for own, rng, stamp in zip(moved, rngs, stamps, strict=True)]
    stack.rngs = tuple(noise_generator(rng, place) for rng in rngs)
    sums, counts = torch.zeros(0, len(networks), device=place), torch.zeros(0)
    cast = torch.autocast(place.type, dtype=dtype) if dtype != torch.float32 else nullcontext()

    def losses_of(labels: Tensor, pictures: Tensor) -> Tensor:
        with cast:
            logits = stack(pictures).float().transpose(1, 2)
        return F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction="none").mean(1)

    def total(labels: Tensor, pictures: Tensor) -> Tensor:
        return losses_of(labels, pictures).sum()

    start = time.perf_counter()
    told = time.monotonic()
    for step in range(steps):
        if check:
            check()
        factor = recipe.rate(step, steps)
        for optimizer, rates in zip(optimizers, highest, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        pairs = [each.next() for each in batches]
        x, y = torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
        if recipe.adversarial:
            starts = [random_start(own, recipe.adversarial, rng) for own, rng in zip(x, rngs, strict=True)]
            x = worsen(partial(total, y), torch.stack(starts), x, recipe.adversarial)
        losses = losses_of(y, x)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        # The sum: the gradient of every network's own mean loss, untouched by the others.
        losses.sum().backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        # The first set decides where a pass begins: one row of losses per pass.
        if batches[0].passes > len(counts):
            if len(counts):
                _refuse_divergence(sums[-1], step, recipe)
            sums, counts = F.pad(sums, (0, 0, 0, 1)), F.pad(counts, (0, 1))
        sums[-1] += losses.detach()
        counts[-1] += 1
        now = time.monotonic()
        if report and now - told >= 0.1 and step + 1 < steps:
            told = now
            report((step + 1) * batch * len(networks), steps * batch * len(networks))
    _refuse_divergence(sums[-1], steps, recipe)
    seconds = time.perf_counter() - start
    if report:
        report(steps * batch * len(networks), steps * batch * len(networks))
    stack.unstack(networks)
    trained = []
    for network, losses in zip(networks, (sums.cpu() / counts.unsqueeze(1)).T, strict=True):
        trained.append(
            Trained(
                model=network.eval(),
                seconds=seconds / len(networks),
                steps=steps,
                images=steps * batch,
                losses=tuple(losses.tolist()),
                device=str(place),
                dtype=str(dtype).removeprefix("torch."),
            )
        )
    return trained


def _on(place: torch.device, images: Sequence[Images]) -> list[Images]:
    """Move sets to a device; pictures that several sets share are moved once."""
    shared: dict[int, Tensor] = {}
    return [Images(shared.setdefault(id(one.x), one.x.to(place)), one.y.to(place)) for one in images]


def _refuse_divergence(totals: Tensor, step: int, recipe: Recipe) -> None:
    if not bool(torch.isfinite(totals).all()):
        bad = (~torch.isfinite(totals)).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"the loss of networks {bad} is not finite before step {step}; lower the learning rate ({recipe.lr})"
        )
