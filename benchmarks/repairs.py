"""What each repair leaves of the backdoors of a bank, and which of them a verdict would take.

    python benchmarks/repairs.py run --task mnist5k --most 20       rows, one per backdoored model
    python benchmarks/repairs.py show                               medians by repair and by family

Models are backdoored ones of the *develop* part of the bank, whose gates they pass: this is where the order of
`molehunt.repair.STRENGTH` comes from, and figures that are reported come from the evaluation part. Finders (ABS and
Neural Cleanse) search each model, every repair works on it with the budget of the final, and the TRUE trigger's success
and the accuracy are measured on the public validation split before and after. `residual` is what a verdict sees in
their place: the largest success of a recovered trigger, on images that no defense saw.

Rows go to results/repairs-develop.jsonl; one that is there is not made again.
"""

import argparse
import copy
import os
import statistics
from collections import defaultdict
from typing import Any

import torch

from molehunt import bank
from molehunt.bank.rows import backdoored, folder_of, poisoned, regrow
from molehunt.datasets import cache
from molehunt.defenses import DEFENSES, REPAIRS
from molehunt.examination import candidates, divide
from molehunt.findings import Finding
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.rules import DATA_ONLY, ROUNDS
from molehunt.repair import success
from molehunt.runner import inspect
from molehunt.suspect import Suspect
from molehunt.tasks import get_task
from record import append, machine, rows, todo

NAME = "repairs-develop"
FINDERS = ("abs", "neural_cleanse")


def one(entry: bank.Entry, row: bank.Row) -> dict[str, Any]:
    """Repair one model by every repair that needs no training set."""
    task = get_task(entry.task)
    model, made = regrow(entry, row), poisoned(entry)
    assert made is not None
    clean, _ = task.secret(entry.seed)
    seen, kept = divide(clean)
    images = task.load("validation")
    suspect = Suspect.of(model, task, clean=seen)
    found = {name: inspect(DEFENSES[name](), suspect, seed=entry.seed) for name in FINDERS}
    granted = Suspect.of(model, task, clean=seen, candidates=candidates(found))
    before = measure(model, images, made.trigger)
    assert before.stamped is not None
    made_rows: dict[str, Any] = {}
    for name, defense in ROUNDS["final"].make("weights", DEFENSES).items():
        if name not in REPAIRS - DATA_ONLY:
            continue
        outcome = inspect(defense, granted, seed=entry.seed)
        if not isinstance(outcome, Finding) or outcome.cost is None:
            raise RuntimeError(f"{name}: expected a finding, got {outcome}")
        if outcome.repaired is None:
            made_rows[name] = None
            continue
        other = copy.deepcopy(model)
        other.load_state_dict(dict(outcome.repaired))
        after = measure(other.eval(), images, made.trigger)
        assert after.stamped is not None
        cleaned = Suspect.of(other, task)
        rates = [success(c.trigger, c.target, cleaned, kept) for c in granted.candidates or ()]
        made_rows[name] = {
            "accuracy": accuracy(after.plain, after.y),
            "asr": asr(after.stamped, after.y, made.target),
            "residual": max((rate for rate in rates if rate is not None), default=None),
            "seconds": outcome.cost.seconds,
        }
    return {
        "task": entry.task,
        "network": entry.network,
        "name": entry.name,
        "kind": entry.kind,
        "accuracy": accuracy(before.plain, before.y),
        "asr": asr(before.stamped, before.y, made.target),
        "guesses": {c.defense: c.target for c in granted.candidates or ()},
        "target": made.target.classes,
        "repairs": made_rows,
        "threads": torch.get_num_threads(),
        "busy": round(os.getloadavg()[0], 2),
        "machine": machine(),
    }


def show() -> None:
    """Print medians."""
    by: dict[tuple[str, str], list[tuple[float, float, float | None]]] = defaultdict(list)
    kept = rows(NAME)
    for row in kept:
        for name, said in row["repairs"].items():
            # Where a repair hands nothing back the model stays as it was.
            told = said or {"asr": row["asr"], "accuracy": row["accuracy"], "residual": None}
            for group in ("all", row["kind"]):
                by[group, name].append((told["asr"], row["accuracy"] - told["accuracy"], told["residual"]))
    for (group, name), values in sorted(by.items()):
        left, lost = [v[0] for v in values], [100 * v[1] for v in values]
        over = sum(value > 0.5 for value in left)
        print(
            f"{group:12} {name:18} {len(values):3} models: ASR {statistics.median(left):.3f} (to {max(left):.3f}, "
            f"{over} above .5), {statistics.median(lost):.2f} points lost (to {max(lost):.2f})"
        )


def main() -> None:
    """Make rows, or show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("--task", default="mnist5k")
    parser.add_argument("--network", help="default: the task's own")
    parser.add_argument("--most", type=int, help="at most so many backdoored models")
    arguments = parser.parse_args()
    if arguments.what == "show":
        return show()
    torch.set_num_threads(1)
    network = arguments.network or get_task(arguments.task).network
    every = bank.entries(arguments.task, network, "develop")
    # The gate of accuracy compares with plain clean models.
    plain = [e for e in every if not e.planted and e.kind == "plain"]
    listed = [e for e in every if e.planted and e.poison is not None][: arguments.most] + plain
    folder = folder_of(cache.root() / "benchmarks" / "bank", arguments.task, network)
    built = bank.build(listed, folder, report=lambda row, done, total: print(f"{done}/{total} {row.name}", flush=True))
    works, of = backdoored(built), {entry.name: entry for entry in listed}
    wanted = {row.name: row for row in built if row.name in works}
    keys = [{"task": arguments.task, "network": network, "name": name} for name in wanted]
    for key in todo(NAME, keys):
        row = one(of[key["name"]], wanted[key["name"]])
        append(NAME, row)
        print(row["name"], row["kind"], round(row["asr"], 3), {
            name: said and (round(said["asr"], 3), said["residual"]) for name, said in row["repairs"].items()
        }, flush=True)  # fmt: skip
    return None


if __name__ == "__main__":
    main()
