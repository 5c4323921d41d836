"""How charts say and mark things: shares, amounts, names of classes, dashes."""

from collections.abc import Sequence
from typing import Any

from molehunt.figures import drawable
from molehunt.legible import legible

DASHED: Any = (0, (5, 4))
DOTTED: Any = (0, (1, 2))


def name_of(k: int, classes: Sequence[str]) -> str:
    """The name of a class, shortened, in quotes."""
    return f"“{legible(classes[k], 40)}”" if 0 <= k < len(classes) else f"class {k}"


def label_of(k: int, classes: Sequence[str]) -> str:
    """The name of a class as it can be drawn: shortened; its number where the font lacks a letter."""
    short = legible(classes[k], 16) if 0 <= k < len(classes) else ""
    return f"“{short}”" if short and drawable(short) else f"class {k}"


def share(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f} %"


def amount(value: float) -> str:
    """A number with three digits that count, and a real minus sign."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", "−")
