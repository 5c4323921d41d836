"""The networks whose votes `rab_curves.py` certifies: what they learn from, and how blocks of them are kept on disk."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from molehunt.attacks import BadNets
from molehunt.defenses._ensemble import answers, noise, seed_of
from molehunt.files import write_atomically
from molehunt.networks import Network, build
from molehunt.runner import generator
from molehunt.suspect import Suspect, freeze
from molehunt.tasks import Images, Split, get_task
from molehunt.testing import PlantedTask
from molehunt.training import Recipe, train
from molehunt.training.layout import Layout, measure
from molehunt.training.together import train_together
from molehunt.triggers import Additive

LONG = 20
"""Passes of the official MNIST example."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One ensemble.

    Attributes:
        task, pair: which two classes of what.
        network: of the members.
        sigma: standard deviation of the noise.
        members: N.
        epochs: passes over the training pictures.
        batch: pictures per step.
        poison_rate: share of the training rows that are poisoned.
        norm: l2 norm of the trigger.
        images: training pictures, and test pictures, at most; None for all.
    """

    task: str = "mnist"
    pair: tuple[int, int] = (0, 1)
    network: str = "mntd_mnist"
    sigma: float = 1.0
    members: int = 1_000
    epochs: int = LONG
    batch: int = 128
    poison_rate: float = 0.1
    norm: float = 1.0
    images: int | None = None

    def to_json(self) -> dict[str, Any]:
        """All settings, as a row has them."""
        return {**asdict(self), "pair": list(self.pair)}

    @property
    def recipe(self) -> Recipe:
        """How a member is trained."""
        return Recipe(
            epochs=self.epochs, batch=self.batch, optimizer="adamw", lr=1e-3, weight_decay=0.0, schedule="constant"
        )


COLOR = Case(
    task="cifar10", pair=(0, 2), network="mntd_cifar", members=250, epochs=10, batch=64, poison_rate=0.02, norm=0.1
)


@dataclass(frozen=True, eq=False)
class Material:
    """What the members of a case learn from and are asked about.

    Attributes:
        task: of two classes.
        training: the poisoned set.
        asked: test pictures, first as they are, then all with the trigger.
        y: their labels, 0 or 1, the trigger ignored.
        poisoned: number of poisoned rows.
    """

    task: PlantedTask
    training: Images
    asked: Tensor
    y: Tensor
    poisoned: int


@cache
def material(case: Case) -> Material:
    """Make the two-class task of a case, and poison it."""
    known = get_task(case.task)

    def two(splits: Sequence[Split]) -> Images:
        parts = [known.load(split) for split in splits]
        x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
        rows = ((y == case.pair[0]) | (y == case.pair[1])).nonzero().squeeze(1)[: case.images]
        return Images(x[rows], (y[rows] == case.pair[1]).long())

    # Both public parts: what the paper calls the training set.
    clean, test = two(("train", "validation")), two(("test",))
    task = PlantedTask(
        name=f"{case.task} {case.pair[0]} against {case.pair[1]}",
        shape=known.shape,
        classes=tuple(known.classes[k] for k in case.pair),
        augment="none",
        network=case.network,
        mean=known.mean,
        std=known.std,
        splits={"train": clean, "test": test},
    )
    delta = torch.zeros(known.shape)
    # One step in from the lower right corner; the channels share the norm.
    delta[:, -2, -2] = case.norm / known.shape[0] ** 0.5
    attack = BadNets(target=1, poison_rate=case.poison_rate, trigger=Additive(delta))
    made = attack(clean, task, generator(0, "rab curves poison"))
    asked = torch.cat([test.x, made.trigger(test.x)])
    return Material(task, made.stamped(), asked, torch.cat([test.y, test.y]), int(made.altered.sum()))


def begun(case: Case, number: int) -> tuple[Network, Images, torch.Generator]:
    """A member's fresh network, its noisy training set, and its generator."""
    about, rng = material(case), generator(number, "rab curves")
    network = build(case.network, about.task.shape, 2, rng=rng)
    x, y = about.training
    return network, Images(x + noise(tuple(x.shape), "gaussian", case.sigma, rng), y), rng


