"""Attacks: one file each, and `ATTACKS`, their table of contents."""

from molehunt.attacks.adap_blend import AdapBlend
from molehunt.attacks.adap_patch import AdapPatch
from molehunt.attacks.badnets import BadNets
from molehunt.attacks.blended import Blended
from molehunt.attacks.bpp import Bpp
from molehunt.attacks.ftrojan import FTrojan
from molehunt.attacks.input_aware import InputAware
from molehunt.attacks.issba import ISSBA
from molehunt.attacks.label_consistent import LabelConsistent
from molehunt.attacks.low_frequency import LowFrequency
from molehunt.attacks.multi_trigger import MultiTrigger
from molehunt.attacks.poisoning import Attack, Mark, Poisoned
from molehunt.attacks.refool import Refool
from molehunt.attacks.sig import SIG
from molehunt.attacks.sticker import PhysicalSticker
from molehunt.attacks.tact import TaCT
from molehunt.attacks.wanet import WaNet
from molehunt.plugins import with_plugins

ATTACKS: dict[str, type[Attack]] = {
    "badnets": BadNets,
    "blended": Blended,
    "sig": SIG,
    "label_consistent": LabelConsistent,
    "tact": TaCT,
    "adap_blend": AdapBlend,
    "adap_patch": AdapPatch,
    "multi_trigger": MultiTrigger,
    "sticker": PhysicalSticker,
    "wanet": WaNet,
    "ftrojan": FTrojan,
    "bpp": Bpp,
    "refool": Refool,
    "low_frequency": LowFrequency,
    "issba": ISSBA,
    "input_aware": InputAware,
}


def available() -> dict[str, type[Attack]]:
    """Return the built-in attacks and those that installed packages add, by name.

    A package adds one by an entry point of the group `molehunt.attacks`.

    Raises:
        ValueError: two packages use one name, or a package uses the name of a built-in attack.
    """
    return with_plugins("molehunt.attacks", ATTACKS, "attack", reserved={"none"})


__all__ = [
    "ATTACKS",
    "ISSBA",
    "SIG",
    "AdapBlend",
    "AdapPatch",
    "Attack",
    "BadNets",
    "Blended",
    "Bpp",
    "FTrojan",
    "InputAware",
    "LabelConsistent",
    "LowFrequency",
    "Mark",
    "MultiTrigger",
    "PhysicalSticker",
    "Poisoned",
    "Refool",
    "TaCT",
    "WaNet",
    "available",
]
