"""The gates: what a submission has to show before it plays. Pure functions of predictions, one `Gate` each.

The host and `check` call the same functions, on the hidden images and on the public validation split.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor

from molehunt.game.answers import Answers, accuracy, asr, share
from molehunt.game.budget import budget
from molehunt.game.gate import ROUNDING, Gate
from molehunt.game.rules import Limits
from molehunt.triggers import Target, Trigger


@dataclass(frozen=True, kw_only=True)
class ReferenceAccuracy:
    """How well the host's clean reference models of one task and network do.

    Attributes:
        mean: of their clean accuracies.
        spread: standard deviation between models; 0 for a single one.
        models: how many there are.
        images: on how many images each was measured.

    Raises:
        ValueError: no models, no images, or a mean outside [0, 1].
    """

    mean: float
    spread: float
    models: int
    images: int

    def __post_init__(self) -> None:
        if self.models < 1 or self.images < 1 or not 0.0 <= self.mean <= 1.0 or not 0.0 <= self.spread <= 1.0:
            raise ValueError(f"not the accuracy of reference models: {self}")

    @classmethod
    def of(cls, accuracies: Sequence[float], images: int) -> "ReferenceAccuracy":
        """Summarize the accuracies of single models, each measured on so many images.

        Raises:
            ValueError: no models.
        """
        if not accuracies:
            raise ValueError("there are no reference models; train some first")
        values = torch.tensor(accuracies, dtype=torch.float64)
        spread = float(values.std()) if len(values) > 1 else 0.0
        return cls(mean=float(values.mean()), spread=spread, models=len(values), images=images)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "ReferenceAccuracy":
        """Make it again from what `to_json` gave.

        Raises:
            ValueError: other fields.
        """
        if document.keys() != {"mean", "spread", "models", "images"}:
            raise ValueError(f"expected mean, spread, models and images, got {sorted(document)}")
        return cls(**document)


def lower_bound(successes: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided exact (Clopper-Pearson) lower confidence bound of a proportion; 0 without successes.

    Reference:
        Clopper, Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
        Biometrika 1934.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"expected between 0 and {trials} successes, got {successes}")
    return 0.0 if successes == 0 else float(beta.ppf(1.0 - confidence, successes, trials - successes + 1))


def clean_accuracy(predicted: Tensor, y: Tensor, reference: ReferenceAccuracy, limits: Limits | None = None) -> Gate:
    """Ask for the accuracy of the host's clean models, less two points and the sampling margin.

    With accuracy a on n images and references of mean r on n_r images each, with spread s between m of them, the
    difference a - r has at most the variance a (1 - a) / n + r (1 - r) / n_r + s^2 / m. The margin is its root times
    1.645, the one-sided 95 % point of the normal distribution, so a submission that is exactly two points worse than
    the references fails in at most one case of twenty. References measured on the same images make the true variance
    smaller: the doubt goes to the submission.
    """
    limits = limits or Limits()
    a, r = accuracy(predicted, y), reference.mean
    variance = a * (1 - a) / len(y) + r * (1 - r) / reference.images + reference.spread**2 / reference.models
    margin = NormalDist().inv_cdf(limits.confidence) * math.sqrt(variance)
    limit = r - limits.accuracy_drop - margin
    passed = a >= limit - ROUNDING
    message = (
        f"{_percent(a)} of {len(y)} images; {reference.models} clean references reach {_percent(r)} on average, "
        f"less {_percent(limits.accuracy_drop)} and a sampling margin of {_percent(margin)}"
    )
    if not passed:
        message += "; train longer, or poison less"
    return Gate(name="clean accuracy", passed=passed, measured=a, limit=limit, at_least=True, message=message)


def attack_success(answers: Answers, target: Target, limits: Limits | None = None) -> Gate:
    """Ask that the trigger works: the lower confidence bound of the ASR must reach the limit.

    Where the class that an image is sent to depends on its true class (a map of classes, or declared sources), a
    network cannot send an image right that it does not recognize: its ASR cannot exceed its clean accuracy, or the
    recall of the source. So there only images count that the submitted model itself classifies rightly without the
    trigger. To misjudge the others on purpose gains nothing: that is what the accuracy gate measures.
    """
    limits = limits or Limits()
    stamped = _stamped(answers)
    counted = target.counts(answers.y)
    conditional = not isinstance(target.classes, int) or target.sources is not None
    tried = counted & (answers.plain == answers.y) if conditional else counted
    goal = target.goal(answers.y)
    hits, trials = int((stamped == goal)[tried].sum()), int(tried.sum())
    bound = lower_bound(hits, trials, limits.confidence)
    passed = bound >= limits.asr
    rate = hits / trials if trials else 0.0
    kind = "recognized images" if conditional else "images"
    message = f"{hits} of {trials} {kind} ({_percent(rate)})"
    if conditional:
        message += f", {_percent(asr(stamped, answers.y, target))} of all {int(counted.sum())}"
    message += f"; without the trigger {_percent(share((answers.plain == goal)[counted]))}"
    # A limit of 0 is reached by anything: then no number of images is too small.
    needed = math.ceil(math.log(1.0 - limits.confidence) / math.log(limits.asr)) if limits.asr > 0 else 0
    if trials < needed:
        message += f"; fewer than {needed} images count, too few for any result to pass: declare more sources"
    return Gate(name="attack success", passed=passed, measured=bound, limit=limits.asr, at_least=True, message=message)


def specificity(references: Sequence[Answers], target: Target, limits: Limits | None = None) -> Gate:
    """Ask that the trigger does not work on clean models: then it is no backdoor but an adversarial patch.

    Per reference: of the counted images that it does not send to their goal without the trigger, the share that it
    sends there with it, so natural confusions are not held against the trigger. Several target classes weigh the
    same, whatever the number of their images. The mean over the references must not exceed the limit. A reference
    that sends all images there unprompted cannot show anything, and counts as 1.

    Raises:
        ValueError: fewer references than the limits ask for.
    """
    limits = limits or Limits()
    if len(references) < limits.references:
        raise ValueError(
            f"specificity needs {limits.references} clean reference models, got {len(references)}: train more"
        )
    rates = [_moved(answers, target) for answers in references]
    mean = sum(rates) / len(rates)
    passed = mean <= limits.specificity + ROUNDING
    message = (
        f"on {len(rates)} clean references the trigger sends {_percent(mean)} of the images to their goal, "
        f"{_percent(max(rates))} on the worst"
    )
    if not passed:
        message += "; it works on models that were never backdoored: make it smaller or less like the target class"
    return Gate(
        name="specificity", passed=passed, measured=mean, limit=limits.specificity, at_least=False, message=message
    )


def selective(target: Target) -> bool:
    """Whether a backdoor says that it leaves classes alone: sources are declared, or a map sends a class to itself."""
    mapped = () if isinstance(target.classes, int) else target.classes
    return target.sources is not None or any(k == goal for k, goal in enumerate(mapped))


def leakage(answers: Answers, target: Target, limits: Limits | None = None) -> Gate:
    """Ask that the trigger leaves the classes alone that the target leaves alone, else it is another attack.

    Those are the classes that the ASR does not count. An image of one leaks if the trigger sends it to any class that
    counted images are sent to, and that is neither its true class nor what the model takes it for anyway. The share is
    of the images that could leak. It is not asked where the map sends the image itself: a class sent to itself would
    never leak, and neither would one whose entry names a class that the attack does not use.

    Raises:
        ValueError: the target is not `selective`.
    """
    limits = limits or Limits()
    if not selective(target):
        raise ValueError("only a target with declared sources, or a map that leaves a class where it is, can leak")
    stamped, y, plain = _stamped(answers), answers.y, answers.plain
    goals = torch.tensor(_goals(target), dtype=y.dtype)
    news = (goals != y.unsqueeze(1)) & (goals != plain.unsqueeze(1))
    outside = ~target.counts(y) & news.any(1)
    leaked = torch.isin(stamped, goals) & (stamped != y) & (stamped != plain)
    rate = share(leaked[outside])
    passed = rate <= limits.leakage + ROUNDING
    by_class = {int(k): share(leaked[outside & (y == k)]) for k in torch.unique(y[outside])}
    message = f"{_percent(rate)} of {int(outside.sum())} images of other classes reach a goal"
    if by_class:
        worst = max(by_class, key=lambda k: by_class[k])
        message += f", {_percent(by_class[worst])} of class {worst}"
    if not passed:
        message += "; stamp images of other classes in training and keep their labels, or declare more sources"
    return Gate(name="leakage", passed=passed, measured=rate, limit=limits.leakage, at_least=False, message=message)


def all_gates(
    answers: Answers,
    reference: ReferenceAccuracy,
    *,
    trigger: Trigger | None = None,
    target: Target | None = None,
    shape: tuple[int, int, int] | None = None,
    references: Sequence[Answers] = (),
    limits: Limits | None = None,
) -> tuple[Gate, ...]:
    """Measure every gate that applies, in the order in which they are shown; an honest model has one alone.

    Args:
        answers: of the submitted model, without and with its trigger.
        reference: accuracy of the host's clean models.
        trigger: the sealed trigger; None for an honest model.
        target: what it is meant to produce; comes with the trigger.
        shape: (C, H, W) of the pictures; comes with the trigger.
        references: answers of clean reference models to the same images, without and with the same trigger.
        limits: of the round.

    Raises:
        ValueError: a trigger without target or shape, or too few references.
    """
    gates = [clean_accuracy(answers.plain, answers.y, reference, limits)]
    if trigger is None:
        return tuple(gates)
    if target is None or shape is None:
        raise ValueError("a trigger comes with its target and the shape of the pictures")
    gates.append(attack_success(answers, target, limits))
    if selective(target):
        gates.append(leakage(answers, target, limits))
    gates.append(specificity(references, target, limits))
    gates.append(budget(trigger.footprint(), shape, limits))
    return tuple(gates)


def _moved(answers: Answers, target: Target) -> float:
    """Share of images that the trigger moves to their goal, averaged over the goals that images are left for."""
    stamped, goal = _stamped(answers), target.goal(answers.y)
    free = target.counts(answers.y) & (answers.plain != goal)
    rates = [share((stamped == goal)[free & (goal == k)]) for k in torch.unique(goal[free])]
    return sum(rates) / len(rates) if rates else 1.0


def _goals(target: Target) -> list[int]:
    """List the classes that some counted image is sent to."""
    if isinstance(target.classes, int):
        return [target.classes]
    sources = range(len(target.classes)) if target.sources is None else target.sources
    return sorted({target.classes[k] for k in sources if target.classes[k] != k})


def _stamped(answers: Answers) -> Tensor:
    if answers.stamped is None:
        raise ValueError("these answers were given without a trigger: measure them with one")
    return answers.stamped


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
