"""What an attack gives when its victim is trained for more passes than the default recipe has.

    python benchmarks/longer_training.py run --attack wanet --passes 10 --seed 0
    python benchmarks/longer_training.py run --attack "badnets (one pixel)"         another form of it
    python benchmarks/longer_training.py collect            results/attacks-longer.json from the rows

`run` trains the default network of MNIST by its recipe with another number of passes, measures on the validation split
and appends one row to results/attacks-longer.jsonl; a row that is there already is not made again. The set is poisoned
once, before the first pass, and is the same for every number of passes.
"""

import argparse
import os
import shlex
from dataclasses import replace
from typing import Any

import torch

from attacks import VARIANTS, cover_accuracy
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.attacker import describe, make_attack, train_model
from molehunt.runner import generator
from molehunt.tasks import get_task
from molehunt.training import recipe_for
from record import Figure, fill, machine, rows, spread, write

NAME = "attacks-longer"
CHOICES = ("wanet", "bpp", "input_aware", "badnets (one pixel)", "badnets (random place)")


def one(key: dict[str, Any]) -> dict[str, Any]:
    """Train one backdoored model and answer its row."""
    task = get_task(key["task"])
    name, chosen = VARIANTS.get(key["attack"], (key["attack"], {}))
    attack, images = make_attack(name, chosen), task.load("validation")
    recipe = replace(recipe_for(key["network"], task), epochs=key["passes"], least_images=0)
    busy = os.getloadavg()[0]
    rng = generator(key["seed"], f"attack benchmark {key['attack']} {key['network']}")
    model, made = train_model(task, key["network"], recipe, attack, rng=rng)
    assert made is not None
    answers = measure(model.eval(), images, made.trigger)
    assert answers.stamped is not None
    settings = describe(attack)
    del settings["attack"]
    return {
        **key,
        "settings": settings,
        "split": "validation",
        "accuracy": accuracy(answers.plain, answers.y),
        "asr": asr(answers.stamped, answers.y, made.target),
        "cover_accuracy": cover_accuracy(model, attack, made, images, task),
        "threads": torch.get_num_threads(),
        "busy": round(busy, 2),
        "machine": machine(),
    }


def collect() -> None:
    """Write results/attacks-longer.json, and print the lines of the tables in the pages."""
    kept, figures = rows(NAME), {}
    for attack, task, passes in sorted({(r["attack"], r["task"], r["passes"]) for r in kept}):
        found = [r for r in kept if (r["attack"], r["task"], r["passes"]) == (attack, task, passes)]
        cells = []
        for field in ("accuracy", "asr", "cover_accuracy"):
            if found[0][field] is None:  # it has no covers
                cells.append("")
                continue
            seen = spread([r[field] for r in found])
            low, middle, high = (f"{100 * seen[k]:.1f}" for k in ("min", "median", "max"))
            cells.append(middle if len(found) == 1 else f"{middle} ({low} to {high})")
            figures[f"{attack} on {task}, {passes:g} passes, {field}"] = Figure(
                value=seen["median"],
                unit="share",
                goal=None,
                better="higher",
                spread=seen,
                seeds=[r["seed"] for r in found],
                command="python benchmarks/longer_training.py run "
                f"--attack {shlex.quote(attack)} --task {task} --passes {passes:g}",
            )
        print(f"{attack} on {task}: | {passes:g} | {len(found)} | {' | '.join(cells)} |")
    write(NAME, figures)


def main() -> None:
    """Make one row, or collect them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect"])
    parser.add_argument("--attack", choices=CHOICES, default="wanet")
    parser.add_argument("--passes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", default="mnist")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        return collect()
    network = get_task(arguments.task).network
    key = {"attack": arguments.attack, "task": arguments.task, "network": network, "passes": arguments.passes}
    return fill(NAME, [{**key, "seed": arguments.seed}], one)


if __name__ == "__main__":
    main()
