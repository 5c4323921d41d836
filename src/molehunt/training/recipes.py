"""How a network is trained, as data: a recipe per network, and the default for a task."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from molehunt.tasks import Augment, Task

Optimizer = Literal["sgd", "adamw", "muon"]
Schedule = Literal["constant", "linear", "cosine"]
Precision = Literal["fast", "float32"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training besides the data, the starting weights and the generator.

    Attributes:
        epochs: passes over the data, in (0, 10000]; a fraction stops within a pass.
        least_images: images seen in all, repeats counted, are at least this many; a small data set gets more passes.
        batch: images per step; all images when there are fewer. Images of one pass and the next may share a batch.
        optimizer: "sgd" with Nesterov momentum, "adamw", or "muon" for convolutions with "sgd" for everything else.
        lr: the highest learning rate, of "sgd" and "adamw".
        muon_lr: the highest learning rate of "muon": the size of a step relative to the weight's own size.
        momentum: of "sgd", in [0, 1); the first beta of "adamw".
        muon_momentum: of "muon", in [0, 1).
        weight_decay: in units of 1 / step at learning rate 1; it never touches biases and norms.
        schedule: how the learning rate goes to zero after the warm-up; "constant" stays.
        warmup: share of the steps over which the learning rate rises linearly from zero, in [0, 1].
        label_smoothing: share of the label that is spread over all classes, in [0, 1).
        augment: "none", "crop" (shifts), "flip_crop" (shifts and mirroring), as in `Task.augment`.
        shift: largest shift of "crop" in pixels, each way; the border is filled by reflection.
        cutout: side in pixels of a square that is covered in every picture after the other augmentation, at a place of
            its own, in part beyond the border now and then; 0 for none. What covers it is the mean color of the set.
        adversarial: train on pictures that were first made harder by one signed gradient step of at most this size (of
            1) per value; 0 for none. Costs one more forward and backward pass; see `molehunt.training.adversarial`.
        initialize: set the layers that are computed from data first; False when training goes on from given weights.
        precision: "fast" is the number format that the device runs fastest, see `molehunt.networks.fast_dtype`.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: float = 10
    least_images: int = 0
    batch: int = 128
    optimizer: Optimizer = "sgd"
    lr: float = 0.1
    muon_lr: float = 0.2
    momentum: float = 0.9
    muon_momentum: float = 0.6
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    augment: Augment = "none"
    shift: int = 2
    cutout: int = 0
    adversarial: float = 0.0
    initialize: bool = True
    precision: Precision = "fast"

    def __post_init__(self) -> None:
        ranges: dict[str, bool] = {
            "epochs": 0 < self.epochs <= 10_000,
            "least_images": self.least_images >= 0,
            "batch": self.batch >= 1,
            "lr": 0 <= self.lr < math.inf,
            "muon_lr": 0 <= self.muon_lr < math.inf,
            "momentum": 0 <= self.momentum < 1,
            "muon_momentum": 0 <= self.muon_momentum < 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "warmup": 0 <= self.warmup <= 1,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "shift": self.shift >= 0,
            "cutout": self.cutout >= 0,
            "adversarial": 0 <= self.adversarial <= 1,
            "optimizer": self.optimizer in get_args(Optimizer),
            "schedule": self.schedule in get_args(Schedule),
            "augment": self.augment in get_args(Augment),
            "precision": self.precision in get_args(Precision),
        }
        for name, fine in ranges.items():
            if not fine:
                raise ValueError(
                    f"recipe: {name} is out of range: {getattr(self, name)!r}; see molehunt.training.Recipe"
                )

    def steps(self, count: int) -> int:
        """Return the number of optimizer steps on a data set of `count` images, at least one."""
        return max(1, round(max(self.epochs * count, self.least_images) / min(self.batch, count)))

    def rate(self, step: int, steps: int) -> float:
        """Return the share of the highest learning rate at a step.

        Args:
            step: from 0 to steps - 1.
            steps: number of steps of the whole training.

        Returns:
            A factor in [0, 1]. The warm-up ends at 1; a schedule ends close to 0, at the last step.
        """
        done = (step + 0.5) / steps
        if done < self.warmup:
            return done / self.warmup
        left = (1 - done) / (1 - self.warmup) if self.warmup < 1 else 0.0
        return {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[self.schedule]

    def to_json(self) -> dict[str, Any]:
        """All settings by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Recipe":
        """Make a recipe from settings by name; those not named have their default.

        Raises:
            ValueError: an unknown name, or a value of the wrong type or out of range.
        """
        known = {field.name: field.default for field in fields(cls)}
        if unknown := document.keys() - known.keys():
            raise ValueError(f"a recipe has no setting {sorted(unknown)}; it has {sorted(known)}")
        for name, value in document.items():
            kind = float if name == "epochs" else type(known[name])
            fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"recipe: {name} must be a {kind.__name__}, got {value!r}")
        return cls(**document)


