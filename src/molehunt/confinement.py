"""How a process gives up what it does not need, for good: files, network, other processes, memory. Linux only.

Everything here acts on the calling process, which must have one thread, and cannot be undone by it. There are four
walls: resource limits; namespaces of its own for users, network and System V objects; Landlock, which leaves only
named files and folders; and a seccomp filter, which refuses system calls for other processes, sockets, attributes of
files and rare doors into the kernel. Landlock and seccomp need no privilege; where namespaces are forbidden (many
containers) the filter alone keeps the network away. `docs/extend/isolation.md` says what each wall stops.

Reference:
    The kernel's user-space API guides on Landlock and on seccomp filters, docs.kernel.org.
"""

import ctypes
import functools
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Rights of Landlock; the first number is the version of the interface that brought them.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_DIR, _MAKE_REG = 1 << 7, 1 << 8
_TRUNCATE = 1 << 14
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | 1 << 15
_FILES_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP, _SCOPES = 0b11, 0b11  # bind and connect, since 4; abstract sockets and signals, since 6
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same number on every architecture

_NEW_USER, _NEW_NET, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000
_PDEATHSIG, _SECCOMP, _NO_NEW_PRIVS = 1, 22, 38

# System calls that are refused, by their numbers on (x86_64, aarch64).
_REFUSED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # Sockets: the second wall against the network, and the only one against Unix sockets in the file system.
    "sockets": ((41,), (198,)),
    # fork, vfork, execve, execveat, ptrace, process_vm_*, kcmp, pidfd_*, process_madvise, process_mrelease, tkill,
    # rt_*sigqueueinfo, setpriority, ioprio_set, sched_set*.
    "processes": (
        (57, 58, 59, 322, 101, 310, 311, 312, 434, 438, 424, 440, 448, 200, 129, 297, 141, 251, 203, 144, 142, 314),
        (221, 281, 117, 270, 271, 272, 434, 438, 424, 440, 448, 130, 138, 240, 140, 30, 122, 119, 118, 274),
    ),
    # What Landlock does not guard: *chmod* and *chown*; then *xattr and *utime*; then truncate (which it guards since
    # its third version), file handles, inotify and fanotify.
    "owners": ((90, 91, 268, 452, 92, 93, 94, 260), (52, 53, 452, 55, 54)),
    "attributes": ((188, 189, 190, 197, 198, 199, 132, 235, 261, 280), (5, 6, 7, 14, 15, 16, 88)),
    "handles": ((76, 303, 304, 253, 294, 300), (45, 264, 265, 26, 262)),
    # mount and its relatives, chroot, unshare, setns.
    "views": (
        (165, 166, 155, 161, 272, 308, 428, 429, 430, 431, 432, 433, 442),
        (40, 39, 41, 51, 97, 268, 428, 429, 430, 431, 432, 433, 442),
    ),
    # Memory that no limit counts or that others share: shm*, semget, msgget, mq_open, memfd_*.
    "memory": ((29, 30, 31, 64, 68, 240, 319, 447), (194, 196, 195, 190, 186, 180, 279, 447)),
    # bpf, perf_event_open, userfaultfd, io_uring_*, keyctl, add_key, request_key.
    "doors": ((321, 298, 323, 425, 426, 427, 250, 248, 249), (280, 241, 282, 425, 426, 427, 219, 217, 218)),
}
# AUDIT_ARCH, then clone, clone3, kill, tgkill, prlimit64.
_CALLS: dict[str, tuple[int, tuple[int, int, int, int, int]]] = {
    "x86_64": (0xC000003E, (56, 435, 62, 234, 302)),
    "aarch64": (0xC00000B7, (220, 435, 129, 131, 261)),
}
_NEWEST = 462  # mseal; whatever the kernel learns later does not exist for the process
_CLONE_THREAD = 0x00010000


class Unavailable(OSError):
    """The system does not offer a wall; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a confined process may use.

    Attributes:
        memory: bytes that it may allocate on top of what it has.
        cpu: seconds of processor time, over all threads.
        file: size in bytes of the largest file that it may write.
        open_files: descriptors.
    """

    memory: int = 3 * 2**30
    cpu: int = 3600
    file: int = 512 * 2**20
    open_files: int = 256