def learned(case: Case, numbers: Sequence[int]) -> list[Network | None]:
    """Train members together; None for one whose loss is not finite, which must not end the vote of the others."""
    networks, sets, rngs = map(list, zip(*(begun(case, number) for number in numbers), strict=True))
    try:
        if len(numbers) == 1:
            train(networks[0], sets[0], case.recipe, rng=rngs[0])
        else:
            train_together(networks, sets, case.recipe, rngs=rngs)
    except FloatingPointError:
        return [None] if len(numbers) == 1 else [learned(case, [number])[0] for number in numbers]
    return networks


def grow(case: Case, threads: int, item: tuple[Path, Sequence[int]]) -> Path:
    """Train a block of members and put what they answer on disk."""
    path, numbers = item
    torch.set_num_threads(threads)
    about, start = material(case), time.perf_counter()
    ballots, taught = torch.zeros(len(numbers), len(about.y), dtype=torch.uint8), 0
    for row, network in zip(ballots, learned(case, numbers), strict=True):
        if network is None:
            continue  # votes for class 0, always
        taught += 1
        freeze(network)
        known = torch.Generator().manual_seed(seed_of(network.state_dict()))
        shift = noise(about.task.shape, "gaussian", case.sigma, known)
        row[:] = answers(network, Suspect.of(network, about.task), about.asked, shift)
    told = {"case": kind(case), "numbers": list(numbers), "taught": taught, "seconds": time.perf_counter() - start}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [save({"ballots": ballots}, metadata={"about": json.dumps(told)})])
    return path


def kind(case: Case) -> dict[str, Any]:
    """What a member's answers depend on: all settings but how many members there are."""
    return {name: value for name, value in case.to_json().items() if name != "members"}


def read(path: Path, case: Case, numbers: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
    """Read a finished block.

    Raises:
        ValueError: it is of another case, or of other members.
    """
    with safe_open(path, framework="pt") as file:
        about: dict[str, Any] = json.loads(file.metadata()["about"])
        ballots: Tensor = file.get_tensor("ballots")
    if about["case"] != kind(case) or about["numbers"] != list(numbers):
        raise ValueError(f"{path} holds other members; give this run a --state folder of its own")
    return ballots, about


def settle(case: Case, state: Path) -> Layout:
    """Where networks of this kind train fastest here: measured once, then kept in the folder."""
    path = state / f"{case.network}-layout.json"
    if not path.exists():
        layout, rates = measure(case.network, material(case).task.shape, 2, case.recipe)
        layout.write(path, rates)
    return Layout.read(path)


def ensemble(case: Case, state: Path) -> tuple[Tensor, dict[str, Any]]:
    """Train the members that the folder does not hold, and return all votes (N, pictures) and what they cost."""
    name = hashlib.sha256(json.dumps(kind(case), sort_keys=True).encode()).hexdigest()[:12]
    folder = state / f"{case.task}-sigma{case.sigma:g}-passes{case.epochs}-{name}"
    layout = settle(case, state)
    size = layout.block
    blocks = [range(first, min(first + size, case.members)) for first in range(0, case.members, size)]
    items = [(folder / f"members-{numbers[0]:05d}-{numbers[-1]:05d}.safetensors", numbers) for numbers in blocks]
    missing = [item for item in items if not item[0].exists()]
    for path in layout.engine().map(partial(grow, case, layout.threads), missing):
        print(path.name, flush=True)
    found = [read(path, case, numbers) for path, numbers in items]
    about = [one for _, one in found]
    cost = {"seconds": sum(one["seconds"] for one in about), "taught": sum(one["taught"] for one in about)}
    return torch.cat([ballots for ballots, _ in found]).long(), {**cost, "layout": asdict(layout)}
