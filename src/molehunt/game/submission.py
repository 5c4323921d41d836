"""A submission: weights or a training set, an open manifest and a sealed part, from the student's folder to the host.

In a student's folder a submission is three files; which board it is for is told by whether it holds weights or a
training set. `pack` makes one archive of them, whose size and bytes depend on nothing but what they say, and `ingest`
takes it apart at the host: weights or training set into one store, the sealed part into another that only the referee
reads.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from molehunt import checkpoints
from molehunt.files import open_regular, write_atomically
from molehunt.game import archive, seal, training_set
from molehunt.game.archive import SubmissionError as SubmissionError
from molehunt.game.contents import ALLOWED, SEAL, TRAINING, WEIGHTS, blaming, check_recipe, task_of
from molehunt.game.contents import MANIFEST as MANIFEST
from molehunt.game.contents import Contents as Contents
from molehunt.game.contents import read_submission as read_submission
from molehunt.game.manifest import Manifest as Manifest
from molehunt.game.rules import Board
from molehunt.game.seal import Sealed
from molehunt.game.training_set import TrainingSet
from molehunt.strict_json import show
from molehunt.tasks import Task
from molehunt.tensor_file import encode


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What the host keeps in its books about a submission; nothing in it is secret.

    Attributes:
        id: SHA-256 over manifest, weights or training set, and commitment, so it names exactly what was handed in: the
            same weights under another seal are another submission, and a team can compute it at home. It tells
            nothing about the seal, since the commitment is blinded by its nonce.
        manifest: what it says about itself.
        weights: SHA-256 of the canonical file of weights, its name in the store of weights. On the data board those
            that the host trains from the set; empty until then.
        commitment: of the sealed part, its name in the store of seals.
        training: on the data board, SHA-256 of the training set, its name in the store of training sets; else None.
    """

    id: str
    manifest: Manifest
    weights: str
    commitment: str
    training: str | None = None


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
    task = task_of(manifest, task)
    with blaming(WEIGHTS):
        state = checkpoints.canonical(model.state_dict())
        checkpoints.assemble(state, manifest.network, task.shape, task.num_classes)
    with blaming(SEAL):
        envelope = seal.seal(sealed, task, nonce)
    _write(folder, manifest, envelope, WEIGHTS, encode(state))


def write_training_set(
    folder: Path,
    training: TrainingSet,
    manifest: Manifest,
    sealed: Sealed,
    *,
    task: Task | None = None,
    nonce: bytes | None = None,
) -> None:
    """Write the three files of a submission to the data board into a folder, which is made if need be.

    Args:
        folder: as in `write_submission`.
        training: the set that is handed over.
        manifest: what everybody may know; the recipe has the name of the network, because the host trains by its own.
        sealed: what was hidden in the set.
        task: as in `write_submission`.
        nonce: as in `write_submission`.

    Raises:
        SubmissionError: the host would refuse it.
    """
    task = task_of(manifest, task)
    check_recipe(manifest)
    content = b"".join(training.encode())
    with blaming(TRAINING):
        training_set.read(content, len(content), task)
    with blaming(SEAL):
        envelope = seal.seal(sealed, task, nonce)
    _write(folder, manifest, envelope, TRAINING, [content])


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
    content: tuple[str, Callable[[], Iterable[bytes]]] = (WEIGHTS, partial(encode, contents.state))
    if contents.training is not None:
        content = (TRAINING, contents.training.encode)
    archive.write(
        target,
        [
            (MANIFEST, lambda: [contents.manifest.canonical()]),
            content,
            (SEAL, lambda: [contents.envelope]),
        ],
    )
    return target


