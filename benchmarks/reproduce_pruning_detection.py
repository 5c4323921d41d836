"""Pruning-based detection on the model bank: held-out AUC of its regression, beside that of shuffled labels.

    python benchmarks/reproduce_pruning_detection.py run --task mnist --partition calibrate
    python benchmarks/reproduce_pruning_detection.py collect

`run` measures every model that the bank has a row of (`python benchmarks/bank.py run` makes them) under all setups, and
appends its accuracies to results/pruning_detection.jsonl; a model that is there already is not measured again. Its
weights are taken from the cache, or trained again from its seed.

`collect` judges every model by a regression that has neither seen it nor chosen its setup by it (nested
cross-validation over mode, sampling, ranking and penalty), repeats the whole of that with shuffled labels, and writes
results/rounds_1_2.json.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from rich.progress import track

from bank import restore
from molehunt import bank
from molehunt.bank.judgement import judge
from molehunt.bank.rows import backdoored
from molehunt.datasets import cache
from molehunt.defenses._pruning import Mode, Ranking, Sampling
from molehunt.defenses._regression import nested
from molehunt.defenses.pruning_detection import PruningDetection
from molehunt.engine import Run
from molehunt.examination import divide
from molehunt.runner import generator
from molehunt.suspect import Suspect
from molehunt.tasks import get_task
from molehunt.testing import auc
from record import Figure, append, machine, rows, spread, todo, write

NAME, FIGURES = "pruning_detection", "rounds_1_2"
RANKED: tuple[Ranking, ...] = ("l1", "std")
SETUPS = {
    f"{mode} {sampling} {ranking}": PruningDetection(mode=mode, sampling=sampling, ranking=ranking)
    for mode, sampling, ranking in product(get_args(Mode), get_args(Sampling), RANKED)
    if not (sampling == "random" and ranking == "std")  # who draws at random asks no ranking
}
"""What the inner cross-validation chooses from."""
SHUFFLES = 99


def run(task_name: str, network: str, partition: str, most: int | None, root: Path) -> None:
    """Measure the models of a partition under all setups."""
    task = get_task(task_name)
    folder = restore(task_name, network, root)
    listed = bank.entries(task_name, network, partition, most=most)
    known = {row.name: row for row in bank.read_rows(listed, folder)}
    keys = [{"task": task_name, "network": network, "name": e.name, "weights": r.weights}
            for e in listed if (r := known.get(e.name)) is not None]  # fmt: skip
    if missing := len(listed) - len(keys):
        print(f"{missing} models of the bank have no row yet: python benchmarks/bank.py run --task {task_name}")
    by_name = {entry.name: entry for entry in listed}
    for key in track(list(todo(NAME, keys)), description=f"pruning {task_name}"):
        entry = by_name[key["name"]]
        clean, _ = task.secret(entry.seed)
        suspect = Suspect.of(bank.regrow(entry, known[entry.name]), task, clean=divide(clean)[0])
        busy, start, found = os.getloadavg()[0], time.monotonic(), {}
        seconds = {}
        for name, defense in SETUPS.items():
            begun = time.monotonic()
            finding = defense(suspect, Run(rng=generator(entry.seed, f"pruning benchmark {name}")))
            found[name] = finding.details["accuracies"].tolist()
            seconds[name] = time.monotonic() - begun
        append(
            NAME,
            {
                **key,
                "partition": partition,
                "kind": entry.kind,
                "planted": entry.planted,
                "accuracies": found,
                "images": finding.details["images"],
                "seconds": seconds,
                "all_seconds": time.monotonic() - start,
                "dtype": str(suspect.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "busy": round(busy, 2),
                "machine": machine(),
            },
        )


def judged(found: Iterable[dict[str, Any]], works: frozenset[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Features (N, S) by setup and labels (N,) of the clean models and of those whose backdoor passes the gates."""
    kept = [row for row in found if not row["planted"] or row["name"] in works]
    features = {name: torch.tensor([row["accuracies"][name] for row in kept], dtype=torch.float64) for name in SETUPS}
    return features, torch.tensor([int(row["planted"]) for row in kept])


def collect(root: Path) -> None:
    """Write the figures."""
    figures: dict[str, Figure] = {}
    kept = rows(NAME)
    for task, network, part in dict.fromkeys((r["task"], r["network"], r["partition"]) for r in kept):
        mine = [r for r in kept if (r["task"], r["network"], r["partition"]) == (task, network, part)]
        folder = restore(task, network, root)
        works = backdoored(bank.read_rows(bank.entries(task, network, part), folder))
        features, labels = judged(mine, works)
        clean, planted = int((labels == 0).sum()), int((labels == 1).sum())
        command = f"python benchmarks/reproduce_pruning_detection.py run --task {task} --partition {part}"
        note = f"{clean} clean, {planted} planted that pass the gates, {part} part of the bank"
        said = nested(features, labels, generator(0, "pruning folds")).predictions
        answer = judge(said[labels == 0].tolist(), said[labels == 1].tolist(), generator(0, "pruning interval"))
        shuffled = []
        for i in track(range(SHUFFLES), description="shuffled labels"):
            other = labels[torch.randperm(len(labels), generator=generator(i, "pruning shuffle"))]
            again = nested(features, other, generator(i, "pruning folds")).predictions
            shuffled.append(auc(again, other == 1))
        title = f"pruning-based detection on {task}, {network}"
        figures[f"{title}, held-out AUC"] = Figure(
            value=answer.auc,
            unit="AUC",
            goal=None,
            better="higher",
            spread=[answer.low, answer.high],
            command=command,
            note=note,
        )
        figures[f"{title}, AUC with shuffled labels"] = Figure(
            value=statistics.median(shuffled),
            unit="AUC",
            goal=None,
            better="lower",
            spread=spread(shuffled),
            command=command,
            note=f"{SHUFFLES} shuffles, the whole nested cross-validation each",
        )
        figures[f"{title}, permutation p-value"] = Figure(
            value=(1 + sum(s >= answer.auc for s in shuffled)) / (SHUFFLES + 1),
            unit="p",
            goal=None,
            better="lower",
            command=command,
        )
        for name in SETUPS:
            alone = torch.tensor([SETUPS[name].judge(a) for a in features[name]])
            figures[f"{title}, AUC without a regression, {name}"] = Figure(
                value=auc(alone, labels == 1), unit="AUC", goal=None, better="higher", command=command, note=note
            )
            figures[f"{title}, seconds of one model, {name}"] = Figure(
                value=statistics.median(r["seconds"][name] for r in mine),
                unit="s",
                goal=None,
                better="lower",
                spread=spread([r["seconds"][name] for r in mine]),
                command=command,
                note=f"{mine[0]['threads']} thread, beside other work",
            )
    print(write(FIGURES, figures).read_text())


def main() -> None:
    """Measure or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect"])
    parser.add_argument("--task", default="mnist")
    parser.add_argument("--network", help="default: the task's own")
    parser.add_argument("--partition", default="evaluate", choices=bank.PARTITIONS)
    parser.add_argument("--most", type=int, help="at most so many clean models and so many planted ones")
    parser.add_argument("--folder", type=Path, help="folder of all banks; default: in the cache")
    arguments: Any = parser.parse_args()
    root = arguments.folder or cache.root() / "benchmarks" / "bank"
    if arguments.what == "collect":
        collect(root)
    else:
        network = arguments.network or get_task(arguments.task).network
        torch.set_num_threads(1)
        run(arguments.task, network, arguments.partition, arguments.most, root)


if __name__ == "__main__":
    main()
