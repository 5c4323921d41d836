"""ABS on the model bank: does it tell backdoored models from clean ones, name the target, and in how many seconds?

    python benchmarks/reproduce_abs.py run --task mnist5k --partition develop      trains what is missing, then scans
    python benchmarks/reproduce_abs.py collect                                     results/rounds_1_2.json from the rows

Scanned are the bank's models with an opaque patch, the trigger that ABS looks for, and as many clean ones of every
kind. One row per model is appended to results/abs.jsonl at once; finished rows are skipped. Models are those of the
bank, made again from their seeds: those that benchmarks/bank.py kept a row of come out with the same weights on the
same kind of machine, the others are trained and measured here. Planted models that do not pass the gates are scanned,
and left out of the figures.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bank import restore
from molehunt import bank
from molehunt.bank.judgement import judge
from molehunt.bank.roster import OPAQUE
from molehunt.bank.rows import backdoored, poisoned
from molehunt.datasets import cache
from molehunt.defenses.abs import ABS
from molehunt.examination import divide
from molehunt.findings import Finding
from molehunt.networks import Network
from molehunt.runner import configuration, generator, inspect
from molehunt.suspect import Suspect
from molehunt.tasks import get_task
from molehunt.triggers import Patch
from record import Figure, append, machine, rows, spread, todo, write

NAME = "abs"
KEYS = ("task", "network", "partition", "name", "digest")


def listed(task: str, network: str, partition: str, most: int | None = None) -> list[bank.Entry]:
    """Planted models with an opaque patch, and the first clean models of the partition, as many; in turns.

    Args:
        task: name of the task.
        network: name of the network.
        partition: of the bank.
        most: at most so many of each.
    """
    entries = bank.entries(task, network, partition)
    planted = [entry for entry in entries if entry.planted and entry.kind in OPAQUE][:most]
    clean = [entry for entry in entries if not entry.planted][: len(planted)]
    return [entry for pair in zip(clean, planted, strict=True) for entry in pair]


def key_of(entry: bank.Entry) -> dict[str, Any]:
    """What a finished row is told by."""
    return {name: getattr(entry, name) for name in KEYS}


def model_of(entry: bank.Entry, folder: Path) -> tuple[bank.Row, Network]:
    """The model and what is known of it."""
    (made,) = bank.build([entry], folder)
    try:
        return made, bank.regrow(entry, made)
    except ValueError:
        # Its row was made on another kind of machine. The folder is ours, so the row can go.
        (folder / f"{entry.name}.json").unlink()
        (made,) = bank.build([entry], folder)
        return made, bank.regrow(entry, made)


def scan(entry: bank.Entry, made: bank.Row, model: Network, defense: ABS) -> dict[str, Any]:
    """Scan one model and answer its row."""
    task = get_task(entry.task)
    clean, _ = task.secret(entry.seed)
    suspect = Suspect.of(model, task, clean=divide(clean)[0])
    busy = os.getloadavg()[0]
    found = inspect(defense, suspect, seed=entry.seed)
    if not isinstance(found, Finding) or found.cost is None or found.score is None or found.class_scores is None:
        raise RuntimeError(f"{entry.name}: expected a finding, got {found}")
    row: dict[str, Any] = {
        **key_of(entry),
        "planted": entry.planted,
        "kind": entry.kind,
        "score": found.score,
        "guess": int(found.class_scores.argmax()),
        "class_scores": [round(score, 5) for score in found.class_scores.tolist()],
        "best": found.details["best"],
        "compromised": found.details["compromised"],
        "seconds": found.cost.seconds,
        "forward": found.cost.forward,
        "dtype": str(suspect.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "busy": round(busy, 2),
        "configuration": configuration(defense),
        "machine": machine(),
    }
    truth = poisoned(entry)
    if truth is not None:
        row["target"] = truth.target.classes
        if isinstance(found.trigger, Patch) and isinstance(truth.trigger, Patch):
            strong, square = found.trigger.mask > 0, truth.trigger.mask > 0
            row["iou"] = float((strong & square).sum() / (strong | square).sum())
    return row


def run(task: str, network: str, partition: str, most: int | None, defense: ABS, root: Path) -> None:
    """Train and scan what is missing, model by model."""
    folder = restore(task, network, root)
    torch.set_num_threads(1)
    entries = {entry.name: entry for entry in listed(task, network, partition, most)}
    for key in todo(NAME, map(key_of, entries.values())):
        entry = entries[key["name"]]
        made, model = model_of(entry, folder)
        row = scan(entry, made, model, defense)
        row["made"] = asdict(made)
        append(NAME, row)
        shown = {name: row.get(name) for name in ("name", "kind", "score", "guess", "target", "seconds")}
        print(json.dumps(shown), flush=True)


def right(row: dict[str, Any]) -> bool:
    """Whether the class with the highest score is the target."""
    return bool(row["guess"] == row["target"])


def figures_of(title: str, kept: Sequence[dict[str, Any]], command: str) -> dict[str, Figure]:
    """The figures of one bank and partition.

    Args:
        title: what every figure is named after.
        kept: its rows.
        command: what makes them again.
    """
    # The accuracy gate compares with the plain clean models that were scanned.
    works = backdoored([bank.Row(**row["made"]) for row in kept])
    clean = [row for row in kept if not row["planted"]]
    figures: dict[str, Figure] = {}
    for family in (*sorted(OPAQUE), "all"):
        bad = [row for row in kept if row["name"] in works and family in {row["kind"], "all"}]
        if len(bad) < 2 or len(clean) < 2:
            continue
        good, hidden = ([row["score"] for row in part] for part in (clean, bad))
        found = judge(good, hidden, generator(0, title))
        figures[f"{title}, {family}, AUC"] = Figure(
            value=found.auc,
            unit="",
            goal=None,
            better="higher",
            spread={"low": found.low, "high": found.high, "permuted": found.permuted},
            command=command,
            note=f"{found.clean} clean and {found.planted} backdoored models; 95 % bootstrap interval",
        )
        # A detection: more suspicious than every clean model.
        detected = [row for row in bad if row["score"] > max(good)]
        figures[f"{title}, {family}, detected and right target"] = Figure(
            value=sum(map(right, detected)) / len(detected) if detected else None,
            unit=f"of {len(detected)} detected of {len(bad)}",
            goal=None,
            better="higher",
            command=command,
            note="detected: above every clean model; "
            f"{sum(map(right, bad))} of all {len(bad)} backdoored models have their target first",
        )
    seconds = [row["seconds"] for row in kept]
    figures[f"{title}, time"] = Figure(
        value=spread(seconds)["median"],
        unit="s",
        goal=None,
        better="lower",
        spread=spread(seconds),
        command=command,
        note=f"{kept[0]['threads']} thread, {kept[0]['dtype']}; load before each {[row['busy'] for row in kept]}",
    )
    return figures


def collect() -> None:
    """Write results/rounds_1_2.json."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows(NAME):
        groups.setdefault((row["task"], row["network"], row["partition"]), []).append(row)
    figures: dict[str, Figure] = {}
    for (task, network, partition), kept in groups.items():
        current = {entry.digest for entry in listed(task, network, partition)}
        kept = [row for row in kept if row["digest"] in current]
        if not kept:
            continue
        command = f"python benchmarks/reproduce_abs.py run --task {task} --network {network} --partition {partition}"
        figures |= figures_of(f"ABS, {task}, {network}, {partition}", kept, command)
    print(write("rounds_1_2", figures).read_text())


def main() -> None:
    """Scan what is missing, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect"])
    parser.add_argument("--task", default="mnist5k")
    parser.add_argument("--network", help="default: the task's own")
    parser.add_argument("--partition", default="develop", choices=["develop", "calibrate", "evaluate"])
    parser.add_argument("--most", type=int, help="at most so many clean models and so many planted ones")
    parser.add_argument("--folder", type=Path, help="folder for rows of models; default: in the cache")
    arguments: Any = parser.parse_args()
    if arguments.what == "collect":
        collect()
        return
    network = arguments.network or get_task(arguments.task).network
    root = arguments.folder or cache.root() / "benchmarks" / "abs"
    run(arguments.task, network, arguments.partition, arguments.most, ABS(), root)


if __name__ == "__main__":
    main()