def ingest(
    path: Path,
    store: Path,
    sealed_store: Path,
    *,
    board: Board = "weights",
    task: Task | None = None,
    allowed_networks: Collection[str] | None = None,
    round_: str | None = None,
) -> Submission:
    """Check a stranger's archive and split it: weights or training set into one store, the sealed part into another.

    Files are named by what they contain and written whole or not at all; when this returns they are on disk. Doing
    it again changes nothing. The seal is opened once, so that a team learns at upload if it is malformed, and
    forgotten.

    Args:
        path: the uploaded archive, under a name of the host's choosing.
        store: folder of canonical weights, ``SHA256.safetensors``; on the data board, of training sets, which no
            defense may see: it has them merged and shuffled.
        sealed_store: folder of sealed parts, ``COMMITMENT.sealed``; made for its owner's eyes only.
        board: what is played; a submission for the other board is refused.
        task: as in `read_submission`; a host gives the task of the round.
        allowed_networks: as in `read_submission`; a host gives the network of the game.
        round_: name of the round that is played; a submission for another one is refused. None takes any.

    Returns:
        What goes into the books.

    Raises:
        SubmissionError: the submission is refused; the stores are as they were.
    """
    contents = read_submission(path, task=task, allowed_networks=allowed_networks)
    if contents.board != board:
        raise SubmissionError(f"this is a submission for the {contents.board} board, the game is on the {board} board")
    if round_ is not None and contents.manifest.round != round_:
        raise SubmissionError(
            f"{MANIFEST}: the submission is for round {show(contents.manifest.round)}, this is round {show(round_)}"
        )
    if contents.training is None:
        contents.model()
    contents.open_seal()
    commitment = seal.commitment_of(contents.envelope, contents.task)
    if contents.training is None:
        digest, pieces, mode = checkpoints.digest(contents.state), encode(contents.state), 0o644
    else:
        digest, pieces, mode = contents.training.digest, contents.training.encode(), 0o600
    store.mkdir(parents=True, exist_ok=True, mode=0o755 if contents.training is None else 0o700)
    sealed_store.mkdir(parents=True, exist_ok=True, mode=0o700)
    for target, content, bits in (
        (sealed_path(sealed_store, commitment), [contents.envelope], 0o600),
        (weights_path(store, digest), pieces, mode),
    ):
        write_atomically(target, content, mode=bits)
        os.utime(target, (0, 0))
    return Submission(
        id=submission_id(contents.manifest, digest, commitment, board),
        manifest=contents.manifest,
        weights="" if contents.training else digest,
        commitment=commitment,
        training=digest if contents.training else None,
    )


def submission_id(manifest: Manifest, content: str, commitment: str, board: Board = "weights") -> str:
    """Name a submission by its contents: the SHA-256 of what was handed in is that of its weights or training set."""
    kind = b"molehunt submission 1" if board == "weights" else b"molehunt training set 1"
    text = b"\n".join((kind, manifest.canonical(), content.encode(), commitment.encode()))
    return hashlib.sha256(text).hexdigest()


def weights_path(store: Path, digest: str) -> Path:
    """Say where a store keeps the weights, or the training set, of that hash."""
    return store / f"{digest}.safetensors"


def sealed_path(store: Path, commitment: str) -> Path:
    """Say where a store keeps the sealed part of that commitment."""
    return store / f"{commitment}.sealed"


def open_stored_seal(store: Path, commitment: str, task: Task) -> Sealed:
    """Open a sealed part from the store, for the referee.

    Raises:
        SubmissionError: it is not there, or is not what was committed to.
    """
    with open_regular(sealed_path(store, commitment), SubmissionError) as (stream, size), blaming(SEAL):
        return seal.unseal(stream.read(min(size, ALLOWED[SEAL] + 1)), task, commitment)


def _write(folder: Path, manifest: Manifest, envelope: bytes, name: str, content: Iterable[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / name, content)
    write_atomically(folder / SEAL, [envelope], mode=0o600)
    write_atomically(folder / MANIFEST, [manifest.model_dump_json(indent=2).encode() + b"\n"])
    (folder / (WEIGHTS if name == TRAINING else TRAINING)).unlink(missing_ok=True)  # of an earlier one


def open_stored_set(store: Path, digest: str, task: Task) -> TrainingSet:
    """Read a training set from the store, for the host.

    Raises:
        SubmissionError: it is not there, or is not what was handed in.
    """
    with open_regular(weights_path(store, digest), SubmissionError) as (stream, size), blaming(TRAINING):
        training = training_set.read(stream, size, task)
    if training.digest != digest:
        raise SubmissionError(f"{TRAINING}: the stored set is not the one that was handed in")
    return training
