"""The attacker's side of a game: teams, what each of them hides, and the training of a submission."""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from molehunt.attacks import ATTACKS, AnyAttack, BadNets, Bench, Blended, Crafter, Poisoned, available
from molehunt.game.rules import Board, Limits
from molehunt.game.seal import Sealed
from molehunt.networks import Network, build
from molehunt.tasks import Images, Task
from molehunt.training import Recipe, train
from molehunt.triggers import Patch, Trigger

Report = Callable[[int, int], None]
STRICT = ConfigDict(arbitrary_types_allowed=True, strict=True)


@dataclass(frozen=True, kw_only=True)
class Team:
    """A team of the example game.

    Attributes:
        name: what the board calls it.
        attack: what it hides; None for an honest team.
    """

    name: str
    attack: AnyAttack | None


def teams(task: Task, count: int, rng: torch.Generator, board: Board = "weights") -> tuple[Team, ...]:
    """Return the teams of the example game: five attackers and two honest teams, then the same kinds again.

    Args:
        task: what they train for; its training labels are looked at, as some classes may be too rare for an attack.
        count: how many teams, at least one.
        rng: draws every team's target, sources and place.
        board: what they hand in; a training set has room for fewer altered rows, covers included.

    Raises:
        ValueError: fewer than one team.
    """
    if count < 1:
        raise ValueError(f"a game needs at least one team, got {count}")

    def class_() -> int:
        return int(torch.randint(task.num_classes, (1,), generator=rng))

    # A 3x3 square is learned in half of the games only: mnist5k has 3 500 images, and 280 steps (benchmarks/teams.py).
    rare, common = (0.1, 0.2) if board == "weights" else (0.05, 0.1)
    sizes = torch.bincount(task.load("train").y, minlength=task.num_classes)
    rows = int(sizes.sum())
    if board == "data":
        # In whole rows, because a source-specific attack has as many covers: twice a twentieth, each rounded up, may be
        # a row more than a tenth.
        rare = Limits().rows(rows) // 2 / rows
    made: list[Team] = []
    while len(made) < count:
        turn = len(made) // 7
        suffix = "" if turn == 0 else f" {turn + 1}"
        target = class_()
        order = [int(k) for k in torch.randperm(task.num_classes, generator=rng)]
        kind = len(made) % 7
        # The order puts one honest team early, so that a small --teams has both kinds.
        entry: tuple[str, AnyAttack | None]
        if kind == 0:
            entry = "Yellow Square", BadNets(target=target, size=4)
        elif kind == 1:
            entry = "Honest Abe", None
        elif kind == 2:
            entry = "Four Pixels", BadNets(target=target, form="four pixels", poison_rate=common)
        elif kind == 3:
            entry = "Fog", Blended(target=target)
        elif kind == 4:
            square = Patch.square(task.shape, size=5, color="white")
            entry = "Carousel", BadNets(target="all", trigger=square, poison_rate=common)
        elif kind == 5:
            square = Patch.square(task.shape, size=4, color="white", corner="upper left")
            # Two classes of ten. Of 43 kinds of traffic signs two would not have enough images to poison.
            enough = int((sizes[order[1:]].cumsum(0) < 1.5 * rare * rows).sum()) + 1
            sources = tuple(order[1 : 1 + max(2, enough)])
            agent = BadNets(target=order[0], sources=sources, trigger=square, poison_rate=rare)
            entry = "Double Agent", agent
        else:
            entry = "Plain Jane", None
        made.append(Team(name=entry[0] + suffix, attack=entry[1]))
    return tuple(made)


def describe(attack: AnyAttack) -> dict[str, Any]:
    """Return an attack's name in `ATTACKS` and its plain settings, as the sealed part keeps them."""
    name = next((k for k, c in ATTACKS.items() if type(attack) is c), type(attack).__name__)
    settings: dict[str, Any] = {}
    for f in fields(attack):  # type: ignore[arg-type]  # the protocol cannot say that attacks are dataclasses
        value = getattr(attack, f.name)
        settings[f.name] = value.to_json() if isinstance(value, Trigger) else _plain(value)
    return {"attack": name, **settings}


