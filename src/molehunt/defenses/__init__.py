"""Defenses: one file each, and `DEFENSES`, their table of contents."""

from importlib.metadata import entry_points

from molehunt.defenses.contract import Defense
from molehunt.defenses.fine_pruning import FinePruning
from molehunt.defenses.neural_cleanse import NeuralCleanse
from molehunt.defenses.strip import STRIP

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
    plugins: dict[str, type[Defense]] = {}
    for point in entry_points(group="molehunt.defenses"):
        if point.name in DEFENSES:
            raise ValueError(f"a plug-in may not replace a built-in defense: {point.name!r} is {point.value}")
        if point.name in plugins:
            raise ValueError(f"two plug-ins have one name: {point.name!r}, the second is {point.value}")
        plugins[point.name] = point.load()
    return DEFENSES | plugins


__all__ = ["DEFENSES", "STRIP", "Defense", "FinePruning", "NeuralCleanse", "available"]
