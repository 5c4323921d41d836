"""Attacks: one file each, and `ATTACKS`, their table of contents."""

from molehunt.attacks.badnets import BadNets
from molehunt.attacks.blended import Blended
from molehunt.attacks.poisoning import Attack, Mark, Poisoned

ATTACKS: dict[str, type[Attack]] = {"badnets": BadNets, "blended": Blended}

__all__ = ["ATTACKS", "Attack", "BadNets", "Blended", "Mark", "Poisoned"]
