"""Every kind of trigger by name, and how one is made again from what was written down."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from molehunt.triggers.base import Shape, Trigger
from molehunt.triggers.encoded import Encoded
from molehunt.triggers.frequency import Frequency
from molehunt.triggers.quantize import Quantize
from molehunt.triggers.reflection import Reflection
from molehunt.triggers.several import Several, split
from molehunt.triggers.simple import Additive, Blend, Patch, Sinusoid
from molehunt.triggers.sticker import Sticker
from molehunt.triggers.warp import Warp

# kind -> (class, numbers with their JSON types, tensors)
TRIGGERS: dict[str, tuple[type, dict[str, type], tuple[str, ...]]] = {
    "patch": (Patch, {"opacity": float}, ("mask", "pattern")),
    "blend": (Blend, {"opacity": float}, ("pattern",)),
    "additive": (Additive, {}, ("delta",)),
    "warp": (Warp, {}, ("flow",)),
    "sinusoid": (Sinusoid, {"shape": list, "amplitude": float, "frequency": float}, ()),
    "sticker": (
        Sticker,
        {
            "shape": list,
            "opacity": float,
            "rotation": float,
            "scale": float,
            "perspective": float,
            "brightness": float,
            "travel": float,
        },
        ("pattern",),
    ),
    "several": (Several, {}, ()),  # its fields are triggers: `from_json` reads them one by one
    "frequency": (Frequency, {"shape": list, "magnitude": float, "window": int, "cells": list}, ()),
    "quantize": (Quantize, {"shape": list, "levels": int, "dither": bool}, ()),
    "reflection": (Reflection, {"opacity": float, "ghost": float, "shift": list, "blur": float}, ("picture",)),
    "network": (Encoded, {"network": str, "shape": list, "linf": float, "area": float}, ("weights",)),
}


def from_json(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trigger:
    """Make a trigger again from what `to_json` and `tensors` gave.

    Args:
        document: the JSON object; unknown and missing fields are refused.
        tensors: exactly the tensors of that kind, by field name.

    Raises:
        ValueError: unknown kind, wrong fields, types, shapes or ranges.
    """
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in TRIGGERS:
        raise ValueError(f"unknown trigger kind {kind!r}; known: {', '.join(TRIGGERS)}")
    if kind == "several":
        return Several(tuple(from_json(part, named) for part, named in split(document, tensors)))
    make, numbers, names = TRIGGERS[kind]
    fields = document.keys() - {"kind"}
    if fields != numbers.keys():
        raise ValueError(f"a {kind} has the fields {sorted(numbers)}, got {sorted(fields)}")
    if tensors.keys() != set(names):
        raise ValueError(f"a {kind} has the tensors {sorted(names)}, got {sorted(tensors)}")
    arguments: dict[str, Any] = dict(tensors)
    arguments |= {name: _read(name, document[name], kind_of) for name, kind_of in numbers.items()}
    trigger: Trigger = make(**arguments)
    return trigger


def fits(trigger: Trigger, shape: Shape) -> bool:
    """Whether a trigger can be stamped on images of this shape (C, H, W)."""
    return trigger.fits(shape)


def _read(name: str, value: Any, kind: type) -> Any:
    """Take a value as the type that a field has, and nothing else for it."""
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} must be a number, got {value!r}")
        try:
            return float(value)
        except OverflowError:  # an integer of more than 308 digits
            raise ValueError(f"{name} must be a number of ordinary size") from None
    if kind is list:
        if not isinstance(value, list) or not all(type(v) is int for v in value):
            raise ValueError(f"{name} must be a list of whole numbers, got {value!r}")
        return tuple(value)
    if type(value) is not kind:
        words = {int: "a whole number", bool: "true or false", str: "a text"}
        raise ValueError(f"{name} must be {words[kind]}, got {value!r}")
    return value
