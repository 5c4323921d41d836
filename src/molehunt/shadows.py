"""Shadow models: clean and backdoored networks, from which meta-classifiers learn what a backdoored one answers."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from molehunt import meta_files
from molehunt.attacks import Attack, Poisoned
from molehunt.attacks.jumbo import jumbo
from molehunt.datasets import cache
from molehunt.meta_training import fit
from molehunt.metas import Meta, Settings
from molehunt.networks import Network
from molehunt.runner import generator
from molehunt.suspect import freeze
from molehunt.tasks import Images, Task, get_task
from molehunt.training import Recipe, recipe_for
from molehunt.training.layout import Layout
from molehunt.training.members import Grown, Member, Plan
from molehunt.training.population import train_population

Report = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, how much there is)."""


@dataclass(frozen=True)
class JumboDraw:
    """One attack of the jumbo distribution, by its seed: it travels to another process as this number.

    Attributes:
        seed: draws trigger, target and rate.
    """

    seed: int

    def attack(self, task: Task) -> Attack:
        """The attack, for a task."""
        return jumbo(task.shape, task.num_classes, torch.Generator().manual_seed(self.seed))

    def target(self, task: Task) -> int:
        """The class that its trigger produces."""
        return int(self.attack(task).target)  # type: ignore[attr-defined]  # the jumbo distribution is all-to-one

    def __call__(self, images: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison images."""
        return self.attack(task)(images, task, rng)


@dataclass(frozen=True, kw_only=True)
class Shadows:
    """A population of shadow models for one task and network, and the meta-classifiers that learn from it.

    Both are made once and kept in the cache; an interrupted run goes on. The shadows should be what suspects are, but
    for the backdoor: with another architecture, recipe or length of training the meta-classifiers read the recipe.

    Attributes:
        task: name of the task.
        network: a key of `NETWORKS`.
        count: of clean models, and of backdoored ones.
        images: training images that each of them sees, drawn anew for each; None for the whole split.
        recipe: how they are trained; None for the default of the network.
        seed: of the population: other seeds, other models.

    Raises:
        ValueError: fewer than one model of either kind.

    Reference:
        Xu, Wang, Li, Borisov, Gunter, Li, "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021.

    Departures from the paper:
        By default all shadows see the whole public training split, as suspects do, where the paper's share one fiftieth
        of the data; with `images` each draws its own. There are far fewer: the paper has 2 048 of either kind, and
        further ones to choose a pass by.
    """

    task: str
    network: str
    count: int = 128
    images: int | None = None
    recipe: Recipe | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a population needs at least one model of either kind, got {self.count}")

    @cached_property
    def plan(self) -> Plan:
        """What is trained: clean and backdoored models in turn, so that a longer population begins like a shorter."""
        task = get_task(self.task)
        members = []
        for number in range(2 * self.count):
            told = f"shadow {self.task} {self.network} {self.seed} {number}"
            seed = int.from_bytes(hashlib.sha256(told.encode()).digest()[:6], "big")
            members.append(
                Member(
                    name=f"{'backdoored' if number % 2 else 'clean'} {number}",
                    seed=seed,
                    poison=JumboDraw(seed) if number % 2 else None,
                    subset=self.images,
                    subset_seed=seed,
                )
            )
        recipe = self.recipe or recipe_for(self.network, task)
        return Plan(task=self.task, network=self.network, recipe=recipe, members=tuple(members))

    @property
    def folder(self) -> Path:
        """Where population and meta-classifiers are kept, in the cache."""
        kept = [asdict(get_task(self.task)), self.images, self.seed, self.count, self.plan.recipe.to_json()]
        told = json.dumps(kept, sort_keys=True)
        name = f"{self.task.partition(':')[0]}-{self.network}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        return cache.root() / "shadows" / name

    def about(self) -> dict[str, Any]:
        """What a file of meta-classifiers should say of the models that they learned from."""
        return {
            "task": self.task,
            "network": self.network,
            "shadows": self.count,
            "images": self.images,
            "recipe": self.plan.recipe.to_json(),
            "seed": self.seed,
        }

    def targets(self) -> torch.Tensor:
        """Target class of every model, int64 (2 count,), -1 of a clean one."""
        task = get_task(self.task)
        found = [m.poison.target(task) if isinstance(m.poison, JumboDraw) else -1 for m in self.plan.members]
        return torch.tensor(found)

    def grow(
        self,
        *,
        layout: Layout | None = None,
        report: Report | None = None,
        check: Callable[[], None] | None = None,
    ) -> list[Grown]:
        """Train what is missing, and return all models, clean and backdoored in turn.

        Args:
            layout: where to train; by default the one that the folder was begun with, else the fastest by a short
                measurement.
            report: called with ("shadow models", models done, models in all).
            check: called between blocks of models; raises to stop.
        """

        def told(done: int, total: int) -> None:
            if report:
                report("shadow models", done, total)

        return list(train_population(self.plan, self.folder, layout=layout, report=told, check=check))

    def metas(
        self,
        number: int = 5,
        settings: Settings | None = None,
        *,
        seed: int = 0,
        layout: Layout | None = None,
        report: Report | None = None,
        check: Callable[[], None] | None = None,
    ) -> tuple[Meta, ...]:
        """Return meta-classifiers, from the cache or trained now on the population, which is grown first.

        Args:
            number: how many, each with starting weights, queries and an order of its own.
            settings: how they are built and trained.
            seed: of the meta-classifiers. A host who plays against students that may know this program takes a secret
                one, and draws it after the last model was handed in: else they know its weights and queries.
            layout: as in `grow`.
            report: as in `grow`; of the meta-classifiers it is called with ("meta-classifier 1", models seen, models to
                see).
            check: called at every step of a meta-classifier, and between blocks of models while they are grown; raises
                to stop.

        Raises:
            ValueError: fewer than one.
        """
        if number < 1:
            raise ValueError(f"at least one meta-classifier is needed, got {number}")
        settings = settings or Settings()
        made = [_read(self._path(place, settings, seed)) for place in range(number)]
        networks: list[Network] = []
        if any(meta is None for meta in made):
            networks = [one.network for one in self.grow(layout=layout, report=report, check=check)]
            for network in networks:
                freeze(network)
        targets, task = self.targets(), get_task(self.task)
        found = []
        for place, kept in enumerate(made):
            if kept is None:
                rng = generator(seed, f"meta-classifier {place} of {self.task} {self.network} {self.seed}")
                kept = Meta(task.shape, task.num_classes, task.mean, task.std, settings, rng)
                title, steps, total = f"meta-classifier {place + 1}", 0, settings.passes * len(networks)

                def step(title: str = title, total: int = total) -> None:
                    nonlocal steps
                    if check:
                        check()
                    if report:
                        report(title, min(steps * settings.batch, total), total)
                    steps += 1

                fit(kept, networks, targets, rng, step)
                if report:
                    report(title, total, total)
                meta_files.save((kept,), self._path(place, settings, seed), self.about())
                # As it will be read from now on: frozen.
                kept = Meta.from_json(kept.to_json(), kept.state_dict())
            found.append(kept)
        return tuple(found)

    def _path(self, place: int, settings: Settings, seed: int) -> Path:
        told = json.dumps([asdict(settings), seed], sort_keys=True)
        return self.folder / f"meta-{hashlib.sha256(told.encode()).hexdigest()[:16]}-{place}.safetensors"


def _read(path: Path) -> Meta | None:
    """A kept meta-classifier; None where there is none, or the file is broken."""
    try:
        return meta_files.load(path)[0][0] if path.exists() else None
    except (ValueError, OSError):
        return None
