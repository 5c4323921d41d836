"""A submission: weights, an open manifest and a sealed part, from the student's folder to the host's stores.

In a student's folder a submission is three files. `pack` makes one archive of them, whose size and bytes depend on
nothing but what they say, and `ingest` takes it apart at the host: the weights into one store, the sealed part into
another that only the referee reads. Both ends use `read_submission`, so what `check` accepts at home the host accepts.
"""

import hashlib
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError
from torch import Tensor, nn

from molehunt import checkpoints, networks, strict_json
from molehunt.files import open_regular, write_atomically
from molehunt.game import archive, seal
from molehunt.game.archive import Member
from molehunt.game.archive import SubmissionError as SubmissionError
from molehunt.game.manifest import Manifest as Manifest
from molehunt.game.seal import Sealed, SealError, first_problem
from molehunt.strict_json import show
from molehunt.tasks import TASKS, Task
from molehunt.tensor_file import LIMITS, CheckpointError, encode

MANIFEST, WEIGHTS, SEAL = "manifest.json", "model.safetensors", "sealed.bin"
ALLOWED = {MANIFEST: 2**14, WEIGHTS: LIMITS.file, SEAL: 2**24}


@dataclass(frozen=True, kw_only=True, eq=False)
class Contents:
    """A submission that was read and found in order; the seal is checked in size only, not opened.

    Attributes:
        manifest: what it says about itself.
        task: the task that it is for.
        state: the weights in canonical form, float32 by name.
        envelope: the padded sealed part.
    """

    manifest: Manifest
    task: Task
    state: dict[str, Tensor]
    envelope: bytes

    def model(self) -> networks.Network:
        """Put the weights into their network, in evaluation mode.

        Raises:
            SubmissionError: the network answers plain images with something that is not finite.
        """
        with _blaming(WEIGHTS):
            return checkpoints.assemble(self.state, self.manifest.network, self.task.shape, self.task.num_classes)

    def open_seal(self) -> Sealed:
        """Open the sealed part; for the team itself, and for the referee.

        Raises:
            SubmissionError: it is malformed or does not fit the task.
        """
        with _blaming(SEAL):
            return seal.unseal(self.envelope, self.task)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What the host keeps in its books about a submission; nothing in it is secret.

    Attributes:
        id: SHA-256 over manifest, weights and commitment, so it names exactly what was handed in: the same weights
            under another seal are another submission, and a team can compute it at home. It tells nothing about the
            seal, since the commitment is blinded by its nonce.
        manifest: what it says about itself.
        weights: SHA-256 of the canonical file of weights, its name in the store of weights.
        commitment: of the sealed part, its name in the store of seals.
    """

    id: str
    manifest: Manifest
    weights: str
    commitment: str


def write_submission(
    folder: Path,
    model: nn.Module,
    manifest: Manifest,
    sealed: Sealed,
    *,
    task: Task | None = None,
    nonce: bytes | None = None,
) -> None:
    """Write the three files of a submission into a folder, which is made if need be.

    The folder is the team's private copy: `sealed.bin` holds the nonce that opens the commitment.

    Args:
        folder: where; files of an earlier submission in it are replaced.
        model: the trained network, of the architecture that the manifest names.
        manifest: what everybody may know.
        sealed: what was hidden.
        task: the task, if it is not one of `TASKS`.
        nonce: 32 secret bytes; None draws them, and nothing but a test or a resumed game should give them.

    Raises:
        SubmissionError: the model is not of that architecture, has values that are not finite, or the sealed part does
            not fit the task.
    """
    task = _task(manifest, task)
    with _blaming(WEIGHTS):
        state = checkpoints.canonical(model.state_dict())
        checkpoints.assemble(state, manifest.network, task.shape, task.num_classes)
    with _blaming(SEAL):
        envelope = seal.seal(sealed, task, nonce)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, encode(state))
    write_atomically(folder / SEAL, [envelope], mode=0o600)
    write_atomically(folder / MANIFEST, [manifest.model_dump_json(indent=2).encode() + b"\n"])


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
        if missing := [name for name in ALLOWED if name not in members]:
            raise SubmissionError(f"{missing[0]} is missing; make the submission with `molehunt train` or `pack`")
        manifest = _manifest(members[MANIFEST].read())
        task = _task(manifest, task)
        known = networks.NETWORKS if allowed_networks is None else allowed_networks
        if manifest.network not in known:
            raise SubmissionError(
                f"{MANIFEST}: unknown network {show(manifest.network)}; accepted here: {', '.join(sorted(known))}"
            )
        if members[SEAL].size != (size := seal.envelope_size(task.shape)):
            raise SubmissionError(f"{SEAL} has {members[SEAL].size} bytes; for the task {task.name} it has {size}")
        with _blaming(WEIGHTS):
            layout = checkpoints.layout_of(manifest.network, task.shape, task.num_classes)
            state = checkpoints.read_safetensors(members[WEIGHTS].open(), layout)
        return Contents(manifest=manifest, task=task, state=state, envelope=members[SEAL].read())


def pack(folder: Path, target: Path | None = None, *, task: Task | None = None) -> Path:
    """Make the archive of a submission folder.

    Everything is read as the host will read it and written in canonical form, so the archives of an honest and a
    backdoored model of one team and network have the same size, and no time, user or tool is recorded in them.

    Args:
        folder: a folder that `write_submission` made; other files in it stay out of the archive.
        target: the archive; None puts ``FOLDER.zip`` beside the folder.
        task: as in `read_submission`.

    Returns:
        The path of the archive.

    Raises:
        SubmissionError: the host would refuse it.
    """
    contents = read_submission(folder, task=task)
    contents.open_seal()
    target = folder.resolve().with_name(folder.resolve().name + ".zip") if target is None else target
    archive.write(
        target,
        [
            (MANIFEST, lambda: [contents.manifest.canonical()]),
            (WEIGHTS, partial(encode, contents.state)),
            (SEAL, lambda: [contents.envelope]),
        ],
    )
    return target


def ingest(
    path: Path,
    weights_store: Path,
    sealed_store: Path,
    *,
    task: Task | None = None,
    allowed_networks: Collection[str] | None = None,
) -> Submission:
    """Check a stranger's archive and split it: weights into one store, the sealed part into another.

    Files are named by what they contain and written whole or not at all; when this returns they are on disk. Doing
    it again changes nothing. The seal is opened once, so that a team learns at upload if it is malformed, and
    forgotten.

    Args:
        path: the uploaded archive, under a name of the host's choosing.
        weights_store: folder of canonical weights, ``SHA256.safetensors``.
        sealed_store: folder of sealed parts, ``COMMITMENT.sealed``; made for its owner's eyes only.
        task: as in `read_submission`; a host gives the task of the round.
        allowed_networks: as in `read_submission`.

    Returns:
        What goes into the books.

    Raises:
        SubmissionError: the submission is refused; the stores are as they were.
    """
    contents = read_submission(path, task=task, allowed_networks=allowed_networks)
    contents.model()
    contents.open_seal()
    commitment = seal.commitment_of(contents.envelope, contents.task)
    weights = checkpoints.digest(contents.state)
    weights_store.mkdir(parents=True, exist_ok=True)
    sealed_store.mkdir(parents=True, exist_ok=True, mode=0o700)
    for target, pieces, mode in (
        (sealed_path(sealed_store, commitment), [contents.envelope], 0o600),
        (weights_path(weights_store, weights), encode(contents.state), 0o644),
    ):
        write_atomically(target, pieces, mode=mode)
        os.utime(target, (0, 0))
    return Submission(
        id=submission_id(contents.manifest, weights, commitment),
        manifest=contents.manifest,
        weights=weights,
        commitment=commitment,
    )


def submission_id(manifest: Manifest, weights: str, commitment: str) -> str:
    """Name a submission by its contents; see `Submission`."""
    text = b"\n".join((b"molehunt submission 1", manifest.canonical(), weights.encode(), commitment.encode()))
    return hashlib.sha256(text).hexdigest()


def weights_path(store: Path, weights: str) -> Path:
    """Say where a store keeps the weights of that hash."""
    return store / f"{weights}.safetensors"


def sealed_path(store: Path, commitment: str) -> Path:
    """Say where a store keeps the sealed part of that commitment."""
    return store / f"{commitment}.sealed"


def open_stored_seal(store: Path, commitment: str, task: Task) -> Sealed:
    """Open a sealed part from the store, for the referee.

    Raises:
        SubmissionError: it is not there, or is not what was committed to.
    """
    with open_regular(sealed_path(store, commitment), SubmissionError) as (stream, size), _blaming(SEAL):
        return seal.unseal(stream.read(min(size, ALLOWED[SEAL] + 1)), task, commitment)


def _task(manifest: Manifest, task: Task | None) -> Task:
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
def _blaming(name: str) -> Iterator[None]:
    """Let a refusal by another module name the file of the submission that it is about."""
    try:
        yield
    except (CheckpointError, SealError) as error:
        raise SubmissionError(f"{name}: {error}") from None
