"""Each wall by itself, in small processes; the filter also in an interpreter, for processors that are not here."""

import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from molehunt import confinement

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: walls are Linux only")
needs_landlock = pytest.mark.skipif(
    sys.platform != "linux" or confinement.landlock_version() < 1, reason="NOT TESTED: this kernel has no Landlock"
)
PRELUDE = """
import mmap, os, socket, sys, threading
from pathlib import Path
from molehunt import confinement as c

def attempt(act):
    try:
        return act() or "done"
    except (OSError, MemoryError) as error:
        return type(error).__name__

ACTS = {
    "read": lambda: Path(sys.argv[1]).read_text(),
    "connect": lambda: socket.create_connection(("127.0.0.1", 9), 1) and None,
    "fork": lambda: os._exit(0) if os.fork() == 0 else None,
    "thread": lambda: threading.Thread(target=int).start(),
    "signal others": lambda: os.kill(os.getppid(), 0),
    "signal itself": lambda: os.kill(os.getpid(), 0),
    "allocate": lambda: mmap.mmap(-1, 2**31).close(),
    "chmod": lambda: Path(sys.argv[1]).chmod(0o600),
    "execute": lambda: os.system("exit 0") and None,
}
def show(*names):
    print(*(f"{n}: {attempt(ACTS[n])}" for n in names), sep="; ")
"""


def said(code: str, *arguments: object) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("seven")
    return path


@needs_linux
def test_without_walls_everything_works(secret: Path) -> None:
    """Or the others could not fail. Nobody listens on port 9, and to be refused one must reach somebody."""
    acts = ("read", "connect", "fork", "thread", "signal others", "signal itself", "allocate", "chmod", "execute")
    assert said(f"show{acts}", secret) == (
        "read: seven; connect: ConnectionRefusedError; fork: done; thread: done; signal others: done; "
        "signal itself: done; allocate: done; chmod: done; execute: done"
    )


@needs_landlock
def test_landlock_leaves_only_what_is_named(secret: Path) -> None:
    code = 'c.keep_only(read=[Path("/usr"), Path("/missing")], write=[]); show("read", "fork", "connect")'
    assert said(code, secret).startswith("read: PermissionError; fork: done; connect: ")
    code = 'c.keep_only(read=[Path(sys.argv[1])], write=[]); show("read")'
    assert said(code, secret) == "read: seven"


@needs_landlock
def test_landlock_lets_write_where_it_may(secret: Path) -> None:
    code = """
c.keep_only(read=[], write=[Path(sys.argv[1]).parent])
folder = Path(sys.argv[1]).parent
(folder / "deep").mkdir()
(folder / "deep" / "a").write_text("x")
(folder / "deep" / "a").replace(folder / "deep" / "b")
(folder / "deep" / "b").unlink()
print(attempt(lambda: (folder / "link").symlink_to("/etc/passwd")), attempt(lambda: os.mkfifo(folder / "pipe")))
"""
    assert said(code, secret) == "PermissionError PermissionError"


@needs_linux
def test_the_filter_refuses_calls_beyond_the_process(secret: Path) -> None:
    code = 'c.filter_calls(); show("read", "connect", "fork", "thread", "signal others", "signal itself", "chmod")'
    assert said(code, secret) == (
        "read: seven; connect: PermissionError; fork: PermissionError; thread: done; "
        "signal others: PermissionError; signal itself: done; chmod: PermissionError"
    )


@needs_linux
def test_a_network_of_its_own_is_empty(secret: Path) -> None:
    code = """
try:
    c.leave_namespaces()
except c.Unavailable as error:
    print("connect: OSError")
else:
    show("connect")
"""
    assert said(code, secret) == "connect: OSError"  # network is unreachable


@needs_linux
def test_limits(secret: Path) -> None:
    code = 'c.limit(c.Limits(memory=2**30, file=10)); show("allocate", "read")'
    assert said(code, secret) == "allocate: OSError; read: seven"


@needs_linux
def test_capabilities_are_gone(secret: Path) -> None:
    code = """
c.drop_capabilities()
status = Path("/proc/self/status").read_text().splitlines()
print({line.split()[1] for line in status if line.startswith(("CapEff", "CapPrm", "CapInh"))})
"""
    assert said(code, secret) == "{'0000000000000000'}"


CONFINE = (
    'print(c.confine(read=[Path("/usr")], write=[], limits=c.Limits(), strict=%s)); show("read", "connect", "fork")'
)


