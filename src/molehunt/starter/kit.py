"""Writes the kit: every file is a template of this package, filled with the task and with the rules as they are."""

import json
import re
import shlex
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from molehunt.defenses import DEFENSES
from molehunt.files import write_atomically
from molehunt.game.budget import budget_rules
from molehunt.game.rules import DATA_ONLY, ROUNDS, Limits
from molehunt.tasks import Task
from molehunt.training import recipe_for

FILES = (
    "README.md",
    "RULES.md",
    "attack.py",
    "attack.ipynb",
    "my_attack/pyproject.toml",
    "my_attack/my_attack.py",
    "my_attack/test_my_attack.py",
)
"""What the kit consists of."""


def write(task: Task, folder: Path) -> tuple[Path, ...]:
    """Write the kit for a task into a folder, which is made if need be.

    Args:
        task: what the kit is for.
        folder: where.

    Returns:
        The files, in the order of `FILES`.

    Raises:
        ValueError: one of the files is there already; a student's work is never replaced.
        OSError: the folder cannot be written to.
    """
    if there := [name for name in FILES if (folder / name).exists()]:
        raise ValueError(f"{folder / there[0]} is there already; name another folder with --out")
    written = []
    for name in FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [render(name, task).encode()])
        written.append(path)
    return tuple(written)


def render(name: str, task: Task) -> str:
    """Return the text of one file of the kit."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["quoted"] = lambda text: json.dumps(str(text))
    environment.filters["shell"] = lambda text: shlex.quote(str(text))
    source = "attack.ipynb.md" if name == "attack.ipynb" else name
    template = files("molehunt.starter").joinpath("templates", f"{source}.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(**_facts(task))
    return notebook(text) if name == "attack.ipynb" else text


def notebook(text: str) -> str:
    """Turn Markdown into a notebook: what stands in fences of Python becomes cells of code, all else cells of text."""
    cells: list[dict[str, Any]] = []
    for index, part in enumerate(re.split(r"^```python\n(.*?)^```\n", text, flags=re.MULTILINE | re.DOTALL)):
        if not part.strip():
            continue
        lines = part.strip("\n").splitlines(keepends=True)
        cell: dict[str, Any] = {"id": f"cell-{index}", "metadata": {}, "source": lines}
        if index % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        else:
            cell |= {"cell_type": "markdown"}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    document = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _facts(task: Task) -> dict[str, Any]:
    """All that the templates say; the rules are the program's own, so that no kit can contradict the host."""
    recipe_for(task.network, task)
    limits = Limits()
    return {
        "task": task,
        # A manifest opens no paths, so `check` has to be told where the pictures are.
        "option": f" --task {shlex.quote(task.name)}" if task.name.startswith("folder:") else "",
        "target": min(3, task.num_classes - 1),
        "shape": "x".join(map(str, task.shape)),
        "rounds": [
            {
                "name": r.name,
                "title": r.title,
                "tasks": ", ".join(r.tasks),
                "counts": r.counts,
                "weights": [getattr(r.weights, f.name) for f in fields(r.weights)],
                "defenses": ", ".join(
                    name + ("" if name in DEFENSES else " (not there yet)") + (" †" if name in DATA_ONLY else "")
                    for name in r.defenses
                ),
                "repairs": [(name, r.repairs[name]) for name in r.defenses if name in r.repairs],
            }
            for r in ROUNDS.values()
        ],
        "data_only": DATA_ONLY,
        "limits": limits,
        "budget": budget_rules(limits),
    }
