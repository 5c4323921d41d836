"""The sealed part: what a team hid, committed to at upload and opened after closing.

A sealed part is the same number of bytes whether a model is honest or not; what it says, and how long it is, lie
inside. The commitment is the SHA-256 of a secret nonce and the canonical bytes: it binds the team, and without the
nonce it tells nothing, although the honest answer "none" is easy to guess.

The file is::

    8 bytes    MOLESEAL
    32 bytes   nonce
    4 bytes    length of the canonical bytes, little-endian
    ...        canonical bytes: 4 bytes of length, JSON, tensors as safetensors (absent where there are none)
    ...        zeros up to `envelope_size`
"""

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from molehunt import checkpoints, strict_json, triggers
from molehunt.files import Refused
from molehunt.game.manifest import One
from molehunt.tasks import Task
from molehunt.tensor_file import Limits, encode
from molehunt.triggers import Target, Trigger

MAGIC = b"MOLESEAL"
NONCE = 32
PREFIX = len(MAGIC) + NONCE + 4
DOCUMENT = 2**16
SMALLEST = 2**20
TENSORS = 2 * triggers.several.MOST
"""Tensors that a trigger may have: so many has the largest kind, a mask and a pattern for each of several patches."""
HEADER = 2**13

Finite = Annotated[float, Field(allow_inf_nan=False)]


class SealError(Refused):
    """A sealed part is refused, or does not open; the message says why."""


