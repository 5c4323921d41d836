"""What fine-pruning, and each half of it alone, leaves of a backdoor and of the accuracy.

    python benchmarks/reproduce_fine_pruning.py run --task mnist --attack badnets --seed 0
    python benchmarks/reproduce_fine_pruning.py run --task cifar10 --attack badnets --seed 0 --state FOLDER
    python benchmarks/reproduce_fine_pruning.py try --task cifar10 --network narrow_cifar --seed 100 --set lr=0.02
    python benchmarks/reproduce_fine_pruning.py collect               results/rounds_1_2.json from the rows

`run` repairs the model that benchmarks/training.py makes of the same attack and seed (with its `--state` a training
that is finished there is only read), with the defender's part of the test split and the defaults of the defense, and
measures on the hidden part. A row that is there already is not made again.

`try` is for choosing settings: it repairs and measures on the validation split, and appends to
results/fine_pruning-develop.jsonl. With `--state` several tries share one training.
"""

import argparse
import copy
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molehunt.defenses import FinePruning
from molehunt.findings import Finding
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.attacker import parse_settings
from molehunt.networks import Network
from molehunt.runner import inspect
from molehunt.suspect import Suspect
from molehunt.tasks import Images, Task, get_task
from molehunt.triggers import Target, Trigger
from record import Figure, append, machine, rows, spread, write
from training import again

NAME, DEVELOP = "fine_pruning", "fine_pruning-develop"
TARGET = Target(classes=0)
VERSIONS = ("before", "pruning alone", "fine-tuning alone", "fine-pruning")


def parts(task: Task, seed: int, *, develop: bool) -> tuple[Images, Images]:
    """Clean images of the defender, and hidden ones that judge the repair."""
    if not develop:
        return task.secret(seed)
    images, size = task.load("validation"), len(task.secret(seed)[0].y)
    order = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(seed))
    mine, hidden = order[:size], order[size:]
    return Images(images.x[mine], images.y[mine]), Images(images.x[hidden], images.y[hidden])


def judged(model: Network, weights: Mapping[str, Tensor] | None, hidden: Images, trigger: Trigger) -> dict[str, float]:
    """Accuracy and ASR on hidden images, of the model or of it with other weights."""
    other = copy.deepcopy(model)
    if weights is not None:
        other.load_state_dict(dict(weights))
    answers = measure(other.eval(), hidden, trigger)
    assert answers.stamped is not None
    return {"accuracy": accuracy(answers.plain, answers.y), "asr": asr(answers.stamped, answers.y, TARGET)}


def run(key: dict[str, Any], changes: dict[str, Any], state: Path | None, *, develop: bool) -> None:
    """Make or read one backdoored model, repair it and append the row."""
    task, seed = get_task(key["task"]), int(key["seed"])
    model, poisoned = again(task, key["network"], key["attack"], seed, state)
    clean, hidden = parts(task, seed, develop=develop)
    times = []
    found = None
    for baselines in (False, True):  # the seconds are those of a run that does nothing for the baselines
        busy, start = round(os.getloadavg()[0], 2), time.monotonic()
        defense = FinePruning(**changes, baselines=baselines)
        found = inspect(defense, Suspect.of(model, task, clean=clean), seed=seed)
        times.append((time.monotonic() - start, busy))
    if not isinstance(found, Finding) or found.repaired is None:
        raise RuntimeError(f"no repair: {found}")
    settings = asdict(defense)
    del settings["baselines"]
    row: dict[str, Any] = {
        **key,
        "split": "validation" if develop else "test",
        "settings": settings,
        "before": judged(model, None, hidden, poisoned.trigger),
        "pruning alone": judged(model, found.details["prune_only"], hidden, poisoned.trigger),
        "fine-tuning alone": judged(model, found.details["fine_tune_only"], hidden, poisoned.trigger),
        "fine-pruning": judged(model, found.repaired, hidden, poisoned.trigger),
        "held out": found.details["accuracy"],
        "pruned": found.details["pruned"],
        "channels": len(found.details["order"]),
        "clean": len(clean.y),
        "seconds": times[0][0],
        "busy": times[0][1],
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }
    append(DEVELOP if develop else NAME, row)
    print({k: v for k, v in row.items() if k not in ("machine", "settings")}, flush=True)


def current() -> list[dict[str, Any]]:
    """The rows that were made with the defaults of today; older ones stay in the file."""
    today = asdict(FinePruning())
    del today["baselines"]
    return [row for row in rows(NAME) if row.get("settings") == today]


def collect() -> None:
    """Write results/rounds_1_2.json."""
    kept, figures = current(), {}
    for task, network, attack in dict.fromkeys((r["task"], r["network"], r["attack"]) for r in kept):
        found = [r for r in kept if (r["task"], r["network"], r["attack"]) == (task, network, attack)]
        values = {(v, what): [r[v][what] for r in found] for v in VERSIONS for what in ("accuracy", "asr")}
        made = {f"{version}, {what}": (listed, "share") for (version, what), listed in values.items()}
        made["seconds"] = ([r["seconds"] for r in found], "s")
        for what, (listed, unit) in made.items():
            figures[f"fine-pruning on {task}, {network}, {attack}, {what}"] = Figure(
                value=spread(listed)["median"],
                unit=unit,
                goal=None,
                better="higher" if what.endswith("accuracy") else "lower",
                spread=spread(listed),
                seeds=[r["seed"] for r in found],
                command=f"python benchmarks/reproduce_fine_pruning.py run --task {task} --attack {attack}",
            )
    print(write("rounds_1_2", figures).read_text())


def main() -> None:
    """Run one model, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "try", "collect"])
    parser.add_argument("--task", choices=["mnist", "mnist5k", "cifar10"], default="mnist")
    parser.add_argument("--network", help="default: fast_cifar on cifar10, else the task's own")
    parser.add_argument("--attack", choices=["badnets", "blended"], default="badnets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting; try only")
    parser.add_argument("--state", type=Path, help="folder of finished trainings of benchmarks/training.py")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        return collect()
    develop = arguments.what == "try"
    if arguments.set and not develop:
        parser.error("--set changes the defense, so its figure would not be that of the defaults; use try")
    own = "fast_cifar" if arguments.task == "cifar10" else get_task(arguments.task).network
    key = {"task": arguments.task, "network": arguments.network or own, "attack": arguments.attack}
    key["seed"] = arguments.seed
    if not develop and any(all(row[k] == v for k, v in key.items()) for row in current()):
        print("this row is there already")
        return None
    if arguments.state:
        arguments.state.mkdir(parents=True, exist_ok=True)
    return run(key, parse_settings(arguments.set), arguments.state, develop=develop)


if __name__ == "__main__":
    main()
