"""What a team does at home: train a model or alter a training set, hide something in it or not, and submit it."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from molehunt.attacks import ATTACKS, AnyAttack, Attack, Bench, Crafted, Crafter, Poisoned, poison
from molehunt.game import code
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.attacker import Report, describe, make_attack, sealed, train_model
from molehunt.game.budget import budget
from molehunt.game.manifest import Manifest
from molehunt.game.rules import BOARDS, Board, get_round
from molehunt.game.seal import first_problem
from molehunt.game.submission import MANIFEST, pack, write_submission, write_training_set
from molehunt.game.training_set import Changes, TrainingSet
from molehunt.networks import NETWORKS, Network
from molehunt.runner import generator
from molehunt.tasks import Images, Task
from molehunt.training import Recipe, recipe_for
from molehunt.triggers import Target, Trigger

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
        seed: from 0 to 2**64 - 1; together with the team's name it draws poison, weights and the order of the data, so
            that two honest teams that leave it alone do not hand in the same bytes, by which they would be known.

    Raises:
        ValueError: an unknown name, settings that the attack does not have, an attack of one's own that raises, a
            team's name that a manifest refuses, or, on the data board, where the host trains, a recipe, or an attack
            that controls the training.
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
        if self.board == "data" and isinstance(self.hidden, Crafter):
            raise ValueError(f"on the data board the host trains, and {self.attack} controls the training itself")

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
    def hidden(self) -> AnyAttack | None:
        """What is hidden in it; None for nothing."""
        if self.attack == HONEST:
            return None
        try:
            return make_attack(self.attack, self.settings)
        except ValueError:
            raise
        except Exception as error:
            if self.attack in ATTACKS:
                raise
            # Its class, or its package, may raise anything, such as for a setting that has no default.
            raise ValueError(f"{self.attack} cannot be made: {type(error).__name__}: {error}") from error

    @cached_property
    def digest(self) -> str:
        """Names all that decides the weights, but for the pictures themselves.

        The code of an attack that does not come with Molehunt counts: changed, it is another attack, and a training
        must not go on.
        """
        told = [self.task.name, self.manifest.network, self.training.to_json(), self.attack, dict(self.settings)]
        if self.hidden is not None:
            # With the defaults: an attack whose defaults changed is another one.
            told.append(describe(self.hidden))
        digest = hashlib.sha256(json.dumps([*told, self.seed, self.team], sort_keys=True).encode())
        if self.hidden is not None:
            digest.update(code.digest(type(self.hidden)).encode())
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


def begins_anew(plan: Plan, folder: Path) -> bool:
    """Whether a folder holds an unfinished training of other settings or other code, with which `make` does not go on.

    On the data board nothing is trained, so there it never does.
    """
    left = [path.name for path in folder.glob("training-*.safetensors*")]
    own = _state(plan, folder).name
    return plan.board == "weights" and bool(left) and not any(name.startswith(own) for name in left)


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
        ValueError: the attack does not fit the data, or hides a further trigger that is over the budget; an attack of
            one's own raised, whatever it was, or answered with what is no poisoned training set.
        FloatingPointError: the training diverged.
        DataError: the data could not be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _blaming(plan.hidden):
        return _alter(plan, folder) if plan.board == "data" else _train(plan, folder, report, check)


def drawing(plan: Plan) -> torch.Generator:
    """What draws the poison, then the weights and the order of the images, of a plan on the weights board."""
    return generator(plan.seed, f"train {plan.task.name} {plan.manifest.network} {plan.team}")


def _state(plan: Plan, folder: Path) -> Path:
    """Where an unfinished training is kept."""
    return folder / f"training-{plan.digest[:16]}.safetensors"


def _train(plan: Plan, folder: Path, report: Report | None, check: Callable[[], None] | None) -> Made:
    """Train the model of a plan and write it; see `make`."""
    model, poisoned = train_model(
        plan.task,
        plan.manifest.network,
        plan.training,
        None if plan.hidden is None else _within(plan.hidden),
        rng=drawing(plan),
        report=report,
        checkpoint=_state(plan, folder),
        check=check,
    )
    images = plan.task.load("validation")
    answers = measure(model, images, None if poisoned is None else poisoned.trigger)
    write_submission(folder, model, plan.manifest, sealed(plan.hidden, poisoned, seed=plan.seed), task=plan.task)
    archive = pack(folder, task=plan.task)
    for left in folder.glob("training-*.safetensors*"):
        left.unlink()
    rate = None
    if poisoned is not None and answers.stamped is not None:
        rate = asr(answers.stamped, answers.y, poisoned.target)
    return Made(folder=folder, archive=archive, accuracy=accuracy(answers.plain, answers.y), asr=rate)


def _alter(plan: Plan, folder: Path) -> Made:
    """Write the training set of a plan; see `make`."""
    clean = plan.task.load("train")
    rng = generator(plan.seed, f"alter {plan.task.name} {plan.team}")
    poisoned = None if plan.hidden is None else poison(_within(plan.hidden), clean, plan.task, rng)
    training = TrainingSet.of(poisoned, clean, rng)
    hidden = sealed(plan.hidden, poisoned, seed=plan.seed)
    write_training_set(folder, training, plan.manifest, hidden, task=plan.task)
    return Made(folder=folder, archive=pack(folder, task=plan.task), changes=training.changes(clean))


@dataclass(frozen=True)
class _Within:
    """An attack whose answer is looked at: else its faults would come out in the midst of a training."""

    attack: Attack

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        return _looked_at(self.attack, self.attack(clean, task, rng), task)


@dataclass(frozen=True)
class _WithinCraft:
    """The same of an attack that makes the whole model."""

    attack: Crafter

    def craft(self, bench: Bench) -> Crafted:
        crafted = self.attack.craft(bench)
        name = type(self.attack).__name__
        if not isinstance(crafted, Crafted):
            raise ValueError(f"{name} returned {type(crafted).__name__} in place of molehunt.attacks.Crafted")
        if (problem := _unlike(crafted.model, bench)) is not None:
            raise ValueError(f"{name} returned {problem}; molehunt.testing.check_attack tells what an attack must do")
        _looked_at(self.attack, crafted.poisoned, bench.task)
        return crafted


def _within(attack: AnyAttack) -> AnyAttack:
    return _WithinCraft(attack) if isinstance(attack, Crafter) else _Within(attack)


def _looked_at(attack: AnyAttack, poisoned: Poisoned, task: Task) -> Poisoned:
    """Hand an attack's answer on if nothing is wrong with it.

    Of further triggers the rules ask what the gate asks of the sealed one. They are in no seal: nobody can ask later.

    Raises:
        ValueError: something is.
    """
    if (problem := _problem(poisoned, task)) is not None:
        name = type(attack).__name__
        raise ValueError(f"{name} returned {problem}; molehunt.testing.check_attack tells what an attack must do")
    for number, (trigger, _) in enumerate(poisoned.further, start=1):
        gate = budget(trigger.footprint(), task.shape)
        if not gate.passed:
            raise ValueError(
                f"further trigger {number} of {len(poisoned.further)} is over the budget, which holds for every "
                f"trigger: {gate.measured:.3f}, at most {gate.limit:.3f}, {gate.message}"
            )
    return poisoned


@contextmanager
def _blaming(attack: AnyAttack | None) -> Iterator[None]:
    """Say where in an attack of one's own an error arose. What did not come through its code is not its mistake."""
    try:
        yield
    except (Exception, SystemExit) as error:
        place = None if attack is None else code.line_of(error, type(attack))
        if place is None:
            raise
        said = f": {error}" if str(error) else ""
        raise ValueError(f"{type(attack).__name__} raised {type(error).__name__} at {place}{said}") from error


