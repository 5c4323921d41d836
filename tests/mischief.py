"""A defense that does what no defense may: what the walls around an evaluation are tested with."""

import ctypes
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Mischief:
    """Does one thing and answers with what it got; errors are part of the answer, so that a wall is told from a crash.

    Attributes:
        act: a key of `ACTS`.
        where: a path or a port for it.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(),)
    act: str
    where: str = ""

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Do it."""
        if self.act in PLAIN:
            answer = PLAIN[self.act](suspect, run)
            return answer if isinstance(answer, Finding) else Finding(defense="mischief", score=0.0)
        try:
            details = {"got": ACTS[self.act](self.where)}
        except OSError as error:
            details = {"refused": error.strerror}
        return Finding(defense="mischief", score=0.0, details=details)


def read(where: str) -> str:
    return Path(where).read_text()


def read_late(where: str) -> str:
    """From a second thread, in case a wall stands around one thread only."""
    got: list[str] = []
    errors: list[OSError] = []

    def work() -> None:
        try:
            got.append(read(where))
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return got[0]


def listing(where: str) -> list[str]:
    return sorted(os.listdir(where))  # noqa: PTH208


def write(where: str) -> str:
    Path(where).write_text("I was here")
    return "written"


def truncate(where: str) -> str:
    os.truncate(where, 0)
    return "emptied"


def chmod(where: str) -> str:
    Path(where).chmod(0)
    return "locked"


def link(where: str) -> str:
    Path("link").symlink_to(where)
    return read("link")


def connect(where: str) -> str:
    with socket.create_connection(("127.0.0.1", int(where)), timeout=2) as connection:
        return connection.recv(100).decode()


def connect_unix(where: str) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(where)
        return connection.recv(100).decode()


def environment(_where: str) -> Json:
    return dict(os.environ)


def environment_of_parent(_where: str) -> str:
    return Path(f"/proc/{os.getppid()}/environ").read_bytes().decode()


def fork(_where: str) -> str:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "forked"


def execute(_where: str) -> str:
    os.execv("/bin/true", ["true"])
    raise AssertionError


def kill_parent(_where: str) -> str:
    os.kill(os.getppid(), 0)
    return "could"


def descriptors(_where: str) -> list[int]:
    """Descriptors that were inherited."""
    found = []
    for descriptor in range(3, 256):
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        found.append(descriptor)
    return found


def threads(_where: str) -> int:
    """Threads are allowed: a matrix product needs them."""
    torch.set_num_threads(2)
    return int(torch.ones(800, 800).matmul(torch.ones(800, 800))[0, 0])


def lazy_import(_where: str) -> str:
    """Python must still find its own modules."""
    import colorsys
    import wave

    return colorsys.__name__ + wave.__name__


def scratch(_where: str) -> str:
    """A scratch folder must work, and temporary files."""
    import tempfile

    Path("note").write_text("kept")
    with tempfile.TemporaryFile() as stream:
        stream.write(b"temporary")
    return read("note")


ACTS: dict[str, Callable[[str], Any]] = {
    f.__name__: f
    for f in (
        *(read, read_late, listing, write, truncate, chmod, link, connect, connect_unix, environment),
        *(environment_of_parent, fork, execute, kill_parent, descriptors, threads, lazy_import, scratch),
    )
}


def allocate(_s: Suspect, _r: Run) -> None:
    _ = torch.ones(10 * 2**30, dtype=torch.uint8)


def allocate_slowly(_s: Suspect, _r: Run) -> None:
    kept = []
    while True:
        kept.append(bytearray(2**24))


def sleep(_s: Suspect, _r: Run) -> None:
    time.sleep(1000)


def spin(_s: Suspect, _r: Run) -> None:
    while True:
        pass


def fill_disk(_s: Suspect, _r: Run) -> None:
    for i in range(10_000):
        Path(f"junk{i}").write_bytes(bytes(2**20))
        time.sleep(0.001)


def large_file(_s: Suspect, _r: Run) -> None:
    with Path("large").open("wb") as stream:
        for _ in range(10_000):
            stream.write(bytes(2**20))


def segfault(_s: Suspect, _r: Run) -> None:
    ctypes.string_at(0)


def leave(_s: Suspect, _r: Run) -> None:
    os._exit(0)


def not_a_number(_s: Suspect, _r: Run) -> Finding:
    scores = torch.zeros(10)
    finding = Finding(defense="?", class_scores=scores)
    scores[3] = torch.nan
    return finding


def change_weights(s: Suspect, _r: Run) -> None:
    with torch.no_grad():
        next(s.model.parameters()).add_(1.0)


def repeat(_s: Suspect, _r: Run) -> Finding:
    """One small file, mentioned so often that reading the answer takes more memory than its files do."""
    return Finding(defense="?", score=0.0, details={"again": [torch.zeros(100)] * 20})


def chatter(_s: Suspect, run: Run) -> None:
    os.write(3, b"go\n" * 3 + b"99999999999999999999 1\n\xff\xfe {}\n" + b"x" * 10_000 + b"\n7 9\n")
    run.report(1, 4)
    time.sleep(0.2)
    run.report(4, 4)


def forge(text: str) -> Callable[[Suspect, Run], None]:
    """Write the answer itself and end before the runner can write its own."""

    def act(_s: Suspect, _r: Run) -> None:
        Path("../result/outcome.json").write_text(text)
        os._exit(0)

    return act


PLAIN: dict[str, Callable[[Suspect, Run], Any]] = {
    f.__name__: f
    for f in (
        *(allocate, allocate_slowly, sleep, spin, fill_disk, large_file, segfault, leave, not_a_number),
        *(change_weights, repeat, chatter),
    )
} | {
    "forged rubbish": forge("{"),
    "forged verdict": forge('{"is": "abstention", "defense": "x", "reason": "I would rather not"}'),
    "forged path": forge(
        '{"is": "finding", "defense": "x", "class_scores": {"tensor": "../../../../../../../etc/passwd"}}'
    ),
    "forged scores": forge('{"is": "finding", "defense": "x", "class_scores": [1, 2]}'),
    "forged twice": forge('{"is": "finding", "defense": "x", "score": 1.0, "score": 2.0}'),
    "forged length": forge("[" + " " * 2**25 + "]"),
    "forged nest": forge("[" * 100_000),
    "forged cost": forge(
        '{"is": "finding", "defense": "someone_else", "score": 1.0, "record": {"seed": 666},'
        ' "cost": {"is": "cost", "seconds": -5, "forward": "many", "backward": -1, "peak_bytes": -1}}'
    ),
}
