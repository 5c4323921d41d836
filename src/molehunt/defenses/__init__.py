"""Defenses: one file each, and `DEFENSES`, their table of contents."""

from collections.abc import Mapping

from molehunt.defenses.abs import ABS
from molehunt.defenses.contract import Defense
from molehunt.defenses.fine_pruning import FinePruning
from molehunt.defenses.fine_tuning import FineTuning
from molehunt.defenses.gradient_shaping import GradientShaping
from molehunt.defenses.mntd import MNTD
from molehunt.defenses.neural_cleanse import NeuralCleanse
from molehunt.defenses.neuron_pruning import NeuronPruning
from molehunt.defenses.pair_inversion import PairInversion
from molehunt.defenses.pruning_detection import PruningDetection
from molehunt.defenses.rab import RAB
from molehunt.defenses.sentinet import SentiNet
from molehunt.defenses.spectral_signatures import SpectralSignatures
from molehunt.defenses.strip import STRIP
from molehunt.defenses.super_fine_tuning import SuperFineTuning
from molehunt.defenses.unlearning import Unlearning
from molehunt.plugins import with_plugins

DEFENSES: dict[str, type[Defense]] = {
    "abs": ABS,
    "fine_pruning": FinePruning,
    "fine_tuning": FineTuning,
    "gradient_shaping": GradientShaping,
    "mntd": MNTD,
    "neural_cleanse": NeuralCleanse,
    "neuron_pruning": NeuronPruning,
    "pair_inversion": PairInversion,
    "pruning_detection": PruningDetection,
    "rab": RAB,
    "sentinet": SentiNet,
    "spectral_signatures": SpectralSignatures,
    "strip": STRIP,
    "super_fine_tuning": SuperFineTuning,
    "unlearning": Unlearning,
}

REPAIRS = frozenset(
    {"fine_tuning", "super_fine_tuning", "fine_pruning", "gradient_shaping", "unlearning", "neuron_pruning"}
)
"""Built-in defenses that answer with a repaired model and no score: they say nothing about clean models."""


SCORELESS = REPAIRS | {"spectral_signatures"}
"""Built-in defenses that have no score of a model: repairs, and one that scores training samples."""


def scoring(defenses: Mapping[str, Defense]) -> dict[str, Defense]:
    """Return the defenses that may score a model: all but those in `SCORELESS`."""
    return {name: defense for name, defense in defenses.items() if name not in SCORELESS}


def without_repairs(defenses: Mapping[str, Defense]) -> dict[str, Defense]:
    """Return all defenses but the built-in repairs."""
    return {name: defense for name, defense in defenses.items() if name not in REPAIRS}


def available() -> dict[str, type[Defense]]:
    """Return the built-in defenses and those that installed packages add, by name.

    A package adds one by an entry point of the group `molehunt.defenses`.

    Raises:
        ValueError: two packages use one name, or a package uses the name of a built-in defense.
    """
    return with_plugins("molehunt.defenses", DEFENSES, "defense")


__all__ = [
    "ABS",
    "DEFENSES",
    "MNTD",
    "RAB",
    "REPAIRS",
    "SCORELESS",
    "STRIP",
    "Defense",
    "FinePruning",
    "FineTuning",
    "GradientShaping",
    "NeuralCleanse",
    "NeuronPruning",
    "PairInversion",
    "PruningDetection",
    "SentiNet",
    "SpectralSignatures",
    "SuperFineTuning",
    "Unlearning",
    "available",
    "scoring",
    "without_repairs",
]
