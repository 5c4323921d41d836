"""Measure what the first complete game costs: the game itself, a scan, STRIP's speed; and collect what others measured.

    python benchmarks/play.py game mnist5k     a whole game on a fresh folder, timed from outside
    python benchmarks/play.py scan             peak memory of a scan, of a fast CIFAR network
    python benchmarks/play.py strip            forward images per second of STRIP on the fast CIFAR network
    python benchmarks/play.py strip --network narrow_cifar      on the narrow one
    python benchmarks/play.py collect          results/play.json from all rows, also training's and Neural Cleanse's

Every call but the last appends a row to results/play.jsonl.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from molehunt.defenses import DEFENSES
from molehunt.networks import build
from molehunt.runner import generator, inspect
from molehunt.suspect import Suspect
from molehunt.tasks import get_task
from record import RESULTS, Figure, append, machine, rows, spread, write

MOLEHUNT = [sys.executable, "-m", "molehunt"]


def load() -> float:
    """Return how many other processes wanted a core in the last minute."""
    return round(os.getloadavg()[0], 2)


def game(task: str, seed: int) -> dict[str, Any]:
    """Play a whole game in a fresh folder and time it from outside."""
    with tempfile.TemporaryDirectory() as folder:
        busy, start = load(), time.monotonic()
        command = [*MOLEHUNT, "play", "--task", task, "--seed", str(seed), "--out", f"{folder}/game"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = json.loads((Path(folder) / "game" / "result.json").read_text())
    backdoors = [s for s in result["submissions"] if s["kind"] == "backdoored"]
    return {
        "figure": f"play {task}",
        "seed": seed,
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "busy": busy,
        "valid": sum(s["valid"] for s in backdoors),
        "backdoors": len(backdoors),
        "points": {row["name"]: row["points"] for row in result["defenders"]},
        "p": {s["team"]: round(s["p"], 3) for s in result["submissions"]},
    }


def scan(seed: int) -> dict[str, Any]:
    """Scan a fast CIFAR network, as trained or not: memory does not depend on its weights."""
    from safetensors.torch import save_file

    task = get_task("cifar10")
    model = build("fast_cifar", task.shape, task.num_classes, mean=task.mean, std=task.std, rng=generator(seed, "scan"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        busy, start = load(), time.monotonic()
        done = subprocess.run(
            [*MOLEHUNT, "scan", str(path), "--task", "cifar10", "--network", "fast_cifar"], stdout=subprocess.DEVNULL
        )
        seconds = time.monotonic() - start
    if done.returncode not in {0, 1, 2}:
        raise RuntimeError(f"the scan gave no answer: exit code {done.returncode}")
    # Linux counts in KiB; the largest single process of the scan, its confined children included.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"figure": "scan", "seed": seed, "peak_gib": peak, "seconds": seconds, "busy": busy}


def strip(seed: int, network: str) -> dict[str, Any]:
    """Run STRIP with 100 overlays on a stream of 500 inputs of a CIFAR network."""
    task = get_task("cifar10")
    model = build(network, task.shape, task.num_classes, mean=task.mean, std=task.std, rng=generator(seed, "strip"))
    clean, hidden = task.secret(seed)
    suspect = Suspect.of(model, task, clean=clean, inputs=hidden.x[:500])
    outcome = inspect(DEFENSES["strip"](overlays=100), suspect, name="strip", seed=seed)  # type: ignore[call-arg]
    cost = outcome.cost  # type: ignore[union-attr]
    assert cost is not None
    return {
        "figure": "strip" if network == "fast_cifar" else f"strip {network}",
        "seed": seed,
        "images": cost.forward,
        "seconds": cost.seconds,
        "per_second": cost.forward / cost.seconds,
        "dtype": str(suspect.dtype),
        "threads": torch.get_num_threads(),
        "busy": load(),
    }


def collect() -> None:
    """Write results/play.json."""
    kept = rows("play")
    note = "amx" if machine()["amx"] else "this machine has no AMX; the goals were set on one that has"

    def figure(name: str, field: str, unit: str, goal: float, better: Any, command: str) -> Figure:
        found = [row for row in kept if row["figure"] == name]
        # Another number format is another machine: no median goes across the two.
        found = [row for row in found if row.get("dtype") == found[-1].get("dtype")]
        values = [row[field] for row in found]
        return Figure(
            value=spread(values)["median"] if values else None,
            unit=unit,
            goal=goal,
            better=better,
            spread=spread(values) if values else None,
            seeds=[row["seed"] for row in found],
            command=f"python benchmarks/play.py {command}",
            note=f"{note}; load before each run {[row['busy'] for row in found]}",
        )

    def borrowed(file: str, key: str, goal: float, better: Any) -> Figure:
        """A figure that another benchmark collected, with the goal that the game sets."""
        source = RESULTS / f"{file}.json"
        found = json.loads(source.read_text())["figures"].get(key) if source.exists() else None
        command = f"python benchmarks/{file}.py"
        if found is None:
            return Figure(value=None, unit="", goal=goal, better=better, command=command)
        kept_fields = {k: found[k] for k in ("value", "unit", "spread", "seeds", "command", "note") if k in found}
        return Figure(goal=goal, better=better, **kept_fields)

    recipes = {"badnets_cnn": (15, 0.99), "fast_cifar": (240, 0.90), "fast_cifar_long": (720, 0.935)}
    trained = {
        f"{key}, {attack}, {what}": borrowed("training", f"{key}, {attack}, {what}", goal, better)
        for key, (seconds, accuracy) in recipes.items()
        for attack, what, goal, better in (
            ("clean", "time", seconds, "lower"),
            ("clean", "accuracy", accuracy, "higher"),
            ("badnets", "accuracy", accuracy, "higher"),
            ("badnets", "ASR", 0.99, "higher"),
            ("badnets", "loss of accuracy against its clean twin", 0.01, "lower"),
        )
    }
    path = write(
        "play",
        {
            **trained,
            **{
                key: borrowed("neural_cleanse", key, goal, better)
                for key, goal, better in (
                    ("Neural Cleanse, narrow_cifar, correct target", 9, "higher"),
                    ("Neural Cleanse, narrow_cifar, time", 60, "lower"),
                )
            },
            "play mnist5k": figure("play mnist5k", "seconds", "s", 180, "lower", "game mnist5k"),
            "play mnist": figure("play mnist", "seconds", "s", 720, "lower", "game mnist"),
            "scan memory": figure("scan", "peak_gib", "GiB", 3, "lower", "scan"),
            "STRIP, fast CIFAR": figure("strip", "per_second", "images/s", 3000, "higher", "strip"),
            "STRIP, narrow CIFAR": figure(
                "strip narrow_cifar", "per_second", "images/s", 3000, "higher", "strip --network narrow_cifar"
            ),
        },
    )
    print(path.read_text())


def main() -> None:
    """Measure one thing, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["game", "scan", "strip", "collect"])
    parser.add_argument("task", nargs="?", default="mnist5k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", choices=["fast_cifar", "narrow_cifar"], default="fast_cifar", help="of strip")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        collect()
        return
    if arguments.what == "game":
        row = game(arguments.task, arguments.seed)
    elif arguments.what == "strip":
        row = strip(arguments.seed, arguments.network)
    else:
        row = scan(arguments.seed)
    append("play", row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
