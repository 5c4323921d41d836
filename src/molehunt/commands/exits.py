"""How the program ends: its exit codes, and errors that lie in what it was given."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DONE = 0
CLEAR, FOUND, UNSURE = 0, 1, 2
"""What `scan` answers."""
PASSED, MISSED = 0, 1
"""What `check` answers."""
REFUSED = 3
"""Wrong usage, or an input that is refused. Never 0, 1 or 2, which are answers."""
INTERNAL = 70
"""A mistake of the program."""
STOPPED = 130
"""Ctrl-C, as shells have it: 128 and the number of the signal."""
UNREAD = 141
"""Whoever read the output went away, as shells have it."""


class InputError(Exception):
    """What the user gave is at fault; the message says what, and what to do."""


@contextmanager
def given(kinds: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Blame the input for errors of these kinds that are raised in here.

    Keep it around the one call that judges the input: a `ValueError` from anywhere else is a mistake of ours.
    """
    try:
        yield
    except kinds as error:
        raise InputError(_words(error)) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name a file in the refusals of what is in it, which know it by its content only.

    Raises:
        InputError: nothing is there, or what is there is refused.
    """
    from molehunt.files import Refused

    if not path.exists():
        raise InputError(f"cannot open {path}: there is no such file or folder")
    try:
        yield
    except Refused as error:
        text = str(error)
        raise InputError(text if str(path) in text else f"{path}: {text}") from error


def _words(error: Exception) -> str:
    """Say what is wrong without the number that the system has for it."""
    if isinstance(error, FileExistsError) and error.filename:
        return f"{error.filename} is a file, and a folder is needed; name another one"
    if isinstance(error, NotADirectoryError) and error.filename:
        return f"{error.filename} cannot be made: a part of the path is a file; name another folder"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def check_target(path: Path | None) -> None:
    """See before the work whether a file can be written after it; None is always fine.

    Raises:
        InputError: it is a folder, or lies in a folder that is not there or cannot be written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: permission denied")