class _Details(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    config: dict[str, Any] = Field(default_factory=dict, max_length=64)
    poison_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    declared: dict[Annotated[str, Field(max_length=64)], Finite] = Field(default_factory=dict, max_length=32)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: One
    kind: Literal["none", "backdoor"]
    attack: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")] | None
    target: dict[str, Any] | None
    trigger: dict[str, Any] | None
    details: _Details


@dataclass(frozen=True, kw_only=True, eq=False)
class Sealed:
    """What a team hid.

    Attributes:
        attack: name of the attack; None for an honest model, and then so are target and trigger.
        target: where the trigger sends images.
        trigger: what wakes the backdoor.
        details: what else the team states, as JSON; each key may be absent. `config`: the configuration of the attack.
            `poison_rate`: share of the training images that were altered, in [0, 1]. `seed`: that of the training run,
            from 0. `declared`: figures by name that the team measured. Nothing of it is trusted; it is
            published with the rest.

    Raises:
        ValueError: a backdoor without attack, target or trigger, or an honest model with one of them; unknown or
            malformed details.
    """

    attack: str | None = None
    target: Target | None = None
    trigger: Trigger | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [name for name in ("attack", "target", "trigger") if getattr(self, name) is not None]
        if len(given) not in {0, 3}:
            raise ValueError(
                f"a backdoor has an attack, a target and a trigger, an honest model none; got only {given}"
            )
        try:
            _Details.model_validate(self.details)
        except ValidationError as error:
            raise SealError(f"details: {first_problem(error)}") from None

    @property
    def backdoored(self) -> bool:
        """Whether something is hidden."""
        return self.attack is not None


def envelope_size(shape: tuple[int, int, int]) -> int:
    """Bytes of every sealed part of a task with images (C, H, W).

    One megabyte holds the largest trigger, a mask and a pattern in float32, on 3x224x224 images, and 64 KiB of JSON.
    Larger images get the next power of two. The size follows from the task alone, which is public, so it tells nothing.
    """
    channels, height, width = shape
    needed = 4 * (channels + 1) * height * width + 2 * DOCUMENT
    return max(SMALLEST, 1 << (needed - 1).bit_length())


def canonical(sealed: Sealed) -> bytes:
    """Write a sealed part in its only spelling, without nonce and padding.

    Raises:
        ValueError: the JSON is too long, has numbers that are not finite, or the tensors are not finite.
    """
    document = strict_json.dumps(
        {
            "format": 1,
            "kind": "backdoor" if sealed.backdoored else "none",
            "attack": sealed.attack,
            "target": None if sealed.target is None else sealed.target.to_json(),
            "trigger": None if sealed.trigger is None else sealed.trigger.to_json(),
            "details": _plain(_Details.model_validate(sealed.details)),
        }
    )
    if len(document) > DOCUMENT:
        raise SealError(f"the sealed JSON has {len(document)} bytes; at most {DOCUMENT} are sealed; shorten the config")
    tensors = {} if sealed.trigger is None else checkpoints.canonical(sealed.trigger.tensors())
    return len(document).to_bytes(4, "little") + document + (b"".join(encode(tensors)) if tensors else b"")


def new_nonce() -> bytes:
    """Draw the secret that hides a sealed part behind its commitment.

    From the operating system and not from a `torch.Generator`: whoever guessed a seed could try both answers.
    """
    return secrets.token_bytes(NONCE)


def seal(sealed: Sealed, task: Task, nonce: bytes | None = None) -> bytes:
    """Make the padded sealed part of a submission.

    Args:
        sealed: what was hidden; checked against the task as the host will check it.
        task: what the model was trained for.
        nonce: 32 secret bytes; None draws them.

    Returns:
        `envelope_size(task.shape)` bytes.

    Raises:
        SealError: it does not fit the task or the envelope.
    """
    nonce = new_nonce() if nonce is None else nonce
    if len(nonce) != NONCE:
        raise SealError(f"expected a nonce of {NONCE} bytes, got {len(nonce)}")
    content = canonical(sealed)
    size = envelope_size(task.shape)
    if PREFIX + len(content) > size:
        raise SealError(f"the sealed part has {PREFIX + len(content)} bytes; for this task at most {size}")
    envelope = (MAGIC + nonce + len(content).to_bytes(4, "little") + content).ljust(size, b"\0")
    unseal(envelope, task)  # a team should learn about a mistake now, not from the host
    return envelope


def opening(envelope: bytes, task: Task) -> tuple[bytes, bytes]:
    """Take nonce and canonical bytes out of a sealed part without reading what they say.

    Raises:
        SealError: another size than this task's, another kind of file, or padding that is not zero.
    """
    size = envelope_size(task.shape)
    if len(envelope) != size:
        raise SealError(f"the sealed part has {len(envelope)} bytes; for the task {task.name} it has {size}")
    if not envelope.startswith(MAGIC):
        raise SealError(f"the sealed part does not begin with {MAGIC.decode()}")
    nonce = envelope[len(MAGIC) : len(MAGIC) + NONCE]
    length = int.from_bytes(envelope[PREFIX - 4 : PREFIX], "little")
    if length > size - PREFIX:
        raise SealError(f"the sealed part claims {length} bytes of content; at most {size - PREFIX} fit")
    if envelope[PREFIX + length :].strip(b"\0"):
        raise SealError("the padding of the sealed part is not zero")
    return nonce, envelope[PREFIX : PREFIX + length]


def commit(nonce: bytes, content: bytes) -> str:
    """Commit to a sealed part: SHA-256 of the nonce and the canonical bytes, in hexadecimal.

    Raises:
        SealError: the nonce does not have 32 bytes, so that bytes could be moved between it and the content.
    """
    if len(nonce) != NONCE:
        raise SealError(f"expected a nonce of {NONCE} bytes, got {len(nonce)}")
    return hashlib.sha256(nonce + content).hexdigest()


def verify(commitment: str, nonce: bytes, content: bytes) -> bool:
    """Whether these are exactly the bytes that were committed to."""
    return len(nonce) == NONCE and hmac.compare_digest(commit(nonce, content).encode(), commitment.encode())


def commitment_of(envelope: bytes, task: Task) -> str:
    """Return the commitment of a padded sealed part.

    Raises:
        SealError: as in `opening`.
    """
    return commit(*opening(envelope, task))


def unseal(envelope: bytes, task: Task, commitment: str | None = None) -> Sealed:
    """Open a sealed part and check all that it says against the task.

    Args:
        envelope: the padded sealed part.
        task: what the model was submitted for.
        commitment: what was published at upload; None skips the comparison.

    Raises:
        SealError: it is not what was committed to; malformed; or it names classes or images that the task does not
            have.
    """
    nonce, content = opening(envelope, task)
    if commitment is not None and not verify(commitment, nonce, content):
        raise SealError("the sealed part is not the one that was committed to")
    try:
        sealed = _parse(content)
        _check(sealed, task)
        if canonical(sealed) != content:
            raise SealError("the sealed part is not in canonical form; make it with `seal`")
    except SealError:
        raise
    except ValidationError as error:
        raise SealError(f"sealed part: {first_problem(error)}") from None
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        # The trigger's own checks raise ValueError; the others are what torch raises on shapes it did not expect.
        raise SealError(f"sealed part: {error}") from None
    return sealed


def first_problem(error: ValidationError) -> str:
    """Say in one short line what the first thing is that a schema refuses."""
    problem = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{strict_json.show(place)}: {reason}, got {strict_json.show(problem['input'])}"


def _plain(details: _Details) -> dict[str, Any]:
    return details.model_dump(exclude_unset=True)


def _parse(content: bytes) -> Sealed:
    length = int.from_bytes(content[:4], "little")
    if len(content) < 4 or length > len(content) - 4:
        raise SealError("the sealed part is cut short")
    document = _Document.model_validate(strict_json.loads(content[4 : 4 + length], limit=DOCUMENT))
    tensors: Mapping[str, Tensor] = {}
    if rest := content[4 + length :]:
        limits = Limits(file=len(rest), header=HEADER, tensors=TENSORS)
        tensors = checkpoints.read_safetensors(rest, None, limits=limits)
    trigger = None if document.trigger is None else triggers.from_json(document.trigger, tensors)
    if trigger is None and tensors:
        raise SealError("the sealed part has tensors but no trigger")
    sealed = Sealed(
        attack=document.attack,
        target=None if document.target is None else Target.from_json(document.target),
        trigger=trigger,
        details=_plain(document.details),
    )
    if sealed.backdoored != (document.kind == "backdoor"):
        raise SealError(f"the kind is {document.kind}, which is not what the rest says")
    return sealed


def _check(sealed: Sealed, task: Task) -> None:
    """Compare a target and a trigger with the classes and images of the task."""
    if sealed.target is None or sealed.trigger is None:
        return
    sealed.target.check(task.num_classes)
    y = torch.arange(task.num_classes)
    if not bool(sealed.target.counts(y).any()):
        raise SealError("the target sends no class anywhere but where it already is")
    if not triggers.fits(sealed.trigger, task.shape):
        raise SealError(f"the trigger is not for images of shape {task.shape}")
    x = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).repeat(1, *task.shape)
    stamped = sealed.trigger(x)
    # Rounding may leave [0, 1] by a hair; NaN fails every comparison.
    if stamped.shape != x.shape or not bool(((stamped >= -1e-6) & (stamped <= 1 + 1e-6)).all()):
        raise SealError("the trigger makes something other than images in [0, 1]")
