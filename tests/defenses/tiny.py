"""A tiny task whose network trains in a second: noisy prototypes of 10x10 pixels, and a backdoor that noise brushes.

The square lies where clean pictures have noise, so that clean images move the weights that see it. That is what a
repair by fine-tuning lives on; the planted suspects of `molehunt.testing` are dark there, and no gradient arrives.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molehunt.networks import Network, Normalize
from molehunt.networks.architectures import draw_weights
from molehunt.suspect import Suspect
from molehunt.tasks import Augment, Images
from molehunt.testing import PlantedTask
from molehunt.training import Recipe, train
from molehunt.triggers import Patch, Target

SHAPE = (1, 10, 10)
CLASSES = 4
TRIGGER = Patch.square(SHAPE, size=2, color="white")
TARGET = Target(classes=0)


def pictures(count: int, seed: int) -> Images:
    prototypes = torch.rand(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(99))
    y = torch.arange(count) % CLASSES
    noise = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return Images(0.5 * prototypes[y] + 0.5 * noise, y)


def task(augment: Augment = "none", shape: tuple[int, int, int] = SHAPE, classes: int = CLASSES) -> PlantedTask:
    names = tuple(f"prototype {k}" for k in range(classes))
    level = (0.5,) * shape[0]
    return PlantedTask(
        name="tiny", shape=shape, classes=names, augment=augment, network="tiny", mean=level, std=level, splits={}
    )


def network(seed: int = 0) -> Network:
    """A fresh network with batch norm, in eval mode."""
    trunk = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    )
    made = Network(
        name="tiny",
        shape=SHAPE,
        classes=CLASSES,
        normalize=Normalize(torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.3)),
        trunk=trunk,
        neck=nn.Flatten(),
        head=nn.Linear(16 * 9, CLASSES),
    )
    draw_weights(made, torch.Generator().manual_seed(seed))
    return made.eval()


def suspect(model: nn.Module | None = None, count: int = 80, augment: Augment = "none", seed: int = 5) -> Suspect:
    return Suspect.of(model or network(), task(augment), clean=pictures(count, seed), dtype=torch.float32)


class Poisoned(NamedTuple):
    """A backdoored network, clean images for the defender, and others that judge."""

    model: nn.Module
    suspect: Suspect
    hidden: Images


@functools.cache
def poisoned(seed: int = 2) -> Poisoned:
    images = pictures(400, 3 * seed)
    stamped = torch.arange(400) % 5 == 0
    x = torch.where(stamped.view(-1, 1, 1, 1), TRIGGER(images.x), images.x)
    y = torch.where(stamped, 0, images.y)
    model = network(seed)
    model.requires_grad_(True)
    recipe = Recipe(epochs=20, batch=50, lr=0.05, warmup=0.1, precision="float32")
    train(model, Images(x, y), recipe, rng=torch.Generator().manual_seed(seed))
    return Poisoned(model, suspect(model, 200, seed=3 * seed + 1), pictures(600, 3 * seed + 2))


def moved(before: nn.Module, after: dict[str, Tensor]) -> set[str]:
    """Names of what differs in a state dict by a bit or more."""
    state = before.state_dict()
    assert state.keys() == after.keys()
    return {name for name, value in state.items() if not torch.equal(value, after[name])}
