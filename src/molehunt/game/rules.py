"""The rules of the game: its rounds, what each is about, and the limits that a backdoor has to keep."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, TypeAlias, get_args

from molehunt.defenses import Defense

Board: TypeAlias = Literal["weights", "data"]
"""What a team hands in: a model, or a training set from which the host trains the model that is judged."""
BOARDS: tuple[Board, ...] = get_args(Board)

ORDER = (
    "abs",
    "neural_cleanse",
    "pair_inversion",
    "pruning_detection",
    "spectral_signatures",
    "mntd",
    "strip",
    "sentinet",
    "unlearning",
    "neuron_pruning",
    "fine_tuning",
    "super_fine_tuning",
    "fine_pruning",
    "gradient_shaping",
    "rab",
)
"""Every defense of the game by its name in `DEFENSES`, in the order in which they run: those that recover triggers
before those that judge recovered ones."""

DATA_ONLY = frozenset({"spectral_signatures", "gradient_shaping", "rab"})
"""Defenses that look at, or retrain from, the training set, and so play on the data board alone."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a round is about: the share of each part in its points.

    Attributes:
        detection: of B, whether something was hidden.
        target: of T, which class it is meant to produce.
        trigger: of R, what wakes it.
        cleaning: of C, the repaired model.

    Raises:
        ValueError: a negative weight, or a sum other than 1.
    """

    detection: float
    target: float
    trigger: float
    cleaning: float

    def __post_init__(self) -> None:
        values = [getattr(self, f.name) for f in fields(self)]
        if min(values) < 0 or abs(sum(values) - 1.0) > 1e-9:
            raise ValueError(f"weights must not be negative and must sum to 1, got {values}")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the gates ask of a submission.

    Attributes:
        accuracy_drop: points of clean accuracy that may be lost against the reference mean, as a share.
        asr: least attack success rate, to be reached by the lower confidence bound.
        confidence: of all one-sided bounds.
        specificity: largest success rate of the trigger on clean reference models.
        leakage: largest success rate on classes that the target leaves alone.
        references: fewest clean reference models for the specificity gate.
        area: largest opacity times area of a local trigger.
        opacity: largest opacity of a blend.
        linf: largest change of any value by a global additive trigger.
        displacement: farthest that a warp moves a pixel, in pixels of a picture whose shorter side has 32.
        altered: on the data board, largest share of the training rows that may be altered, in pixels, label or both.
            No row may be added or left out.
    """

    accuracy_drop: float = 0.02
    asr: float = 0.90
    confidence: float = 0.95
    specificity: float = 0.20
    leakage: float = 0.20
    references: int = 5
    area: float = 0.10
    opacity: float = 0.20
    linf: float = 32 / 255
    displacement: float = 2.0
    altered: float = 0.10

    def rows(self, count: int) -> int:
        """Rows of a training set of `count` that may be altered on the data board, at least one."""
        return max(1, round(self.altered * count))


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What one removal may spend on a submission. A verdict on removals depends on it more than on the attack.

    Attributes:
        steps: optimizer steps of one attempt, 1 or more.
        batch: images per step, 1 or more.
        lr: highest learning rate, positive. A removal may go below it where that costs less accuracy, never above.

    Raises:
        ValueError: a number out of range.
    """

    steps: int
    batch: int
    lr: float

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.lr > 0:
            raise ValueError(f"a repair needs steps, images and a rate above zero, got {self}")


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of the game.

    Attributes:
        name: key in `ROUNDS`.
        title: what the attackers play against.
        defenses: what the host runs on every submission, by name, in running order.
        weights: what the points of the round are made of.
        tasks: names of the tasks that it is played on unless the host says otherwise.
        counts: how often the round counts in the total of a game.
        repairs: what each of its removals may spend, by name.
    """

    name: str
    title: str
    defenses: tuple[str, ...]
    weights: Weights
    tasks: tuple[str, ...]
    counts: int = 1
    repairs: Mapping[str, Repair] = field(default_factory=dict)

    def make(self, board: str, known: Mapping[str, type[Defense]]) -> dict[str, Defense]:
        """Return the defenses of a board that exist, in running order, each with the budget that the round gives it.

        Args:
            board: "weights" or "data".
            known: the defenses that exist, by name.

        Raises:
            ValueError: another board.
        """
        return {name: known[name](**self._settings(name)) for name in self.on_board(board) if name in known}

    @property
    def repairs_all(self) -> bool:
        """Whether every repair is asked about every model: so it is where most points are for cleaning."""
        return self.weights.cleaning >= 0.5

    def _settings(self, name: str) -> dict[str, float]:
        # Training again, by the whole recipe, is worth nothing where nobody gets points for a cleaned model.
        if name == "spectral_signatures" and self.weights.cleaning == 0:
            return {"retrain": False}
        if name not in self.repairs:
            return {}
        budget = asdict(self.repairs[name])
        # Its rate has two peaks, of which this is the higher.
        return {"max1" if key == "lr" and name == "super_fine_tuning" else key: v for key, v in budget.items()}

    def on_board(self, board: str) -> tuple[str, ...]:
        """Return the defenses that play on a board, in running order.

        Args:
            board: "weights" (the submitted model alone) or "data" (the training set is handed over).

        Raises:
            ValueError: another board.
        """
        if board not in BOARDS:
            raise ValueError(f'a board is "weights" or "data", got {board!r}')
        return tuple(d for d in self.defenses if board == "data" or d not in DATA_ONLY)


