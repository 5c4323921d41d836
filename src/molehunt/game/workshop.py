"""What a team does at home: train a model or alter a training set, hide something in it or not, and submit it."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from molehunt.attacks import Attack
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.attacker import Report, make_attack, sealed, train_model
from molehunt.game.manifest import Manifest
from molehunt.game.rules import BOARDS, Board, get_round
from molehunt.game.seal import first_problem
from molehunt.game.submission import MANIFEST, pack, write_submission, write_training_set
from molehunt.game.training_set import Changes, TrainingSet
from molehunt.networks import NETWORKS
from molehunt.runner import generator
from molehunt.tasks import Task
from molehunt.training import Recipe, recipe_for

HONEST = "none"
"""The attack of an honest team."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be trained.

    Attributes:
        task: what the model is for.
        network: a key of `NETWORKS`; None for the task's.
        recipe: a key of `RECIPES`; None for the network's.
        board: "weights" for a model; "data" for a training set, from which the host trains the model.
        attack: as `attack_class` takes it, or "none" for an honest model.
        settings: of the attack, by name; those not named have their default.
        team: who submits.
        round: name of the round.
        seed: from 0 to 2**64 - 1; draws poison, weights and the order of the data.

    Raises:
        ValueError: an unknown name, settings that the attack does not have, a team's name that a manifest refuses, or
            a recipe on the data board, where the host trains by its own.
    """

    task: Task
    network: str | None = None
    recipe: str | None = None
    board: Board = "weights"
    attack: str = HONEST
    settings: Mapping[str, Any] = field(default_factory=dict)
    team: str = "My Team"
    round: str = "final"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"expected a seed from 0 to 2**64 - 1, got {self.seed}")
        if self.manifest.network not in NETWORKS:
            raise ValueError(f"unknown network {self.manifest.network!r}; known: {', '.join(NETWORKS)}")
        if self.board not in BOARDS:
            raise ValueError(f"unknown board {self.board!r}; known: {', '.join(BOARDS)}")
        if self.board == "data" and self.manifest.recipe != self.manifest.network:
            raise ValueError(f"on the data board the host trains by its own recipe: leave out {self.recipe!r}")
        if self.attack == HONEST and self.settings:
            raise ValueError(f"an honest model has no settings, got {', '.join(self.settings)}; name an attack")
        self.training, self.hidden  # noqa: B018 - each raises for names that it does not know

    @cached_property
    def manifest(self) -> Manifest:
        """What everybody may know about the submission."""
        network = self.network or self.task.network
        try:
            return Manifest(
                team=self.team,
                round=get_round(self.round).name,
                task=self.task.name,
                network=network,
                recipe=self.recipe or network,
            )
        except ValidationError as error:
            raise ValueError(f"the manifest would be refused: {first_problem(error)}") from None

    @cached_property
    def training(self) -> Recipe:
        """How the model is trained."""
        return recipe_for(self.manifest.recipe, self.task)

    @cached_property
    def hidden(self) -> Attack | None:
        """What is hidden in it; None for nothing."""
        return None if self.attack == HONEST else make_attack(self.attack, self.settings)

    @property
    def digest(self) -> str:
        """Names all that decides the weights, but for the pictures themselves."""
        told = [self.task.name, self.manifest.network, self.training.to_json(), self.attack, dict(self.settings)]
        digest = hashlib.sha256(json.dumps([*told, self.seed], sort_keys=True).encode())
        if self.hidden is not None and ":" in self.attack:
            # A plug-in under development: with other code it is another attack, and a training must not go on.
            digest.update(Path(inspect.getfile(type(self.hidden))).read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Made:
    """A submission that is ready to be handed in.

    Attributes:
        folder: the team's private copy; it holds the secret that opens the seal.
        archive: what is handed in.
        accuracy: clean accuracy on the validation split, in [0, 1]; None on the data board, where nothing was trained.
        asr: attack success rate there; None for an honest model, and on the data board.
        changes: on the data board, what the set changes; else None.
    """

    folder: Path
    archive: Path
    accuracy: float | None = None
    asr: float | None = None
    changes: Changes | None = None


def holds_submission(folder: Path) -> bool:
    """Whether there is a submission in a folder, which `make` would replace."""
    return (folder / MANIFEST).exists()


def make(plan: Plan, folder: Path, *, report: Report | None = None, check: Callable[[], None] | None = None) -> Made:
    """Train a model by a plan and write its submission: a folder, and the archive beside it.

    On the data board nothing is trained: the attack alters the training set, and that is what is written.

    The training keeps its state in the folder, under a name that depends on the plan: called again after an
    interruption it goes on, and called with another plan it begins anew.

    Args:
        plan: what to train.
        folder: where; made if need be, an earlier submission in it is replaced.
        report: called with (images done, images in all).
        check: called often; raises to stop.

    Raises:
        ValueError: the attack does not fit the data.
        FloatingPointError: the training diverged.
        DataError: the data could not be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if plan.board == "data":
        return _alter(plan, folder)
    state = folder / f"training-{plan.digest[:16]}.safetensors"
    model, poisoned = train_model(
        plan.task,
        plan.manifest.network,
        plan.training,
        plan.hidden,
        rng=generator(plan.seed, f"train {plan.task.name} {plan.manifest.network}"),
        report=report,
        checkpoint=state,
        check=check,
    )
    images = plan.task.load("validation")
    answers = measure(model, images, None if poisoned is None else poisoned.trigger)
    write_submission(folder, model, plan.manifest, sealed(plan.hidden, poisoned, seed=plan.seed), task=plan.task)
    archive = pack(folder, task=plan.task)
    for left in folder.glob("training-*.safetensors"):
        left.unlink()
    rate = None
    if poisoned is not None and answers.stamped is not None:
        rate = asr(answers.stamped, answers.y, poisoned.target)
    return Made(folder=folder, archive=archive, accuracy=accuracy(answers.plain, answers.y), asr=rate)


def _alter(plan: Plan, folder: Path) -> Made:
    """Write the training set of a plan; see `make`."""
    clean = plan.task.load("train")
    rng = generator(plan.seed, f"alter {plan.task.name}")
    poisoned = None if plan.hidden is None else plan.hidden(clean, plan.task, rng)
    training = TrainingSet.of(poisoned, clean, rng)
    hidden = sealed(plan.hidden, poisoned, seed=plan.seed)
    write_training_set(folder, training, plan.manifest, hidden, task=plan.task)
    return Made(folder=folder, archive=pack(folder, task=plan.task), changes=training.changes(clean))
