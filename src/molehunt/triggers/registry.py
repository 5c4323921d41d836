"""Every kind of trigger by name, and how one is made again from what was written down."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from molehunt.triggers.base import Shape, Trigger
from molehunt.triggers.simple import Additive, Blend, Patch, Sinusoid
from molehunt.triggers.warp import Warp

# kind -> (class, numbers with their JSON types, tensors)
TRIGGERS: dict[str, tuple[type, dict[str, type], tuple[str, ...]]] = {
    "patch": (Patch, {"opacity": float}, ("mask", "pattern")),
    "blend": (Blend, {"opacity": float}, ("pattern",)),
    "additive": (Additive, {}, ("delta",)),
    "warp": (Warp, {}, ("flow",)),
    "sinusoid": (Sinusoid, {"shape": list, "amplitude": float, "frequency": float}, ()),
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
    make, numbers, names = TRIGGERS[kind]
    fields = document.keys() - {"kind"}
    if fields != numbers.keys():
        raise ValueError(f"a {kind} has the fields {sorted(numbers)}, got {sorted(fields)}")
    if tensors.keys() != set(names):
        raise ValueError(f"a {kind} has the tensors {sorted(names)}, got {sorted(tensors)}")
    arguments: dict[str, Any] = dict(tensors)
    for name, kind_of in numbers.items():
        value = document[name]
        if kind_of is float:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
            try:
                arguments[name] = float(value)
            except OverflowError:  # an integer of more than 308 digits
                raise ValueError(f"{name} must be a number of ordinary size") from None
        else:
            if not isinstance(value, list) or not all(type(v) is int for v in value):
                raise ValueError(f"{name} must be a list of whole numbers, got {value!r}")
            arguments[name] = tuple(value)
    trigger: Trigger = make(**arguments)
    return trigger


def fits(trigger: Trigger, shape: Shape) -> bool:
    """Whether a trigger can be stamped on images of this shape (C, H, W)."""
    return trigger.fits(shape)
