"""Print every figure of benchmarks/results/*.json as one table; missed goals are marked."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from record import RESULTS, Figure


def spread(value: Any) -> str:
    """Write a spread as people do: smallest to largest, or the sentence that it is."""
    if isinstance(value, dict) and {"min", "max"} <= value.keys():
        return f"{value['min']:.4g} to {value['max']:.4g}"
    return "" if value is None else str(value)


def main() -> None:
    """Read all results and print them."""
    console = Console()
    missed = 0
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text())
        host = document["machine"]
        gpu = f", {host['gpu']}" if host.get("gpu") else ""
        title = f"{path.stem} · {host['processor']}, {host['cores']} cores{gpu} · torch {document['versions']['torch']}"
        table = Table(title=title, title_justify="left")
        for column in ("figure", "value", "unit", "goal", "", "spread", "python benchmarks/"):
            table.add_column(column, overflow="fold")
        for key, entry in document["figures"].items():
            figure = Figure(
                value=entry.get("value"),
                unit=entry.get("unit", ""),
                goal=entry.get("goal"),
                better=entry["better"],
            )
            mark = {True: "[green]met[/]", False: "[bold red]MISSED[/]", None: ""}[figure.met]
            if figure.value is None:
                mark = "[yellow]not measured[/]"
            missed += figure.met is False
            sign = ">=" if figure.better == "higher" else "<="
            table.add_row(
                key,
                "" if figure.value is None else f"{figure.value:.4g}",
                figure.unit,
                "" if figure.goal is None else f"{sign} {figure.goal:g}",
                mark,
                spread(entry.get("spread")),
                entry.get("command", "").removeprefix("python benchmarks/"),
            )
        console.print(table)
    console.print(f"{missed} goals missed" if missed else "no goal missed")


if __name__ == "__main__":
    main()