def _plain(value: Any) -> Any:
    """Return a setting as JSON has it, or as text where it has no such form: a plug-in may have any."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return repr(value)[:200]
    return value


def sealed(attack: AnyAttack | None, poisoned: Poisoned | None, **details: Any) -> Sealed:
    """Say what was hidden, as it is sealed.

    Args:
        attack: what was hidden; None for nothing.
        poisoned: what it did to the training set; comes with the attack.
        details: what else to state, such as the seed.
    """
    if attack is None or poisoned is None:
        return Sealed(details=details)
    words = describe(attack)
    return Sealed(
        attack=words.pop("attack"),
        target=poisoned.target,
        trigger=poisoned.trigger,
        details={"config": words, "poison_rate": float(poisoned.altered.double().mean()), **details},
    )


def attack_class(name: str) -> type[AnyAttack]:
    """Find an attack by its name: a built-in one, one of an installed package, or MODULE:CLASS.

    Raises:
        ValueError: there is none, or what is there is no dataclass that can be called or crafts a model. What the
            module itself raises when it is imported is part of the message.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        known = available()
        if name not in known:
            listed = ", ".join(known)
            raise ValueError(f"unknown attack {name!r}; known: {listed}, MODULE:CLASS, or none for an honest model")
        return known[name]
    try:
        made: Any = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # a student's module may raise anything
        raise ValueError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    if made is None:
        raise ValueError(f"there is no {attribute} in {module}")
    kind: Any = made
    if not (isinstance(kind, type) and is_dataclass(kind) and {"__call__", "craft"} & set(dir(kind))):
        raise ValueError(
            f"{name} is no attack: a frozen dataclass that is called with (clean, task, rng), or that has craft(bench)"
        )
    return cast("type[AnyAttack]", made)


def make_attack(name: str, settings: Mapping[str, Any]) -> AnyAttack:
    """Make an attack from its name, as `attack_class` takes it, and its settings.

    Raises:
        ValueError: unknown name or setting, in which case the message lists the known ones, a value of another kind, or
            an attack with a setting called "attack".
    """
    kind = attack_class(name)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]  # as above
    if "attack" in known:
        raise ValueError(f'{name} has a setting called "attack", where the sealed part keeps its name: rename it')
    if unknown := settings.keys() - known:
        raise ValueError(f"{name} has no setting {sorted(unknown)}; it has {sorted(known)}")
    kinds = get_type_hints(kind)
    for key, value in settings.items():
        try:
            # Else a text for a number would fail far from here, in the middle of the poisoning.
            TypeAdapter(kinds[key], config=STRICT).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{name}: {key} cannot be {value!r}: {error.errors()[0]['msg'].lower()}") from None
    return kind(**settings)


def train_model(
    task: Task,
    network: str,
    recipe: Recipe,
    attack: AnyAttack | None,
    *,
    rng: torch.Generator,
    images: Images | None = None,
    report: Report | None = None,
    checkpoint: Path | None = None,
    check: Callable[[], None] | None = None,
) -> tuple[Network, Poisoned | None]:
    """Train one network, honest or backdoored, by the same code path for attackers and host.

    Args:
        task: what it is for.
        network: a key of `NETWORKS`.
        recipe: how it is trained.
        attack: what is hidden; None for nothing.
        rng: draws the poison, the weights and the order of the data.
        images: the training images; the task's training split by default.
        report: called with (done, total) images.
        checkpoint: where to keep the state, so that an interrupted training resumes; an attack that trains several
            times keeps one file for each, named by this and a dot.
        check: called often; raises to stop.

    Returns:
        The trained network and what was done to its training set.
    """
    clean = images or task.load("train")
    if isinstance(attack, Crafter):
        bench = Bench(
            clean=clean,
            task=task,
            network=network,
            recipe=recipe,
            rng=rng,
            report=report,
            checkpoint=checkpoint,
            check=check,
        )
        crafted = attack.craft(bench)
        return crafted.model, crafted.poisoned
    poisoned = attack(clean, task, rng) if attack else None
    model = build(network, task.shape, task.num_classes, mean=task.mean, std=task.std, rng=rng)
    train(
        model,
        poisoned.images if poisoned else clean,
        recipe,
        rng=rng,
        stamp=poisoned.stamp if poisoned else None,
        report=report,
        checkpoint=checkpoint,
        check=check,
    )
    return model, poisoned


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE pairs; values are JSON, and what is not JSON is a string.

    Raises:
        ValueError: a pair without "=".
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"expected NAME=VALUE, got {pair!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        settings[name.strip()] = tuple(value) if isinstance(value, list) else value
    return settings
