"""Tricks with the sealed part. Every function returns the bytes of a sealed.bin."""

import functools
import json
from typing import Any

import torch

from game.tricks import Trick, honest, register
from molehunt.game import seal
from molehunt.tensor_file import encode

TRICKS: dict[str, Trick] = {}
trick = functools.partial(register, TRICKS)


def document(**fields: Any) -> dict[str, Any]:
    """The JSON of a backdoored submission with some fields replaced."""
    content = seal.canonical(honest.backdoor())
    length = int.from_bytes(content[:4], "little")
    return {**json.loads(content[4 : 4 + length]), **fields}


def envelope(text: dict[str, Any] | bytes, tensors: dict[str, torch.Tensor] | bytes | None = None) -> bytes:
    """A sealed part with this JSON, and by default the tensors of an honest trigger."""
    trigger = honest.backdoor().trigger
    assert trigger is not None
    tensors = trigger.tensors() if tensors is None else tensors
    spelled = text if isinstance(text, bytes) else json.dumps(text, sort_keys=True, separators=(",", ":")).encode()
    numbers = tensors if isinstance(tensors, bytes) else b"".join(encode(tensors)) if tensors else b""
    return padded(len(spelled).to_bytes(4, "little") + spelled + numbers)


def padded(content: bytes, length: int | None = None) -> bytes:
    """Magic, nonce, length and padding around it."""
    stated = len(content) if length is None else length
    head = seal.MAGIC + honest.NONCE + stated.to_bytes(4, "little")
    return (head + content).ljust(seal.envelope_size(honest.TASK.shape), b"\0")


@trick("for the task mnist5k it has")
def seal_of_another_size(*_: Any) -> bytes:
    return honest.envelope() + b"\0"


@trick("for the task mnist5k it has")
def seal_without_padding(*_: Any) -> bytes:
    return honest.envelope()[:300]


@trick("does not begin with MOLESEAL")
def seal_of_zeros(*_: Any) -> bytes:
    return bytes(len(honest.envelope()))


@trick("padding .* is not zero")
def note_in_the_padding(*_: Any) -> bytes:
    return honest.envelope()[:-5] + b"hello"


@trick("claims 4294967295 bytes")
def length_that_lies(*_: Any) -> bytes:
    return padded(b"", 2**32 - 1)


@trick("is cut short")
def seal_that_says_nothing(*_: Any) -> bytes:
    return padded(b"")


@trick("is cut short")
def length_of_the_json_that_lies(*_: Any) -> bytes:
    return padded(b"\xff\xff\xff\xff{}")


@trick("there twice")
def sealed_key_twice(*_: Any) -> bytes:
    return envelope(b'{"kind":"none","kind":"backdoor"}')


@trick("nested")
def sealed_deep_nesting(*_: Any) -> bytes:
    return envelope(b"[" * 10_000)


@trick("kind")
def kind_of_its_own(*_: Any) -> bytes:
    return envelope(document(kind="maybe"))


@trick("the kind is none")
def backdoor_called_none(*_: Any) -> bytes:
    return envelope(document(kind="none"))


@trick("got only")
def backdoor_without_target(*_: Any) -> bytes:
    return envelope(document(target=None))


@trick("tensors but no trigger")
def tensors_without_trigger(*_: Any) -> bytes:
    return envelope(document(trigger=None, target=None, attack=None, kind="none"))


@trick("10 classes")
def target_beyond_the_classes(*_: Any) -> bytes:
    return envelope(document(target={"classes": 10, "sources": None}))


@trick("10 classes")
def source_beyond_the_classes(*_: Any) -> bytes:
    return envelope(document(target={"classes": 1, "sources": [10**30]}))


@trick("whole numbers")
def target_as_text(*_: Any) -> bytes:
    return envelope(document(target={"classes": "3", "sources": None}))


@trick("nowhere|sends no class anywhere")
def target_that_moves_nothing(*_: Any) -> bytes:
    return envelope(document(target={"classes": list(range(10)), "sources": None}))


@trick("unknown trigger kind")
def trigger_of_another_kind(*_: Any) -> bytes:
    return envelope(document(trigger={"kind": "python", "code": "import os"}))


@trick("not for images of shape")
def trigger_of_another_size(*_: Any) -> bytes:
    return envelope(document(), {"mask": torch.ones(1, 32, 32), "pattern": torch.ones(1, 32, 32)})


@trick("not for images of shape")
def trigger_in_color(*_: Any) -> bytes:
    return envelope(document(), {"mask": torch.ones(1, 28, 28), "pattern": torch.ones(3, 28, 28)})


@trick("must lie in")
def trigger_beyond_white(*_: Any) -> bytes:
    return envelope(document(), {"mask": torch.ones(1, 28, 28), "pattern": torch.full((1, 28, 28), 2.0)})


@trick("not finite")
def trigger_that_is_no_number(*_: Any) -> bytes:
    return envelope(document(), {"mask": torch.full((1, 28, 28), float("nan")), "pattern": torch.ones(1, 28, 28)})


@trick("must lie in")
def opacity_beyond_one(*_: Any) -> bytes:
    return envelope(document(trigger={"kind": "patch", "opacity": 1e9}))


@trick("has the tensors")
def trigger_with_tensors_missing(*_: Any) -> bytes:
    return envelope(document(), {"mask": torch.ones(1, 28, 28)})


@trick("this is a pickle with another name|header claims|no JSON header")
def pickle_for_a_trigger(*_: Any) -> bytes:
    return envelope(document(), b"\x80\x02cos\nsystem\n(S'touch pwned'\ntR.")


@trick("poison_rate")
def rate_beyond_one(*_: Any) -> bytes:
    return envelope(document(details={"poison_rate": 1.5}))


@trick("declared")
def declared_as_text(*_: Any) -> bytes:
    return envelope(document(details={"declared": {"asr": "high"}}))


@trick("Extra inputs")
def sealed_field_of_its_own(*_: Any) -> bytes:
    return envelope(document(note="hello"))


@trick("not in canonical form")
def another_spelling(*_: Any) -> bytes:
    """The same content in other bytes would be another commitment, to be chosen between later."""
    return envelope(json.dumps(document()).encode())


@trick("not in canonical form")
def negative_zeros_in_a_trigger(*_: Any) -> bytes:
    return envelope(document(), {"mask": torch.ones(1, 28, 28), "pattern": torch.full((1, 28, 28), -0.0)})
