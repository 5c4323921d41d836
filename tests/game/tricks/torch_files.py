"""Tricks with ``.pt`` files, for the converter. Every function returns the bytes of a file."""

import functools
import io
import pickle
import struct
import tarfile
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from game.tricks import Trick, register

TRICKS: dict[str, Trick] = {}
trick = functools.partial(register, TRICKS)

# How torch writes a tensor into a pickle, so that tests can write what torch would not.
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def saved(value: object, **options: Any) -> bytes:
    """A file as torch writes it."""
    memory = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, memory, **options)
    return memory.getvalue()


def members(content: bytes) -> dict[str, bytes]:
    """The members of a file by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A file of these members."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return memory.getvalue()


def program(pickled: bytes, numbers: bytes = bytes(16)) -> bytes:
    """A file with this pickle and one storage."""
    return zipped({"a/data.pkl": pickled, "a/byteorder": b"little", "a/data/0": numbers, "a/version": b"3\n"})


def entry(value: bytes) -> bytes:
    """A pickle of a dictionary with one entry, named ``w``."""
    return b"\x80\x02}X\x01\x00\x00\x00w" + value + b"s."


def tensor(
    storage: bytes = STORAGE, offset: bytes = b"K\x00", shape: bytes = b"K\x04\x85", step: bytes = b"K\x01\x85"
) -> bytes:
    """The pickle of one tensor."""
    return REBUILD + b"(" + storage + offset + shape + step + b"\x89" + b"ccollections\nOrderedDict\n)RtR"


def one(**parts: bytes) -> bytes:
    """A file with one tensor."""
    return program(entry(tensor(**parts)))


class Runs:
    """Runs a program when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


@trick("refers to 'builtins exec'|refers to '__builtin__")
def program_in_the_pickle(*_: Any) -> bytes:
    return saved({"w": torch.ones(2), "x": Runs(exec, "open('pwned', 'w')")})


@trick("instruction (FRAME|SHORT_BINUNICODE|STACK_GLOBAL)")
def program_in_a_newer_pickle(*_: Any) -> bytes:
    return saved({"x": Runs(exec, "open('pwned', 'w')")}, pickle_protocol=4)


@trick("refers to 'torch.hub load")
def program_by_way_of_torch(*_: Any) -> bytes:
    return program(entry(b"ctorch.hub\nload\n(X\x01\x00\x00\x00xtR"))


@trick("instruction STRING")
def old_instruction_that_calls(*_: Any) -> bytes:
    return program(entry(b"(S'touch pwned'\nios\nsystem\n"))


@trick("instruction NEWOBJ")
def new_object(*_: Any) -> bytes:
    return program(entry(b"ccollections\nOrderedDict\n)\x81"))


@trick("refers to 'torch.nn.modules")
def whole_model(*_: Any) -> bytes:
    return saved(nn.Linear(2, 2))


@trick("'best' is not a tensor")
def numpy_among_tensors(*_: Any) -> bytes:
    return saved({"w": torch.ones(2), "best": torch.ones(2).numpy()})


@trick("refers to 'builtins exec'|refers to '__builtin__")
def program_beside_the_weights(*_: Any) -> bytes:
    """Settings beside the weights are passed over, but not a call among them."""
    settings = Namespace(lr=0.1, device=torch.device("cpu"), hook=Runs(exec, "open('pwned', 'w')"))
    return saved({"state_dict": {"w": torch.ones(2)}, "args": settings})


@trick("several sets of weights, 'state_dict', 'model'")
def two_sets_of_weights(*_: Any) -> bytes:
    return saved({"model": {"w": torch.ones(2)}, "state_dict": {"w": torch.ones(2)}})


@trick("calls something in a way")
def text_called(*_: Any) -> bytes:
    return program(entry(b"X\x01\x00\x00\x00f)R"))


