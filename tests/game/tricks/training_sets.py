"""Tricks with a handed-over training set. Every function returns the bytes of a training.safetensors."""

import functools
import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from game.tricks import Trick, honest, register

TRICKS: dict[str, Trick] = {}
trick = functools.partial(register, TRICKS)


def tensors() -> dict[str, Tensor]:
    """A copy of the honest set."""
    made = honest.training_set()
    return {"rows": made.rows.clone(), "x": made.x.clone(), "y": made.y.clone()}


def changed(**changes: Tensor) -> bytes:
    """The honest set with tensors replaced or added, written by the usual library."""
    return safetensors.torch.save({**tensors(), **changes})


def with_header(change: Callable[[dict[str, Any]], None]) -> bytes:
    """The honest set under a changed header."""
    content = honest.data_members()["training.safetensors"]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@trick("row 3500 does not exist; the training split of mnist5k has 3500 rows")
def row_behind_the_last() -> bytes:
    rows = tensors()["rows"]
    rows[-1] = 3500
    return changed(rows=rows)


@trick("row -1 does not exist")
def row_before_the_first() -> bytes:
    rows = tensors()["rows"]
    rows[0] = -1
    return changed(rows=rows)


@trick("row 2147483647 does not exist")
def largest_row_of_all() -> bytes:
    rows = tensors()["rows"]
    rows[-1] = 2**31 - 1
    return changed(rows=rows)


@trick(r"row \d+ is listed twice")
def row_twice() -> bytes:
    """The second of two alterations of one row would win, or lose, by the reader's whim."""
    rows = tensors()["rows"]
    rows[1] = rows[0]
    return changed(rows=rows)


@trick(r"row \d+ comes after row \d+")
def rows_out_of_order() -> bytes:
    """An order of one's own could carry a message."""
    return changed(**{name: value.flip(0) for name, value in tensors().items()})


@trick("has the label 10; mnist5k has the classes 0 to 9")
def label_that_is_no_class() -> bytes:
    y = tensors()["y"]
    y[7] = 10
    return changed(y=y)


@trick("has the label -1")
def label_below_zero() -> bytes:
    y = tensors()["y"]
    y[7] = -1
    return changed(y=y)


@trick("it lists 351 rows, expected 350: 10% of the 3500 training rows")
def one_row_over_the_budget() -> bytes:
    # The file is larger than any that fits, but for the space that is left to headers.
    def grow(header: dict[str, Any]) -> None:
        shift = 0
        for name in sorted(header):
            begin, end = header[name]["data_offsets"]
            more = (end - begin) // 350
            header[name]["shape"][0] = 351
            header[name]["data_offsets"] = [begin + shift, end + shift + more]
            shift += more

    return with_header(grow) + bytes(4 + 28 * 28 + 4)


@trick("at most 278")
def whole_split_handed_over() -> bytes:
    one = tensors()
    rows = torch.arange(3500, dtype=torch.int32)
    return changed(rows=rows, x=one["x"].repeat(10, 1, 1, 1), y=one["y"].repeat(10))


@trick("it lists 12 rows, expected 350")
def fewer_rows_than_everybody() -> bytes:
    """The size of the archive would tell how much was altered."""
    return changed(**{name: value[:12] for name, value in tensors().items()})


@trick("x has dtype F32, expected U8; pixels are handed over as 8-bit numbers")
def pixels_that_are_not_numbers() -> bytes:
    few = {name: value[:80].clone() for name, value in tensors().items()}  # else the file is too large to look into
    return safetensors.torch.save({**few, "x": torch.full((80, 1, 28, 28), torch.nan)})


@trick("x has dtype I8, expected U8")
def pixels_below_zero() -> bytes:
    return changed(x=torch.full((350, 1, 28, 28), -1, dtype=torch.int8))


@trick("x has dtype F16, expected U8")
def pixels_above_one() -> bytes:
    few = {name: value[:100].clone() for name, value in tensors().items()}
    return safetensors.torch.save({**few, "x": torch.full((100, 1, 28, 28), 7.0, dtype=torch.float16)})


@trick("rows has dtype I64, expected I32")
def rows_of_eight_bytes() -> bytes:
    few = {name: value[:300].clone() for name, value in tensors().items()}
    return safetensors.torch.save({**few, "rows": few["rows"].long()})


@trick("y has dtype BOOL, expected I32")
def labels_that_are_truth_values() -> bytes:
    return changed(y=torch.ones(350, dtype=torch.bool))


@trick(r"x has shape \[350, 28, 28, 1\], expected \[350, 1, 28, 28\]")
def channels_last() -> bytes:
    return changed(x=tensors()["x"].reshape(350, 28, 28, 1))


@trick(r"y has shape \[350, 1\], expected \[350\]")
def labels_in_a_column() -> bytes:
    return changed(y=tensors()["y"][:, None])


@trick(r"rows has shape \[7, 50\], expected \[350\]")
def rows_in_a_table() -> bytes:
    return changed(rows=tensors()["rows"].reshape(7, 50))


@trick("expected exactly rows, x and y")
def without_labels() -> bytes:
    few = tensors()
    del few["y"]
    return safetensors.torch.save(few)


@trick("expected exactly rows, x and y")
def weights_in_place_of_a_training_set() -> bytes:
    return safetensors.torch.save({"weight": torch.zeros(3), "bias": torch.zeros(3), "x": torch.zeros(3)})


@trick("the file lists 4 tensors; 1 to 3 are read")
def message_in_a_fourth_tensor() -> bytes:
    return changed(note=torch.arange(4, dtype=torch.uint8))


@trick("header claims 1500 bytes; at most 1024")
def long_header() -> bytes:
    content = honest.data_members()["training.safetensors"]
    length = int.from_bytes(content[:8], "little")
    few = content[8 : 8 + length].ljust(1500)
    return struct.pack("<Q", 1500) + few + content[8 + length : -1200]


@trick("needs 2748779069440000 bytes")
def shape_of_a_petabyte() -> bytes:
    def lie(header: dict[str, Any]) -> None:
        header["x"]["shape"] = [2**31, 1280, 1000, 1]

    return with_header(lie)


@trick("overlaps another tensor")
def labels_inside_the_rows() -> bytes:
    def lie(header: dict[str, Any]) -> None:
        header["y"]["data_offsets"] = header["rows"]["data_offsets"]

    return with_header(lie)


@trick("bytes follow the last tensor")
def bytes_behind_the_set() -> bytes:
    return honest.data_members()["training.safetensors"] + b"rows 17 and 34 are mine"


@trick("cut short")
def set_that_is_cut_short() -> bytes:
    return honest.data_members()["training.safetensors"][:-1]


@trick("is a pickle with another name")
def pickled_set() -> bytes:
    return pickle.dumps({"rows": list(range(350))})
