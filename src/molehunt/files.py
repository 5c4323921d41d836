"""Files from strangers, opened with care, and files of ours, written whole or not at all."""

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from molehunt.strict_json import show


class Refused(ValueError):
    """Something that a stranger handed in is refused; the message says why and, where it helps, what to do."""


@contextmanager
def open_regular(path: Path, error: type[Refused] = Refused) -> Iterator[tuple[BinaryIO, int]]:
    """Open an ordinary file and say how long it is.

    Args:
        path: the file; a symbolic link that the user made is followed.
        error: what to raise.

    Yields:
        The file, opened for reading, and its length in bytes.

    Raises:
        Refused: it does not exist, cannot be read, or is a folder, a device or a pipe, which could block for ever or
            never end.
    """
    name = show(str(path), 200)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        raise error(f"cannot open {name}: {getattr(problem, 'strerror', problem)}") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise error(f"{name} is not an ordinary file")
    with os.fdopen(descriptor, "rb") as stream:
        yield stream, found.st_size


def exactly(stream: BinaryIO, count: int, error: type[Refused] = Refused) -> bytearray:
    """Read so many bytes, no fewer.

    Raises:
        Refused: the file ends before.
    """
    # The caller has compared the count with the length of the file, so this allocates no more than exists.
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        step = stream.readinto(view[got:])  # type: ignore[attr-defined]
        if not step:
            raise error(f"the file ends {count - got} bytes too early")
        got += step
    return data


def write_atomically(path: Path, pieces: Iterable[bytes], *, mode: int = 0o644) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of it.

    Args:
        path: where; its folder exists.
        pieces: the content.
        mode: permission bits.
    """
    handle, name = tempfile.mkstemp(prefix=".part-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the name must survive a power cut too, or what was acknowledged is lost
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
