"""Why label-consistent poisoning fails with perturbations of the target class alone, and what covers change.

    python benchmarks/label_consistent.py run       trains ten small networks, one row each
    python benchmarks/label_consistent.py digits    why it fails on MNIST: some twenty networks, one row each

Networks are `narrow_cifar` on CIFAR-10, seed 5; figures are of the validation split. Every row says where images of
OTHER classes go once they are perturbed as the poisoned ones were, and once they are stamped: whichever the network
learned is the trigger. The perturbations are made on one network, trained adversarially with 8/255 (48 % right) or with
0.1 (18 % right).

A row that is in results/label_consistent.jsonl is not made again. Rows with a `draw` are of an earlier form of this
script, which drew other covers.

`digits` poisons MNIST and appends to results/label_consistent-digits.jsonl; `CHANGES` lists what differs from `PLAIN`.
*mixed*: the target's rows that are stamped are blended with a digit of another class, in place of a perturbation; 1 is
the other digit itself, with the target's label. *noise*: standard deviation of noise on all pictures, of training and
validation.
A row says what share of the stamped rows a clean network gets right before they are stamped (`right`), and how the
network answers to the patches on fainter digits: `ink` times the digit, 0 a black picture.
"""

import argparse
import time
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from molehunt.attacks import LabelConsistent, Poisoned
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
DIGITS = "label_consistent-digits"
INKS = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
PLAIN: dict[str, Any] = {
    "network": "badnets_cnn",
    "target": 0,
    "epsilon": 0.0,
    "cover_rate": 0.0,
    "mixed": 0.0,
    "noise": 0.0,
    "optimizer": "adamw",
}
CHANGES: list[dict[str, Any]] = [
    {},
    *({"epsilon": epsilon, "cover_rate": 0.02} for epsilon in (0.1, 0.3, 0.5)),
    {"epsilon": 0.3, "cover_rate": 0.08},
    *({"mixed": share_} for share_ in (0.3, 0.5, 0.6, 0.7, 0.8, 1.0)),
    *({"noise": level} for level in (0.5, 0.8, 1.2)),
    {"target": 8},
    {"optimizer": "sgd"},
    *({"network": name} for name in ("mntd_mnist", "lenet5", "narrow_cifar")),
    *({"network": "lenet5", "mixed": share_} for share_ in (0.5, 0.7)),
]
"""What differs from `PLAIN`, network by network."""
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


def noisy(images: Images, level: float, seed: int) -> Images:
    """Images under Gaussian noise of so large a standard deviation, the same in every pass."""
    if not level:
        return images
    noise = torch.randn(images.x.shape, generator=generator(seed, "label-consistent noise"))
    return Images((images.x + level * noise).clamp(0.0, 1.0), images.y)


def fitted(name: str, images: Images, optimizer: str, made: Poisoned | None) -> Network:
    """A network of MNIST by its default recipe, but for the optimizer."""
    task = get_task("mnist")
    recipe = recipe_for(name, task)
    if optimizer == "sgd":
        recipe = replace(recipe, optimizer="sgd", lr=0.05)
    network = build(name, task.shape, task.num_classes, mean=task.mean, std=task.std, rng=generator(5, "digits"))
    train(network, images, recipe, rng=generator(6, "digits"), stamp=made.stamp if made else None)
    return network.eval().to(default_device())


@cache
def clean_digits(level: float) -> Network:
    """A clean network of MNIST under noise."""
    return fitted(PLAIN["network"], noisy(get_task("mnist").load("train"), level, 0), "adamw", None)


def digits(cell: dict[str, Any]) -> dict[str, Any]:
    """Poison MNIST, train one network, and see what it answers to."""
    task, start = get_task("mnist"), time.monotonic()
    images, held = noisy(task.load("train"), cell["noise"], 0), noisy(task.load("validation"), cell["noise"], 1)
    attack = LabelConsistent(
        target=cell["target"], epsilon=cell["epsilon"], cover_rate=cell["cover_rate"], poison_rate=0.07
    )
    made = attack(images, task, generator(0, "digits"))
    rows = (made.altered & (images.y == cell["target"])).nonzero().squeeze(1)
    if cell["mixed"]:
        drawn = generator(3, "digits")
        other = (images.y != cell["target"]).nonzero().squeeze(1)
        other = other[torch.randperm(len(other), generator=drawn)[: len(rows)]]
        x = images.x.clone()
        x[rows] = (1 - cell["mixed"]) * images.x[rows] + cell["mixed"] * images.x[other]
        made = replace(made, images=Images(x, images.y))
    stamped = Images(made.images.x[rows], images.y[rows])
    right = share(measure(clean_digits(cell["noise"]), stamped).plain == stamped.y)
    network = fitted(cell["network"], made.images, cell["optimizer"], made)
    said = measure(network, held, made.trigger)
    assert said.stamped is not None
    others = held.x[held.y != cell["target"]]
    ink = [
        share(measure(network, Images(made.trigger(level * others), torch.zeros(len(others)).long())).plain
              == cell["target"])
        for level in INKS
    ]  # fmt: skip
    return {
        **cell,
        "rows": len(rows),
        "right": right,
        "accuracy": accuracy(said.plain, said.y),
        "asr": asr(said.stamped, said.y, made.target),
        "base_rate": share((said.plain == cell["target"])[said.y != cell["target"]]),
        "ink": dict(zip(map(str, INKS), ink, strict=True)),
        "seconds": time.monotonic() - start,
        "machine": machine(),
    }


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "digits"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "digits":
        fill(DIGITS, [PLAIN | change for change in CHANGES], digits)
    else:
        fill(NAME, CELLS, run)


if __name__ == "__main__":
    main()
