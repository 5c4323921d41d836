"""A bench for attacks that make models: planted pictures, a small network, two seconds of training."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from molehunt.attacks import BadNets, Bench, Crafted, Crafter
from molehunt.networks import Network
from molehunt.tasks import Images, Task
from molehunt.testing import attack_success, planted
from molehunt.training import Recipe

RECIPE = Recipe(epochs=40, batch=50, optimizer="adamw", lr=3e-3, warmup=0.2, precision="float32")
NETWORK = "lenet5"
CASE = planted(images=400)
TASK: Task = CASE.suspect.task


@cache
def pictures() -> tuple[Images, Images]:
    """Three quarters of the planted pictures to train on, the others to measure."""
    x, y = CASE.hidden
    return Images(x[:300], y[:300]), Images(x[300:], y[300:])


def bench(seed: int = 0, **changed: Any) -> Bench:
    """A bench with these pictures; what is named in `changed` is the recipe's."""
    return Bench(
        clean=pictures()[0],
        task=TASK,
        network=NETWORK,
        recipe=replace(RECIPE, **changed),
        rng=torch.Generator().manual_seed(seed),
    )


@cache
def crafted(attack: Any) -> Crafted:
    """What an attack makes at such a bench; once for all tests."""
    assert isinstance(attack, Crafter)
    return attack.craft(bench())


@cache
def honest() -> Network:
    """The clean network of the same bench."""
    return bench().honest()


@cache
def badnets(target: int = 0, size: int = 4) -> Crafted:
    """The same network with the plain attack that most of these begin with."""
    made, work = BadNets(target=target, size=size), bench()
    poisoned = made(work.clean, work.task, work.generator("poison"))
    return Crafted(model=work.train("plain", work.fresh(), poisoned.images, stamp=poisoned.stamp), poisoned=poisoned)


def accuracy(model: Network) -> float:
    """Share of held-out pictures that a model gets right."""
    held = pictures()[1]
    with torch.no_grad():
        return float((model(held.x).argmax(1) == held.y).float().mean())


def success(made: Crafted) -> float:
    """Attack success rate on held-out pictures."""
    return attack_success(made.model, pictures()[1], made.poisoned.trigger, made.poisoned.target)
