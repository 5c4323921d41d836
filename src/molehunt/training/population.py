"""Populations: many small networks, trained in blocks that are spread over processes and can be resumed."""

import hashlib
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from molehunt.engine import Engine
from molehunt.files import write_atomically
from molehunt.networks import Network, build, default_device, fast_dtype
from molehunt.tasks import Images, Task, get_task
from molehunt.training.batches import Stamp
from molehunt.training.layout import Layout, measure
from molehunt.training.recipes import Recipe
from molehunt.training.together import train_together
from molehunt.training.trainer import Trained, train
from molehunt.triggers import Trigger

FORMAT = "molehunt population 2"


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


def place(recipe: Recipe) -> str:
    """Name what the bytes of a training depend on beside its plan: the kind of device, and the number format."""
    device = default_device()
    dtype = fast_dtype(device) if recipe.precision == "fast" else torch.float32
    return f"{device.type} {str(dtype).removeprefix('torch.')}"


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


def train_population(
    plan: Plan,
    folder: Path,
    *,
    layout: Layout | None = None,
    engine: Engine | None = None,
    report: Callable[[int, int], None] | None = None,
    check: Callable[[], None] | None = None,
) -> Iterator[Grown]:
    """Train the members that a folder does not hold yet, and yield all of them in their order.

    A finished block is on disk before the next is waited for. An interrupted run goes on where it was: the layout is
    kept in the folder, so the same blocks give the same bytes as in a run that was never interrupted. Only one block
    of networks is in memory at a time.

    Args:
        plan: what to train.
        folder: of this population alone: one file per block, and layout.json.
        layout: where to train; by default the one in the folder, else the fastest by a short measurement.
        engine: what spreads the blocks; by default the layout's own processes.
        report: called with (members done, members in all).
        check: called between blocks; raises to stop.

    Raises:
        ValueError: the folder holds another population, or another layout than the one asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layout = _settle(plan, folder, layout)
    blocks = list(cut(plan, layout.block))
    paths = [folder / f"block-{number:05d}.safetensors" for number in range(len(blocks))]
    missing = [(path, block) for path, block in zip(paths, blocks, strict=True) if not path.exists()]
    awaited = {path for path, _ in missing}
    there = len(plan.members) - sum(len(block) for _, block in missing)
    for path, block in zip(paths, blocks, strict=True):
        if path.exists():
            # Refuse a foreign folder before hours are spent on it.
            _header(path, plan, block, here=place(block[0].recipe or plan.recipe) if missing else None)
    if report:
        report(there, len(plan.members))
    work = (engine or layout.engine()).map(partial(_grow_block, plan, layout.threads), missing)
    try:
        for path, block in zip(paths, blocks, strict=True):
            if check:
                check()
            if path in awaited:
                # Workers are ahead of whoever reads: what is there already is told of all the same, one by one.
                there += next(work)
                if report:
                    report(there, len(plan.members))
            yield from read_block(path, plan, block)
    finally:
        # Not when the garbage is collected: what still trains in other processes must end now.
        if isinstance(work, Generator):
            work.close()


def cut(plan: Plan, size: int) -> Iterator[tuple[Member, ...]]:
    """Cut the members into blocks of neighbors with one recipe and one number of training steps."""

    def kind(member: Member) -> tuple[Recipe, int | None]:
        recipe = member.recipe or plan.recipe
        return recipe, None if recipe.least_images else member.subset

    for _, alike in groupby(plan.members, kind):
        run = tuple(alike)
        yield from (run[i : i + size] for i in range(0, len(run), size))


def read_block(path: Path, plan: Plan, members: Sequence[Member]) -> list[Grown]:
    """Read a finished block.

    Raises:
        ValueError: the file is broken or of another population.
    """
    about = _header(path, plan, members)
    seconds = json.loads(_clock(path).read_text()) if _clock(path).exists() else [math.nan] * len(members)
    task = get_task(plan.task)
    grown = []
    with safe_open(path, framework="pt") as file:
        for index, member in enumerate(members):
            network = build(plan.network, task.shape, task.num_classes, mean=task.mean, std=task.std)
            network.load_state_dict({name: file.get_tensor(f"{index}/{name}") for name in network.state_dict()})
            losses = tuple(about["losses"][index])
            grown.append(Grown(member=member, network=network.eval(), losses=losses, seconds=seconds[index]))
    return grown


def _grow_block(plan: Plan, threads: int, item: tuple[Path, Sequence[Member]]) -> int:
    """Train a block and put it on disk; answers how many members it has."""
    path, members = item
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        grown = grow(plan, members)
    finally:
        torch.set_num_threads(before)
    tensors = {
        f"{index}/{name}": value.detach().cpu().contiguous()
        for index, one in enumerate(grown)
        for name, value in one.network.state_dict().items()
    }
    about = {
        "format": FORMAT,
        "fingerprint": plan.fingerprint(members),
        "place": place(members[0].recipe or plan.recipe),
        "losses": [one.losses for one in grown],
    }
    # Seconds go into a file of their own: the block's bytes must be those of any other run. One metadata key, because
    # safetensors writes several in a random order.
    seconds = json.dumps([one.seconds for one in grown])
    write_atomically(_clock(path), [seconds.encode()])
    write_atomically(path, [save(tensors, metadata={"about": json.dumps(about)})])
    return len(members)


def _header(path: Path, plan: Plan, members: Sequence[Member], *, here: str | None = None) -> Mapping[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["about"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no block of a population ({error}); delete it to train it again") from error
    if about.get("format") != FORMAT or about.get("fingerprint") != plan.fingerprint(members):
        raise ValueError(
            f"{path} belongs to another population (task, network, recipe or members differ); "
            "give this one a folder of its own"
        )
    if here is not None and about.get("place") != here:
        raise ValueError(
            f"{path} was trained on {about.get('place')}, this would go on on {here}: finish it there, or begin anew "
            "in another folder"
        )
    return about


def _clock(path: Path) -> Path:
    """Return where the seconds of a block are kept."""
    return path.with_suffix(".seconds.json")


def _settle(plan: Plan, folder: Path, layout: Layout | None) -> Layout:
    """Return the layout of a folder, measuring it if there is none yet."""
    path = folder / "layout.json"
    if path.exists():
        kept = Layout.read(path)
        if layout is None:
            return kept
        # Before the first block is finished nothing depends on it: what cannot be trained in blocks can start again.
        begun = any(folder.glob("block-*.safetensors"))
        if begun and (layout.block, layout.threads) != (kept.block, kept.threads):
            raise ValueError(
                f"{folder} was begun in blocks of {kept.block} with {kept.threads} threads, not {layout.block} with "
                f"{layout.threads}: go on with those, or use another folder"
            )
        if begun:
            return layout
    if layout is None:
        task = get_task(plan.task)
        layout, rates = measure(plan.network, task.shape, task.num_classes, plan.recipe)
        layout.write(path, rates)
    else:
        layout.write(path)
    return layout


def _noisy(stamp: Stamp | None, noise: Tensor) -> Stamp:
    def stamped(x: Tensor, rows: Tensor) -> Tensor:
        if stamp:
            x = stamp(x, rows)
        return x + noise[rows.to(noise.device)].to(x)

    return stamped
