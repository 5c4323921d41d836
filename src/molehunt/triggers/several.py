"""A trigger made of triggers, of which each picture gets one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from molehunt.triggers.base import Footprint, Json, Shape, Trigger
from molehunt.triggers.fingerprint import draws

MOST = 16
"""Parts that one trigger may have."""


@dataclass(frozen=True, eq=False)
class Several:
    """Put one of several triggers on each picture; which one follows from the picture alone.

    Attributes:
        triggers: at least 2 and at most `MOST`, none of them a `Several`.

    Raises:
        ValueError: too few, too many, or nested.
    """

    triggers: tuple[Trigger, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.triggers) <= MOST:
            raise ValueError(f"several triggers are 2 to {MOST}, got {len(self.triggers)}")
        if any(isinstance(trigger, Several) for trigger in self.triggers):
            raise ValueError("a part of several triggers cannot be several triggers itself: list its parts instead")

    def choice(self, x: Tensor) -> Tensor:
        """Return the number (N,) of the trigger that each image gets, all of them equally likely."""
        return (draws(x, 1).squeeze(1) * len(self.triggers)).long()

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        stamped, choice = x.clone(), self.choice(x)
        for number, trigger in enumerate(self.triggers):
            hit = choice == number
            if bool(hit.any()):
                stamped[hit] = trigger(x[hit])
        return stamped

    def to_json(self) -> Json:
        """The parts, in order."""
        return {"kind": "several", "triggers": [trigger.to_json() for trigger in self.triggers]}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all parts, with the number of the part before the name, as in "0.mask"."""
        return {
            f"{number}.{name}": tensor
            for number, trigger in enumerate(self.triggers)
            for name, tensor in trigger.tensors().items()
        }

    def footprint(self) -> Footprint:
        """The largest value of any part in each field, and the parts: a budget holds for each of them."""
        parts = tuple(trigger.footprint() for trigger in self.triggers)
        return Footprint(
            kind="several",
            area=max(part.area for part in parts),
            opacity=max(part.opacity for part in parts),
            weight=max(part.weight for part in parts),
            linf=max(part.linf for part in parts),
            displacement=max(part.displacement for part in parts),
            parts=parts,
        )

    def fits(self, shape: Shape) -> bool:
        """Whether every part fits."""
        return all(trigger.fits(shape) for trigger in self.triggers)


def split(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[tuple[Mapping[str, Any], Json]]:
    """Take what `to_json` and `tensors` of several triggers gave apart: the document and the tensors of each part.

    Raises:
        ValueError: other fields than the parts, too few or too many of them, parts of this kind, or a tensor that
            belongs to none.
    """
    if document.keys() != {"kind", "triggers"}:
        raise ValueError(f"a several has the field triggers, got {sorted(document.keys() - {'kind'})}")
    parts = document["triggers"]
    if not isinstance(parts, list) or not 2 <= len(parts) <= MOST or not all(isinstance(p, dict) for p in parts):
        raise ValueError(f"triggers must be a list of 2 to {MOST} triggers")
    # Refused here already, or a document could nest until the interpreter's stack ends.
    if any(part.get("kind") == "several" for part in parts):
        raise ValueError("a part of several triggers cannot be several triggers itself")
    named: list[dict[str, Tensor]] = [{} for _ in parts]
    for name, tensor in tensors.items():
        number, dot, rest = name.partition(".")
        places = [str(place) for place in range(len(parts))]
        if not dot or number not in places:
            raise ValueError(f"the tensor {name!r} belongs to none of the {len(parts)} triggers")
        named[int(number)][rest] = tensor
    return list(zip(parts, named, strict=True))