_DIGITS = Recipe(
    epochs=1.5,
    least_images=45_000,
    batch=100,
    optimizer="adamw",
    lr=8e-3,
    weight_decay=0.05,
    schedule="linear",
    warmup=0.15,
    augment="crop",
    shift=1,
)
_MUON = Recipe(
    batch=250,
    optimizer="muon",
    muon_lr=0.15,
    warmup=0.2,
    schedule="linear",
    label_smoothing=0.2,
    augment="flip_crop",
)
_RESNET = Recipe(epochs=15, lr=0.1, warmup=0.2, label_smoothing=0.1, augment="flip_crop", shift=4)

# The numbers were chosen on the validation split; docs/reference/training.md has what they give on the test split.
RECIPES: dict[str, Recipe] = {
    "badnets_cnn": _DIGITS,
    "lenet5": replace(_DIGITS, epochs=3, lr=5e-3),
    "mntd_mnist": _DIGITS,
    "mntd_cifar": replace(_DIGITS, epochs=20, lr=2e-3, weight_decay=5e-4, augment="flip_crop", shift=2),
    "fast_cifar": replace(_MUON, epochs=5),
    "fast_cifar_long": replace(_MUON, epochs=16, muon_lr=0.08, shift=4),
    "narrow_cifar": replace(_MUON, epochs=3),
    "resnet18": _RESNET,
    "preact_resnet18": _RESNET,
    "wrn_16_1": _RESNET,
    "vgg11_bn": replace(_RESNET, lr=0.05),
    "vit_tiny": replace(_RESNET, epochs=60, batch=250, optimizer="adamw", lr=1e-3, weight_decay=0.05, warmup=0.1),
}

# A set of 3 500 images gives too few steps per pass for the recipes above.
_FEW = Recipe(epochs=8, batch=100, optimizer="adamw", lr=4e-3, warmup=0.25, shift=1)
SMALL: dict[str, dict[str, Recipe]] = {
    "mnist5k": {"badnets_cnn": _FEW, "lenet5": replace(_FEW, epochs=16), "mntd_mnist": _FEW},
}


def recipe_for(network: str, task: Task) -> Recipe:
    """Return the default recipe of a network on a task.

    The augmentation is the task's: digits are never mirrored, whatever the network. A small task has recipes of its
    own, `SMALL`.

    Args:
        network: a key of `RECIPES` or `molehunt.networks.NETWORKS`, or `timm:NAME`, which gets a general recipe.
        task: what it will be trained for.

    Raises:
        ValueError: unknown network.
    """
    if network.startswith("timm:"):
        recipe = _RESNET
    elif network in RECIPES:
        recipe = RECIPES[network]
    else:
        raise ValueError(f"no recipe for {network!r}; known are {', '.join(RECIPES)} and timm:NAME")
    if task.name in SMALL and network in SMALL[task.name]:
        recipe = SMALL[task.name][network]
    return replace(recipe, augment=task.augment)