def _unlike(model: object, bench: Bench) -> str | None:
    """What keeps a model from being a network of the kind that was asked for, with numbers; None for nothing."""
    if not isinstance(model, Network):
        return f"a {type(model).__name__} as model, expected a network of molehunt.networks"
    wanted = {name: value.shape for name, value in bench.fresh().state_dict().items()}
    if {name: value.shape for name, value in model.state_dict().items()} != wanted:
        return f"a model with other weights than a {bench.network} has"
    bad = [name for name, value in model.state_dict().items() if not bool(torch.isfinite(value).all())]
    if bad:
        return f"numbers that are none in {bad[0]}"
    if any(module.training for module in model.modules()):
        return "a model in training mode"
    # What a file cannot hold would be measured here and be gone there.
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return "a model that still has hooks" if hooked else None


def _problem(made: object, task: Task) -> str | None:
    """What keeps an attack's answer from being a poisoned training set of a task; None for nothing.

    Raises:
        ValueError: its target is none of the task's classes.
    """
    if not isinstance(made, Poisoned):
        return f"{type(made).__name__} in place of molehunt.attacks.Poisoned"
    (x, y), altered = made.images, made.altered
    if not (x.is_floating_point() and tuple(x.shape[1:]) == task.shape):
        return f"pictures {x.dtype} {tuple(x.shape)}, expected floats (N, {', '.join(map(str, task.shape))})"
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        return f"labels {y.dtype} {tuple(y.shape)}, expected int64 ({len(x)},)"
    if altered.dtype != torch.bool or altered.shape != x.shape[:1]:
        return f"`altered` {altered.dtype} {tuple(altered.shape)}, expected bool ({len(x)},)"
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < task.num_classes:
        return f"labels from {int(y.min())} to {int(y.max())}, expected 0 to {task.num_classes - 1}"
    if not (isinstance(made.trigger, Trigger) and isinstance(made.target, Target)):
        return "a trigger or a target that is none of molehunt.triggers"
    made.target.check(task.num_classes)
    return None
