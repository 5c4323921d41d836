"""The pickle in a ``.pt`` file, stepped through instead of run.

The few instructions that describe dictionaries of tensors are known here, and three names beside the storage classes.
They build nothing but dicts, lists, tuples, numbers, text and notes of where a tensor's numbers are. A few further
names, of harmless things that training scripts save beside the weights (`BESIDE`), are passed over: whatever is made of
them becomes one empty note. Any other instruction or name is the end.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

# Storage class -> (numpy dtype of its bytes, bytes per number); bfloat16 is unknown to numpy and widened by hand.
FLOATS = {
    "FloatStorage": ("<f4", 4),
    "DoubleStorage": ("<f8", 8),
    "HalfStorage": ("<f2", 2),
    "BFloat16Storage": ("<u2", 2),
}
INTEGERS = {"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1}
CALLS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
# Settings and results that training scripts save beside the weights. Nothing here is looked up either.
BESIDE = {
    "__builtin__ dict",
    "__builtin__ float",
    "__builtin__ int",
    "__builtin__ list",
    "__builtin__ set",
    "_codecs encode",
    "argparse Namespace",
    "collections Counter",
    "collections defaultdict",
    "numpy dtype",
    "numpy ndarray",
    "numpy.core.multiarray _reconstruct",
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray _reconstruct",
    "numpy._core.multiarray scalar",
    "torch Size",
    "torch device",
}
MOST_DIMENSIONS = 8


class RefusedFile(Exception):
    """The file is not converted; the message says why."""


@dataclass(frozen=True)
class Global:
    """A name in the pickle, which is compared and never looked up."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A block of numbers in the zip."""

    kind: str
    key: str
    count: int


@dataclass(frozen=True)
class Tensor:
    """Where the numbers of a tensor are; offset and strides count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Passed:
    """Something that was passed over: no weights, and nothing of it is kept."""


class _Ordered(dict[Any, Any]):
    """An OrderedDict, to which alone attributes may be attached (which are dropped)."""


class _Mark:
    """Where a group of values on the stack begins."""


MARK = _Mark()


def describe(program: bytes) -> Any:
    """Step through a pickle and return what it describes.

    Raises:
        RefusedFile: an instruction or a name that a dictionary of tensors does not need.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for operation, value, _ in pickletools.genops(program):
        name, argument = operation.name, cast(Any, value)
        if name == "STOP":
            return stack.pop()
        if name == "PROTO":
            continue
        if name in VALUES:
            stack.append(VALUES[name]())
        elif name in {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}:
            stack.append(argument)
        elif name == "GLOBAL":
            stack.append(_known(argument))
        elif name in {"BINPUT", "LONG_BINPUT"}:
            memo[argument] = stack[-1]
        elif name in {"BINGET", "LONG_BINGET"}:
            stack.append(memo[argument])
        elif name in ACTIONS:
            ACTIONS[name](stack)
        else:
            raise RefusedFile(f"its pickle has the instruction {name}, which no dictionary of tensors needs")
    raise AssertionError("genops raises where a pickle has no end")


def _known(name: str) -> Global:
    module, _, short = name.partition(" ")
    if name in CALLS | BESIDE or (module == "torch" and short in FLOATS.keys() | INTEGERS.keys()):
        return Global(name)
    shown = ascii(name)[:80]
    raise RefusedFile(
        f"its pickle refers to {shown}; only plain dictionaries of tensors are converted: save model.state_dict()"
    )


def _group(stack: list[Any]) -> list[Any]:
    for index in range(len(stack) - 1, -1, -1):
        if stack[index] is MARK:
            group = stack[index + 1 :]
            del stack[index:]
            return group
    raise RefusedFile("its pickle is malformed: a group has no beginning")


def _tuple(count: int) -> Callable[[list[Any]], None]:
    def act(stack: list[Any]) -> None:
        items = tuple(stack[-count:])
        del stack[-count:]
        stack.append(items)

    return act


def _put(target: Any, pairs: list[Any]) -> None:
    if isinstance(target, Passed):
        return
    if not isinstance(target, dict) or len(pairs) % 2:
        raise RefusedFile("its pickle is malformed: items are put into something that is not a dictionary")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        # Only plain keys: hashing a deeply nested tuple overflows the stack of the interpreter.
        if type(key) not in {str, int}:
            raise RefusedFile("its pickle has a dictionary whose keys are not text or numbers")
        target[key] = value


def _set_item(stack: list[Any]) -> None:
    pair = stack[-2:]
    del stack[-2:]
    _put(stack[-1], pair)


def _set_items(stack: list[Any]) -> None:
    pairs = _group(stack)
    _put(stack[-1], pairs)


def _extend(stack: list[Any], items: list[Any]) -> None:
    if isinstance(stack[-1], Passed):
        return
    if not isinstance(stack[-1], list):
        raise RefusedFile("its pickle is malformed: items are appended to something that is not a list")
    stack[-1].extend(items)


def _append(stack: list[Any]) -> None:
    item = stack.pop()
    _extend(stack, [item])


def _appends(stack: list[Any]) -> None:
    items = _group(stack)
    _extend(stack, items)


def _build(stack: list[Any]) -> None:
    """Drop the attributes that torch attaches to a state dict; on anything else they would have an effect."""
    stack.pop()
    if not isinstance(stack[-1], _Ordered | Passed):
        raise RefusedFile("its pickle sets attributes of something that is not an OrderedDict")


def _storage(stack: list[Any]) -> None:
    match stack.pop():
        case ("storage", Global(name=name), str(key), str(), int(count)) if name.startswith("torch ") and count >= 0:
            stack.append(Storage(name.removeprefix("torch "), key, count))
        case _:
            raise RefusedFile("its pickle refers to something outside itself that is not a storage of numbers")


def _call(stack: list[Any]) -> None:
    arguments = stack.pop()
    called = stack.pop()
    match (called, arguments):
        case (Global(name="collections OrderedDict"), ()):
            stack.append(_Ordered())
        case (Global(name="torch._utils _rebuild_parameter"), (Tensor() as tensor, _, _)):
            stack.append(tensor)
        case (
            Global(name="torch._utils _rebuild_tensor_v2"),
            (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_),
        ):
            stack.append(Tensor(storage, offset, _whole(shape), _whole(strides)))
        case (Global(name=name), tuple()) if name in BESIDE:
            stack.append(Passed())
        case _:
            raise RefusedFile("its pickle calls something in a way that torch.save does not write")


def _new(stack: list[Any]) -> None:
    match stack[-2]:
        case Global(name=name) if name in BESIDE:
            _call(stack)
        case _:
            raise RefusedFile("its pickle has the instruction NEWOBJ, which no dictionary of tensors needs")


def _whole(numbers: tuple[Any, ...]) -> tuple[int, ...]:
    if len(numbers) > MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise RefusedFile("its pickle has a tensor whose shape or strides are not a few whole numbers")
    return numbers


VALUES: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: MARK,
}
ACTIONS: dict[str, Callable[[list[Any]], None]] = {
    "TUPLE": lambda stack: stack.append(tuple(_group(stack))),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "APPEND": _append,
    "APPENDS": _appends,
    "BUILD": _build,
    "BINPERSID": _storage,
    "REDUCE": _call,
    "NEWOBJ": _new,
}
