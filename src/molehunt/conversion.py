"""Turning ``.pt`` and ``.pth`` files into safetensors, in a process of its own.

Only `molehunt convert` and `molehunt scan` do this, for a file of the user's own choice; a host refuses ``.pt`` files.
The child neither unpickles the file nor imports torch, has no network, and may use so much memory, time and disk. What
it writes is then read here like any other stranger's file.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from molehunt import checkpoints, strict_json
from molehunt.files import open_regular, write_atomically
from molehunt.tensor_file import LIMITS, CheckpointError, Limits, encode

SECONDS = 120
REPORT = 2**18
# Importing the package would import torch, which takes seconds and half a gigabyte, so its first file is stepped over.
START = """
import sys, types
package = sys.modules["molehunt"] = types.ModuleType("molehunt")
package.__path__ = [sys.argv.pop(1)]
from molehunt.torch_file import child
child.main()
"""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done to the weights on the way.

    Attributes:
        names: the tensors that were written.
        dropped: those that were left out because they hold integers, such as counters (the first 100).
        unwrapped: the keys under which the weights lay, such as ``state_dict``.
        stripped: what was taken off the front of every name, such as ``module.``.
        beside: short texts and whole numbers that were saved beside the weights, such as ``num_classes``. They are a
            stranger's words.
    """

    names: tuple[str, ...]
    dropped: tuple[str, ...]
    unwrapped: tuple[str, ...]
    stripped: tuple[str, ...]
    beside: Mapping[str, Any] = field(default_factory=dict)


def convert(source: Path, target: Path, *, limits: Limits = LIMITS) -> Conversion:
    """Read a plain dictionary of tensors from a ``.pt`` file and write it as canonical safetensors.

    Half, double and bfloat16 weights become float32; integer tensors are left out. Common wrappers and prefixes
    are taken off.

    Args:
        source: a file that ``torch.save`` of version 1.6 or later wrote.
        target: the safetensors file; it is replaced as a whole, or left as it was.
        limits: what to refuse; also limits the result.

    Returns:
        What was done.

    Raises:
        CheckpointError: as in `tensors`.
    """
    state, done = tensors(source, limits=limits)
    write_atomically(target, encode(state))
    return done


def tensors(source: Path, *, limits: Limits = LIMITS) -> tuple[dict[str, Tensor], Conversion]:
    """Read a plain dictionary of tensors from a ``.pt`` file, in canonical form.

    Args:
        source: as in `convert`.
        limits: what to refuse; also limits the result.

    Returns:
        The tensors by name, and what was done.

    Raises:
        CheckpointError: it is anything else, lies about sizes, or needs more memory, time or disk than is allowed.
    """
    with (
        open_regular(source, CheckpointError) as (stream, size),
        tempfile.TemporaryFile() as result,
        tempfile.TemporaryFile() as answer,
    ):
        if size > limits.file:
            raise CheckpointError(f"the file has {size} bytes; at most {limits.file} are read")
        status = _run(stream.fileno(), result.fileno(), answer.fileno(), limits)
        answer.seek(0)
        report = _report(answer.read(REPORT), status)
        result.seek(0)
        state = checkpoints.read_safetensors(result, None, limits=limits)
    lists = {key: tuple(report[key]) for key in ("dropped", "unwrapped", "stripped")}
    return state, Conversion(names=tuple(state), **lists, beside=report["beside"])


def _run(source: int, result: int, answer: int, limits: Limits) -> int:
    """Start the child on three descriptors and wait for it; return its exit status, negative for a signal."""
    settings = {
        "most": limits.file,
        "limits": {
            # The largest tensor is held twice, once as it is in the file and once in float32, and Python and numpy
            # need a quarter of a gigabyte.
            "RLIMIT_AS": 3 * limits.file + 2**28,
            "RLIMIT_CPU": SECONDS // 2,
            "RLIMIT_FSIZE": limits.file + limits.header,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        },
    }
    # -I: no variables, current folder or user packages decide what the child imports. One thread: numpy would
    # otherwise reserve address space for each core.
    command = [sys.executable, "-I", "-B", "-c", START, str(Path(__file__).parent), str(result), json.dumps(settings)]
    child = subprocess.Popen(
        command,
        stdin=source,
        stdout=answer,
        stderr=subprocess.DEVNULL,
        pass_fds=(result,),
        env={"OPENBLAS_NUM_THREADS": "1", **{k: os.environ[k] for k in ("LD_LIBRARY_PATH",) if k in os.environ}},
    )
    try:
        return child.wait(SECONDS)
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"converting it took more than {SECONDS} seconds") from None
    finally:
        child.kill()
        child.wait()


def _report(answer: bytes, status: int) -> dict[str, Any]:
    try:
        report = strict_json.loads(answer, limit=REPORT, depth=3)
    except strict_json.JSONError:
        raise CheckpointError(f"the process that converts it ended with status {status} and no answer") from None
    if "error" in report:
        raise CheckpointError(f"not converted: {report['error']}")
    found: dict[str, Any] = report
    return found
