"""How a probability came about: where the log-odds start, and what each defense adds."""

import math

from molehunt.charts.words import amount
from molehunt.details import mapping, number
from molehunt.figures import INK, REST, SAID, Axes, Picture, chart
from molehunt.findings import Verdict
from molehunt.legible import legible


def waterfall(verdict: Verdict) -> Picture | None:
    """Bars from left to right, each beginning where the one above ends; None where no weights were learned."""
    told = mapping(verdict.details.get("log_odds"))
    start = number(told.get("start"))
    raised = {legible(name, 24): number(value) for name, value in mapping(told.get("raised")).items()}
    steps = sorted(((value, name) for name, value in raised.items() if value is not None), key=lambda s: (-s[0], s[1]))
    if start is None or not steps:
        return None
    end = start + sum(value for value, _ in steps)

    def draw(axes: Axes) -> None:
        names = ["no defense", *(name for _, name in steps), "together"]
        axes.barh(0, start, color=REST, edgecolor=INK, linewidth=0.8, label="to begin with")
        at = start
        for row, (value, _) in enumerate(steps, start=1):
            axes.barh(row, value, left=at, color=SAID, label="a defense adds" if row == 1 else None)
            at += value
        axes.barh(len(names) - 1, end, color=REST, edgecolor=INK, linewidth=0.8)
        axes.axvline(0.0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("log-odds that something is hidden")

    parts = ", ".join(f"{name} adds {amount(value)}" for value, name in steps if value >= 0.005)
    alt = f"Log-odds of {amount(start)} to begin with; {parts or 'no defense adds anything'}; together {amount(end)}"
    return chart(draw, f"{alt}, a probability of {1 / (1 + math.exp(-end)):.2f} before it is cut")
