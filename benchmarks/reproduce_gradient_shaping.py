"""What clipping and noise cost in accuracy and leave of a backdoor, and what a step of them costs in seconds.

    python benchmarks/reproduce_gradient_shaping.py run --task mnist --attack badnets --seed 0
    python benchmarks/reproduce_gradient_shaping.py run --task mnist5k --mode fine_tune --factor 1 --sigma 0 0.1
    python benchmarks/reproduce_gradient_shaping.py step --network badnets_cnn --batch 256
    python benchmarks/reproduce_gradient_shaping.py collect     results/rounds_1_2.json from the rows

`run` hands the defense the training set of an attack of benchmarks/training.py (same attack, same seed) and the
defender's part of the test split, which measures, and judges the result on the hidden part. It makes one row for
every pair of --factor (clip norm in units of the median of the first norms) and --sigma, and one of the control: the
same network, steps and learning rate without clipping and noise. Rows that are there already are not made again, so
that an interrupted grid goes on where it was. The clean accuracy and the success of the attack belong together.

`step` times one step of the defense, measuring its norms alone, and one ordinary step, all in float32 and in turn, so
that whatever else the machine does touches all three; the row has the medians.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from molehunt.defenses._fresh import trainable
from molehunt.defenses._per_sample import per_sample
from molehunt.defenses.gradient_shaping import GradientShaping, shaped_gradient
from molehunt.findings import Finding
from molehunt.game.answers import accuracy, asr, measure
from molehunt.networks import Network, build
from molehunt.runner import inspect
from molehunt.suspect import Suspect
from molehunt.tasks import Images, get_task
from molehunt.testing import auc
from molehunt.triggers import Target, Trigger
from record import Figure, append, machine, rows, spread, todo, write
from training import again

NAME = "gradient_shaping"
TARGET = Target(classes=0)
FACTORS = (0.25, 1.0, 4.0)
SIGMAS = (0.0, 0.01, 0.1, 1.0)
NO_CLIP = 1e9  # a clip norm that no gradient reaches


def judged(model: Network, hidden: Images, trigger: Trigger) -> dict[str, float]:
    """Accuracy and ASR on hidden images."""
    answers = measure(model.eval(), hidden, trigger)
    assert answers.stamped is not None
    return {"accuracy": accuracy(answers.plain, answers.y), "asr": asr(answers.stamped, answers.y, TARGET)}


def keys(arguments: argparse.Namespace, network: str) -> Iterator[dict[str, Any]]:
    """The rows that a run asks for: the control first."""
    settings = {"mode": arguments.mode, "steps": arguments.steps, "lr": arguments.lr}
    settings |= {"batch": arguments.batch, "epochs": arguments.epochs}
    base = {"task": arguments.task, "network": network, "attack": arguments.attack, "seed": arguments.seed, **settings}
    yield {"what": "run", **base, "factor": None, "sigma": 0.0}
    for factor in arguments.factor:
        for sigma in arguments.sigma:
            yield {"what": "run", **base, "factor": factor, "sigma": sigma}


def run(arguments: argparse.Namespace, network: str) -> None:
    """Make or read one backdoored model and training set, and all rows of the grid that are missing."""
    missing = list(todo(NAME, keys(arguments, network)))
    if not missing:
        print("these rows are there already")
        return
    task, seed = get_task(arguments.task), int(arguments.seed)
    model, poisoned = again(task, network, arguments.attack, seed, arguments.state)
    handed = poisoned.stamped()
    clean, hidden = task.secret(seed)
    before = judged(model, hidden, poisoned.trigger)
    suspect = Suspect.of(model, task, training=handed, clean=clean)
    for key in missing:
        defense = defense_of(key)
        busy, start = round(os.getloadavg()[0], 2), time.monotonic()
        found = inspect(defense, suspect, seed=seed)
        seconds = time.monotonic() - start
        row = {**key, "settings": asdict(defense), "before": before, "seconds": seconds, "busy": busy}
        row |= {"threads": torch.get_num_threads(), "machine": machine()}
        if isinstance(found, Finding) and found.repaired is not None:
            repaired = copy.deepcopy(model)
            repaired.load_state_dict(dict(found.repaired))
            row |= {"after": judged(repaired, hidden, poisoned.trigger), "clip": found.details["clip"]}
            row |= {"curve": found.details["epochs"], "per_class": found.details["accuracy"]["after"]["per_class"]}
            if found.sample_scores is not None:
                row["auc"] = auc(found.sample_scores, poisoned.altered)
        else:  # a learning rate that a clip norm tames may ruin the control, and that is an answer too
            row["failure"] = getattr(found, "message", str(found))
        append(NAME, row)
        print({k: v for k, v in row.items() if k not in ("machine", "settings", "curve")}, flush=True)


def defense_of(key: dict[str, Any]) -> GradientShaping:
    """Make the defense of a row."""
    made = GradientShaping(
        sigma=float(key["sigma"]), **{name: key[name] for name in ("mode", "steps", "epochs", "lr", "batch")}
    )
    return replace(made, clip=NO_CLIP) if key["factor"] is None else replace(made, factor=float(key["factor"]))


def step(network: str, task_name: str, batch: int, repeats: int) -> None:
    """Time steps and append the row."""
    task = get_task(task_name)
    model = build(network, task.shape, task.num_classes, rng=torch.Generator().manual_seed(0)).eval()
    trainable(model)
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(batch, *task.shape, generator=rng)
    y = torch.randint(task.num_classes, (batch,), generator=rng)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

    def plain() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def shaped() -> None:
        shaped_gradient(model, x, y, clip=1.0, sigma=0.1, expected=batch, noise=rng)
        optimizer.step()

    ways: dict[str, Callable[[], object]] = {
        "plain": plain,
        "shaped": shaped,
        "norms alone": lambda: per_sample(model, x, y),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy = round(os.getloadavg()[0], 2)
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["shaped"], seconds["plain"], strict=True)]
    row = {"what": "step", "task": task_name, "network": network, "batch": batch, "repeats": repeats, "busy": busy}
    row |= {"seconds": {name: statistics.median(listed) for name, listed in seconds.items()}, "ratio": spread(ratios)}
    append(NAME, row | {"threads": torch.get_num_threads(), "machine": machine()})
    print(row)


def collect() -> None:
    """Write results/rounds_1_2.json."""
    figures: dict[str, Figure] = {}
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in rows(NAME):
        if row["what"] == "step":
            at = f"{row['network']}, batch {row['batch']}"
            command = f"python benchmarks/{Path(__file__).name} step --network {row['network']} --batch {row['batch']}"
            for name, seconds in row["seconds"].items():
                figures[f"{at}, {name}"] = Figure(value=seconds, unit="s", goal=None, better="lower", command=command)
            figures[f"{at}, shaped over plain"] = Figure(
                value=row["ratio"]["median"],
                unit="",
                goal=None,
                better="lower",
                spread=row["ratio"],
                command=command,
                note=f"{row['threads']} threads, load {row['busy']}",
            )
        elif "after" in row:
            arm = "control" if row["factor"] is None else f"clip {row['factor']:g}, sigma {row['sigma']:g}"
            at = f"{row['task']}, {row['network']}, {row['attack']}, {row['mode']}, {row['steps']} steps of "
            cells.setdefault(f"{at}{row['batch']} at {row['lr']:g}, {arm}", []).append(row)
    for at, found in cells.items():
        values = {what: [r["after"][what] for r in found] for what in ("accuracy", "asr")}
        values |= {"seconds": [r["seconds"] for r in found], "auc": [r["auc"] for r in found if "auc" in r]}
        for what, listed in values.items():
            if listed:
                figures[f"{at}, {what}"] = Figure(
                    value=spread(listed)["median"],
                    unit="s" if what == "seconds" else "share",
                    goal=None,
                    better="higher" if what in ("accuracy", "auc") else "lower",
                    spread=spread(listed),
                    seeds=[r["seed"] for r in found],
                    command=f"python benchmarks/{Path(__file__).name} run --task {found[0]['task']} --attack "
                    f"{found[0]['attack']}",
                )
    print(write("rounds_1_2", figures).read_text())


def main() -> None:
    """Run a grid, time steps, or collect."""
    default = GradientShaping()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "step", "collect"])
    parser.add_argument("--task", choices=["mnist", "mnist5k", "cifar10"], default="mnist")
    parser.add_argument("--network", help="default: fast_cifar on cifar10, else the task's own")
    parser.add_argument("--attack", choices=["badnets", "blended"], default="badnets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["retrain", "fine_tune"], default=default.mode)
    parser.add_argument("--factor", type=float, nargs="*", default=list(FACTORS))
    parser.add_argument("--sigma", type=float, nargs="*", default=list(SIGMAS))
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--epochs", type=float, default=default.epochs)
    parser.add_argument("--lr", type=float, default=default.lr)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--repeats", type=int, default=10, help="of step")
    parser.add_argument("--state", type=Path, help="folder of finished trainings of benchmarks/training.py")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        return collect()
    own = "fast_cifar" if arguments.task == "cifar10" else get_task(arguments.task).network
    network = arguments.network or own
    if arguments.what == "step":
        return step(network, arguments.task, arguments.batch, arguments.repeats)
    if arguments.state:
        arguments.state.mkdir(parents=True, exist_ok=True)
    return run(arguments, network)


if __name__ == "__main__":
    main()