@needs_landlock
@pytest.mark.parametrize("strict", [True, False])
def test_where_namespaces_are_forbidden_the_filter_keeps_the_network_away(secret: Path, strict: bool) -> None:
    code = """
def forbidden():
    raise c.Unavailable("user namespaces are forbidden")
c.leave_namespaces = forbidden
"""
    assert said(code + CONFINE % strict, secret).splitlines() == [
        "('user namespaces are forbidden',)",
        "read: PermissionError; connect: PermissionError; fork: PermissionError",
    ]


@needs_linux
def test_without_landlock_it_stops_or_says_so(secret: Path) -> None:
    code = "c.landlock_version = lambda: -1\n"
    message = "Landlock is not available; it needs Linux 5.13 or later with Landlock switched on"
    assert message in said(code + CONFINE % False, secret)
    assert "read: seven" in said(code + CONFINE % False, secret)
    strict = (
        "try:\n    c.confine(read=[], write=[], limits=c.Limits())\nexcept c.Unavailable as error:\n    print(error)"
    )
    assert said(code + strict, secret) == message


@needs_linux
def test_an_unknown_processor_has_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    with pytest.raises(confinement.Unavailable, match="no list of system calls for pdp11"):
        confinement.filter_calls()


ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
PID = 4321


def decide(machine: str, number: int, arguments: Sequence[int] = (), arch: int | None = None) -> int:
    """Interpret the filter as the kernel would."""
    own = confinement._CALLS[machine][0]
    data = struct.pack("=iIQ6Q", number, own if arch is None else arch, 0, *arguments, *[0] * (6 - len(arguments)))
    program = [struct.unpack("=HBBI", step) for step in confinement._program(machine, PID)]
    value, at = 0, 0
    while True:
        code, jump_true, jump_false, k = program[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, k)
        elif code == 0x06:
            return int(k)
        else:
            true = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
            at += jump_true if true else jump_false


@pytest.mark.parametrize("machine", confinement._CALLS)
class TestFilter:
    def test_ordinary_calls_pass(self, machine: str) -> None:
        read, openat, exit_group, futex = {"x86_64": (0, 257, 231, 202), "aarch64": (63, 56, 94, 98)}[machine]
        assert {decide(machine, number) for number in (read, openat, exit_group, futex)} == {ALLOW}

    def test_every_listed_call_is_refused(self, machine: str) -> None:
        column = list(confinement._CALLS).index(machine)
        numbers = [number for group in confinement._REFUSED.values() for number in group[column]]
        assert len(set(numbers)) == len(numbers), "a number is listed twice: a slip in the table"
        assert {decide(machine, number) for number in numbers} == {EPERM}

    def test_another_interface_of_the_kernel_is_no_way_around(self, machine: str) -> None:
        assert decide(machine, 0, arch=0x40000003) == KILL  # 32-bit calls
        assert decide(machine, 0x40000000 + 41) == ENOSYS  # x32
        assert decide(machine, -1) == ENOSYS
        assert decide(machine, confinement._NEWEST + 1) == ENOSYS

    def test_threads_but_no_processes(self, machine: str) -> None:
        _, (clone, clone3, *_) = confinement._CALLS[machine]
        assert decide(machine, clone, [0x3D0F00]) == ALLOW  # what pthread_create asks for
        assert decide(machine, clone, [0x1200011]) == EPERM  # what fork asks for
        assert decide(machine, clone3) == ENOSYS

    def test_signals_and_limits_for_itself_only(self, machine: str) -> None:
        _, (_, _, kill, tgkill, prlimit) = confinement._CALLS[machine]
        for call in (kill, tgkill):
            assert decide(machine, call, [PID]) == ALLOW
            for other in (PID + 1, 0, 1, 2**64 - 1):
                assert decide(machine, call, [other]) == EPERM
        assert decide(machine, prlimit, [PID]) == ALLOW
        assert decide(machine, prlimit, [0]) == ALLOW
        assert decide(machine, prlimit, [PID + 1]) == EPERM


def test_both_processors_refuse_the_same() -> None:
    """aarch64 never had fork, vfork, chmod, chown, lchown, utime, utimes, futimesat, inotify_init."""
    more = {name: len(x86) - len(arm) for name, (x86, arm) in confinement._REFUSED.items()}
    assert more == {
        **dict.fromkeys(confinement._REFUSED, 0), "processes": 2, "owners": 3, "attributes": 3, "handles": 1,
    }  # fmt: skip
