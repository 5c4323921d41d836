"""One really trained backdoored network and its clean twin, for the slow tests of defenses."""

import dataclasses
import functools
from typing import NamedTuple

import torch
from torch import nn

from molehunt.attacks import BadNets
from molehunt.networks import build
from molehunt.tasks import Images, Task, get_task
from molehunt.training import recipe_for, train
from molehunt.triggers import Target, Trigger


class Trained(NamedTuple):
    """A network on `mnist5k` with a 5x5 square for class 1, its clean twin, and the images that judge them."""

    backdoored: nn.Module
    twin: nn.Module
    task: Task
    clean: Images
    hidden: Images
    trigger: Trigger
    target: Target


@functools.cache
def trained() -> Trained:
    task = get_task("mnist5k")
    images = task.load("train")
    recipe = dataclasses.replace(recipe_for("badnets_cnn", task), epochs=10)
    models = []
    for attack in (BadNets(target=1, size=5, poison_rate=0.05), None):
        rng = torch.Generator().manual_seed(1007)
        model = build("badnets_cnn", task.shape, task.num_classes, mean=task.mean, std=task.std, rng=rng)
        if attack is None:
            train(model, images, recipe, rng=rng)
        else:
            poisoned = attack(images, task, rng)
            train(model, poisoned.images, recipe, rng=rng, stamp=poisoned.stamp)
        models.append(model)
    clean, hidden = task.secret(5)
    return Trained(models[0], models[1], task, clean, hidden, poisoned.trigger, poisoned.target)
