"""Who is in the bank: every model as a task, a network, a partition, a kind and a number, from which all is drawn."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molehunt.attacks import SIG, AdapBlend, Attack, BadNets, Blended, FTrojan, Refool, TaCT, WaNet
from molehunt.game.rules import Limits
from molehunt.runner import generator
from molehunt.tasks import Images, Task, get_task
from molehunt.training import Recipe, recipe_for
from molehunt.training.members import Member, Plan, Poison, Prepared, facts
from molehunt.training.recipes import SMALL
from molehunt.triggers import Patch, Sinusoid, Target

# MUST be raised by whoever changes what a model of the bank is made of where its digest cannot see it: the code of an
# attack or of a trigger, of the training, of a network, or of the draws below. Else rows of models that nobody can make
# again count as valid. A test holds what every family does to a few pictures, and fails when this was forgotten.
FORMAT = 3
"""Raised when the models change: rows of an older format are trained again."""

LIMITS = Limits()
"""What a referee allows: every trigger is drawn within it."""

PARTITIONS = ("develop", "calibrate", "evaluate")

_DIGITS = {"develop": 40, "calibrate": 99, "evaluate": 100}
_JUDGED = {"develop": 0, "calibrate": 0, "evaluate": 10}
SIZES: dict[tuple[str, str], dict[str, int]] = {
    ("mnist5k", "badnets_cnn"): _DIGITS,
    ("mnist", "badnets_cnn"): _DIGITS,
    ("cifar10", "narrow_cifar"): {"develop": 12, "calibrate": 39, "evaluate": 40},
    ("cifar10", "fast_cifar"): _JUDGED,
    ("cifar10", "wrn_16_1"): _JUDGED,
}
"""By task and network: clean models per partition, and as many backdoored ones."""

CLEAN = ("plain", "strong augmentation", "plain", "adversarial", "plain", "easy class")
"""Kinds of clean models, in turns: every second one is there because it resembles a backdoored one."""


@dataclass(frozen=True, eq=False)
class _Honest:
    """A training set without marks."""

    images: Images

    def stamp(self, x: Tensor, rows: Tensor) -> Tensor:
        """Leave the batch (B, C, H, W) as it is."""
        del rows
        return x


@dataclass(frozen=True, kw_only=True)
class EasyClass:
    """An honest set in which one class is met more often, so that the model falls for it easily.

    Attributes:
        favorite: the class that keeps all of its images.
        kept: share of the images of every other class that stays, in (0, 1].
    """

    favorite: int
    kept: float = 0.4

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Prepared:
        """Choose the rows that stay; see the class.

        Raises:
            ValueError: there is no such class, or the share is out of range.
        """
        if not 0 <= self.favorite < task.num_classes:
            raise ValueError(f"{task.name} has the classes 0 to {task.num_classes - 1}, got {self.favorite}")
        if not 0 < self.kept <= 1:
            raise ValueError(f"the share that stays must lie in (0, 1], got {self.kept}")
        stay = (clean.y == self.favorite) | (torch.rand(len(clean.y), generator=rng) < self.kept)
        return _Honest(Images(clean.x[stay], clean.y[stay]))


@dataclass(frozen=True, kw_only=True, eq=False)
class ThirdRefool(Refool):
    """Refool whose reflected picture comes from one third of the training rows, so that partitions share none.

    Attributes:
        third: 0, 1 or 2: the picture is one of the rows third, third + 3, third + 6 ...
    """

    third: int

    def candidates(self, clean: Images, goal: Target) -> Tensor:
        """Return the rows (M,) outside the target class that are of that third."""
        rows = super().candidates(clean, goal)
        return rows[rows % len(PARTITIONS) == self.third]


def _between(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def _patch(task: Task, rng: torch.Generator) -> Patch:
    """Draw an opaque patch of three to five pixels a side, anywhere, every pixel a shade of its own."""
    channels, height, width = task.shape
    size = int(torch.randint(3, 6, (1,), generator=rng))
    top = int(torch.randint(height - size + 1, (1,), generator=rng))
    left = int(torch.randint(width - size + 1, (1,), generator=rng))
    mask = Patch.square(task.shape, size=size, at=(top, left)).mask
    shades = 0.5 + 0.5 * torch.rand(channels, height, width, generator=rng)
    return Patch(mask=mask, pattern=shades * mask)


def _few(task: Task) -> bool:
    """Whether a task has so few images that what is poisoned at the usual rates is not learned."""
    return task.name in SMALL


def _tact(task: Task, target: int, rng: torch.Generator) -> Attack:
    source = (target + 1 + int(torch.randint(task.num_classes - 1, (1,), generator=rng))) % task.num_classes
    attack = TaCT(target=target, sources=(source,), trigger=_patch(task, rng))
    return replace(attack, poison_rate=0.04, cover_rate=0.08) if _few(task) else attack


def _badnets(task: Task, target: int, rng: torch.Generator) -> Attack:
    attack = BadNets(target=target, trigger=_patch(task, rng))
    return replace(attack, poison_rate=0.15) if _few(task) else attack


def _adap_blend(task: Task, target: int, rng: torch.Generator) -> Attack:
    attack = AdapBlend(target=target, opacity=LIMITS.opacity * _between(0.9, 1.0, rng))
    return replace(attack, poison_rate=0.15, cover_rate=0.1) if _few(task) else attack


def _stripes(task: Task, rng: torch.Generator) -> Sinusoid:
    """Draw vertical stripes of at least four fifths of the amplitude that is allowed."""
    return Sinusoid(task.shape, amplitude=LIMITS.linf * _between(0.8, 1.0, rng), frequency=_between(4.0, 9.0, rng))


def _sig(task: Task, target: int, rng: torch.Generator) -> Attack:
    stripes = _stripes(task, rng)
    return SIG(target=target, amplitude=stripes.amplitude, frequency=stripes.frequency)


def _ftrojan(task: Task, target: int, rng: torch.Generator) -> Attack:
    # The same number in a cell changes the pixels of a colored picture more, by the gains of its chroma.
    low, high = (150.0, 240.0) if task.shape[0] == 1 else (135.0, 169.0)
    return FTrojan(target=target, magnitude=_between(low, high, rng))


def _refool(task: Task, target: int, rng: torch.Generator, partition: str) -> Attack:
    del task
    opacity = LIMITS.opacity * _between(0.7, 1.0, rng)
    return ThirdRefool(target=target, opacity=opacity, third=PARTITIONS.index(partition))


# The two with opaque patches stand last: where the turns do not come out even, they are the ones that get fewer.
FAMILIES: dict[str, Callable[[Task, int, torch.Generator, str], Attack]] = {
    "blended": lambda _, t, g, __: Blended(target=t, opacity=LIMITS.opacity * _between(0.75, 1.0, g)),
    "sig": lambda k, t, g, _: _sig(k, t, g),
    "stripes": lambda k, t, g, _: Blended(target=t, trigger=_stripes(k, g)),
    "wanet": lambda _, t, g, __: WaNet(target=t, strength=_between(0.5, 0.95, g)),
    "ftrojan": lambda k, t, g, _: _ftrojan(k, t, g),
    "refool": _refool,
    "adap_blend": lambda k, t, g, _: _adap_blend(k, t, g),
    "tact": lambda k, t, g, _: _tact(k, t, g),
    "badnets": lambda k, t, g, _: _badnets(k, t, g),
}
"""Attack families, each drawing a trigger that keeps the budget of the game, from task, target and generator, for a
partition; a bank has those of `families`."""
OPAQUE = frozenset({"tact", "badnets"})
"""Families whose patches hide what is below."""


UNLEARNED = frozenset({"wanet", "ftrojan"})
"""Families that a few thousand images do not teach a network within the budget of the game, at any rate that was tried
on the develop partition: three in ten images poisoned cost five points of accuracy and more, and still do not pass."""


def families(task: Task) -> tuple[str, ...]:
    """Return the attack families of a task's bank, in turns: keys of `FAMILIES`.

    SIG is left to colored pictures. On gray ones with a dark ground its stripes are cut off where they are darker, and
    within the budget a network does not learn them from images of the target class alone; there the same stripes come
    with changed labels. Where there are few images, those in `UNLEARNED` are left out, and the two with opaque patches
    share one turn, so that they are a fifth of all.
    """
    other = "sig" if task.shape[0] == 1 else "stripes"
    known = tuple(name for name in FAMILIES if name != other)
    if not _few(task):
        return known
    soft = tuple(name for name in known if name not in UNLEARNED | OPAQUE)
    return (*soft, "tact", *soft, "badnets")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the bank. It is data: everything else about it is drawn from these five.

    Attributes:
        task: name of the task.
        network: name of the network.
        partition: one of `PARTITIONS`.
        planted: whether a backdoor is trained into it.
        number: from 0, among the clean or the planted ones of its partition.

    Raises:
        ValueError: an unknown partition, or a negative number.
    """

    task: str
    network: str
    partition: str
    planted: bool
    number: int

    def __post_init__(self) -> None:
        if self.partition not in PARTITIONS:
            raise ValueError(f"unknown partition {self.partition!r}; known: {', '.join(PARTITIONS)}")
        if self.number < 0:
            raise ValueError(f"models are numbered from 0, got {self.number}")

    @property
    def name(self) -> str:
        """Its name in the bank of its task and network."""
        return f"{self.partition}-{'planted' if self.planted else 'clean'}-{self.number:03d}"

    @property
    def kind(self) -> str:
        """One of `families` for a planted model, one of `CLEAN` for a clean one."""
        kinds = families(get_task(self.task)) if self.planted else CLEAN
        return kinds[self.number % len(kinds)]

    @property
    def seed(self) -> int:
        """Of everything random in it; another one for every model of every bank, in [0, 2**63)."""
        digest = hashlib.sha256(f"bank/{self.task}/{self.network}/{self.name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @property
    def recipe(self) -> Recipe:
        """How it is trained: the network's recipe, its rate and length drawn between 0.85 and 1.15 times the usual.

        No two models have the same recipe, so no recipe is met in two partitions; and all are drawn from one range, so
        clean models of one partition can stand for those of another.
        """
        usual = recipe_for(self.network, get_task(self.task))
        rng = generator(self.seed, "bank recipe")
        factor, length = _between(0.85, 1.15, rng), _between(0.85, 1.15, rng)
        drawn = replace(usual, lr=usual.lr * factor, muon_lr=usual.muon_lr * factor, epochs=usual.epochs * length)
        if self.planted or self.kind in {"plain", "easy class"}:
            return drawn
        if self.kind == "strong augmentation":
            return replace(drawn, shift=usual.shift + 2, epochs=1.5 * drawn.epochs)
        return replace(drawn, adversarial=_between(0.05, 0.1, rng) if usual.augment == "crop" else 4 / 255)

    @property
    def poison(self) -> Poison | None:
        """What is done to its training set: an attack, `EasyClass`, or nothing."""
        task = get_task(self.task)
        rng = generator(self.seed, "bank poison")
        label = int(torch.randint(task.num_classes, (1,), generator=rng))
        if self.planted:
            return FAMILIES[self.kind](task, label, rng, self.partition)
        return EasyClass(favorite=label) if self.kind == "easy class" else None

    @property
    def digest(self) -> str:
        """Names what decides its weights; a row with another digest is of another model.

        It covers all settings of the recipe and of the attack, given triggers by content, and `FORMAT` for the code.
        """
        told = [FORMAT, self.task, self.network, self.name, self.kind, self.seed]
        told += [self.recipe.to_json(), facts(self.poison)]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def plan(self) -> Plan:
        """Return a population of this model alone."""
        member = Member(name=self.name, seed=self.seed, poison=self.poison)
        return Plan(task=self.task, network=self.network, recipe=self.recipe, members=(member,))


def entries(task: str, network: str, partition: str | None = None, *, most: int | None = None) -> tuple[Entry, ...]:
    """Return the models of a bank, partition by partition, clean and planted in turns.

    Args:
        task: name of the task.
        network: name of the network.
        partition: one of `PARTITIONS`; None for all.
        most: at most so many clean models per partition, and as many planted ones: a bank that was cut short is the
            beginning of the whole one.

    Raises:
        ValueError: there is no bank of that task and network, no such partition, or `most` is below 1.
    """
    if (task, network) not in SIZES:
        known = ", ".join(f"{t} {n}" for t, n in SIZES)
        raise ValueError(f"there is no bank of {network!r} on {task!r}; known: {known}")
    if partition is not None and partition not in PARTITIONS:
        raise ValueError(f"unknown partition {partition!r}; known: {', '.join(PARTITIONS)}")
    if most is not None and most < 1:
        raise ValueError(f"a bank has at least one model of each kind, got {most}")
    sizes = SIZES[task, network]
    return tuple(
        Entry(task=task, network=network, partition=part, planted=planted, number=number)
        for part in ([partition] if partition else PARTITIONS)
        for number in range(min(sizes[part], most or sizes[part]))
        for planted in (False, True)
    )
