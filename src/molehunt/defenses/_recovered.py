"""Triggers that other defenses recovered: which of them work, on which pictures, and what is left of them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molehunt.defenses._held_out import split
from molehunt.engine import Run
from molehunt.findings import Candidate, Finding
from molehunt.suspect import Suspect, freeze
from molehunt.tasks import Images
from molehunt.training import accuracy


@dataclass(frozen=True, eq=False)
class Recovered:
    """A candidate that works.

    Attributes:
        candidate: the trigger, its target and who found it.
        success: share of held-out images of other classes that it sends to its target, in [0, 1].
    """

    candidate: Candidate
    success: float


def others(images: Images, target: int) -> Images:
    """The images of all classes but one."""
    rows = images.y != target
    return Images(images.x[rows], images.y[rows])


def success(model: nn.Module, images: Images, candidate: Candidate) -> float | None:
    """Share of the images of other classes that a trigger sends to its target, in [0, 1]; None if there are none."""
    some = others(images, candidate.target)
    if len(some.y) == 0:
        return None
    return accuracy(model, Images(candidate.trigger(some.x), torch.full_like(some.y, candidate.target)))


def working(model: nn.Module, held: Images, candidates: Sequence[Candidate], least: float) -> list[Recovered]:
    """The candidates that send at least so large a share of held-out images of other classes to their target.

    Raises:
        ValueError: of a candidate it cannot be said, as all held-out images are of its target.
    """
    found = []
    for candidate in candidates:
        share = success(model, held, candidate)
        if share is None:
            raise ValueError(
                f"whether a trigger works cannot be told: all {len(held.y)} held-out images are of its target, class "
                f"{candidate.target}; grant more clean images"
            )
        if share >= least:
            found.append(Recovered(candidate, share))
    return found


def told(found: Sequence[Recovered], model: nn.Module, held: Images) -> list[dict[str, Any]]:
    """Of each trigger who found it, its target, and its success before and on a repaired model, as JSON values."""
    return [
        {
            "defense": one.candidate.defense,
            "target": one.candidate.target,
            "before": one.success,
            "after": success(model, held, one.candidate),
        }
        for one in found
    ]


@dataclass(frozen=True, eq=False)
class Ready:
    """What a defense begins with that works on recovered triggers.

    Attributes:
        images: clean images to work with.
        held: clean images that measure.
        found: the candidates that work; empty where there is nothing to do.
        idle: the finding that says so, by the name of the defense.
    """

    images: Images
    held: Images
    found: list[Recovered]
    idle: Finding


def ready(name: str, suspect: Suspect, held_out: float, works: float, run: Run) -> Ready:
    """Part the clean images, and see which candidates work.

    Raises:
        ValueError: fewer than four clean images, or of a candidate it cannot be said whether it works.
    """
    run.check()
    if suspect.clean is None or len(suspect.clean.y) < 4:
        raise ValueError(f"{name} needs 4 clean images or more, to work with and to hold out")
    images, held = split(suspect.clean, held_out, run.rng)
    candidates = suspect.candidates or ()
    details = {"triggers": [], "warnings": [_nothing_works(candidates, works)]}
    found = working(suspect.model, held, candidates, works)
    return Ready(images, held, found, Finding(defense=name, details=details))


def _nothing_works(candidates: Sequence[Candidate], least: float) -> str:
    """Why there is nothing to do."""
    if not candidates:
        return "no trigger was recovered"
    return f"none of {len(candidates)} recovered triggers sends {100 * least:g} % of held-out images to its target"


def rebuilt(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The network with other weights, frozen, where it was: what whoever loads the state dict will have."""
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)
    return freeze(copied)
