"""Training a suspect on clean images: the loop and its choice of a rate, for fine-tuning and super-fine-tuning."""

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.defenses._fresh import recipe_of_fresh, redraw, trainable
from molehunt.defenses._held_out import HAIR, split
from molehunt.engine import OutOfTime, Run
from molehunt.findings import Finding
from molehunt.networks import anatomy, dropout_rng
from molehunt.suspect import Suspect, freeze
from molehunt.tasks import Images
from molehunt.training import Recipe, accuracy, train
from molehunt.training.batches import Batches
from molehunt.training.optimizers import make_optimizers
from molehunt.training.trainer import noise_generator

Rate = Callable[[int, float], float]
"""(step from 0, highest rate) to the learning rate of that step, at most the highest."""

LOOK = 10
"""Steps between two looks at the loss: a look at every step would make a GPU wait."""
MOST_RESTORES = 20
"""After so many the rate is a millionth of what was asked for; then it is not the rate."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a suspect is tuned: what the two defenses have in common.

    Attributes:
        name: of the defense.
        steps: optimizer steps, 0 for none.
        recipe: batch size, optimizer and its settings; its length, rate and augmentation do not count.
        lr: highest learning rate of the first attempt.
        rate: the learning rate of each step.
        keep: steps between two states that can be gone back to.
        attempts: tunings at most, each from the start at a third of the rate before.
        tolerance: accuracy on held-out images that the repair may cost, in [0, 1].
        held_out: share of the clean images that measure accuracy, in (0, 1).
        head_only: train the last linear layer alone, all else in eval mode.
        control: also train a fresh network for as many steps.

    Raises:
        ValueError: a setting out of range.
    """

    name: str
    steps: int
    recipe: Recipe
    lr: float
    rate: Rate
    keep: int
    attempts: int
    tolerance: float
    held_out: float
    head_only: bool
    control: bool

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be 0 or more, got {self.steps}")
        if self.attempts < 1:
            raise ValueError(f"attempts must be 1 or more, got {self.attempts}")
        if not 0.0 <= self.tolerance <= 1.0:
            raise ValueError(f"tolerance must lie in [0, 1], got {self.tolerance}")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must lie in (0, 1), got {self.held_out}")


def repair(suspect: Suspect, run: Run, plan: Plan) -> Finding:
    """Tune copies of a suspect until one keeps its held-out accuracy; see `FineTuning` for what the details hold.

    Every attempt sees the same batches, and so does the next call with the same seed and as many images.

    Raises:
        ValueError: too few clean images.
        FloatingPointError: the loss was not finite at any rate.
    """
    if suspect.clean is None or len(suspect.clean.y) < 4:
        raise ValueError(f"{plan.name} needs 4 clean images or more, to tune on and to hold out")
    images, held = split(suspect.clean, plan.held_out, run.rng)
    seed = run.rng.get_state()
    before = accuracy(suspect.model, held)
    least = before - plan.tolerance - HAIR
    tried: list[dict[str, Any]] = []
    best: tuple[float, float, nn.Module] | None = None
    late: list[str] = []
    for attempt in range(plan.attempts):
        if best is None:
            run.check()
        lr = plan.lr / 3**attempt
        model = tunable(suspect.model, images.x[:1], head_only=plan.head_only)
        run.rng.set_state(seed)
        try:
            restored = tune(model, images, plan, lr=lr, run=run, dtype=suspect.dtype)
        except OutOfTime:
            # What is finished is an answer; a repair that costs more than it should is better than none.
            if best is None:
                raise
            late.append(f"no time was left to try {lr:g}")
            break
        except FloatingPointError:
            tried.append({"lr": lr, "accuracy": None, "restored": MOST_RESTORES})
            if best is None and attempt == plan.attempts - 1:
                raise
            continue
        reached = accuracy(freeze(model), held)
        tried.append({"lr": lr, "accuracy": reached, "restored": restored})
        if best is None or reached > best[0]:
            best = reached, lr, model
        if reached >= least:
            best = reached, lr, model
            break
    assert best is not None, "else the last attempt would have raised"
    warnings = late
    if best[0] < least:
        points = f"{100 * plan.tolerance:g} points of held-out accuracy"
        warnings.append(f"the repair costs more than {points} at every rate tried")
    details: dict[str, Any] = {
        "images": {"tune": len(images.y), "held_out": len(held.y)},
        "accuracy": {"before": before, "repaired": best[0]},
        "rates": tried,
        "lr": best[1],
        "warnings": warnings,
    }
    if plan.control:
        run.rng.set_state(seed)
        try:
            fresh = scratch(suspect, images, plan, run)
        except (ValueError, FloatingPointError) as error:
            warnings.append(f"no control trained from scratch: {error}")
        else:
            details["scratch"] = cpu_state(fresh)
            details["accuracy"]["scratch"] = accuracy(fresh, held)
    return Finding(defense=plan.name, repaired=cpu_state(best[2]), details=details)


def tunable(model: nn.Module, example: Tensor, *, head_only: bool) -> nn.Module:
    """Copy a frozen model, and let gradients reach what is to be tuned: everything, or the last linear layer."""
    copied = copy.deepcopy(model)
    trainable(copied.get_submodule(anatomy(copied, example).head) if head_only else copied)
    return copied


