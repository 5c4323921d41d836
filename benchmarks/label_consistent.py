"""Why label-consistent poisoning fails with perturbations of the target class alone, and what covers change.

    python benchmarks/label_consistent.py run       trains ten small networks, one row each

Networks are `narrow_cifar` on CIFAR-10, seed 5; figures are of the validation split. Every row says where images of
OTHER classes go once they are perturbed as the poisoned ones were, and once they are stamped: whichever the network
learned is the trigger. The perturbations are made on one network, trained adversarially with 8/255 (48 % right) or with
0.1 (18 % right).

A row that is in results/label_consistent.jsonl is not made again. Rows with a `draw` are of an earlier form of this
script, which drew other covers.
"""

import argparse
import time
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from molehunt.attacks import LabelConsistent
from molehunt.attacks.label_consistent import _away
from molehunt.game.answers import accuracy, asr, measure, share
from molehunt.networks import Network, build, default_device
from molehunt.runner import generator
from molehunt.tasks import Images, Task, get_task
from molehunt.training import recipe_for, train
from record import fill, machine

NAME, NETWORK = "label_consistent", "narrow_cifar"
CRAFTING = {"0.1": (2, 0.1), "8/255": (4, 8 / 255)}
"""Adversarial training of the network that perturbations are made on: its seed and its epsilon."""
OTHERS = 1_000
CELLS: list[dict[str, Any]] = [
    {"crafted": "0.1", "epsilon": 0.1, "poison_rate": 0.08, "cover_rate": 0.0, "epochs": 3.0},
    {"crafted": "8/255", "epsilon": 0.0, "poison_rate": 0.08, "cover_rate": 0.0, "epochs": 3.0},
    {"crafted": "8/255", "epsilon": 16 / 255, "poison_rate": 0.08, "cover_rate": 0.0, "epochs": 3.0},
    {"crafted": "8/255", "epsilon": 16 / 255, "poison_rate": 0.015, "cover_rate": 0.0, "epochs": 3.0},
    {"crafted": "8/255", "epsilon": 32 / 255, "poison_rate": 0.015, "cover_rate": 0.0, "epochs": 3.0},
    {"crafted": "8/255", "epsilon": 16 / 255, "poison_rate": 0.015, "cover_rate": 0.0, "epochs": 9.0},
    {"crafted": "8/255", "epsilon": 16 / 255, "poison_rate": 0.08, "cover_rate": 0.08, "epochs": 3.0},
    {"crafted": "8/255", "epsilon": 16 / 255, "poison_rate": 0.08, "cover_rate": 0.02, "epochs": 3.0},
    {"crafted": "8/255", "epsilon": 0.1, "poison_rate": 0.08, "cover_rate": 0.08, "epochs": 3.0},
    {"crafted": "8/255", "epsilon": 16 / 255, "poison_rate": 0.05, "cover_rate": 0.05, "epochs": 3.0},
]


def trained(task: Task, seed: int, adversarial: float) -> Network:
    """A clean network of the small kind."""
    model = build(NETWORK, task.shape, task.num_classes, mean=task.mean, std=task.std, rng=generator(seed, "lc"))
    recipe = replace(recipe_for(NETWORK, task), adversarial=adversarial)
    train(model, task.load("train"), recipe, rng=generator(seed, "lc2"))
    return model.eval().to(default_device())


@cache
def crafting(name: str) -> Network:
    """The network that perturbations are made on."""
    return trained(get_task("cifar10"), *CRAFTING[name])


@cache
def twin() -> Network:
    """A clean network to compare with."""
    return trained(get_task("cifar10"), 0, 0.0)


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """Poison and train one network, and see what it answers to."""
    task, start = get_task("cifar10"), time.monotonic()
    epsilon, model = cell["epsilon"], crafting(cell["crafted"])
    attack = LabelConsistent(
        model=model, epsilon=epsilon, poison_rate=cell["poison_rate"], cover_rate=cell["cover_rate"]
    )
    made = attack(task.load("train"), task, generator(0, "cell"))
    recipe = recipe_for(NETWORK, task)
    recipe = replace(recipe, epochs=cell["epochs"])
    network = build(NETWORK, task.shape, task.num_classes, mean=task.mean, std=task.std, rng=generator(5, "cell"))
    train(network, made.images, recipe, rng=generator(6, "cell"), stamp=made.stamp)
    network.eval().to(default_device())
    images = task.load("validation")
    said = measure(network, images, made.trigger)
    assert said.stamped is not None
    row: dict[str, Any] = {
        **cell,
        "accuracy": accuracy(said.plain, said.y),
        "twin": accuracy(measure(twin(), images).plain, images.y),
        "asr": asr(said.stamped, said.y, made.target),
        "base_rate": share((said.plain == attack.target)[said.y != attack.target]),
    }
    if epsilon:
        other = images.y != attack.target
        some = Images(images.x[other][:OTHERS], images.y[other][:OTHERS])
        moved = Images(_away(model, some, epsilon, attack.steps, generator(1, "c")), some.y)
        row["perturbed_to_target"] = share(measure(network, moved).plain == attack.target)
        row["twin_perturbed_to_target"] = share(measure(twin(), moved).plain == attack.target)
    return {**row, "seconds": time.monotonic() - start, "machine": machine()}


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run"])
    parser.parse_args()
    torch.set_num_threads(1)
    fill(NAME, CELLS, run)


if __name__ == "__main__":
    main()
