"""Populations: many small networks, trained in blocks that are spread over processes and can be resumed."""

import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from molehunt.engine import Engine
from molehunt.files import write_atomically
from molehunt.networks import build, default_device, fast_dtype
from molehunt.tasks import get_task
from molehunt.training.layout import Layout, measure
from molehunt.training.members import Grown, Member, Plan, grow
from molehunt.training.recipes import Recipe

FORMAT = "molehunt population 2"


def place(recipe: Recipe) -> str:
    """Name what the bytes of a training depend on beside its plan: the kind of device, and the number format."""
    device = default_device()
    dtype = fast_dtype(device) if recipe.precision == "fast" else torch.float32
    return f"{device.type} {str(dtype).removeprefix('torch.')}"


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
