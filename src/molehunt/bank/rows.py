"""Train the models of the bank, one file per finished model; weights are kept, and never needed."""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

import molehunt
from molehunt import checkpoints, strict_json
from molehunt.attacks import Poisoned
from molehunt.bank.roster import Entry
from molehunt.datasets import cache
from molehunt.engine import Local, Processes
from molehunt.files import write_atomically
from molehunt.game.answers import accuracy, asr, measure
from molehunt.networks import Network, fast_dtype
from molehunt.tasks import get_task
from molehunt.training.population import grow

WORKS = 0.90
"""Attack success from which a planted model counts as backdoored; below it, it is neither that nor clean."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of a finished model.

    Attributes:
        name, partition, planted, kind, seed: as in `Entry`.
        digest: of the entry; another one means another model.
        weights: SHA-256 of its weights, by which a model that is made again is told to be the same.
        accuracy: clean accuracy on the public validation split, in [0, 1].
        asr: attack success rate there, in [0, 1]; None for a clean model.
        backdoored: whether the attack success is at least `WORKS`; a planted model that is not is left out of figures.
        norm: Euclidean norm of all its weights.
        recipe: all settings of its training.
        seconds: its training took.
        dtype: number format of the matrix work in training.
        threads: torch threads that trained it; another number changes the last bits.
        versions: of Python, torch and Molehunt.
    """

    name: str
    partition: str
    planted: bool
    kind: str
    seed: int
    digest: str
    weights: str
    accuracy: float
    asr: float | None
    backdoored: bool
    norm: float
    recipe: dict[str, Any]
    seconds: float
    dtype: str
    threads: int
    versions: dict[str, str]


def folder_of(root: Path, task: str, network: str) -> Path:
    """Return where the rows of one bank lie below the folder of all banks."""
    return root / f"{task}-{network}"


def build(
    listed: Sequence[Entry],
    folder: Path,
    *,
    processes: int = 1,
    threads: int = 1,
    report: Callable[[Row, int, int], None] | None = None,
) -> tuple[Row, ...]:
    """Train those models of a bank that its folder does not hold yet.

    A finished model is on disk before it is told of, so a run that is killed loses only the models under way. A row
    depends on its entry and on the number of threads, not on the others or on how often the run was interrupted.

    Args:
        listed: the models.
        folder: of this bank alone: one JSON file per finished model.
        processes: that train, one model each.
        threads: of each process.
        report: called for every new row with (row, done, in all).

    Returns:
        All rows, in the order of the entries.

    Raises:
        ValueError: a file in the folder is no row.
        FloatingPointError: a training diverged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {row.name: row for row in read_rows(listed, folder)}
    missing = [entry for entry in listed if entry.name not in done]
    engine = Processes(processes, threads) if processes > 1 else Local()
    for row in engine.map(partial(_finish, folder, threads), missing):
        done[row.name] = row
        if report:
            report(row, len(done), len(listed))
    return tuple(done[entry.name] for entry in listed)


def read_rows(listed: Sequence[Entry], folder: Path) -> tuple[Row, ...]:
    """Return the rows of the models that are finished, in the order of the entries; the others are left out.

    A row whose entry is drawn otherwise today counts as not finished.

    Raises:
        ValueError: a file is no row; the message names it.
    """
    return tuple(_rows(listed, folder))


def regrow(entry: Entry, *, threads: int | None = None) -> Network:
    """Return the trained model: its kept weights where they are, else it is trained again from its seed.

    Args:
        entry: the model.
        threads: torch threads to train with; None leaves their number alone.
    """
    task = get_task(entry.task)
    kept = _kept(entry)
    if kept.exists():
        layout = checkpoints.layout_of(entry.network, task.shape, task.num_classes)
        state = checkpoints.read_safetensors(kept, layout)
        return checkpoints.assemble(state, entry.network, task.shape, task.num_classes).eval()
    return _train(entry, threads)


def _rows(listed: Sequence[Entry], folder: Path) -> Iterator[Row]:
    for entry in listed:
        path = folder / f"{entry.name}.json"
        if not path.exists():
            continue
        found = strict_json.loads(path.read_bytes())
        if not isinstance(found, dict) or found.keys() != {f.name for f in fields(Row)}:
            raise ValueError(f"{path} is no row of a model bank; delete it to train the model again")
        if found["digest"] == entry.digest:
            yield Row(**found)


def _kept(entry: Entry) -> Path:
    """Return where the weights are kept: a cache, safe to delete."""
    return cache.root() / "bank" / f"{entry.name}-{entry.digest[:16]}.safetensors"


def _train(entry: Entry, threads: int | None) -> Network:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        plan = entry.plan()
        return grow(plan, plan.members)[0].network.eval()
    finally:
        torch.set_num_threads(before)


def _finish(folder: Path, threads: int, entry: Entry) -> Row:
    """Train and measure one model, and put its row on disk."""
    start = time.monotonic()
    model = _train(entry, threads)
    seconds = time.monotonic() - start
    task = get_task(entry.task)
    poisoned = None
    if entry.planted and entry.poison is not None:
        # From the generator that the training began with, so it is the trigger that was trained.
        poisoned = entry.poison(task.load("train"), task, torch.Generator().manual_seed(entry.seed))
    trigger = poisoned.trigger if isinstance(poisoned, Poisoned) else None
    answers = measure(model, task.load("validation"), trigger)
    rate = None
    if isinstance(poisoned, Poisoned) and answers.stamped is not None:
        rate = asr(answers.stamped, answers.y, poisoned.target)
    state = model.state_dict()
    row = Row(
        name=entry.name,
        partition=entry.partition,
        planted=entry.planted,
        kind=entry.kind,
        seed=entry.seed,
        digest=entry.digest,
        weights=checkpoints.digest(state),
        accuracy=accuracy(answers.plain, answers.y),
        asr=rate,
        backdoored=rate is not None and rate >= WORKS,
        norm=math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters())),
        recipe=entry.recipe.to_json(),
        seconds=seconds,
        dtype=str(fast_dtype(next(model.parameters()).device)).removeprefix("torch."),
        threads=threads,
        versions={"molehunt": molehunt.__version__, "torch": torch.__version__, "python": platform.python_version()},
    )
    kept = _kept(entry)
    kept.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write(state, kept)
    write_atomically(folder / f"{entry.name}.json", [json.dumps(asdict(row), indent=1, allow_nan=False).encode()])
    return row
