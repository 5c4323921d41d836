"""What recovered triggers do on held-out images, and which repair is taken for it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from molehunt.findings import Finding, State
from molehunt.suspect import BATCH, Suspect
from molehunt.tasks import Images
from molehunt.triggers import Trigger, fits

REPAIR_FROM = 0.2
"""Below this p the submitted weights stand: do no harm."""
STRENGTH = ("unlearning", "fine_pruning", "super_fine_tuning", "fine_tuning")
"""Repairs from the one that leaves least of a backdoor to the one that leaves most, on fifteen planted models of the
develop part of the mnist5k bank: median success of the true trigger .2, 7, 22 and 75 %."""
GONE = 0.05
"""A recovered trigger that sends so few held-out images to its class counts as gone: clean models err too."""
DROP = 0.05
"""Clean accuracy that a repair may cost on held-out images, as a share."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recovered:
    """A recovered trigger and what it does on held-out images; `asr` is None where nothing was measured.

    `sources` are the classes on which it works and is measured; None means all but the target. `handicap` is taken off
    its merit.
    """

    defense: str
    trigger: Trigger
    target: int
    asr: float | None
    sources: tuple[int, ...] | None = None
    handicap: float = 0.0

    @property
    def weight(self) -> float:
        """Share of the picture that it replaces, opacity times area."""
        return self.trigger.footprint().weight

    @property
    def merit(self) -> float:
        """Held-out success rate minus half the weight; what was not measured counts as no success."""
        return (self.asr or 0.0) - 0.5 * self.weight - self.handicap


def success(
    trigger: Trigger,
    target: int,
    suspect: Suspect | None,
    held_out: Images | None,
    sources: tuple[int, ...] | None = None,
) -> float | None:
    """Share of held-out images of the source classes, by default of all others, that the trigger sends to its class."""
    if suspect is None or held_out is None or not fits(trigger, suspect.task.shape):
        return None
    y = held_out.y
    x = held_out.x[y != target if sources is None else torch.isin(y, torch.tensor(sources, device=y.device))]
    if len(x) == 0:
        return None
    hits = sum(
        int((suspect.logits(trigger(x[i : i + BATCH])).argmax(1) == target).sum()) for i in range(0, len(x), BATCH)
    )
    return hits / len(x)


def choose(
    findings: Sequence[Finding],
    p: float,
    recovered: Sequence[Recovered],
    suspect: Suspect | None,
    held_out: Images | None,
) -> tuple[State | None, dict[str, Any]]:
    """Choose a repair, or none, and say why.

    Of those that keep the accuracy it is the one that leaves least of the recovered triggers. What was recovered is not
    the attacker's trigger, so among those that leave nothing of it (`GONE`), and where no trigger was recovered, the
    most accurate one would be the one that changed least, backdoor included: it is the first of `STRENGTH`, and after
    these the most accurate.
    """
    offers = [f for f in findings if f.repaired is not None]
    if not offers:
        return None, {"taken": None, "why": "no defense offered a repair"}
    if p < REPAIR_FROM:
        return None, {"taken": None, "why": f"p = {p:.3f} is below {REPAIR_FROM}: the submitted weights stand"}
    if suspect is None or held_out is None or len(held_out.y) == 0:
        taken = offers[0]
        return taken.repaired, {"taken": taken.defense, "why": "taken on trust: nothing to measure it on was given"}
    before = _accuracy(suspect, held_out)
    tried: list[dict[str, Any]] = []
    best: tuple[float, int, float, str] | None = None
    state: State | None = None
    for offer in offers:
        model = copy.deepcopy(suspect.model)
        try:
            model.load_state_dict(dict(offer.repaired or {}))
        except RuntimeError as error:
            tried.append({"defense": offer.defense, "accepted": False, "why": str(error).splitlines()[0]})
            continue
        cleaned = Suspect.of(model, suspect.task, device=suspect.device, dtype=suspect.dtype)
        after = _accuracy(cleaned, held_out)
        rates = [success(c.trigger, c.target, cleaned, held_out, c.sources) for c in recovered]
        # Without a recovered trigger nothing is measured, which is not the same as a trigger that works no longer.
        residual = max((rate for rate in rates if rate is not None), default=None)
        accepted = after >= before - DROP
        tried.append(
            {"defense": offer.defense, "accepted": accepted, "accuracy_after": after, "residual_asr": residual}
        )
        rank = STRENGTH.index(offer.defense) if offer.defense in STRENGTH else len(STRENGTH)
        merit = (0.0 if residual is None or residual <= GONE else residual, rank, -after, offer.defense)
        if accepted and (best is None or merit < best):
            best, state = merit, offer.repaired
    measured = any(one.get("residual_asr") is not None for one in tried)
    why = "lowest residual success of the recovered triggers"
    if not measured:
        why = "no trigger to measure: the one that left least of other backdoors"
    if best is None:
        why = f"no repair kept accuracy within {DROP}"
    record: dict[str, Any] = {"taken": best[3] if best else None, "why": why, "accuracy_before": before}
    return state, record | {"accuracy_after": -best[2] if best else before, "tried": tried}


def _accuracy(suspect: Suspect, images: Images) -> float:
    """Share of the images that are classified as their true class."""
    return float((suspect.logits(images.x).argmax(1).cpu() == images.y.cpu()).double().mean())