def tune(model: nn.Module, images: Images, plan: Plan, *, lr: float, run: Run, dtype: torch.dtype) -> int:
    """Train a model in place, and go back to its last good state at half the rate where the loss is not finite.

    A state is good where the loss was finite with it. One is kept every `plan.keep` steps; the loss is looked at in
    between too. Going back costs no step: training goes on with the next one.

    Args:
        model: on the device of the images. Only parameters with `requires_grad` are trained; if there is none outside
            the head all else, norms and their statistics too, stays as it is. Left in eval mode.
        images: at least two.
        plan: how.
        lr: highest learning rate.
        run: for its generator and its clock.
        dtype: number format of the matrix work.

    Returns:
        How often it went back.

    Raises:
        FloatingPointError: it had to go back more than `MOST_RESTORES` times, or never had a good state.
    """
    if not plan.steps:
        return 0
    place = images.x.device
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from the stubs
    model.train(not plan.head_only)
    optimizers = make_optimizers(model, plan.recipe)
    batches = Batches(images, plan.recipe, run.rng)
    batch = min(plan.recipe.batch, len(images.y))
    good, sure = _State(model, optimizers), False
    bad = torch.zeros((), dtype=torch.bool, device=place)
    restored, told = 0, time.monotonic()
    with dropout_rng(model, noise_generator(run.rng, place)):
        for step in range(plan.steps):
            run.check()
            # Before the step: set after it, every step would have the rate of the one before.
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = plan.rate(step, lr)
            x, y = batches.next()
            with torch.autocast(place.type, dtype=dtype) if dtype != torch.float32 else nullcontext():
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=plan.recipe.label_smoothing)
            bad |= ~torch.isfinite(loss.detach())
            if step % plan.keep == 0 or step % LOOK == 0 or step + 1 == plan.steps:
                if bool(bad):
                    restored, lr = restored + 1, lr / 2
                    if restored > MOST_RESTORES:
                        break
                    good.restore(model, optimizers)
                    bad.zero_()
                    continue
                # Statistics can overflow while the loss stays finite.
                if step % plan.keep == 0 and _finite(model):
                    good, sure = _State(model, optimizers), True
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
            if (now := time.monotonic()) - told >= 0.1 and step + 1 < plan.steps:
                told = now
                run.report((step + 1) * batch, plan.steps * batch)
    if restored > MOST_RESTORES or not sure:
        rate = lr * 2**restored
        raise FloatingPointError(f"the loss was not finite {restored} times; lower the learning rate ({rate:g})")
    # No loss was computed after the last step.
    if not _finite(model):
        good.restore(model, optimizers)
        restored += 1
    run.report(plan.steps * batch, plan.steps * batch)
    model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]  # as above
    return restored


def _finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


class _State:
    """Weights, statistics and momentum at one moment."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self.model = copy.deepcopy(model.state_dict())
        self.optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]

    def restore(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        model.load_state_dict(self.model)
        for optimizer, state in zip(optimizers, self.optimizers, strict=True):
            # A copy: what is loaded becomes the optimizer's own, and the next step would write into it.
            optimizer.load_state_dict(copy.deepcopy(state))


def scratch(suspect: Suspect, images: Images, plan: Plan, run: Run) -> nn.Module:
    """Train a fresh network of the suspect's architecture on the same images for the same number of steps.

    It has the recipe that the package trains such a network with, else AdamW, for a rate that is meant for finished
    weights would make the control look worse than it is.

    Raises:
        ValueError: the network has layers whose weights cannot be drawn afresh.
        FloatingPointError: its loss is not finite.
    """
    model = redraw(suspect.model, run.rng, suspect.task).to(suspect.device)
    trainable(model)
    if plan.steps:
        batch = min(plan.recipe.batch, len(images.y))
        recipe = replace(
            recipe_of_fresh(suspect.model, suspect.task),
            epochs=1 / 2**20,
            least_images=plan.steps * batch,
            batch=batch,
            augment=plan.recipe.augment,
            precision=plan.recipe.precision,
        )
        train(model, images, recipe, rng=run.rng, report=run.report, check=run.check, device=suspect.device)
    return freeze(model)


def recipe_of(suspect: Suspect, recipe: Recipe) -> Recipe:
    """Augment as the suspect's task allows, in the number format that the suspect runs in."""
    precision = "float32" if suspect.dtype == torch.float32 else "fast"
    return replace(recipe, augment=suspect.task.augment, precision=precision)  # type: ignore[arg-type]


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict on the CPU, every tensor contiguous."""
    return {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}


def triangular(step: float, cycle: float, low: float, high: float) -> float:
    """Learning rate of a cyclic triangle: `low` at every multiple of the cycle, `high` exactly in its middle.

    Args:
        step: 0 or more.
        cycle: steps from one low to the next, positive.
        low: lowest rate.
        high: highest rate, at least `low`.
    """
    u = math.fmod(step, cycle) / cycle
    # From whichever end is nearer, so that both are hit without rounding and equal ends give their own value.
    return low + (high - low) * 2 * u if u < 0.5 else high - (high - low) * (2 * u - 1)
