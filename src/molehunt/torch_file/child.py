"""The child process that turns a ``.pt`` file into safetensors, under limits.

Its standard input is the file; its first argument the descriptor to write safetensors to, its second the limits as
JSON. It puts one JSON object on its standard output: a report, or ``{"error": ...}``.
"""

import ctypes
import io
import json
import math
import os
import sys
from typing import Any, BinaryIO, NamedTuple

from molehunt.strict_json import show
from molehunt.torch_file.archive import Archive
from molehunt.torch_file.naming import stripped
from molehunt.torch_file.program import FLOATS, INTEGERS, RefusedFile, Tensor, describe

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "net_state_dict",
    "netC",
    "network",
    "classifier",
    "weights",
    "params",
    "module",
)
MOST_BESIDE = 20


class Weights(NamedTuple):
    """The tensors of a file, and what was done to find them."""

    tensors: dict[str, Tensor]
    unwrapped: list[str]
    stripped: list[str]
    beside: dict[str, Any]


def weights_of(document: Any) -> Weights:
    """Find the dictionary of tensors in what a training script saved.

    Raises:
        RefusedFile: there is none, or other things are mixed into it.
    """
    unwrapped: list[str] = []
    beside: dict[str, Any] = {}
    while isinstance(document, dict) and len(unwrapped) < 3:
        inner = [key for key in WRAPPERS if _may_hold_weights(document.get(key))]
        if not inner:
            break
        if len(inner) > 1:
            raise RefusedFile(
                f"it holds several sets of weights, {', '.join(show(key) for key in inner)}; save one of them alone"
            )
        beside |= {key: value for key, value in document.items() if isinstance(key, str) and _is_plain(value)}
        unwrapped.append(inner[0])
        document = document[inner[0]]
    if not isinstance(document, dict) or not document:
        raise RefusedFile("it does not hold a dictionary of tensors; save model.state_dict()")
    for key, value in document.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise RefusedFile(f"the entry {show(key)} is not a tensor with a name; save model.state_dict() alone")
    names, prefixes = stripped(document)
    tensors = {name: document[key] for key, name in names.items()}
    return Weights(tensors, unwrapped, prefixes, dict(list(beside.items())[:MOST_BESIDE]))


def _may_hold_weights(value: Any) -> bool:
    """Whether a value is a dictionary with tensors, or with dictionaries, in it; settings have neither."""
    return isinstance(value, dict) and any(isinstance(inner, Tensor | dict) for inner in value.values())


def _is_plain(value: Any) -> bool:
    """Whether a value is short text, a number of ordinary size, or a few whole numbers such as a picture's size."""
    if isinstance(value, list | tuple):
        return len(value) <= 4 and all(type(item) is int and abs(item) < 2**31 for item in value)
    return type(value) in {str, int} and (len(value) <= 100 if isinstance(value, str) else abs(value) < 2**31)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are side by side, each once, in some order of the dimensions.

    Contiguous, transposed and channels-last tensors are. Views that repeat numbers are not: with a stride of zero
    a file of a kilobyte describes terabytes.
    """
    expected = 1
    for stride, size in sorted(zip(tensor.strides, tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def convert(source: BinaryIO, target: BinaryIO, most: int) -> dict[str, Any]:
    """Write the float tensors of a ``.pt`` file as safetensors, in float32.

    Args:
        source: the file.
        target: where the safetensors file goes.
        most: largest result, in bytes.

    Returns:
        The report: names dropped, keys unwrapped, prefixes stripped, plain values beside the weights.

    Raises:
        RefusedFile: it is not a plain dictionary of tensors, or lies about sizes.
    """
    archive = Archive(source)
    weights = weights_of(describe(archive.program()))
    kept: dict[str, Tensor] = {}
    total = 0
    for name, tensor in sorted(weights.tensors.items()):
        shown, kind = show(name), tensor.storage.kind
        itemsize = FLOATS[kind][1] if kind in FLOATS else INTEGERS[kind]
        if archive.size(tensor.storage.key) != tensor.storage.count * itemsize:
            raise RefusedFile(f"the storage of {shown} does not have the size that it claims")
        count = math.prod(tensor.shape)
        if count == 0 or len(tensor.shape) != len(tensor.strides) or not is_dense(tensor):
            raise RefusedFile(f"{shown} is empty or a view that repeats or skips numbers; save tensor.contiguous()")
        if tensor.offset < 0 or tensor.offset + count > tensor.storage.count:
            raise RefusedFile(f"{shown} reaches beyond its storage")
        if kind in FLOATS:
            kept[name] = tensor
            total += 4 * count
    if total > most:
        raise RefusedFile(f"its tensors have {total} bytes in float32; at most {most} are converted")
    if not kept:
        raise RefusedFile("it has no floating-point tensors")
    for key in sorted({tensor.storage.key for tensor in kept.values()}):
        archive.check(key)
    _write(target, archive, kept)
    dropped = sorted(weights.tensors.keys() - kept.keys())
    return {
        "dropped": [name[:256] for name in dropped[:100]],
        "unwrapped": weights.unwrapped,
        "stripped": weights.stripped,
        "beside": {key[:100]: value for key, value in weights.beside.items()},
    }


def _write(target: BinaryIO, archive: Archive, kept: dict[str, Tensor]) -> None:
    import numpy as np  # after the limits are set

    header, offset = {}, 0
    for name, tensor in kept.items():
        stop = offset + 4 * math.prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode("ascii")
    target.write(len(text).to_bytes(8, "little") + text)
    for tensor in kept.values():
        dtype, itemsize = FLOATS[tensor.storage.kind]
        count = math.prod(tensor.shape)
        flat = np.frombuffer(
            archive.numbers(tensor.storage.key, tensor.offset * itemsize, count * itemsize), dtype=dtype
        )
        if tensor.storage.kind == "BFloat16Storage":
            flat = (flat.astype("<u4") << 16).view("<f4")
        with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite, which the reader refuses
            flat = flat.astype("<f4", copy=False)
        # In memory the dimensions come in the order of falling strides; read them so, then put them back.
        order = sorted(range(len(tensor.shape)), key=lambda i: -tensor.strides[i])
        array = flat.reshape([tensor.shape[i] for i in order]).transpose(np.argsort(order) if order else None)
        target.write(np.ascontiguousarray(array).data)


def confine(limits: dict[str, int]) -> None:
    """Give up the network, new privileges and resources; what a system does not offer is left out."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET: a network without any interface
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: no orphan outlives the command
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):  # macOS knows RLIMIT_AS and refuses it
            continue


def answer(source: BinaryIO, target: BinaryIO, most: int) -> dict[str, Any]:
    """Convert, and turn whatever goes wrong into an answer; the arguments are those of `convert`."""
    try:
        return convert(source, target, most)
    except RefusedFile as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "reading it needs more memory than a file of weights may take"}
    except Exception as error:  # whatever a damaged file makes the standard library raise
        return {"error": f"it is malformed ({type(error).__name__})"}


def main() -> None:
    """Convert standard input; see the module's first lines."""
    descriptor, settings = int(sys.argv[1]), json.loads(sys.argv[2])
    confine(settings["limits"])
    with os.fdopen(descriptor, "wb") as target:
        report = answer(io.BufferedReader(io.FileIO(0)), target, settings["most"])
    os.write(1, json.dumps(report).encode("ascii"))
