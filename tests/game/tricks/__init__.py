"""Hostile and broken submissions, made on the fly: one function per trick, named after it.

Each function makes something that somebody might upload, and says what the refusal must contain. `all_archives` gives
every archive, `BARE_WEIGHTS` files of weights by themselves, `TORCH_FILES` files for the converter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Trick:
    """A way to break or fool a reader.

    Attributes:
        name: what it is called.
        says: part of the message that must refuse it, as a regular expression.
        make: makes it; what it takes and gives depends on the module.
    """

    name: str
    says: str
    make: Callable[..., Any]


def register(tricks: dict[str, Trick], says: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Note a function as a trick."""

    def note(make: Callable[..., Any]) -> Callable[..., Any]:
        name = make.__name__
        assert name not in tricks, f"two tricks are called {name}"
        tricks[name] = Trick(name, says, make)
        return make

    return note


def parameters(tricks: dict[str, Trick]) -> list[Any]:
    """All tricks as parameters of a test, by name."""
    return [pytest.param(trick, id=trick.name) for trick in tricks.values()]


def all_archives() -> dict[str, Trick]:
    """Every trick as one that writes an archive: ``make(folder) -> Path``."""
    from game.tricks import archives, manifests, seals, training_sets, weights  # they need `register`

    def wrapped(trick: Trick, member: str) -> Trick:
        def make(folder: Path) -> Path:
            content = trick.make()
            honest = archives.plain_data if member == "training.safetensors" else archives.plain
            return honest(folder / f"{trick.name}.zip", {member: content})

        return Trick(trick.name, rf"{member}.*{trick.says}", make)

    found = dict(archives.TRICKS)
    for member, tricks in (
        ("manifest.json", manifests.TRICKS),
        ("model.safetensors", weights.TRICKS),
        ("training.safetensors", training_sets.TRICKS),
        ("sealed.bin", seals.TRICKS),
    ):
        for name, trick in tricks.items():
            assert name not in found, f"two tricks are called {name}"
            found[name] = wrapped(trick, member)
    return found
