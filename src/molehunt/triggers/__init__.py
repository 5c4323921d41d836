"""Triggers: what wakes a backdoor, as data.

A trigger is a small frozen object that maps images to images. It is declarative: it goes to JSON plus named tensors
and comes back from them, so that a submission never carries code. `TRIGGERS` lists the kinds that exist.
"""

from molehunt.triggers.base import Footprint, Json, Shape, Trigger
from molehunt.triggers.encoded import Encoded
from molehunt.triggers.encoders import ENCODERS, Encoder
from molehunt.triggers.frequency import Frequency
from molehunt.triggers.quantize import Quantize
from molehunt.triggers.reflection import Reflection
from molehunt.triggers.registry import TRIGGERS, fits, from_json
from molehunt.triggers.several import Several
from molehunt.triggers.simple import COLORS, CORNERS, Additive, Blend, Patch, Sinusoid
from molehunt.triggers.sticker import Sticker
from molehunt.triggers.target import Target
from molehunt.triggers.warp import Warp

__all__ = [
    "COLORS",
    "CORNERS",
    "ENCODERS",
    "TRIGGERS",
    "Additive",
    "Blend",
    "Encoded",
    "Encoder",
    "Footprint",
    "Frequency",
    "Json",
    "Patch",
    "Quantize",
    "Reflection",
    "Several",
    "Shape",
    "Sinusoid",
    "Sticker",
    "Target",
    "Trigger",
    "Warp",
    "fits",
    "from_json",
]
