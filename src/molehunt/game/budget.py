"""How large a trigger may be, by its kind: one table for the gate and for the words of the rules."""

from dataclasses import replace
from typing import Literal

from molehunt.game.gate import ROUNDING, Gate
from molehunt.game.rules import Limits
from molehunt.triggers import Footprint

Way = Literal["weight", "area", "opacity", "linf", "displacement"]

BUDGET: dict[str, tuple[Way, ...]] = {
    "patch": ("weight",),
    "sticker": ("weight",),
    "blend": ("opacity",),
    "reflection": ("opacity",),
    "additive": ("area", "linf"),
    "network": ("area", "linf"),
    "sinusoid": ("linf",),
    "frequency": ("linf",),
    "quantize": ("linf",),
    "warp": ("displacement",),
}
"""What of its `Footprint` is limited, by kind of trigger; where two ways are listed, one of them suffices.

`budget` measures it and `budget_rules` says it in words, so that the kit, the pages and the host cannot contradict each
other."""
MEASURED: dict[Way, str] = {
    "weight": "opacity times area",
    "area": "area",
    "opacity": "opacity",
    "linf": "largest change of a value",
    "displacement": "farthest move of a pixel",
}


def budget(footprint: Footprint, shape: tuple[int, int, int], limits: Limits | None = None) -> Gate:
    """Ask that the trigger is small: how small depends on its kind, see `BUDGET` and `budget_rules`.

    The area of a sticker is the largest that any of its views touches, the opacity of a reflection is one in linear
    light. Where one of two ways suffices, the gate shows the one that is kept, else the second. Of several triggers
    each keeps the budget of its kind; the gate shows the one that is nearest to its limit.

    Args:
        footprint: of the trigger.
        shape: (C, H, W) of the pictures.
        limits: of the round.

    Raises:
        ValueError: a kind without a rule.
    """
    limits = limits or Limits()
    if footprint.parts:
        # Each picture carries one of them, so each has to keep the budget of its own kind.
        gates = [budget(part, shape, limits) for part in footprint.parts]
        worst = max(
            range(len(gates)), key=lambda i: (not gates[i].passed, gates[i].measured / max(gates[i].limit, ROUNDING))
        )
        return replace(gates[worst], message=f"trigger {worst + 1} of {len(gates)}: {gates[worst].message}")
    if footprint.kind not in BUDGET:
        raise ValueError(f"no budget is known for a trigger of kind {footprint.kind!r}")
    most: dict[Way, float] = {
        "weight": limits.area,
        "area": limits.area,
        "opacity": limits.opacity,
        "linf": limits.linf,
        "displacement": limits.displacement * min(shape[1:]) / 32,
    }
    measured: dict[Way, float] = {way: getattr(footprint, way) for way in BUDGET[footprint.kind]}
    kept = [way for way in measured if measured[way] <= most[way] + ROUNDING]
    way = kept[0] if kept else BUDGET[footprint.kind][-1]
    return Gate(
        name="budget",
        passed=bool(kept),
        measured=measured[way],
        limit=most[way],
        at_least=False,
        unit="pixels" if way == "displacement" else "share",
        message=f"{MEASURED[way]} of a {footprint.kind}" + ("" if kept else "; make the trigger smaller or fainter"),
    )


def budget_rules(limits: Limits | None = None) -> dict[str, str]:
    """Say in words what `budget` asks, by kind of trigger."""
    limits = limits or Limits()
    words: dict[Way, str] = {
        "weight": f"opacity times area at most {100 * limits.area:.0f} %",
        "area": f"changes at most {100 * limits.area:.0f} % of the pixels",
        "opacity": f"opacity at most {100 * limits.opacity:.0f} %",
        "linf": f"no value changes by more than {255 * limits.linf:.0f}/255",
        "displacement": f"no pixel moves by more than {limits.displacement:g} px where the shorter side has 32, in "
        "proportion elsewhere",
    }
    notes = {
        "sticker": "; the area is the largest that any of its views touches",
        "reflection": " in linear light",
    }
    rules = {kind: ", or ".join(words[way] for way in ways) + notes.get(kind, "") for kind, ways in BUDGET.items()}
    return {**rules, "several": "each of its triggers keeps the limit of its kind"}
