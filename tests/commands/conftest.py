"""What the tests of commands share: a cache of their own, and trainings of a second."""

from dataclasses import replace
from pathlib import Path

import pytest

from molehunt.training.recipes import SMALL


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("MOLEHUNT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MOLEHUNT_DATA", raising=False)
    monkeypatch.delenv("MOLEHUNT_DEBUG", raising=False)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on mnist5k for one pass over the data: good enough to be told from chance, and done in a second."""
    recipes = SMALL["mnist5k"]
    monkeypatch.setitem(recipes, "badnets_cnn", replace(recipes["badnets_cnn"], epochs=1, batch=25))
