"""How many stamped inputs STRIP lets through, at four shares of clean ones that it rejects.

    python benchmarks/reproduce_strip.py run --task mnist --attack badnets --seed 0
    python benchmarks/reproduce_strip.py run --task cifar10 --attack badnets --seed 0 --inputs 500 --state FOLDER
    python benchmarks/reproduce_strip.py collect                      results/rounds_1_2.json from the rows

`run` trains the model that benchmarks/training.py makes of the same attack and seed (with its `--state` a training
that is finished there is only read) and appends one row per setting of STRIP to results/strip.jsonl; a row that is
there already is not made again. The stream is clean test images and as many others that carry the trigger; all that
STRIP calibrates with, and every overlay, is the defender's part of the test split, disjoint from the stream.

FRR: the share of clean inputs that are rejected; the boundary is the quantile of the calibration images' entropies, so
the share that is measured on the stream differs from the one asked for. FAR: the share of stamped inputs at or above
the boundary. Only stamped inputs of other classes than the target that the network does send there are counted.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from molehunt.defenses import STRIP
from molehunt.defenses.strip import quantile_boundary
from molehunt.findings import Finding
from molehunt.game.answers import accuracy, asr, measure
from molehunt.runner import inspect
from molehunt.suspect import Suspect
from molehunt.tasks import Images, get_task
from molehunt.testing import auc
from molehunt.triggers import Target
from record import Figure, append, machine, rows, spread, todo, write
from training import again

NAME = "strip"
REJECTIONS = (0.005, 0.01, 0.02, 0.03)
SETTINGS = {"default": STRIP(), "notebook": STRIP.notebook(), "paper": STRIP.paper()}
TARGET = Target(classes=0)


def run(task_name: str, attack: str, seed: int, inputs: int, state: Path | None) -> None:
    """Train or read one backdoored model and append what STRIP says of a stream, once per setting."""
    task = get_task(task_name)
    keys = [{"task": task_name, "attack": attack, "seed": seed, "setting": s, "inputs": inputs} for s in SETTINGS]
    wanted = list(todo(NAME, keys))
    if not wanted:
        print("these rows are there already")
        return
    network = "fast_cifar" if task_name == "cifar10" else task.network
    model, poisoned = again(task, network, attack, seed, state)
    clean, hidden = task.secret(seed)
    answers = measure(model, hidden, poisoned.trigger)
    assert answers.stamped is not None
    works = (TARGET.counts(answers.y) & (answers.stamped == TARGET.goal(answers.y))).nonzero().squeeze(1)
    carry = works[:inputs]
    plain = torch.tensor([i for i in range(len(hidden.y)) if i not in set(carry.tolist())])[: len(carry)]
    stream = torch.cat([hidden.x[plain], poisoned.trigger(hidden.x[carry])])
    stamped = torch.arange(len(stream)) >= len(plain)
    for key in wanted:
        suspect = Suspect.of(model, task, clean=Images(clean.x, clean.y), inputs=stream)
        found = inspect(SETTINGS[key["setting"]], suspect, name="strip", seed=seed)
        if not isinstance(found, Finding) or found.input_scores is None:
            raise RuntimeError(f"STRIP gave no scores: {found}")
        assert found.cost is not None
        entropies, calm = -found.input_scores, found.details["clean_entropies"]
        rates = []
        for rejection in REJECTIONS:
            boundary = quantile_boundary(calm, rejection)
            rates.append({
                "asked": rejection,
                "boundary": boundary,
                "frr": float((entropies[~stamped] <= boundary).double().mean()),
                "far": float((entropies[stamped] > boundary).double().mean()),
            })  # fmt: skip
        row = {
            **key,
            "network": network,
            "accuracy": accuracy(answers.plain, answers.y),
            "asr": asr(answers.stamped, answers.y, TARGET),
            "auc": auc(found.input_scores, stamped),
            "score": found.score,
            "clean_mean": float(calm.mean()),
            "clean_std": float(calm.std()),
            "calibration": len(calm),
            "stream": len(stream),
            "rates": rates,
            "seconds": found.cost.seconds,
            "per_second": found.cost.forward / found.cost.seconds,
            "dtype": str(suspect.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "busy": round(os.getloadavg()[0], 2),
            "machine": machine(),
        }
        append(NAME, row)
        print({k: v for k, v in row.items() if k != "machine"}, flush=True)


def collect() -> None:
    """Write results/rounds_1_2.json."""
    kept, figures = rows(NAME), {}
    for task, attack, setting in dict.fromkeys((r["task"], r["attack"], r["setting"]) for r in kept):
        found = [r for r in kept if (r["task"], r["attack"], r["setting"]) == (task, attack, setting)]
        made: list[tuple[str, list[float], Any]] = [("AUC", [r["auc"] for r in found], "higher")]
        for place, rejection in enumerate(REJECTIONS):
            made.append((f"FAR at {rejection:.1%} FRR", [r["rates"][place]["far"] for r in found], "lower"))
            made.append((f"FRR measured, {rejection:.1%} asked", [r["rates"][place]["frr"] for r in found], "lower"))
        for what, values, better in made:
            figures[f"STRIP on {task}, {attack}, {setting}, {what}"] = Figure(
                value=spread(values)["median"],
                unit="share",
                goal=None,
                better=better,
                spread=spread(values),
                seeds=[r["seed"] for r in found],
                command=f"python benchmarks/reproduce_strip.py run --task {task} --attack {attack}",
            )
        other = [r["auc"] - s["auc"] for r in found for s in kept
                 if setting == "default" and s["setting"] == "notebook"
                 and all(r[k] == s[k] for k in ("task", "attack", "seed", "inputs"))]  # fmt: skip
        if other:
            figures[f"STRIP on {task}, {attack}, AUC with 16 overlays less AUC with 100"] = Figure(
                value=spread(other)["median"],
                unit="share",
                goal=-0.005,
                better="higher",
                spread=spread(other),
                seeds=[r["seed"] for r in found],
                command=f"python benchmarks/reproduce_strip.py run --task {task} --attack {attack}",
            )
    print(write("rounds_1_2", figures).read_text())


def main() -> None:
    """Run one model, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect"])
    parser.add_argument("--task", choices=["mnist", "cifar10"], default="mnist")
    parser.add_argument("--attack", choices=["badnets", "blended"], default="badnets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=2000, help="stamped inputs, and as many clean ones")
    parser.add_argument("--state", type=Path, help="folder of finished trainings of benchmarks/training.py")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        collect()
    else:
        run(arguments.task, arguments.attack, arguments.seed, arguments.inputs, arguments.state)


if __name__ == "__main__":
    main()
