"""What the default recipes give: seconds, clean accuracy on the test split, and the success of a planted trigger.

    python benchmarks/training.py run --recipe fast_cifar --attack badnets --seed 3
    python benchmarks/training.py try --recipe narrow_cifar --set batch=250 --set epochs=3
    python benchmarks/training.py collect                   results/training.json and the table of the docs page

`run` appends to results/training.jsonl and measures on the test split; a row that is there already is not made again.
Rows of a recipe that has other settings by now stay in the file, and are neither collected nor taken for done.
`try` is for choosing recipes: it measures on the validation split and appends to results/training-develop.jsonl. A
clean model and its backdoored twin have the same recipe and seed; the poison is drawn before the weights, so they do
not begin alike. With `--state` an interrupted training goes on where it was.

The trigger of a "badnets" twin is a 3x3 yellow square in the lower right corner (white on gray pictures), stamped on
5 % of the training set after augmentation; "blended" mixes noise into 10 % with opacity .2. The target is class 0.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.flop_counter import FlopCounterMode

from molehunt.attacks import Attack, BadNets, Blended, Poisoned
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.attacker import parse_settings, train_model
from molehunt.networks import Network, build, default_device, fast_dtype
from molehunt.runner import generator
from molehunt.tasks import Task, get_task
from molehunt.training import Recipe, recipe_for
from molehunt.triggers import Patch, Target
from record import RESULTS, Figure, append, machine, rows, spread, write

NAME, DEVELOP = "training", "training-develop"
PAGE = Path(__file__).parent.parent / "docs/reference/training.md"
TASK_OF = {"badnets_cnn": "mnist", "lenet5": "mnist", "mntd_mnist": "mnist"}  # all others: cifar10


def attack_of(name: str, task: Task) -> Attack | None:
    """Make the attack of a backdoored twin."""
    if name == "clean":
        return None
    if name == "blended":
        return Blended(target=0)
    color = "white" if task.shape[0] == 1 else "yellow"
    return BadNets(target=0, poison_rate=0.05, trigger=Patch.square(task.shape, size=3, color=color))


def forward_flops(network: str, task: Task) -> float:
    """Count the operations of one image's forward pass; a multiplication with its addition is two."""
    model = build(network, task.shape, task.num_classes, mean=task.mean, std=task.std).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *task.shape))
    return float(counter.get_total_flops())


def one(
    key: str, attack: str, seed: int, *, develop: bool, changes: dict[str, Any], state: Path | None, task: Task
) -> dict[str, Any]:
    """Train one model and answer its row."""
    network = key.removesuffix("_long")
    recipe: Recipe = replace(recipe_for(key, task), **changes)
    planted = attack_of(attack, task)
    checkpoint = state / f"{key}-{attack}-{seed}.pt" if state else None
    split = "validation" if develop else "test"
    test = task.load("validation" if develop else "test")
    train_images = len(task.load("train").y)
    busy, cpu, start = os.getloadavg()[0], time.process_time(), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        line = progress.add_task(f"{key} {attack} {seed}")
        model, poisoned = train_model(
            task,
            network,
            recipe,
            planted,
            rng=generator(seed, f"training benchmark {network}"),
            report=lambda done, total: progress.update(line, completed=done, total=total),
            checkpoint=checkpoint,
        )
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    images = recipe.steps(train_images) * min(recipe.batch, train_images)
    answers = measure(model.eval(), test, poisoned.trigger if poisoned else None)
    tflop = 3 * forward_flops(network, task) * images / 1e12
    row: dict[str, Any] = {
        "recipe": key,
        "attack": attack,
        "seed": seed,
        "task": task.name,
        "network": network,
        "split": split,
        "settings": recipe.to_json(),
        "accuracy": accuracy(answers.plain, answers.y),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "images": images,
        "tflop": tflop,
        "dtype": str(fast_dtype(default_device())).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "busy": round(busy, 2),
        "machine": machine(),
    }
    if poisoned and answers.stamped is not None:
        row["asr"] = asr(answers.stamped, answers.y, Target(classes=0))
    return row


def again(task: Task, network: str, attack: str, seed: int, state: Path | None) -> tuple[Network, Poisoned]:
    """Make the backdoored model of a row again, or read its finished training."""
    model, poisoned = train_model(
        task,
        network,
        recipe_for(network, task),
        attack_of(attack, task),
        rng=generator(seed, f"training benchmark {network}"),
        checkpoint=state / f"{network}-{attack}-{seed}.pt" if state else None,
    )
    assert poisoned is not None
    return model.eval(), poisoned


def current() -> list[dict[str, Any]]:
    """The finished rows whose recipe is still that of the package."""
    return [r for r in rows(NAME) if Recipe.from_json(r["settings"]) == recipe_for(r["recipe"], get_task(r["task"]))]


def named(row: dict[str, Any]) -> str:
    """Name of the recipe, with the GPU that it ran on, if any: seconds there are not those of a processor."""
    gpu = row["machine"].get("gpu")
    return f"{row['recipe']} on {gpu}" if gpu else str(row["recipe"])


