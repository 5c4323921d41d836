"""Tricks with the weights. Every function returns the bytes of a model.safetensors."""

import functools
import io
import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from game.tricks import Trick, honest, register
from molehunt.tensor_file import encode

TRICKS: dict[str, Trick] = {}
trick = functools.partial(register, TRICKS)
Header = dict[str, Any]


def with_tensor(name: str, value: Tensor) -> bytes:
    """Honest weights with one tensor replaced or added, written by the usual library."""
    return safetensors.torch.save({**honest.state(), name: value})


def with_header(change: Callable[[Header], None]) -> bytes:
    """Honest weights under a changed header."""
    content = honest.weights()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    return framed(json.dumps(header).encode(), content[8 + length :])


def framed(header: bytes, numbers: bytes = b"") -> bytes:
    """A file with this header."""
    return struct.pack("<Q", len(header)) + header + numbers


def first(header: Header) -> Header:
    """The line of the tensor whose numbers come first."""
    line: Header = min((v for v in header.values()), key=lambda v: v["data_offsets"][0])
    return line


@trick("missing 'head.bias'")
def tensor_missing(*_: Any) -> bytes:
    state = honest.state()
    del state["head.bias"]
    return b"".join(encode(state))


@trick("extra 'trigger'")
def tensor_too_many(*_: Any) -> bytes:
    return with_tensor("trigger", torch.ones(3))


@trick("'head.bias' has shape")
def another_shape(*_: Any) -> bytes:
    return with_tensor("head.bias", torch.ones(11))


@trick("'head.bias' has shape")
def shape_with_one_more_dimension(*_: Any) -> bytes:
    return with_tensor("head.bias", torch.ones(10, 1))


@trick("'head.bias' has dtype F16")
def half_precision(*_: Any) -> bytes:
    return with_tensor("head.bias", torch.ones(10, dtype=torch.float16))


@trick("'head.bias' has dtype F64")
def double_precision(*_: Any) -> bytes:
    return with_tensor("head.bias", torch.ones(10, dtype=torch.float64))


@trick("'head.bias' has dtype I32")
def integers_for_weights(*_: Any) -> bytes:
    return with_tensor("head.bias", torch.ones(10, dtype=torch.int32))


@trick("dtype 'F8_E4M3', which is not read")
def eight_bits(*_: Any) -> bytes:
    return with_tensor("head.bias", torch.ones(10).to(torch.float8_e4m3fn))


@trick("'head.bias' has values that are not finite")
def not_a_number_among_weights(*_: Any) -> bytes:
    return with_tensor("head.bias", torch.tensor([0.0] * 9 + [float("nan")]))


@trick("'head.bias' has values that are not finite")
def infinity_among_weights(*_: Any) -> bytes:
    return with_tensor("head.bias", torch.tensor([0.0] * 9 + [float("-inf")]))


@trick("plain images with values that are not finite")
def overflow_inside_the_network(*_: Any) -> bytes:
    """Every number is finite; what they do together is not."""
    return with_tensor("head.weight", torch.full_like(honest.state()["head.weight"], 3e38))


@trick("is a variance and has negative")
def negative_variance(*_: Any) -> bytes:
    name = next(name for name in honest.state() if name.endswith("running_var"))
    return with_tensor(name, -honest.state()[name])


@trick("divides the pixels")
def deviation_of_zero(*_: Any) -> bytes:
    return with_tensor("normalize.std", torch.zeros(1, 1, 1))


@trick("divides the pixels")
def deviation_that_rounds_to_zero(*_: Any) -> bytes:
    return with_tensor("normalize.std", torch.full((1, 1, 1), 1e-40))


@trick("this is a pickle with another name")
def pickle_for_weights(*_: Any) -> bytes:
    return pickle.dumps({name: np.zeros(3) for name in honest.state()})


@trick("this is a zip, such as a .pt file")
def torch_file_for_weights(*_: Any) -> bytes:
    memory = io.BytesIO()
    torch.save(honest.state(), memory)
    return memory.getvalue()


@trick("HDF5")
def keras_file_for_weights(*_: Any) -> bytes:
    return b"\x89HDF\r\n\x1a\n" + bytes(100)


@trick("no JSON header follows")
def random_bytes(*_: Any) -> bytes:
    return bytes(range(1, 100))


@trick("too short")
def nothing(*_: Any) -> bytes:
    return b""