def _round(
    name: str,
    title: str,
    defenses: frozenset[str],
    weights: tuple[float, float, float, float],
    task: str,
    counts: int = 1,
    repairs: Mapping[str, Repair] | None = None,
) -> Round:
    detection, target, trigger, cleaning = weights
    return Round(
        name=name,
        title=title,
        defenses=tuple(d for d in ORDER if d in defenses),
        weights=Weights(detection=detection, target=target, trigger=trigger, cleaning=cleaning),
        tasks=(task,),
        counts=counts,
        repairs=repairs or {},
    )


_REMOVAL = frozenset({"pruning_detection", "fine_tuning", "super_fine_tuning", "fine_pruning", "gradient_shaping"})
_STATISTICAL = frozenset({"spectral_signatures", "strip", "abs"})
_REVERSE = frozenset({"sentinet", "neural_cleanse", "unlearning", "neuron_pruning"})
_META = frozenset({"mntd", "rab"})

_FULL = {
    "fine_tuning": Repair(steps=300, batch=128, lr=0.01),
    "super_fine_tuning": Repair(steps=1500, batch=128, lr=0.1),
    "fine_pruning": Repair(steps=200, batch=64, lr=0.05),
    "gradient_shaping": Repair(steps=400, batch=256, lr=0.2),
}
_UNLEARNED = {"unlearning": Repair(steps=100, batch=64, lr=0.01)}
# Where everything plays, removals are a fifth of the points and must not be most of the wait.
_SHORT = {
    **_FULL,
    **_UNLEARNED,
    "fine_tuning": Repair(steps=200, batch=128, lr=0.01),
    "super_fine_tuning": Repair(steps=300, batch=128, lr=0.1),
}

ROUNDS: dict[str, Round] = {
    r.name: r
    for r in (
        _round("I", "backdoor removals", _REMOVAL, (0.25, 0.0, 0.0, 0.75), "mnist", repairs=_FULL),
        _round("II", "statistical detection", _STATISTICAL, (0.60, 0.20, 0.20, 0.0), "cifar10"),
        _round("III", "reverse-engineering", _REVERSE, (0.35, 0.15, 0.35, 0.15), "gtsrb", repairs=_UNLEARNED),
        _round("IV", "meta-model defenses", _META, (0.70, 0.0, 0.0, 0.30), "cifar10"),
        _round(
            "final", "all combined", frozenset(ORDER), (0.40, 0.15, 0.25, 0.20), "cifar10", counts=2, repairs=_SHORT
        ),
    )
}


def get_round(name: str) -> Round:
    """Return the round of that name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in ROUNDS:
        raise ValueError(f"unknown round {name!r}; known: {', '.join(ROUNDS)}")
    return ROUNDS[name]
