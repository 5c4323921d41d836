"""Settings that were tried on the validation split, as a table in the page of each attack.

    python benchmarks/attacks.py try --attack ftrojan --task mnist --set magnitude=100     makes a row
    python benchmarks/tried.py ftrojan                                                     writes the table

A row of results/attacks-develop.jsonl counts if it has the settings that the attack has now; the last one of equal
settings, task, network and seed is shown. A test compares the tables with the rows.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from molehunt.attacks import ATTACKS
from molehunt.game.attacker import describe
from record import rows

NAME = "attacks-develop"
PAGES = Path(__file__).parent.parent / "docs/reference/attacks"
HEADING = "### Settings tried"
NOTE = (
    "Validation split, one model of seed {seed} each; *clean*: a clean model. A row is made by "
    "`python benchmarks/attacks.py try --attack {name} --task {task} --seed 0 --references 1`,\n"
    "with `--set NAME=VALUE` for each setting named, and lies in `benchmarks/results/attacks-develop.jsonl`."
)


def current(name: str, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one attack as it is now: the last of each settings, default ones first."""
    known = {field.name for field in fields(ATTACKS[name])}  # type: ignore[arg-type]  # attacks are dataclasses
    last: dict[str, dict[str, Any]] = {}
    for row in kept:
        if row["attack"] == name and row["settings"].keys() == known and row["split"] == "validation":
            last[json.dumps([row[k] for k in ("settings", "task", "network", "seed")], sort_keys=True)] = row
    return sorted(last.values(), key=lambda row: len(changed(row)))


def changed(row: dict[str, Any]) -> dict[str, Any]:
    """Settings of a row that are not the attack's own."""
    own = json.loads(json.dumps(describe(ATTACKS[row["attack"]]())))
    return {k: v for k, v in row["settings"].items() if v != own[k]}


def line(row: dict[str, Any], *, covers: bool) -> str:
    """One line of the table."""
    told = ", ".join(f"`{k}` {json.dumps(v)}" for k, v in changed(row).items()) or "defaults"
    numbers = [row["accuracy"], row["twin"], row["asr"], *([row.get("cover_accuracy")] if covers else [])]
    cells = ["" if value is None else f"{100 * value:.1f}" for value in numbers]
    missed = ", ".join(gate["name"] for gate in row["gates"] if not gate["passed"]) or "none"
    return f"| {told} | {row['task']} | {' | '.join(cells)} | {missed} |"


def section(name: str, found: list[dict[str, Any]]) -> str:
    """The heading with the table and its note."""
    covers = any("cover_accuracy" in row for row in found)
    columns = ["settings", "task", "accuracy, %", "clean, %", "ASR, %", *(["covers, %"] if covers else [])]
    lines = [f"| {' | '.join([*columns, 'gates missed'])} |", f"|{'---|' * (len(columns) + 1)}"]
    lines += [line(row, covers=covers) for row in found]
    note = NOTE.format(name=name, task=found[0]["task"], seed=found[0]["seed"])
    if covers:
        note += "\n*covers*: unseen images with what the covers carry that keep their class."
    return f"{HEADING}\n\n" + "\n".join(lines) + f"\n\n{note}\n"


def main() -> None:
    """Write the tables of the attacks named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attack", nargs="+", choices=ATTACKS)
    for name in parser.parse_args().attack:
        page = PAGES / f"{name}.md"
        before, _, after = page.read_text().partition("\n## Figures")
        before = before.partition(f"\n{HEADING}\n")[0]
        if found := current(name, rows(NAME)):
            before += f"\n{section(name, found)}"
        page.write_text(f"{before}\n## Figures{after}")


if __name__ == "__main__":
    main()
