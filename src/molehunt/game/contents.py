"""What a submission holds: read from an archive or a folder, and checked before anything is believed.

Both ends use `read_submission`, so what `check` accepts at home the host accepts.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError
from torch import Tensor

from molehunt import checkpoints, networks, strict_json
from molehunt.files import open_regular
from molehunt.game import archive, seal, training_set
from molehunt.game.archive import Member, SubmissionError
from molehunt.game.manifest import Manifest
from molehunt.game.rules import Board
from molehunt.game.seal import Sealed, SealError, first_problem
from molehunt.game.training_set import TrainingSet, TrainingSetError
from molehunt.strict_json import show
from molehunt.tasks import TASKS, Task
from molehunt.tensor_file import LIMITS, CheckpointError

MANIFEST, WEIGHTS, SEAL = "manifest.json", "model.safetensors", "sealed.bin"
TRAINING = "training.safetensors"
ALLOWED = {MANIFEST: 2**14, WEIGHTS: LIMITS.file, TRAINING: LIMITS.file, SEAL: 2**24}


@dataclass(frozen=True, kw_only=True, eq=False)
class Contents:
    """A submission that was read and found in order; the seal is checked in size only, not opened.

    Attributes:
        manifest: what it says about itself.
        task: the task that it is for.
        envelope: the padded sealed part.
        state: on the weights board, the weights in canonical form, float32 by name; else empty.
        training: on the data board, the training set; else None.
    """

    manifest: Manifest
    task: Task
    envelope: bytes
    state: dict[str, Tensor] = field(default_factory=dict)
    training: TrainingSet | None = None

    @property
    def board(self) -> Board:
        """The board that it is for."""
        return "weights" if self.training is None else "data"

    def model(self) -> networks.Network:
        """Put the weights into their network, in evaluation mode.

        Raises:
            SubmissionError: the network answers plain images with something that is not finite, or this is a training
                set, from which the host trains the model.
        """
        if self.training is not None:
            raise SubmissionError("this is a training set, of the data board: the host trains the model from it")
        with blaming(WEIGHTS):
            return checkpoints.assemble(self.state, self.manifest.network, self.task.shape, self.task.num_classes)

    def open_seal(self) -> Sealed:
        """Open the sealed part; for the team itself, and for the referee.

        Raises:
            SubmissionError: it is malformed or does not fit the task.
        """
        with blaming(SEAL):
            return seal.unseal(self.envelope, self.task)


def read_submission(
    path: Path, *, task: Task | None = None, allowed_networks: Collection[str] | None = None
) -> Contents:
    """Read a packed submission, or the folder of one, and check everything but the inside of the seal.

    Nothing is extracted and nothing in it is run.

    Args:
        path: an archive or a folder.
        task: what the submission must be for; None takes the one of `TASKS` that the manifest names. A task that is
            a folder of pictures must be given, since a stranger's manifest opens no paths.
        allowed_networks: names of architectures that are accepted; None accepts all of `NETWORKS`.

    Raises:
        SubmissionError: anything is wrong with it; the message names the file.
    """
    with _members(path) as members:
        if TRAINING in members and WEIGHTS in members:
            raise SubmissionError(f"{WEIGHTS} and {TRAINING} are both there; a submission is for one board")
        content = TRAINING if TRAINING in members else WEIGHTS
        if missing := [name for name in (MANIFEST, content, SEAL) if name not in members]:
            raise SubmissionError(f"{missing[0]} is missing; make the submission with `molehunt train` or `pack`")
        manifest = _manifest(members[MANIFEST].read())
        task = task_of(manifest, task)
        known = networks.NETWORKS if allowed_networks is None else allowed_networks
        if manifest.network not in known:
            raise SubmissionError(
                f"{MANIFEST}: unknown network {show(manifest.network)}; accepted here: {', '.join(sorted(known))}"
            )
        if members[SEAL].size != (size := seal.envelope_size(task.shape)):
            raise SubmissionError(f"{SEAL} has {members[SEAL].size} bytes; for the task {task.name} it has {size}")
        with blaming(content):
            layout = checkpoints.layout_of(manifest.network, task.shape, task.num_classes)
            if content == TRAINING:
                check_recipe(manifest)
                training = training_set.read(members[TRAINING].open(), members[TRAINING].size, task)
                return Contents(manifest=manifest, task=task, training=training, envelope=members[SEAL].read())
            state = checkpoints.read_safetensors(members[WEIGHTS].open(), layout)
        return Contents(manifest=manifest, task=task, state=state, envelope=members[SEAL].read())


def check_recipe(manifest: Manifest) -> None:
    """Refuse a recipe of the team's own on the data board, where the host trains.

    Raises:
        SubmissionError: as said.
    """
    if manifest.recipe != manifest.network:
        raise SubmissionError(
            f"{MANIFEST}: on the data board the host trains {manifest.network} by its own recipe of that name, got "
            f"{show(manifest.recipe)}"
        )


def task_of(manifest: Manifest, task: Task | None) -> Task:
    """Look up the task that a manifest names, or see that it is the one that is given.

    Raises:
        SubmissionError: unknown, or another.
    """
    if task is None:
        if manifest.task not in TASKS:
            raise SubmissionError(f"{MANIFEST}: unknown task {show(manifest.task)}; known: {', '.join(TASKS)}")
        return TASKS[manifest.task]
    if manifest.task != task.name:
        raise SubmissionError(f"{MANIFEST}: the submission is for {show(manifest.task)}, expected {show(task.name)}")
    return task


def _manifest(data: bytes) -> Manifest:
    try:
        return Manifest.model_validate(strict_json.loads(data, limit=ALLOWED[MANIFEST], depth=2))
    except strict_json.JSONError as error:
        raise SubmissionError(f"{MANIFEST}: {error}") from None
    except ValidationError as error:
        raise SubmissionError(f"{MANIFEST}: {first_problem(error)}") from None


@contextmanager
def _members(path: Path) -> Iterator[dict[str, Member]]:
    if path.is_dir():
        with ExitStack() as stack:
            yield dict(_folder(path, stack))
    else:
        with open_regular(path, SubmissionError) as (stream, size):
            yield archive.read(stream, size, ALLOWED)


def _folder(folder: Path, stack: ExitStack) -> Iterator[tuple[str, Member]]:
    for name, most in ALLOWED.items():
        if (folder / name).exists():
            stream, size = stack.enter_context(open_regular(folder / name, SubmissionError))
            if size > most:
                raise SubmissionError(f"{name} has {size} bytes; at most {most} are read")
            yield name, Member(name, size, partial(_same, stream))


def _same(stream: BinaryIO) -> BinaryIO:
    stream.seek(0)
    return stream


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Let a refusal by another module name the file of the submission that it is about."""
    try:
        yield
    except (CheckpointError, SealError, TrainingSetError) as error:
        raise SubmissionError(f"{name}: {error}") from None
