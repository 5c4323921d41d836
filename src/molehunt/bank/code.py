"""Which code a defense is made of: scores of other code are scores of another defense."""

import ast
import hashlib
import inspect
import sys
from pathlib import Path

OURS = "molehunt.defenses"
METAS = "molehunt.metas"


def place_of(name: str, kind: type) -> str:
    """Return the folder, below that of a bank, of what a defense answered when it was asked alone.

    Args:
        name: of the defense, or MODULE:CLASS.
        kind: its class; with other code the folder is another one.
    """
    return f"scores-{name.replace(':', '.')}-{digest(kind)[:12]}"


def digest(kind: type) -> str:
    """SHA-256 of the code of a class, in hexadecimal: of the whole package that it lies in, else of its file.

    Of a package every file counts, data too, for a defense may read them. Of Molehunt's own defenses it is the file and
    those files of `molehunt.defenses` that it imports, so that a new defense leaves the scores of the others valid; and
    `molehunt.metas` where that is imported, which holds half of a method.
    """
    sha = hashlib.sha256()
    for base, path in _files(kind):
        sha.update(f"{path.relative_to(base).as_posix()}\0".encode())
        sha.update(hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


def folders_of(kind: type) -> tuple[Path, ...]:
    """Return the folders from which another process has to import a class; empty for one of Molehunt."""
    if kind.__module__.startswith("molehunt."):
        return ()
    package = _package(kind)
    places = [inspect.getfile(kind)] if package is None else list(sys.modules[package].__path__)
    return tuple(sorted({Path(place).resolve().parent for place in places}))


def _files(kind: type) -> list[tuple[Path, Path]]:
    """Files that a class is made of, each after the folder that its name counts from."""
    package = _package(kind)
    if package == OURS:
        return _reached(kind)
    if package is None:
        path = Path(inspect.getfile(kind))
        return [(path.parent, path)]
    return [
        (folder, path)
        for folder in map(Path, sys.modules[package].__path__)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]


def _reached(kind: type) -> list[tuple[Path, Path]]:
    """Files of `molehunt.defenses` that a defense of ours is made of: its own, and what is imported from there."""
    folder = Path(inspect.getfile(kind)).parent
    found, open_ = set[Path](), [Path(inspect.getfile(kind))]
    while open_:
        path = open_.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{OURS}."):
                open_.append(folder / f"{str(node.module).removeprefix(f'{OURS}.')}.py")
            if isinstance(node, ast.ImportFrom) and node.module == METAS:
                open_.append(folder.parent / "metas.py")
    return [(folder if path.parent == folder else folder.parent, path) for path in sorted(found)]


def _package(kind: type) -> str | None:
    """Name of the outermost package that a class lies in; None for a class of a single file."""
    if kind.__module__.startswith(f"{OURS}."):
        return OURS
    outermost = kind.__module__.partition(".")[0]
    return outermost if hasattr(sys.modules[outermost], "__path__") else None