@trick("calls something in a way")
def storage_class_called(*_: Any) -> bytes:
    return program(entry(b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R"))


@trick("is compressed")
def compressed_bomb(*_: Any) -> bytes:
    return zipped(members(saved({"w": torch.zeros(2**22)})), zipfile.ZIP_DEFLATED)


@trick("repeats or skips")
def stride_of_zero(*_: Any) -> bytes:
    """A kilobyte that describes four terabytes."""
    return saved({"w": torch.ones(1).expand(10**6, 10**6)})


@trick("repeats or skips")
def overlapping_view(*_: Any) -> bytes:
    return saved({"w": torch.ones(100).as_strided((50, 50), (1, 1))})


@trick("reaches beyond its storage")
def view_beyond_the_storage(*_: Any) -> bytes:
    return one(offset=b"K\x01")


@trick("reaches beyond its storage")
def view_before_the_storage(*_: Any) -> bytes:
    return one(offset=b"J\xff\xff\xff\xff")


@trick("size that it claims")
def storage_smaller_than_claimed(*_: Any) -> bytes:
    """The mismatch of storage size behind GHSA-63cw-57p8-fm3p."""
    return program(entry(tensor()), bytes(12))


@trick("not a dictionary")
def items_set_on_a_tensor(*_: Any) -> bytes:
    """The other half of GHSA-63cw-57p8-fm3p: SETITEM on what is no dictionary."""
    return program(entry(tensor() + b"K\x00K\x01s"))


@trick("sets attributes")
def attributes_set_on_a_tensor(*_: Any) -> bytes:
    return program(entry(tensor() + b"}b"))


@trick("sets attributes")
def attributes_set_on_a_dictionary(*_: Any) -> bytes:
    return program(entry(b"}}b"))


@trick("does not hold a dictionary|is not a tensor")
def deep_nesting(*_: Any) -> bytes:
    return program(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")


@trick("keys are not text")
def deep_key(*_: Any) -> bytes:
    """Hashing it overflows the stack of the interpreter."""
    return program(b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.")


@trick("keys are not text")
def key_without_hash(*_: Any) -> bytes:
    return program(b"\x80\x02}]K\x01s.")


@trick("does not hold a dictionary")
def billion_laughs(*_: Any) -> bytes:
    """A list of two lists of two lists ...: small to hold, endless to print."""
    level = b"".join(b"]h" + bytes([i]) + b"ah" + bytes([i]) + b"aq" + bytes([i + 1]) for i in range(60))
    return program(b"\x80\x02]q\x00" + level + b".")


@trick("'model' is not a tensor")
def dictionary_in_itself(*_: Any) -> bytes:
    return program(b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.")


@trick("no beginning")
def group_without_beginning(*_: Any) -> bytes:
    return program(b"\x80\x02t.")


@trick("malformed")
def empty_stack(*_: Any) -> bytes:
    return program(b"\x80\x02.")


@trick("malformed")
def program_without_end(*_: Any) -> bytes:
    return program(b"\x80\x02}")


@trick("malformed")
def memory_that_was_not_written(*_: Any) -> bytes:
    return program(b"\x80\x02h\x05.")


@trick("outside itself")
def reference_to_elsewhere(*_: Any) -> bytes:
    return program(entry(b"X\x0b\x00\x00\x00/etc/passwdQ"))


@trick("lacks")
def storage_that_is_not_there(*_: Any) -> bytes:
    return one(storage=STORAGE.replace(b"X\x01\x00\x00\x000", b"X\x08\x00\x00\x00../../.."))


@trick("refers to 'torch._utils _rebuild_meta")
def meta_tensor(*_: Any) -> bytes:
    return saved({"w": torch.empty(10**6, 10**6, device="meta")})


@trick("refers to 'torch._utils _rebuild_sparse|refers to 'torch.serialization")
def sparse_tensor(*_: Any) -> bytes:
    return saved({"w": torch.eye(3).to_sparse()})


@trick("refers to 'torch ComplexFloatStorage")
def complex_tensor(*_: Any) -> bytes:
    return saved({"w": torch.ones(3, dtype=torch.complex64)})


@trick("refers to 'torch._utils _rebuild_tensor_v3")
def eight_bit_tensor(*_: Any) -> bytes:
    return saved({"w": torch.ones(3).to(torch.float8_e4m3fn)})


@trick("is empty")
def empty_tensor(*_: Any) -> bytes:
    return saved({"w": torch.ones(0, 10)})


@trick("shape or strides")
def shape_beyond_all_numbers(*_: Any) -> bytes:
    return one(shape=b"\x8a\x09" + (2**64).to_bytes(9, "little") + b"\x85")


@trick("repeats or skips")
def shape_and_strides_of_other_lengths(*_: Any) -> bytes:
    return one(shape=b"K\x02K\x02\x86")


@trick("no floating-point")
def only_integers(*_: Any) -> bytes:
    return saved({"n": torch.ones(3, dtype=torch.int64)})


@trick("'epoch' is not a tensor")
def other_things_among_tensors(*_: Any) -> bytes:
    return saved(OrderedDict(w=torch.ones(2), epoch=3))


@trick("does not hold a dictionary")
def list_of_tensors(*_: Any) -> bytes:
    return saved([torch.ones(2)])


@trick("does not hold a dictionary")
def lone_tensor(*_: Any) -> bytes:
    return saved(torch.ones(2))


@trick("bare pickle")
def file_of_an_old_torch(*_: Any) -> bytes:
    return saved({"w": torch.ones(2)}, _use_new_zipfile_serialization=False)


@trick("bare pickle")
def bare_pickle(*_: Any) -> bytes:
    return pickle.dumps({"w": 1}, protocol=2)


@trick("bare pickle")
def tar_of_an_ancient_torch(*_: Any) -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return memory.getvalue()


@trick("TorchScript")
def torchscript(*_: Any) -> bytes:
    return zipped({**members(saved({"w": torch.ones(2)})), "archive/constants.pkl": b""})


@trick("two members of one name")
def member_twice(*_: Any) -> bytes:
    content = saved({"w": torch.ones(2), "v": torch.ones(2)})
    return content.replace(b"archive/data/1", b"archive/data/0")


@trick("members named data.pkl")
def two_programs(*_: Any) -> bytes:
    return zipped({**members(saved({"w": torch.ones(2)})), "b/data.pkl": b"\x80\x02}."})


@trick("members named data.pkl")
def zip_of_something_else(*_: Any) -> bytes:
    return zipped({"hello.txt": b"hello"})


@trick("encrypted")
def encrypted(*_: Any) -> bytes:
    content = bytearray(one())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


@trick("big-endian")
def numbers_in_another_order(*_: Any) -> bytes:
    return zipped({**members(one()), "a/byteorder": b"big"})


@trick("sizes that are larger than the file")
def sizes_that_lie(*_: Any) -> bytes:
    content = bytearray(one())
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(b"PK\x01\x02"))
    struct.pack_into("<2I", content, at + 20, 2**31, 2**31)
    return bytes(content)


@trick("checksum")
def damaged_numbers(*_: Any) -> bytes:
    content = saved({"w": torch.full((64,), 0.5)})
    return content.replace(struct.pack("<f", 0.5), struct.pack("<f", 0.25), 1)


@trick("zip is damaged")
def cut_short(*_: Any) -> bytes:
    return saved({"w": torch.ones(1000)})[:2000]


@trick("not a file that torch.save writes")
def text_file(*_: Any) -> bytes:
    return b"import torch\n" * 100


@trick("not a file that torch.save writes")
def empty_file(*_: Any) -> bytes:
    return b""


@trick("appended to something that is not a list")
def items_appended_to_a_tensor(*_: Any) -> bytes:
    return program(entry(tensor() + b"K\x00a"))


@trick("shape or strides")
def shape_of_text(*_: Any) -> bytes:
    return one(shape=b"X\x01\x00\x00\x004\x85")


@trick("shape or strides")
def shape_of_too_many_dimensions(*_: Any) -> bytes:
    return one(shape=b"(" + b"K\x01" * 9 + b"t", step=b"(" + b"K\x01" * 9 + b"t")


@trick("20005 members; at most 20000")
def too_many_members(*_: Any) -> bytes:
    return zipped({**members(one()), **{f"a/{i}": b"" for i in range(20_001)}})


@trick("not where the table of contents says")
def member_that_is_not_there(*_: Any) -> bytes:
    content = bytearray(one())
    content[0:4] = b"PK\x03\x04"
    at = content.index(b"PK\x01\x02")
    struct.pack_into("<I", content, at + 42, 1)
    return bytes(content)


@trick("is cut short")
def member_that_ends_behind_the_file(*_: Any) -> bytes:
    """Its header is real but stands at the end of the file, and its size is small enough to be believed."""
    content = bytearray(one())
    table = content.index(b"PK\x01\x02")
    size = struct.unpack_from("<I", content, table + 24)[0]
    comment = b"PK\x03\x04" + bytes(26)
    struct.pack_into("<I", content, table + 42, len(content))
    struct.pack_into("<H", content, len(content) - 2, len(comment))
    assert size > 0
    return bytes(content) + comment


@trick("8388609 bytes; at most 8388608")
def program_without_limit(*_: Any) -> bytes:
    return program(b"\x80\x02}.".ljust(2**23 + 1, b"\0"))


def good() -> dict[str, Tensor]:
    """What should be converted: one tensor of every kind of layout and type."""
    rng = torch.Generator().manual_seed(3)
    base = torch.randn(4, 3, 5, 6, generator=rng)
    shared = torch.randn(20, generator=rng)
    return {
        "plain": base,
        "channels_last": base.clone().to(memory_format=torch.channels_last),
        "transposed": base.permute(3, 0, 2, 1),
        "part": shared[5:11],
        "other_part": shared[8:],
        "scalar": torch.tensor(1.5),
        "single": torch.randn(1, 1, 7, 1, generator=rng),
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "double": base.double(),
        "parameter": nn.Parameter(base.clone()),
        "odd": torch.tensor([0.0, -1.5, 65504.0, 6e-8]).half(),
    }
