"""The members of a population: what each network is trained from, as data, and how a block of them is trained."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from molehunt.networks import Network, build
from molehunt.tasks import Images, Task, get_task
from molehunt.training.batches import Stamp
from molehunt.training.recipes import Recipe
from molehunt.training.together import train_together
from molehunt.training.trainer import Trained, train
from molehunt.triggers import Trigger


class Prepared(Protocol):
    """A training set that somebody prepared: what an attack answers."""

    @property
    def images(self) -> Images:
        """Pictures and labels."""
        ...

    def stamp(self, x: Tensor, rows: Tensor) -> Tensor:
        """Put the marks on a batch; see `molehunt.training.batches.Stamp`."""
        ...


Poison = Callable[[Images, Task, torch.Generator], Prepared]


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One network of a population, as data from which it can be made again at any time.

    Attributes:
        name: its name in the population; together with the seed it stands for everything below, so two members that
            differ in anything have different names.
        seed: of its weights, its poison, its order and its augmentation.
        poison: an attack, or None for a clean network; it is called with the member's own images.
        subset: number of training images that it may use, drawn without replacement; None for all.
        subset_seed: draws the subset, so that members can share one.
        noise: standard deviation of Gaussian noise, one draw per training image, added after augmentation and
            poison; 0 for none. Values may leave [0, 1], as in randomized smoothing.
        recipe: its own recipe; None for that of the plan. Neighbors with the same one can share a block.
    """

    name: str
    seed: int
    poison: Poison | None = None
    subset: int | None = None
    subset_seed: int = 0
    noise: float = 0.0
    recipe: Recipe | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What a population consists of.

    Attributes:
        task: its name.
        network: the architecture of all members.
        recipe: of all members that have none of their own. Members whose sets differ in size need one that asks for a
            number of images (`least_images`) instead of passes, so that all make equally many steps.
        members: who they are; names are unique.
    """

    task: str
    network: str
    recipe: Recipe
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if not names:
            raise ValueError("a population needs at least one member")
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"members have the same name: {', '.join(twice)}")

    def fingerprint(self, members: Sequence[Member]) -> str:
        """Name a block by what decides its bytes, short of the layout, the place and the code of an attack."""
        known = [
            [m.name, m.seed, m.subset, m.subset_seed, m.noise, facts(m.poison), m.recipe and m.recipe.to_json()]
            for m in members
        ]
        whole = {"task": self.task, "network": self.network, "recipe": self.recipe.to_json(), "members": known}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Grown:
    """A trained member.

    Attributes:
        member: who it is.
        network: the network, in eval mode.
        losses: mean training loss of every pass.
        seconds: its share of the time that its block took; not a number when that was not kept.
    """

    member: Member
    network: Network
    losses: tuple[float, ...]
    seconds: float


def facts(value: Any) -> Any:
    """Write down what poisons a set: JSON values in which equal settings look equal, and others do not.

    Dataclasses are their class and fields, triggers their content; any other callable is its name alone.
    """
    if isinstance(value, Trigger):
        tensors = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in value.tensors().items()}
        return {**value.to_json(), "tensors": tensors}
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: facts(getattr(value, field.name)) for field in fields(value)}
        return {"is": type(value).__qualname__, **named}
    if callable(value):
        return {"is": getattr(value, "__qualname__", type(value).__qualname__)}
    return [facts(part) for part in value] if isinstance(value, list | tuple) else value


def start(plan: Plan, member: Member) -> tuple[Network, Images, Stamp | None, torch.Generator]:
    """Make what a member begins with: network, images, stamp and the generator of its training.

    Raises:
        ValueError: the subset is larger than the training split, or the noise is negative.
    """
    task = get_task(plan.task)
    images = task.load("train")
    if member.subset is not None:
        if not 1 <= member.subset <= len(images.y):
            raise ValueError(f"{member.name}: a subset of {member.subset} of {len(images.y)} images cannot be drawn")
        rows = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(member.subset_seed))
        rows = rows[: member.subset].sort().values
        images = Images(images.x[rows], images.y[rows])
    rng = torch.Generator().manual_seed(member.seed)
    stamp: Stamp | None = None
    if member.poison:
        prepared = member.poison(images, task, rng)
        images, stamp = prepared.images, prepared.stamp
    network = build(plan.network, task.shape, task.num_classes, mean=task.mean, std=task.std, rng=rng)
    if member.noise < 0:
        raise ValueError(f"{member.name}: the noise is a standard deviation, got {member.noise}")
    if member.noise:
        stamp = _noisy(stamp, member.noise * torch.randn(images.x.shape, generator=rng))
    return network, images, stamp, rng


def grow(plan: Plan, members: Sequence[Member], *, report: Callable[[int, int], None] | None = None) -> list[Grown]:
    """Train one block in this process; a single member by the plain loop.

    Args:
        plan: task, network and recipe.
        members: those of the block.
        report: called with (images done, images in all).
    """
    recipe = members[0].recipe or plan.recipe
    if any((member.recipe or plan.recipe) != recipe for member in members):
        names = ", ".join(member.name for member in members)
        raise ValueError(f"members of one block need one recipe: {names}; order them by recipe or use smaller blocks")
    starts = [start(plan, member) for member in members]
    networks = [network for network, _, _, _ in starts]
    trained: list[Trained]
    if len(members) == 1:
        _, images, stamp, rng = starts[0]
        trained = [train(networks[0], images, recipe, rng=rng, stamp=stamp, report=report)]
    else:
        trained = train_together(
            networks,
            [images for _, images, _, _ in starts],
            recipe,
            rngs=[rng for _, _, _, rng in starts],
            stamps=[stamp for _, _, stamp, _ in starts],
            report=report,
        )
    return [
        Grown(member=member, network=network, losses=one.losses, seconds=one.seconds)
        for member, network, one in zip(members, networks, trained, strict=True)
    ]


def _noisy(stamp: Stamp | None, noise: Tensor) -> Stamp:
    def stamped(x: Tensor, rows: Tensor) -> Tensor:
        if stamp:
            x = stamp(x, rows)
        return x + noise[rows.to(noise.device)].to(x)

    return stamped
