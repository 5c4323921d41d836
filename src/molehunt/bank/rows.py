"""Train the models of the bank, one file per finished model; weights are kept, and never needed."""

import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

import molehunt
from molehunt import checkpoints, strict_json
from molehunt.attacks import Poisoned
from molehunt.bank.roster import LIMITS, Entry
from molehunt.datasets import cache
from molehunt.engine import Local, Processes
from molehunt.files import write_atomically
from molehunt.game import gates
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.budget import budget
from molehunt.game.gate import Gate
from molehunt.game.gates import ReferenceAccuracy
from molehunt.networks import Network, default_device, fast_dtype
from molehunt.tasks import get_task
from molehunt.tensor_file import CheckpointError
from molehunt.training.members import grow


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of a finished model.

    Attributes:
        name, partition, planted, kind, seed: as in `Entry`.
        digest: of the entry; another one means another model.
        weights: SHA-256 of its weights, by which a model that is made again is told to be the same.
        accuracy: clean accuracy on the public validation split, in [0, 1].
        images: of that split.
        asr: attack success rate there, in [0, 1]; None for a clean model.
        gates: of a planted model, as the referee of a game measures them, on that split: attack success, leakage where
            the target has sources, budget. Fields of `molehunt.game.gate.Gate`; empty for a clean model.
        norm: Euclidean norm of all its weights.
        recipe: all settings of its training.
        seconds: its training took.
        dtype: number format of the matrix work in training.
        threads: torch threads that trained it; another number changes the last bits.
        machine: kind of processor, and of GPU where there is one; another one may change the last bits too.
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
    images: int
    asr: float | None
    gates: list[dict[str, Any]]
    norm: float
    recipe: dict[str, Any]
    seconds: float
    dtype: str
    threads: int
    machine: str
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


def clean_accuracy(row: Row, rows: Iterable[Row]) -> Gate | None:
    """Measure the accuracy gate of a model against the plain clean models of its partition.

    Args:
        row: of the model.
        rows: of the bank; those of other partitions, other kinds and planted models are not looked at.

    Returns:
        The gate; None if there is no plain clean model to compare with.
    """
    plain = [r.accuracy for r in rows if r.partition == row.partition and r.kind == "plain" and not r.planted]
    if not plain:
        return None
    # The gate counts hits, so as many hits as were counted when the model was measured are all that it needs.
    right = torch.arange(row.images) < round(row.accuracy * row.images)
    return gates.clean_accuracy(right, torch.ones_like(right), ReferenceAccuracy.of(plain, row.images), LIMITS)


def backdoored(rows: Iterable[Row]) -> frozenset[str]:
    """Return the names of the planted models that pass the gates: the backdoor works, and costs no more than allowed.

    The other planted models are neither that nor clean, and are left out of figures. The gate that looks for triggers
    that work on clean models as well (specificity) is not measured.

    Args:
        rows: of a bank; the clean accuracy of a model is compared with that of the plain clean ones of its partition,
            so without any of these no model of the partition passes.
    """
    known = tuple(rows)
    return frozenset(
        row.name
        for row in known
        if row.planted
        and all(gate["passed"] for gate in row.gates)
        and (gate := clean_accuracy(row, known)) is not None
        and gate.passed
    )


def regrow(entry: Entry, row: Row) -> Network:
    """Return the trained model of a row: its kept weights where they are, else it is trained again from its seed.

    Kept weights that are damaged, or not those of the row, are thrown away.

    Args:
        entry: the model.
        row: what is known of it; it is trained with as many threads as then.

    Raises:
        ValueError: trained again it has other weights than the row says, as on another kind of machine.
    """
    kept = _kept(entry, row.threads)
    state = _read_kept(kept, entry, row.weights)
    task = get_task(entry.task)
    if state is None:
        state = checkpoints.canonical(_train(entry, row.threads).state_dict())
        found = checkpoints.digest(state)
        if found != row.weights:
            raise ValueError(
                f"{entry.name} came out with other weights: SHA-256 {found[:12]}..., its row says "
                f"{row.weights[:12]}.... The row was made with {_threads(row.threads)} on {row.machine}, torch "
                f"{row.versions.get('torch')}, {row.dtype}; this was {_threads(row.threads)} on {_machine()}, torch "
                f"{torch.__version__}, {_dtype()}. Delete the row and run molehunt bank build here, or copy the cache "
                "folder from there"
            )
        _keep(state, kept)
    return checkpoints.assemble(state, entry.network, task.shape, task.num_classes).eval()


