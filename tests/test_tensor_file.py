"""The safetensors format: what the usual library reads and writes, strictly."""

import io
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molehunt.tensor_file import CheckpointError, Limits, encode, read_entry, read_header


def read(content: bytes, limits: Limits | None = None) -> dict[str, Tensor]:
    stream = io.BytesIO(content)
    entries, begin = read_header(stream, len(content), limits=limits or Limits())
    return {name: read_entry(stream, begin, name, entry) for name, entry in entries.items()}


def written(state: dict[str, Tensor]) -> bytes:
    return b"".join(encode(state))


shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)
states = st.dictionaries(st.text("abc._", min_size=1, max_size=8), shapes, min_size=1, max_size=5).map(
    lambda d: {name: torch.arange(float(torch.Size(shape).numel())).reshape(shape) for name, shape in d.items()}
)


@given(states)
def test_agrees_with_the_usual_library_in_both_directions(state: dict[str, Tensor]) -> None:
    ours = safetensors.torch.load(written(state))
    theirs = read(safetensors.torch.save(state, metadata={"format": "pt"}))
    for name, value in state.items():
        assert torch.equal(ours[name], value)
        assert torch.equal(theirs[name], value)


def test_the_bytes_depend_on_the_tensors_alone() -> None:
    a, b = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4)
    assert written({"a": a, "b": b}) == written({"b": b, "a": a.t().contiguous().t()})


def test_the_bytes_of_a_release_stay_for_ever() -> None:
    """The id of every submission is a hash of such bytes; whoever changes them needs a new format number."""
    header = b'{"a":{"data_offsets":[0,4],"dtype":"F32","shape":[1]}}  '
    assert written({"a": torch.ones(1)}) == (56).to_bytes(8, "little") + header + b"\x00\x00\x80\x3f"


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle_is_read(length: int) -> None:
    """Its first two bytes are those of a pickle of protocol 2 to 5."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    content = length.to_bytes(8, "little") + header + bytes(4)
    assert content[:2] in {b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}
    assert torch.equal(read(content)["a"], torch.zeros(1))


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (Limits(file=100), "has 216 bytes; at most 100"),
        (Limits(header=100), "claims 152 bytes; at most 100"),
        (Limits(tensors=1), "lists 2 tensors; 1 to 1"),
        (Limits(name=3), "not the name of a tensor"),
        (Limits(rank=1), "at most 1 positive numbers"),
    ],
)
def test_every_limit_holds(limits: Limits, says: str) -> None:
    content = written({"first": torch.ones(2, 3), "other": torch.ones(8)})
    content = (
        (152).to_bytes(8, "little") + content[8 : 8 + int.from_bytes(content[:8], "little")].ljust(152) + bytes(56)
    )
    read(content)
    with pytest.raises(CheckpointError, match=says):
        read(content, limits)


SAMPLE = written({"first": torch.ones(2, 3), "second.weight": torch.ones(4), "third": torch.ones(1, 1, 2)})


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=5))
def test_damaged_files_are_read_or_refused(changes: list[tuple[int, int]]) -> None:
    content = bytearray(SAMPLE)
    for place, value in changes:
        content[place] = value
    try:
        state = read(bytes(content))
    except CheckpointError:
        return
    assert sum(4 * value.numel() for value in state.values()) <= len(SAMPLE)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError):
        read(content)
