"""The one training loop: for attacks, for reference models and for repairs."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.networks import Network, default_device, dropout_rng, fast_dtype
from molehunt.tasks import Images
from molehunt.training import state
from molehunt.training.adversarial import random_start, worsen
from molehunt.training.batches import Batches, Stamp
from molehunt.training.objective import Objective
from molehunt.training.optimizers import make_optimizers
from molehunt.training.recipes import Recipe


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What a training did.

    Attributes:
        model: the model that was given, trained, in eval mode.
        seconds: wall-clock time in the loop, without reading data; those before an interruption are included.
        steps: number of optimizer steps.
        images: number of images seen, repeats counted.
        losses: mean training loss of every pass over the data (the last may be a part of one).
        device: where it ran.
        dtype: number format of the matrix work.
    """

    model: nn.Module
    seconds: float
    steps: int
    images: int
    losses: tuple[float, ...]
    device: str
    dtype: str


def train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    rng: torch.Generator,
    stamp: Stamp | None = None,
    report: Callable[[int, int], None] | None = None,
    checkpoint: Path | None = None,
    check: Callable[[], None] | None = None,
    device: torch.device | str | None = None,
    save_seconds: float = 30.0,
    objective: Objective | None = None,
) -> Trained:
    """Train a model in place.

    Only parameters with `requires_grad` are trained; hooks on the model are left alone and run in every step. On a
    CPU the same arguments and thread count give the same weights, also when the training was interrupted and resumed;
    on a GPU they differ by its rounding.

    Args:
        model: any classifier of images in [0, 1]. A `Network` sets its data-dependent layers first if the recipe
            says so. It is handed back on the device that it was on, in eval mode.
        images: x (N, C, H, W) in [0, 1] and labels (N,); one tensor in memory, never changed.
        recipe: how to train.
        rng: on the CPU; draws order, augmentation and dropout.
        stamp: puts the trigger on the images of a batch after augmentation, given their row numbers.
        report: called with (images done, images in all), at most ten times per second and once at the end.
        checkpoint: file that holds the state of the training. If it exists the training goes on from it; a
            finished training is read from it. The generator then continues where it was.
        check: called before every step; raises to stop. The state is saved first.
        device: where to train; a GPU when there is one, else the CPU.
        save_seconds: time between two savings of the state.
        objective: what is minimized in place of the cross-entropy; its parameters are trained beside the model's.

    Returns:
        The model and what was done.

    Raises:
        ValueError: no images, labels of another number than images, nothing to train, a checkpoint of another
            training, or an objective beside a recipe with adversarial pictures.
        FloatingPointError: the loss is not finite.
    """
    if len(images.x) == 0 or len(images.x) != len(images.y):
        raise ValueError(f"expected images and as many labels, got {len(images.x)} and {len(images.y)}")
    if objective is not None and recipe.adversarial:
        raise ValueError(f"an objective says itself what is minimized, got one beside adversarial {recipe.adversarial}")
    place = torch.device(device or default_device())
    home = next(model.parameters()).device
    dtype = fast_dtype(place) if recipe.precision == "fast" else torch.float32
    x = images.x.to(place)
    model.to(place, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # torch's stub lacks the pair
    if recipe.initialize and isinstance(model, Network):
        model.initialize(x)
    # What is trained and kept on disk: the objective may have weights and counters of its own.
    whole = model if objective is None else nn.ModuleList([model, objective.to(place).train()])
    batch = min(recipe.batch, len(x))
    steps = recipe.steps(len(x))
    optimizers = make_optimizers(whole, recipe)
    highest = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    batches = Batches(Images(x, images.y.to(place)), recipe, rng, stamp)
    noise = noise_generator(rng, place)
    sums, counts, first, spent = torch.zeros(0, device=place), torch.zeros(0), 0, 0.0

    fingerprint = _fingerprint(whole, images, recipe, stamp is not None, dtype, objective) if checkpoint else ""
    if checkpoint and (found := state.load(checkpoint, fingerprint, whole, optimizers)):
        tensors, numbers = found
        batches.restore(tensors, numbers)
        sums, counts = tensors["sums"].to(place), tensors["counts"]
        first, spent = numbers["step"], numbers["seconds"]
        rng.set_state(tensors["rng"])
        if noise is not rng:
            noise.set_state(tensors["noise"])

    start = time.perf_counter() - spent
    saved = told = time.monotonic()

    def save(step: int) -> None:
        if checkpoint:
            tensors, numbers = batches.state()
            tensors |= {"sums": sums, "counts": counts, "rng": rng.get_state(), "noise": noise.get_state()}
            stood = {**numbers, "step": step, "seconds": time.perf_counter() - start}
            state.save(checkpoint, fingerprint, whole, optimizers, tensors, stood)

    def loss_of(labels: Tensor, pictures: Tensor) -> Tensor:
        with cast:
            logits = model(pictures)
        return F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)

    cast = torch.autocast(place.type, dtype=dtype) if dtype != torch.float32 else nullcontext()
    with dropout_rng(whole, noise):
        for step in range(first, steps):
            if check:
                try:
                    check()
                except BaseException:
                    save(step)
                    raise
            factor = recipe.rate(step, steps)
            for optimizer, rates in zip(optimizers, highest, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            picked, labels, rows = batches.picked()
            if recipe.adversarial:
                start_at = random_start(picked, recipe.adversarial, rng)
                picked = worsen(partial(loss_of, labels), start_at, picked, recipe.adversarial)
            if objective is None:
                loss = loss_of(labels, picked)
            else:
                with cast:
                    loss = objective(model, picked, labels, rows)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
            if batches.passes > len(counts):
                # One number per pass, on the device: reading the loss at every step would make a GPU wait.
                if len(counts):
                    _refuse_divergence(sums[-1], step, recipe)
                sums, counts = F.pad(sums, (0, 1)), F.pad(counts, (0, 1))
            sums[-1] += loss.detach()
            counts[-1] += 1
            now = time.monotonic()
            if report and now - told >= 0.1 and step + 1 < steps:
                told = now
                report((step + 1) * batch, steps * batch)
            if checkpoint and now - saved >= save_seconds and step + 1 < steps:
                save(step + 1)
                saved = time.monotonic()
    _refuse_divergence(sums[-1], steps, recipe)
    seconds = time.perf_counter() - start if first < steps else spent
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    if first < steps:
        save(steps)
    if report:
        report(steps * batch, steps * batch)
    whole.to(home, memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]  # as above
    losses = tuple((sums.cpu() / counts).tolist())
    return Trained(
        model=model,
        seconds=seconds,
        steps=steps,
        images=steps * batch,
        losses=losses,
        device=str(place),
        dtype=str(dtype).removeprefix("torch."),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, *, batch: int = 500) -> float:
    """Return the share of images that a model classifies right, in [0, 1]; the model is left in its mode.

    Args:
        model: any classifier of images in [0, 1]; it runs where its weights are.
        images: at least one image.
        batch: images per forward pass.

    Raises:
        ValueError: there are no images.
    """
    if len(images.y) == 0:
        raise ValueError("the accuracy over no images is undefined")
    training = model.training
    place = next(model.parameters()).device
    model.eval()
    right = 0
    try:
        for start in range(0, len(images.y), batch):
            x = images.x[start : start + batch].to(place, memory_format=torch.channels_last)
            y = images.y[start : start + batch].to(place)
            right += int((model(x).argmax(1) == y).sum())
    finally:
        model.train(training)
    return right / len(images.y)


def _refuse_divergence(total: Tensor, step: int, recipe: Recipe) -> None:
    if not bool(torch.isfinite(total)):
        raise FloatingPointError(f"the loss is not finite before step {step}; lower the learning rate ({recipe.lr})")


def noise_generator(rng: torch.Generator, place: torch.device) -> torch.Generator:
    """Return the generator of dropout: the given one on the CPU, elsewhere one on the device, seeded from it."""
    if place.type == "cpu":
        return rng
    return torch.Generator(place).manual_seed(int(torch.randint(2**62, (), generator=rng)))


def _fingerprint(
    model: nn.Module, images: Images, recipe: Recipe, stamped: bool, dtype: torch.dtype, objective: Objective | None
) -> str:
    """Name a training by what decides it, short of the generator and of what stamp and objective do."""
    layout: dict[str, Any] = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    description = {"recipe": recipe.to_json(), "layout": layout, "stamped": stamped, "dtype": str(dtype)}
    if objective is not None:
        description["objective"] = type(objective).__qualname__
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    digest.update(images.y.cpu().numpy().tobytes())
    # All of them, half a second for CIFAR-10: two poisoned sets may differ in the pixels of a few rows alone.
    digest.update(images.x.cpu().contiguous().numpy().data)
    return digest.hexdigest()