def limit(limits: Limits) -> None:
    """Set the resource limits for good."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    present = pages * resource.getpagesize()
    for kind, most in (
        # Address space, not resident memory: an allocation then fails where it is asked for, and can be reported. The
        # stacks and arenas of threads reserve some that they never use.
        (resource.RLIMIT_AS, present + limits.memory + 2**28),
        (resource.RLIMIT_CPU, limits.cpu),
        (resource.RLIMIT_FSIZE, limits.file),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        ceiling = resource.getrlimit(kind)[1]
        value = most if ceiling == resource.RLIM_INFINITY else min(most, ceiling)
        # Where both are equal the kernel skips the signal that names processor time as the reason.
        hard = value + 5 if kind == resource.RLIMIT_CPU and value == most else value
        resource.setrlimit(kind, (value, hard))


def leave_namespaces() -> None:
    """Move to new namespaces for users, network (not even a loopback that is up) and System V objects.

    Raises:
        Unavailable: the system forbids them to ordinary users.
    """
    _call("unshare", _NEW_USER | _NEW_NET | _NEW_IPC, what="user and network namespaces")


def keep_only(*, read: Iterable[Path], write: Iterable[Path]) -> None:
    """Let the process open nothing but these files and folders with what is below them; execute nothing at all.

    Args:
        read: may be read; what does not exist is skipped.
        write: folders where files and folders may also be made, changed and removed.

    Raises:
        Unavailable: the kernel has no Landlock.
    """
    version = landlock_version()
    if version < 1:
        raise Unavailable("Landlock is not available; it needs Linux 5.13 or later with Landlock switched on")
    files = _FILES_BY_VERSION[min(version, 5)]
    attributes = [files] + [_TCP] * (version >= 4) + [_SCOPES] * (version >= 6)
    ruleset = ctypes.create_string_buffer(struct.pack(f"={len(attributes)}Q", *attributes))
    handle = _call("syscall", _CREATE_RULESET, ruleset, 8 * len(attributes), 0, what="a Landlock ruleset")
    reading = _READ_FILE | _READ_DIR
    writing = reading | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _TRUNCATE
    try:
        for paths, rights in ((read, reading), (write, writing)):
            for path in paths:
                try:
                    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
                except OSError:
                    continue
                try:
                    allowed = rights & files & (~0 if path.is_dir() else _OF_FILES)
                    rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, place))
                    _call("syscall", _ADD_RULE, handle, 1, rule, 0, what=f"a Landlock rule for {path}")
                finally:
                    os.close(place)
        _no_new_privileges()
        _call("syscall", _RESTRICT_SELF, handle, 0, what="Landlock")
    finally:
        os.close(handle)


def landlock_version() -> int:
    """Version of the kernel's Landlock interface; 0 or less where there is none."""
    return int(_libc().syscall(_CREATE_RULESET, None, 0, 1))


def filter_calls() -> None:
    """Refuse system calls that reach beyond the process; threads may be made, signals go to itself only.

    Raises:
        Unavailable: unknown processor, or no seccomp filters.
    """
    machine = platform.machine()
    if machine not in _CALLS or sys.byteorder != "little":
        raise Unavailable(f"there is no list of system calls for {machine}")
    program = b"".join(_program(machine, os.getpid()))
    code = ctypes.create_string_buffer(program)
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    _no_new_privileges()
    _call("prctl", _SECCOMP, 2, fprog, 0, 0, what="a seccomp filter")


def drop_capabilities() -> None:
    """Give up every capability, also those that a new user namespace brings."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    _call("capset", header, ctypes.create_string_buffer(24), what="capset")


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the one that forked it ends, however it ends."""
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0, what="a signal at the parent's death")
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def confine(*, read: Iterable[Path], write: Iterable[Path], limits: Limits, strict: bool = True) -> tuple[str, ...]:
    """Put up all walls around this process.

    Args:
        read: files and folders that it may still read.
        write: folders that it may still write to.
        limits: of memory, time and files.
        strict: raise where a wall that nothing else replaces is missing; else go on without it.

    Returns:
        What is missing, in words; namespaces may be missing in strict mode too, because the filter stands in for them.

    Raises:
        Unavailable: a wall is missing, in strict mode.
    """
    limit(limits)
    absent = []
    try:
        leave_namespaces()
    except Unavailable as error:
        absent.append(str(error))
    walls: tuple[Callable[[], None], ...] = (
        functools.partial(keep_only, read=read, write=write),
        drop_capabilities,
        filter_calls,
    )
    for wall in walls:
        try:
            wall()
        except Unavailable as error:
            if strict:
                raise
            absent.append(str(error))
    return tuple(absent)


def _program(machine: str, pid: int) -> Iterator[bytes]:
    """The filter, one instruction of 8 bytes after the other."""
    column = list(_CALLS).index(machine)
    arch, (clone, clone3, kill, tgkill, prlimit) = _CALLS[machine]
    load, equal, at_least, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, die = 0x7FFF0000, 0x80000000
    eperm, enosys = 0x00050000 | 1, 0x00050000 | 38

    def step(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, jump_true, jump_false, k)

    # struct seccomp_data: number at 0, architecture at 4, low half of argument i at 16 + 8 i (little endian).
    yield step(load, 4)
    yield step(equal, arch, 1, 0)
    yield step(answer, die)
    yield step(load, 0)
    # Also what x86_64 calls the x32 interface, whose numbers have a high bit.
    yield step(at_least, _NEWEST + 1, 0, 1)
    yield step(answer, enosys)
    for group in _REFUSED.values():
        for number in group[column]:
            yield step(equal, number, 0, 1)
            yield step(answer, eperm)
    # The arguments of clone3 lie in memory, which a filter cannot read; the C library then falls back to clone.
    yield step(equal, clone3, 0, 1)
    yield step(answer, enosys)
    yield step(equal, clone, 0, 4)
    yield step(load, 16)
    yield step(bits, _CLONE_THREAD, 1, 0)
    yield step(answer, eperm)
    yield step(answer, allow)
    for number, targets in ((kill, (pid,)), (tgkill, (pid,)), (prlimit, (0, pid))):
        yield step(equal, number, 0, 3 + len(targets))
        yield step(load, 16)
        for i, target in enumerate(targets):
            yield step(equal, target, len(targets) - i, 0)
        yield step(answer, eperm)
        yield step(answer, allow)
    yield step(answer, allow)


def _no_new_privileges() -> None:
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0, what="no_new_privs")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object, what: str) -> int:
    """Call a function of the C library and turn its error into `Unavailable`."""
    function: Callable[..., int] | None = getattr(_libc(), name, None)
    if function is None:
        raise Unavailable(f"{what}: this system has no {name}")
    result = int(function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))
    if result < 0:
        raise Unavailable(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result
