"""Which code an attack of one's own is made of: changed, it is another attack; and what it raises is its mistake."""

import ast
import hashlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

INSTALLED = {"site-packages", "dist-packages"}
"""Folders in which everything that is installed lies side by side."""


def digest(attack: type) -> str:
    """SHA-256 of the files that an attack is made of, and of their names, in hexadecimal."""
    files = files_of(attack)
    sha = hashlib.sha256()
    for path in files:
        sha.update(f"{os.path.relpath(path, files[0].parent)}\0".encode())
        sha.update(hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


def line_of(error: BaseException, attack: type) -> str | None:
    """Return FILE:LINE of the last line in an attack's own code that an error came through; None for no such line."""
    files = set(files_of(attack))
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename).resolve()
        if path in files:
            place = f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{line}"
    return place


def files_of(attack: type) -> tuple[Path, ...]:
    """Return the files that an attack is made of, in order; none for an attack of Molehunt, or one without a file.

    It is the whole package that its class lies in, data too, for an attack may read them; else the file of the class.
    Then, unless it is installed, the modules and packages that lie beside it and are imported anywhere in it, and so
    on.
    """
    if attack.__module__.partition(".")[0] == "molehunt":
        return ()
    found: set[Path] = set()
    tried: set[Path] = set()
    waiting = _places(attack)
    while waiting:
        place = waiting.pop()
        if place in tried:
            continue
        tried.add(place)
        files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
        files = [path for path in files if "__pycache__" not in path.parts]
        found.update(files)
        if place.parent.name in INSTALLED:
            continue
        for name in {name for path in files if path.suffix == ".py" for name in _imported(path)}:
            beside = (place.parent / name, place.parent / f"{name}.py")
            waiting.extend(path for path in beside if path.exists())
    return tuple(sorted(found))


def _places(attack: type) -> list[Path]:
    """The folders of the outermost package that a class lies in, or its file."""
    outermost = sys.modules.get(attack.__module__.partition(".")[0])
    try:
        places = list(getattr(outermost, "__path__", ())) or [inspect.getfile(attack)]
    except (TypeError, OSError):  # written into a session of Python
        return []
    return [path for place in places if (path := Path(place).resolve()).exists()]


def _imported(path: Path) -> Iterator[str]:
    """First parts of the names of all modules that a file imports, wherever in it; none if that is no Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
