"""What super-fine-tuning leaves of a backdoor and of the accuracy, beside plain fine-tuning and training afresh.

    python benchmarks/reproduce_super_fine_tuning.py run --task mnist --attack badnets --seed 0
    python benchmarks/reproduce_super_fine_tuning.py run --task cifar10 --network resnet18 --state FOLDER
    python benchmarks/reproduce_super_fine_tuning.py try --task mnist5k --seed 100 --set max1=0.3
    python benchmarks/reproduce_super_fine_tuning.py collect        results/rounds_1_2.json from the rows

`run` repairs the model that benchmarks/training.py makes of the same attack and seed. The clean images are as many as
5 % of the training set, but come from the test split, and the rest of that split judges. All repairs have the budget
of super-fine-tuning's defaults, 1 500 steps of 128, and the same images in the same order:

    super-fine-tuning       the defaults of the defense
    fine-tuning             those of plain fine-tuning, but for the budget
    low-rate fine-tuning    at a constant 3e-4, the one that the paper compares with
    scratch                 a fresh network on the same images: a repair has to be more accurate than that

A row that is there already is not made again. With `--state` a training that is finished there is only read, and what
each repair led to is kept, so that an interrupted row goes on with the next repair.

`try` is for choosing settings: it repairs and measures on the validation split, with `--set` for super-fine-tuning
(`steps` and `batch` for all), and appends to results/super_fine_tuning-develop.jsonl.
"""

import argparse
import copy
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from molehunt.defenses.fine_tuning import FineTuning
from molehunt.defenses.super_fine_tuning import SuperFineTuning
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.attacker import parse_settings
from molehunt.networks import Network
from molehunt.runner import generator
from molehunt.suspect import Suspect
from molehunt.tasks import Images, Task, get_task
from molehunt.triggers import Target, Trigger
from record import Figure, append, machine, rows, spread, write
from training import again

NAME, DEVELOP = "super_fine_tuning", "super_fine_tuning-develop"
TARGET = Target(classes=0)
SHARE = 0.05  # clean images, as a share of the training set
LOW = 3e-4
VERSIONS = ("before", "super-fine-tuning", "fine-tuning", "low-rate fine-tuning", "scratch")
Repair = FineTuning | SuperFineTuning


def parts(task: Task, seed: int, *, develop: bool) -> tuple[Images, Images]:
    """Clean images of the defender, 5 % as many as the training set, and the others of the split, which judge."""
    images = task.load("validation" if develop else "test")
    size = round(SHARE * len(task.load("train").y))
    order = torch.randperm(len(images.y), generator=generator(seed, "super-fine-tuning benchmark images"))
    mine, hidden = order[:size], order[size:]
    return Images(images.x[mine], images.y[mine]), Images(images.x[hidden], images.y[hidden])


def repairs(changes: Mapping[str, Any]) -> dict[str, Repair]:
    """The defenses of a row; the last one brings the network from scratch along, which the others would too."""
    ours = SuperFineTuning(**changes)
    budget: dict[str, Any] = {"steps": ours.steps, "batch": ours.batch}
    return {
        "super-fine-tuning": ours,
        "fine-tuning": FineTuning(**budget),
        "low-rate fine-tuning": FineTuning(**budget, lr=LOW, schedule="constant", control=True),
    }


