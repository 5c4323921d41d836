"""The warm process behind `molehunt.isolation`: it imports torch once and forks a confined child per evaluation.

Started as `python -m molehunt.zygote` with a clean environment. It reads requests, one JSON document per line, from
standard input and writes events to standard output. It never computes anything itself: a process that has used more
than one thread cannot be forked safely. When its input ends it kills its child and ends.
"""

import contextlib
import ctypes
import errno
import faulthandler
import gc
import json
import os
import selectors
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import torch

from molehunt import confinement, findings, runner
from molehunt.confinement import Limits
from molehunt.evidence import Store, assemble, digests

Json = dict[str, Any]
REQUESTS, EVENTS, CHILD = 0, 1, 3  # descriptors; the last one is the child's pipe to the zygote
_SYSTEM = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo"),
    *("/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"),
    *("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu", "/sys/devices/system/node"),
)


def main() -> None:
    """Serve until the input ends."""
    torch.set_num_threads(1)
    _warm_up()
    _send({"readable": [str(path) for path in environment()]})
    gc.collect()
    gc.freeze()  # else the first collection in a child would copy every page that it looks at
    requests = _Lines(REQUESTS)
    while True:
        for line in requests.wait():
            if line != b"kill":  # for a child that has just ended
                _serve(json.loads(line), requests)


def environment() -> tuple[Path, ...]:
    """Files and folders that any evaluation may read: Python, its packages, the system's libraries."""
    places = [sys.prefix, sys.base_prefix, *sys.path, *_SYSTEM]
    return tuple(dict.fromkeys(path.resolve() for path in map(Path, places) if path.is_absolute() and path.exists()))


class _Lines:
    """Whole lines from a descriptor, without waiting for more than there is."""

    def __init__(self, descriptor: int, longest: int = 2**24) -> None:
        self.descriptor = descriptor
        self.longest = longest
        self.rest = b""

    def wait(self) -> list[bytes]:
        """Lines that are there, at least part of one. Ends the process when the other side has closed."""
        lines = self.read()
        if lines is None:
            os._exit(0)
        return lines

    def read(self) -> list[bytes] | None:
        """Whole lines among the next bytes; None at the end."""
        data = os.read(self.descriptor, 2**16)
        if not data:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        if len(self.rest) > self.longest:
            self.rest = b""
        return lines


def _send(event: Json) -> None:
    data = json.dumps(event).encode() + b"\n"
    while data:
        data = data[os.write(EVENTS, data) :]


