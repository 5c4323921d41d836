"""Attacks: one file each, and `ATTACKS`, their table of contents."""

from molehunt.attacks.abs_evading import ABSEvading
from molehunt.attacks.adap_blend import AdapBlend
from molehunt.attacks.adap_patch import AdapPatch
from molehunt.attacks.adversarial_embedding import AdversarialEmbedding
from molehunt.attacks.badnets import BadNets
from molehunt.attacks.bit_flips import BitFlips
from molehunt.attacks.blended import Blended
from molehunt.attacks.blind import Blind
from molehunt.attacks.bpp import Bpp
from molehunt.attacks.crafting import AnyAttack, Bench, Crafted, Crafter, poison
from molehunt.attacks.evasive import Evasive
from molehunt.attacks.explanation_disguising import ExplanationDisguising
from molehunt.attacks.ftrojan import FTrojan
from molehunt.attacks.handcrafted import Handcrafted
from molehunt.attacks.input_aware import InputAware
from molehunt.attacks.issba import ISSBA
from molehunt.attacks.label_consistent import LabelConsistent
from molehunt.attacks.lira import LIRA
from molehunt.attacks.low_frequency import LowFrequency
from molehunt.attacks.mntd_adaptive import MNTDAdaptive
from molehunt.attacks.multi_trigger import MultiTrigger
from molehunt.attacks.poisoning import Attack, Mark, Poisoned
from molehunt.attacks.pruning_aware import PruningAware
from molehunt.attacks.refool import Refool
from molehunt.attacks.sig import SIG
from molehunt.attacks.sticker import PhysicalSticker
from molehunt.attacks.strip_evading import STRIPEvading
from molehunt.attacks.subnet_replacement import SubnetReplacement
from molehunt.attacks.tact import TaCT
from molehunt.attacks.trojannn import TrojanNN
from molehunt.attacks.tuning_resistant import TuningResistant
from molehunt.attacks.wanet import WaNet
from molehunt.plugins import with_plugins

ATTACKS: dict[str, type[AnyAttack]] = {
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
    "trojannn": TrojanNN,
    "lira": LIRA,
    "blind": Blind,
    "pruning_aware": PruningAware,
    "tuning_resistant": TuningResistant,
    "strip_evading": STRIPEvading,
    "abs_evading": ABSEvading,
    "mntd_adaptive": MNTDAdaptive,
    "explanation_disguising": ExplanationDisguising,
    "evasive": Evasive,
    "adversarial_embedding": AdversarialEmbedding,
    "subnet_replacement": SubnetReplacement,
    "bit_flips": BitFlips,
    "handcrafted": Handcrafted,
}
"""First those that poison a training set, then, from "trojannn" on, those that control the training (`Crafter`), and
last those that write weights."""


def available() -> dict[str, type[AnyAttack]]:
    """Return the built-in attacks and those that installed packages add, by name.

    A package adds one by an entry point of the group `molehunt.attacks`.

    Raises:
        ValueError: two packages use one name, or a package uses the name of a built-in attack.
    """
    return with_plugins("molehunt.attacks", ATTACKS, "attack", reserved={"none"})


__all__ = [
    "ATTACKS",
    "ISSBA",
    "LIRA",
    "SIG",
    "ABSEvading",
    "AdapBlend",
    "AdapPatch",
    "AdversarialEmbedding",
    "AnyAttack",
    "Attack",
    "BadNets",
    "Bench",
    "BitFlips",
    "Blended",
    "Blind",
    "Bpp",
    "Crafted",
    "Crafter",
    "Evasive",
    "ExplanationDisguising",
    "FTrojan",
    "Handcrafted",
    "InputAware",
    "LabelConsistent",
    "LowFrequency",
    "MNTDAdaptive",
    "Mark",
    "MultiTrigger",
    "PhysicalSticker",
    "Poisoned",
    "PruningAware",
    "Refool",
    "STRIPEvading",
    "SubnetReplacement",
    "TaCT",
    "TrojanNN",
    "TuningResistant",
    "WaNet",
    "available",
    "poison",
]