@trick("claims 9223372036854775807 bytes")
def header_of_exabytes(*_: Any) -> bytes:
    return struct.pack("<Q", 2**63 - 1) + honest.weights()[8:]


@trick("claims 2000000 bytes; at most 1048576")
def header_of_megabytes(*_: Any) -> bytes:
    return framed(b"{" + b" " * 1_999_998 + b"}")


@trick("header: JSON nested")
def deep_header(*_: Any) -> bytes:
    return framed(b'{"a":' * 10_000)


@trick("header: the key 'head.bias' is there twice")
def tensor_twice(*_: Any) -> bytes:
    content = honest.weights()
    length = int.from_bytes(content[:8], "little")
    line = b'"head.bias":{"dtype":"F32","shape":[10],"data_offsets":[0,40]},'
    return framed(b"{" + line + content[9 : 8 + length], content[8 + length :])


@trick("header: NaN")
def offset_that_is_no_number(*_: Any) -> bytes:
    return with_header(lambda header: first(header).update(data_offsets=[0, float("nan")]))


@trick("not JSON")
def header_in_single_quotes(*_: Any) -> bytes:
    return framed(b"{'head.bias': 1}")


@trick("overlaps another tensor")
def overlapping_tensors(*_: Any) -> bytes:
    def change(header: Header) -> None:
        line = max(header.values(), key=lambda v: v["data_offsets"][0])
        line["data_offsets"] = [n - 4 for n in line["data_offsets"]]

    return with_header(change)


@trick("overlaps another tensor")
def all_tensors_on_one_place(*_: Any) -> bytes:
    def change(header: Header) -> None:
        for line in header.values():
            begin, end = line["data_offsets"]
            line["data_offsets"] = [0, end - begin]

    return with_header(change)


@trick("leaves bytes before it")
def hole_between_tensors(*_: Any) -> bytes:
    return with_header(lambda header: header.pop("head.bias"))


@trick("bytes follow the last tensor")
def bytes_behind_the_tensors(*_: Any) -> bytes:
    return honest.weights() + b"the trigger is yellow"


@trick("cut short")
def numbers_cut_short(*_: Any) -> bytes:
    return honest.weights()[:-1]


@trick("is damaged|the header claims")
def header_cut_short(*_: Any) -> bytes:
    return honest.weights()[:100]


@trick("positive numbers are read")
def empty_tensor_of_exabytes(*_: Any) -> bytes:
    return with_header(lambda header: header.update(x={"dtype": "F32", "shape": [0, 10**18], "data_offsets": [0, 0]}))


@trick("needs 400000000000000000000 bytes")
def shape_that_overflows(*_: Any) -> bytes:
    return with_header(lambda header: first(header).update(shape=[10**10, 10**10]))


@trick("positive numbers are read")
def shape_below_zero(*_: Any) -> bytes:
    return with_header(lambda header: first(header).update(shape=[-1, -1]))


@trick("positive numbers are read")
def shape_of_truths(*_: Any) -> bytes:
    return with_header(lambda header: first(header).update(shape=[True]))


@trick("positive numbers are read")
def shape_of_fractions(*_: Any) -> bytes:
    return with_header(lambda header: first(header).update(shape=[2.0, 2.0]))


@trick("positive numbers are read")
def shape_of_a_thousand_dimensions(*_: Any) -> bytes:
    return with_header(lambda header: first(header).update(shape=[1] * 1000))


@trick("expected \\[begin, end\\]")
def offsets_below_zero(*_: Any) -> bytes:
    return with_header(lambda header: first(header).update(data_offsets=[-4, 0]))


@trick("exactly dtype, shape and data_offsets")
def note_beside_a_tensor(*_: Any) -> bytes:
    return with_header(lambda header: first(header).update(note="backdoored"))


@trick("is not the name of a tensor")
def name_that_paints_the_terminal(*_: Any) -> bytes:
    return with_header(lambda header: header.update({"\x1b[2J": header.pop("head.bias")}))


@trick("__metadata__ must map text to text")
def metadata_with_a_payload(*_: Any) -> bytes:
    return with_header(lambda header: header.update(__metadata__={"note": ["a", 1]}))


@trick("lists 5000 tensors|tensors; 1 to 4096")
def thousands_of_tensors(*_: Any) -> bytes:
    return framed(json.dumps({f"t{i}": {} for i in range(5_000)}).encode())


@trick("lists 0 tensors")
def no_tensors(*_: Any) -> bytes:
    return framed(b"{}")