def _serve(request: Json, requests: _Lines) -> None:
    """Fork a child for one request and report what becomes of it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _child(request, writing, parent)
    os.close(writing)
    child = os.pidfd_open(pid)
    lines = _Lines(reading, 1000)
    with selectors.DefaultSelector() as ready:
        for descriptor in (requests.descriptor, reading, child):
            ready.register(descriptor, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fd == reading:
                    found = lines.read()
                    if found is None:
                        ready.unregister(reading)
                    for event in _events(found or []):
                        _send(event)
                elif key.fd == requests.descriptor:
                    # Anything that comes now, the end of the input too, means: stop it.
                    os.kill(pid, signal.SIGKILL)
                    requests.wait()
                else:
                    _, status, usage = os.wait4(pid, 0)
                    os.close(child)
                    for event in _events(_rest(lines)):
                        _send(event)
                    os.close(reading)
                    _send({"exit": os.waitstatus_to_exitcode(status), "peak_bytes": usage.ru_maxrss * 1024})
                    return


def _rest(lines: _Lines) -> Iterator[bytes]:
    """What a child that has ended left in its pipe."""
    os.set_blocking(lines.descriptor, False)
    with contextlib.suppress(BlockingIOError):
        while (found := lines.read()) is not None:
            yield from found


def _events(lines: Iterable[bytes]) -> Iterator[Json]:
    """What a child may say; everything else it says is dropped."""
    for line in lines:
        words = line.split()
        if words == [b"go"]:
            yield {"go": True}
        elif len(words) == 2 and all(word.isdigit() and len(word) < 16 for word in words):
            yield {"progress": [int(word) for word in words]}
        elif words and words[0] == b"missing":
            yield {"missing": line[8:].decode("ascii", "replace")}


def _child(request: Json, pipe: int, parent: int) -> NoReturn:
    """The life of a child: give everything up, look, answer."""
    code = 1
    try:
        confinement.die_with_parent(parent)
        _detach(Path(request["work"]), pipe)
        _evaluate(request)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)  # no clean-up that belongs to the zygote


def _detach(work: Path, pipe: int) -> None:
    """Keep no descriptor but the pipe and the output file, no signal handler, no environment of others."""
    os.dup2(pipe, CHILD)
    output = os.open(work / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.closerange(CHILD + 1, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.enable(all_threads=False)
    scratch = work / "scratch"
    os.environ["TMPDIR"] = os.environ["HOME"] = tempfile.tempdir = str(scratch)
    os.chdir(scratch)


def _evaluate(request: Json) -> None:
    work, store = Path(request["work"]), Store(Path(request["store"]))
    sys.path += request["plugins"]
    scratch = Path(request["scratch"] or work / "scratch")
    needed = [store.path(digest) for digest in digests(request.get("suspect"))]
    present = sum(path.stat().st_size for path in needed)  # mapped evidence counts as address space
    limits = Limits(**request["limits"])
    limits = Limits(**{**request["limits"], "memory": limits.memory + 2 * present})
    missing = confinement.confine(
        read=[*environment(), *map(Path, request["readable"]), *needed],
        write=[work / "scratch", work / "result", scratch],
        limits=limits,
        strict=request["strict"],
    )
    if "canary" in request:
        reached = [name for name, reach in _REACHES.items() if reach(request["canary"])]
        for text in (*missing, *(f"the child can {name}" for name in reached)):
            os.write(CHILD, f"missing {ascii(text)[1:-1]}\n".encode())
        return
    torch.set_num_threads(request["threads"])  # only now: a thread that exists already would keep its freedom
    suspect = assemble(request["suspect"], store)
    defense = runner.remake(request["defense"])
    os.write(CHILD, b"go\n")
    outcome = runner.inspect(
        defense,
        suspect,
        name=request["defense"]["name"],
        seed=request["seed"],
        seconds=request["seconds"],
        report=_Progress(),
        scratch=scratch,
    )
    findings.save(outcome, work / "result" / "outcome.json")


class _Progress:
    """Reports progress through the pipe, ten times a second at most, and never waits for a reader."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = monotonic()
        if now - self.last < 0.1 and done != total:
            return
        self.last = now
        try:
            os.write(CHILD, f"{max(int(done), 0)} {max(int(total), 0)}\n".encode())
        except BlockingIOError:
            return


def _reads(canary: str) -> bool:
    try:
        Path(canary).read_bytes()
    except OSError:
        return False
    return True


def _connects(_canary: str) -> bool:
    """Whether a connection to this machine is at least refused by somebody, not by the lack of a network."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.socket(2, 1, 0)
    if handle < 0:
        return False
    address = struct.pack("=HH4B8x", 2, 0x0900, 127, 0, 0, 1)
    if libc.connect(handle, address, len(address)) == 0:
        return True
    return ctypes.get_errno() not in {errno.ENETUNREACH, errno.EPERM, errno.EACCES}


def _forks(_canary: str) -> bool:
    try:
        pid = os.fork()
    except OSError:
        return False
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return True


_REACHES = {"read files of others": _reads, "connect to the network": _connects, "start processes": _forks}


def _warm_up() -> None:
    """Import what is imported late, so that no child has to: torch loads its compiler at the first optimizer step."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.SGD([parameter], lr=0.1).step()
    torch.nn.functional.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