def collect() -> None:
    """Write results/training.json."""
    figures = {}
    goals = {  # (seconds, accuracy); the success rate's goal is .99 and the twin's accuracy within one point
        "badnets_cnn": (15.0, 0.990),
        "fast_cifar": (240.0, 0.90),
        "fast_cifar_long": (720.0, 0.935),
    }
    kept = current()
    clean = {(named(r), r["seed"]): r["accuracy"] for r in kept if r["attack"] == "clean"}
    for key, attack in dict.fromkeys((named(r), r["attack"]) for r in kept):
        found = [r for r in kept if (named(r), r["attack"]) == (key, attack)]
        twins = [clean[key, r["seed"]] - r["accuracy"] for r in found if (key, r["seed"]) in clean]
        goal = goals.get(key, (None, None))
        dtypes = ", ".join(sorted({r["dtype"] for r in found}))
        amx = all(r["machine"]["amx"] or r["machine"].get("gpu") for r in found)
        note = dtypes + ("" if amx else "; no AMX here; the goals were set on a machine that has it")
        made = [
            ("time", [r["seconds"] for r in found], "s", goal[0], "lower"),
            ("work", [r["tflop"] for r in found], "TFLOP", None, "lower"),
            ("accuracy", [r["accuracy"] for r in found], "share", goal[1], "higher"),
        ]
        if attack != "clean":
            made.append(("ASR", [r["asr"] for r in found], "share", 0.99, "higher"))
            if twins:
                made.append(("loss of accuracy against its clean twin", twins, "share", 0.01, "lower"))
        for what, values, unit, wanted, better in made:
            figures[f"{key}, {attack}, {what}"] = Figure(
                value=spread(values)["median"],
                unit=unit,
                goal=wanted,
                better=better,  # type: ignore[arg-type]  # one of the two words, from the table above
                spread=spread(values),
                seeds=[r["seed"] for r in found],
                command=f"python benchmarks/training.py run --recipe {key.partition(' ')[0]} --attack {attack}",
                note=f"{note}; load before each run {[r['busy'] for r in found]}" if what == "time" else "",
            )
    # All figures come from the rows, so that one of a recipe that is no more must not stay.
    (RESULTS / f"{NAME}.json").unlink(missing_ok=True)
    print(write(NAME, figures).read_text())
    write_table(json.loads((RESULTS / f"{NAME}.json").read_text())["figures"])


def write_table(figures: dict[str, dict[str, Any]]) -> None:
    """Put the figures into the table of the docs page; a test compares the two."""
    columns = (  # title of the figure, factor, decimals
        ("time", 1.0, 1),
        ("accuracy", 100.0, 2),
        ("ASR", 100.0, 2),
        ("loss of accuracy against its clean twin", 100.0, 2),
        ("work", 1.0, 2),
    )
    lines = []
    for key in dict.fromkeys(key.rsplit(", ", 1)[0] for key in figures):
        recipe, attack = key.split(", ")
        cells = [f"`{recipe}`", attack, str(len(figures[f"{key}, time"]["seeds"]))]
        for title, factor, places in columns:
            figure = figures.get(f"{key}, {title}")
            low, middle, high = (
                (factor * figure["spread"][k] for k in ("min", "median", "max")) if figure else (0, 0, 0)
            )
            cell = f"{middle:.{places}f}" + (f" ({low:.{places}f} to {high:.{places}f})" if high > low else "")
            cells.append(cell if figure else "")
        lines.append(f"| {' | '.join(cells)} |")
    before, _, rest = PAGE.read_text().partition("## Figures\n\n")
    head, after = rest.split("\n")[:2], rest.split("\n\n", 1)[1]
    PAGE.write_text(f"{before}## Figures\n\n" + "\n".join([*head, *lines]) + f"\n\n{after}")


def main() -> None:
    """Train one model, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "try", "collect"])
    parser.add_argument("--recipe", default="fast_cifar", help="a key of molehunt.training.RECIPES")
    parser.add_argument("--task", help="default: mnist for the digit networks, else cifar10")
    parser.add_argument("--attack", default="clean", choices=["clean", "badnets", "blended"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting; try only")
    parser.add_argument("--state", type=Path, help="folder for the state of an interrupted training")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        collect()
        return
    if arguments.set and arguments.what == "run":
        parser.error("--set changes a recipe, so its figure would not be the recipe's; use try")
    if arguments.state:
        arguments.state.mkdir(parents=True, exist_ok=True)
    develop = arguments.what == "try"
    task = get_task(arguments.task or TASK_OF.get(arguments.recipe, "cifar10"))
    key = {"recipe": arguments.recipe, "attack": arguments.attack, "seed": arguments.seed, "task": task.name}
    if not develop and any(all(row[k] == v for k, v in key.items()) for row in current()):
        print("this row is there already")
        return
    row = one(
        arguments.recipe,
        arguments.attack,
        arguments.seed,
        develop=develop,
        changes=parse_settings(arguments.set),
        state=arguments.state,
        task=task,
    )
    append(DEVELOP if develop else NAME, row)
    shown = ("recipe", "attack", "seed", "split", "accuracy", "asr", "seconds", "cpu_seconds", "tflop", "busy")
    print(json.dumps({k: row[k] for k in shown if k in row}), flush=True)


if __name__ == "__main__":
    main()