def settings_of(changes: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a row besides model and images."""
    return {name: asdict(defense) for name, defense in repairs(changes).items()}


def judged(model: Network, weights: Mapping[str, Tensor] | None, hidden: Images, trigger: Trigger) -> dict[str, float]:
    """Accuracy and ASR on hidden images, of the model or of it with other weights."""
    other = copy.deepcopy(model)
    if weights is not None:
        other.load_state_dict(dict(weights))
    answers = measure(other.eval(), hidden, trigger)
    assert answers.stamped is not None
    return {"accuracy": accuracy(answers.plain, answers.y), "asr": asr(answers.stamped, answers.y, TARGET)}


def repaired(defense: Repair, suspect: Suspect, seed: int, what: str) -> tuple[Finding, float]:
    """Ask one defense, with a bar, and answer what it finds and how many seconds it took.

    The generator does not depend on the defense, as that of a game would: all see the same batches.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        line = progress.add_task(what)
        rng = generator(seed, "super-fine-tuning benchmark")
        tell = Run(rng=rng, report=lambda done, total: progress.update(line, completed=done, total=total))
        start = time.monotonic()
        found = defense(suspect, tell)
        return found, time.monotonic() - start


def run(key: dict[str, Any], changes: dict[str, Any], state: Path | None, *, develop: bool) -> None:
    """Make or read one backdoored model, repair it in every way and append the row."""
    task, seed = get_task(key["task"]), int(key["seed"])
    model, poisoned = again(task, key["network"], key["attack"], seed, state)
    clean, hidden = parts(task, seed, develop=develop)
    split, settings = "validation" if develop else "test", settings_of(changes)
    facts = {"threads": torch.get_num_threads(), "machine": machine()}
    name = hashlib.sha256(json.dumps([key, split, settings, facts], sort_keys=True).encode()).hexdigest()[:16]
    kept = state / f"super-fine-tuning-{name}.json" if state else None
    done: dict[str, Any] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    suspect = Suspect.of(model, task, clean=clean)
    for version, defense in repairs(changes).items():
        if version in done:
            continue
        busy = round(os.getloadavg()[0], 2)
        found, seconds = repaired(defense, suspect, seed, version)
        # Seconds with a control would be those of two trainings.
        cost = {"seconds": seconds, "busy": busy} if not defense.control else {}
        held = found.details["accuracy"]
        done[version] = {
            **judged(model, found.repaired, hidden, poisoned.trigger),
            "held out": held["repaired"],
            "rates": found.details["rates"],
            "lr": found.details["lr"],
            **cost,
        }
        if "scratch" in found.details:
            scratch = judged(model, found.details["scratch"], hidden, poisoned.trigger)
            done["scratch"] = {**scratch, "held out": held["scratch"]}
        if kept:
            partial = kept.with_suffix(".part")
            partial.write_text(json.dumps(done))
            partial.replace(kept)
    row: dict[str, Any] = {
        **key,
        "split": split,
        "settings": settings,
        "before": judged(model, None, hidden, poisoned.trigger),
        **done,
        "clean": len(clean.y),
        "hidden": len(hidden.y),
        **facts,
    }
    append(DEVELOP if develop else NAME, row)
    print({k: v for k, v in row.items() if k not in ("machine", "settings")}, flush=True)
    if kept:
        kept.unlink(missing_ok=True)


def current() -> list[dict[str, Any]]:
    """The rows that were made with the defaults of today; older ones stay in the file."""
    today = settings_of({})
    return [row for row in rows(NAME) if row.get("settings") == today]


def collect() -> None:
    """Write results/rounds_1_2.json."""
    kept, figures = current(), {}
    for task, network, attack in dict.fromkeys((r["task"], r["network"], r["attack"]) for r in kept):
        found = [r for r in kept if (r["task"], r["network"], r["attack"]) == (task, network, attack)]
        wanted = [(version, what, "share") for version in VERSIONS for what in ("accuracy", "asr")]
        for version, what, unit in [*wanted, ("super-fine-tuning", "seconds", "s")]:
            those = [r for r in found if version in r]
            if not those:  # an architecture that cannot be drawn afresh has no "scratch"
                continue
            listed = [r[version][what] for r in those]
            figures[f"{task}, {network}, {attack}, {version}, {what}"] = Figure(
                value=spread(listed)["median"],
                unit=unit,
                goal=None,
                better="higher" if what == "accuracy" else "lower",
                spread=spread(listed),
                seeds=[r["seed"] for r in those],
                command=f"python benchmarks/reproduce_super_fine_tuning.py run --task {task} --network {network} "
                f"--attack {attack}",
                note=f"{those[0]['clean']} clean images",
            )
    print(write("rounds_1_2", figures).read_text())


def main() -> None:
    """Run one model, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "try", "collect"])
    parser.add_argument("--task", choices=["mnist", "mnist5k", "cifar10"], default="mnist")
    parser.add_argument("--network", help="default: the task's own")
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
    own = get_task(arguments.task).network
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
