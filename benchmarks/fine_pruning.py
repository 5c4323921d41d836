"""What fine-pruning, and each half of it alone, leaves of a backdoor and of the accuracy.

    python benchmarks/fine_pruning.py run --task mnist --attack badnets --seed 0
    python benchmarks/fine_pruning.py run --task cifar10 --attack badnets --seed 0 --state FOLDER
    python benchmarks/fine_pruning.py collect               results/fine_pruning.json from the rows

`run` repairs the model that benchmarks/training.py makes of the same attack and seed (with its `--state` a training
that is finished there is only read), with the defender's part of the test split and the defaults of the defense, and
measures on the hidden part. A row that is there already is not made again.
"""

import argparse
import copy
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molehunt.defenses import FinePruning
from molehunt.findings import Finding
from molehunt.game.answers import accuracy, asr, measure
from molehunt.runner import inspect
from molehunt.suspect import Suspect
from molehunt.tasks import get_task
from molehunt.triggers import Target
from record import Figure, append, machine, rows, spread, todo, write
from training import again

NAME = "fine_pruning"
TARGET = Target(classes=0)
VERSIONS = ("before", "pruning alone", "fine-tuning alone", "fine-pruning")


def run(task_name: str, attack: str, seed: int, state: Path | None) -> None:
    """Make or read one backdoored model, repair it and append the row."""
    task = get_task(task_name)
    network = "fast_cifar" if task_name == "cifar10" else task.network
    key = {"task": task_name, "network": network, "attack": attack, "seed": seed}
    if not list(todo(NAME, [key])):
        print("this row is there already")
        return
    model, poisoned = again(task, network, attack, seed, state)
    clean, hidden = task.secret(seed)

    def judged(weights: Mapping[str, Tensor] | None) -> dict[str, float]:
        """Accuracy and ASR on hidden images, of the model or of it with other weights."""
        other = copy.deepcopy(model)
        if weights is not None:
            other.load_state_dict(dict(weights))
        answers = measure(other.eval(), hidden, poisoned.trigger)
        assert answers.stamped is not None
        return {"accuracy": accuracy(answers.plain, answers.y), "asr": asr(answers.stamped, answers.y, TARGET)}

    times = []
    found = None
    for baselines in (False, True):  # the seconds are those of a run that does nothing for the baselines
        busy, start = round(os.getloadavg()[0], 2), time.monotonic()
        found = inspect(FinePruning(baselines=baselines), Suspect.of(model, task, clean=clean), seed=seed)
        times.append((time.monotonic() - start, busy))
    if not isinstance(found, Finding) or found.repaired is None:
        raise RuntimeError(f"no repair: {found}")
    row: dict[str, Any] = {
        **key,
        "before": judged(None),
        "pruning alone": judged(found.details["prune_only"]),
        "fine-tuning alone": judged(found.details["fine_tune_only"]),
        "fine-pruning": judged(found.repaired),
        "pruned": found.details["pruned"],
        "channels": len(found.details["order"]),
        "clean": len(clean.y),
        "seconds": times[0][0],
        "busy": times[0][1],
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }
    append(NAME, row)
    print({k: v for k, v in row.items() if k != "machine"}, flush=True)


def collect() -> None:
    """Write results/fine_pruning.json."""
    kept, figures = rows(NAME), {}
    for task, network, attack in dict.fromkeys((r["task"], r["network"], r["attack"]) for r in kept):
        found = [r for r in kept if (r["task"], r["network"], r["attack"]) == (task, network, attack)]
        values = {(v, what): [r[v][what] for r in found] for v in VERSIONS for what in ("accuracy", "asr")}
        made = {f"{version}, {what}": (listed, "share") for (version, what), listed in values.items()}
        made["seconds"] = ([r["seconds"] for r in found], "s")
        for what, (listed, unit) in made.items():
            figures[f"{task}, {network}, {attack}, {what}"] = Figure(
                value=spread(listed)["median"],
                unit=unit,
                goal=None,
                better="higher" if what.endswith("accuracy") else "lower",
                spread=spread(listed),
                seeds=[r["seed"] for r in found],
                command=f"python benchmarks/fine_pruning.py run --task {task} --attack {attack}",
            )
    print(write(NAME, figures).read_text())


def main() -> None:
    """Run one model, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect"])
    parser.add_argument("--task", choices=["mnist", "mnist5k", "cifar10"], default="mnist")
    parser.add_argument("--attack", choices=["badnets", "blended"], default="badnets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="folder of finished trainings of benchmarks/training.py")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        collect()
    else:
        run(arguments.task, arguments.attack, arguments.seed, arguments.state)


if __name__ == "__main__":
    main()
