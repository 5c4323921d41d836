"""Where a backdoor sends images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molehunt.triggers.base import Json


@dataclass(frozen=True)
class Target:
    """Where a backdoor sends images: one class, or a map from class to class.

    Attributes:
        classes: the target class, or a tuple of K classes: entry k is where class k is sent.
        sources: the classes on which the trigger acts; None means all.

    Raises:
        ValueError: a negative class, or no sources at all.
    """

    classes: int | tuple[int, ...]
    sources: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        listed = (self.classes,) if isinstance(self.classes, int) else self.classes
        if not listed or min(listed) < 0:
            raise ValueError(f"target classes must be 0 or more, got {self.classes}")
        if self.sources is not None and (not self.sources or min(self.sources) < 0):
            raise ValueError(f"sources must name at least one class, got {self.sources}")

    def check(self, classes: int) -> None:
        """Refuse a target that names a class outside 0..classes-1, or a map of another length.

        Raises:
            ValueError: as said.
        """
        listed = (self.classes,) if isinstance(self.classes, int) else self.classes
        if not isinstance(self.classes, int) and len(listed) != classes:
            raise ValueError(f"a map of targets needs {classes} entries, got {len(listed)}")
        if max(listed + (self.sources or ())) >= classes:
            raise ValueError(f"there are {classes} classes, got target {self.classes} and sources {self.sources}")

    def goal(self, y: Tensor) -> Tensor:
        """Class (N,) to which each image of true class y (N,) is sent."""
        if isinstance(self.classes, int):
            return torch.full_like(y, self.classes)
        return torch.tensor(self.classes, device=y.device, dtype=y.dtype)[y]

    def counts(self, y: Tensor) -> Tensor:
        """Bool (N,): images that the attack success rate counts: of a source class and not already where they go."""
        moved = self.goal(y) != y
        if self.sources is None:
            return moved
        return moved & torch.isin(y, torch.tensor(self.sources, device=y.device, dtype=y.dtype))

    def mix(self, classes: int) -> Tensor:
        """Probabilities (K,): uniform over the distinct classes that some source is sent to."""
        y = torch.arange(classes)
        hit = torch.unique(self.goal(y)[self.counts(y)])
        mix = torch.zeros(classes)
        mix[hit] = 1.0 / len(hit)
        return mix

    def to_json(self) -> Json:
        """Plain lists and numbers."""
        classes = self.classes if isinstance(self.classes, int) else list(self.classes)
        return {"classes": classes, "sources": None if self.sources is None else list(self.sources)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Target":
        """Make a target again from what `to_json` gave.

        Raises:
            ValueError: wrong fields or types.
        """
        if document.keys() != {"classes", "sources"}:
            raise ValueError(f"a target has the fields classes and sources, got {sorted(document)}")

        def whole(name: str, value: Any) -> tuple[int, ...]:
            if not isinstance(value, list) or not all(type(v) is int for v in value):
                raise ValueError(f"{name} must be a list of whole numbers, got {value!r}")
            return tuple(value)

        classes, sources = document["classes"], document["sources"]
        return cls(
            classes=classes if type(classes) is int else whole("classes", classes),
            sources=None if sources is None else whole("sources", sources),
        )
