"""What the tests of commands share: a cache of their own, and trainings of a second."""

from pathlib import Path

import pytest

from molehunt.game import check, workshop
from molehunt.training import Recipe

HURRIED = Recipe(epochs=1, batch=25, optimizer="adamw", lr=4e-3, warmup=0.25, augment="crop", shift=1)
"""One pass over mnist5k: a second, and good enough to be told from chance."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("MOLEHUNT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MOLEHUNT_DATA", raising=False)
    monkeypatch.delenv("MOLEHUNT_DEBUG", raising=False)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teams and references train in a hurry."""
    for module in (check, workshop):
        monkeypatch.setattr(module, "recipe_for", lambda *_: HURRIED)
