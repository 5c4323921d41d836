"""Defenses: one file each, and `DEFENSES`, their table of contents."""

from molehunt.defenses.contract import Defense
from molehunt.defenses.fine_pruning import FinePruning
from molehunt.defenses.neural_cleanse import NeuralCleanse
from molehunt.defenses.strip import STRIP
from molehunt.plugins import with_plugins

DEFENSES: dict[str, type[Defense]] = {
    "fine_pruning": FinePruning,
    "neural_cleanse": NeuralCleanse,
    "strip": STRIP,
}


def available() -> dict[str, type[Defense]]:
    """Return the built-in defenses and those that installed packages add, by name.

    A package adds one by an entry point of the group `molehunt.defenses`.

    Raises:
        ValueError: two packages use one name, or a package uses the name of a built-in defense.
    """
    return with_plugins("molehunt.defenses", DEFENSES, "defense")


__all__ = ["DEFENSES", "STRIP", "Defense", "FinePruning", "NeuralCleanse", "available"]