def poisoned(entry: Entry) -> Poisoned | None:
    """Return the training set of a planted model before its trigger is stamped, with trigger and target; else None."""
    if not entry.planted or entry.poison is None:
        return None
    task = get_task(entry.task)
    # From the generator that the training begins with, so it is the trigger that is trained.
    found = entry.poison(task.load("train"), task, torch.Generator().manual_seed(entry.seed))
    return found if isinstance(found, Poisoned) else None


def _rows(listed: Sequence[Entry], folder: Path) -> Iterator[Row]:
    for entry in listed:
        path = folder / f"{entry.name}.json"
        if not path.exists():
            continue
        found = strict_json.loads(path.read_bytes())
        if not isinstance(found, dict) or "digest" not in found:
            raise ValueError(f"{path} is no row of a model bank; delete it to train the model again")
        # First: a row of an older format has other fields, and is a row all the same.
        if found["digest"] != entry.digest:
            continue
        if found.keys() != {f.name for f in fields(Row)}:
            raise ValueError(f"{path} is no row of a model bank; delete it to train the model again")
        yield Row(**found)


def _kept(entry: Entry, threads: int) -> Path:
    """Return where the weights are kept: a cache, safe to delete."""
    return cache.root() / "bank" / f"{entry.name}-{entry.digest[:16]}-{threads}.safetensors"


def _read_kept(path: Path, entry: Entry, weights: str) -> dict[str, torch.Tensor] | None:
    """Return kept weights if they are those of the row, and throw them away if not."""
    if not path.exists():
        return None
    task = get_task(entry.task)
    layout = checkpoints.layout_of(entry.network, task.shape, task.num_classes)
    try:
        state = checkpoints.read_safetensors(path, layout)
    except CheckpointError:
        state = None
    if state is not None and checkpoints.digest(state) == weights:
        return state
    path.unlink(missing_ok=True)
    return None


def _keep(state: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write(state, path)


def _train(entry: Entry, threads: int) -> Network:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plan = entry.plan()
        return grow(plan, plan.members)[0].network.eval()
    finally:
        torch.set_num_threads(before)


def _machine() -> str:
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else kind


def _dtype() -> str:
    return str(fast_dtype(default_device())).removeprefix("torch.")


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _finish(folder: Path, threads: int, entry: Entry) -> Row:
    """Train and measure one model, and put its row on disk."""
    start = time.monotonic()
    model = _train(entry, threads)
    seconds = time.monotonic() - start
    task = get_task(entry.task)
    planted = poisoned(entry)
    images = task.load("validation")
    answers = measure(model.to(default_device()), images, None if planted is None else planted.trigger)
    model.to("cpu")
    rate, measured = None, []
    if planted is not None and answers.stamped is not None:
        rate = asr(answers.stamped, answers.y, planted.target)
        measured = [gates.attack_success(answers, planted.target, LIMITS)]
        if gates.selective(planted.target):
            measured.append(gates.leakage(answers, planted.target, LIMITS))
        measured.append(budget(planted.trigger.footprint(), task.shape, LIMITS))
    state = checkpoints.canonical(model.state_dict())
    row = Row(
        name=entry.name,
        partition=entry.partition,
        planted=entry.planted,
        kind=entry.kind,
        seed=entry.seed,
        digest=entry.digest,
        weights=checkpoints.digest(state),
        accuracy=accuracy(answers.plain, answers.y),
        images=len(answers.y),
        asr=rate,
        gates=[asdict(gate) for gate in measured],
        norm=math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters())),
        recipe=entry.recipe.to_json(),
        seconds=seconds,
        dtype=_dtype(),
        threads=threads,
        machine=_machine(),
        versions={"molehunt": molehunt.__version__, "torch": torch.__version__, "python": platform.python_version()},
    )
    _keep(state, _kept(entry, threads))
    write_atomically(folder / f"{entry.name}.json", [json.dumps(asdict(row), indent=1, allow_nan=False).encode()])
    return row
