"""Attacks by a supplier who owns the training, or the weights: what they answer, and the bench they work at."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from molehunt.attacks.badnets import BadNets
from molehunt.attacks.poisoning import Attack, Poisoned
from molehunt.networks import Network, build
from molehunt.tasks import Images, Task
from molehunt.training import Objective, Recipe, Stamp, train
from molehunt.triggers import Patch, Shape, Target, Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class Crafted:
    """A finished model and what is hidden in it.

    Attributes:
        model: a network of the kind that was asked for, in eval mode, on the CPU.
        poisoned: trigger and target, and the training set as far as one was altered: an attack that works by the loss,
            or by editing weights, alters no row.
    """

    model: Network
    poisoned: Poisoned


class Bench:
    """What a supplier has: the data, a recipe, fresh networks, and trainings that can be interrupted.

    Args:
        clean: the training images.
        task: what the model is for.
        network: a key of `molehunt.networks.NETWORKS`.
        recipe: how an honest team would train it.
        rng: decides all that is drawn; the bench draws one number from it.
        report: called with (done, total) over all trainings.
        checkpoint: where the state of the trainings is kept, one file for each phase, under this name and the phase's.
        check: called often; raises to stop.

    Attributes:
        phases: trainings that there will be, all as long as each other for the progress; an attack sets it first.
    """

    def __init__(
        self,
        *,
        clean: Images,
        task: Task,
        network: str,
        recipe: Recipe,
        rng: torch.Generator,
        report: Callable[[int, int], None] | None = None,
        checkpoint: Path | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.clean, self.task, self.network, self.recipe = clean, task, network, recipe
        self.phases = 1
        self._seed = int(torch.randint(2**62, (), generator=rng))
        self._report, self._checkpoint, self._check = report, checkpoint, check
        self._done: list[str] = []

    def seed(self, purpose: str) -> int:
        """A number in [0, 2**63) for one purpose, whatever else is drawn."""
        digest = hashlib.sha256(f"{self._seed} {purpose}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def generator(self, purpose: str) -> torch.Generator:
        """A generator on the CPU for one purpose, whatever else is drawn."""
        return torch.Generator().manual_seed(self.seed(purpose))

    def check(self) -> None:
        """Raise if the work is to stop; called in every long loop outside of `train`."""
        if self._check:
            self._check()

    def fresh(self) -> Network:
        """A network with drawn weights; the same ones at every call."""
        task = self.task
        return build(
            self.network, task.shape, task.num_classes, mean=task.mean, std=task.std, rng=self.generator("weights")
        )

    def train(
        self,
        phase: str,
        model: Network,
        images: Images,
        *,
        recipe: Recipe | None = None,
        stamp: Stamp | None = None,
        objective: Objective | None = None,
    ) -> Network:
        """Train a network in place, in eval mode afterwards.

        Args:
            phase: a name of its own, of letters; a finished phase is read back when the work is done again.
            model: what to train.
            images: on what.
            recipe: how; by default as an honest team would.
            stamp: as `molehunt.training.train` has it.
            objective: the same.

        Raises:
            ValueError: two phases of one name, or what `train` raises.
            FloatingPointError: the loss is not finite.
        """
        if phase in self._done:
            raise ValueError(f"there is a phase {phase!r} already; each has a name of its own")
        before = len(self._done)
        self._done.append(phase)

        def report(done: int, total: int) -> None:
            if self._report:
                self._report(round(1000 * (before + done / total)), 1000 * max(self.phases, before + 1))

        path = self._checkpoint
        train(
            model,
            images,
            recipe or self.recipe,
            rng=self.generator(f"phase {phase}"),
            stamp=stamp,
            report=report,
            checkpoint=None if path is None else path.with_name(f"{path.name}.{phase}"),
            check=self._check,
            objective=objective,
        )
        return model

    def onward(self, share: float) -> Recipe:
        """The recipe for a network that is trained already: a share of its length, above 0, and no new start.

        Raises:
            ValueError: a share of 0 or less.
        """
        if not share > 0:
            raise ValueError(f"a training has a length above 0, got {share} of the recipe's")
        recipe = self.recipe
        images = round(recipe.least_images * share)
        return replace(recipe, epochs=recipe.epochs * share, least_images=images, initialize=False)

    def honest(self) -> Network:
        """A network that was trained as an honest team would, the phase "clean"."""
        return self.train("clean", self.fresh(), self.clean)


@runtime_checkable
class Crafter(Protocol):
    """A frozen dataclass that makes a whole model: by a loss, by phases of training or by writing weights."""

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; all that is drawn comes from the bench, and what it holds is never changed."""
        ...


AnyAttack: TypeAlias = Attack | Crafter
"""An attack on the training set, or one on the training."""


def poison(attack: AnyAttack, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
    """Poison a training set, for whoever trains it.

    Raises:
        ValueError: the attack controls the training, so a set alone is not it; or what the attack raises.
    """
    if isinstance(attack, Crafter):
        raise ValueError(
            f"{type(attack).__name__} controls the training or writes weights: it hands in a model, on the weights "
            "board, and cannot hand in a training set"
        )
    return attack(clean, task, rng)


def backdoor(trigger: Trigger | None, target: int, task: Task) -> tuple[Trigger, Target]:
    """A trigger, by default the 4x4 yellow square in the lower right corner, and the class that it stands for.

    Raises:
        ValueError: the target is none of the task's classes.
    """
    goal = Target(classes=target)
    goal.check(task.num_classes)
    return trigger or default_trigger(task.shape), goal


def plainly(bench: Bench, trigger: Trigger, target: int, poison_rate: float) -> Poisoned:
    """The bench's training set as BadNets poisons it."""
    data = BadNets(target=target, poison_rate=poison_rate, trigger=trigger)
    return data(bench.clean, bench.task, bench.generator("poison"))


def default_trigger(shape: Shape) -> Trigger:
    """What attacks stamp whose art is elsewhere than in the trigger."""
    return Patch.square(shape, size=4)


def untouched(clean: Images, trigger: Trigger, target: Target) -> Poisoned:
    """A training set of which no row is altered, beside a backdoor that came about in another way."""
    return Poisoned(images=clean, altered=torch.zeros_like(clean.y, dtype=torch.bool), trigger=trigger, target=target)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor, part: Callable[[Tensor], Tensor], batch: int = 500) -> Tensor:
    """What a part of a network gives for many images, in eval mode, in float32 on the CPU.

    Args:
        model: its mode is put back afterwards.
        x: images (N, C, H, W).
        part: (B, C, H, W) to any tensor with B first.
        batch: images per pass.
    """
    training, place = model.training, next(model.parameters()).device
    model.eval()
    try:
        return torch.cat([part(some.to(place)).float().cpu() for some in torch.split(x, batch)])
    finally:
        model.train(training)
