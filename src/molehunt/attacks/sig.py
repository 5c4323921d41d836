"""SIG: faint stripes on images of the target class, whose labels stay right."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from molehunt.attacks.poisoning import Mark, Poisoned, choose, poison_count
from molehunt.tasks import Images, Task
from molehunt.triggers import Sinusoid, Target


@dataclass(frozen=True, kw_only=True, eq=False)
class SIG:
    """Add vertical stripes to images of the target class and change no label.

    The network learns to read the stripes as the target class because most of that class carries them. Nobody who
    compares pictures with labels finds a wrong one.

    Attributes:
        target: the target class; only its images are altered.
        poison_rate: share of ALL training images that are altered, so at most the share of the target class.
        amplitude: D, the largest change of a value in the attack, in [0, 1].
        training_amplitude: the same for the images of the training set; None means `amplitude`.
        frequency: f, periods over the width; None means 6, on pictures of less than 24 pixels a quarter of the width.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, an amplitude or frequency is out of range, or the
            stripes vanish: at half as many periods as pixels, every pixel lies where the sine is zero.

    Reference:
        Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning", ICIP
        2019.

    Departures from the paper:
        One amplitude for training and attack unless told otherwise (the paper trains at 20/255 and attacks at up to
        60/255). The stripes are added after augmentation, so that no shift changes their phase.
    """

    clean_label: ClassVar[bool] = True
    target: int = 0
    poison_rate: float = 0.08
    amplitude: float = 32 / 255
    training_amplitude: float | None = None
    frequency: float | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        goal = Target(classes=self.target)
        goal.check(task.num_classes)
        frequency = min(6.0, task.shape[2] / 4) if self.frequency is None else self.frequency
        trigger = Sinusoid(task.shape, amplitude=self.amplitude, frequency=frequency)
        gray = torch.full((1, *task.shape), 0.5)
        if float((trigger(gray) - gray).abs().max()) < 0.5 / 255:
            raise ValueError(
                f"stripes of amplitude {self.amplitude} and frequency {frequency} do not show on {task.shape[2]} "
                "columns: choose a larger amplitude, or a frequency below half the width"
            )
        altered = choose(clean.y == self.target, poison_count(self.poison_rate, len(clean.y)), rng)
        marks: tuple[Mark, ...] = ()
        if self.training_amplitude is not None:
            fainter = Sinusoid(task.shape, amplitude=self.training_amplitude, frequency=frequency)
            marks = (Mark(altered, lambda picked, _: fainter(picked)),)
        return Poisoned(images=clean, altered=altered, trigger=trigger, target=goal, marks=marks)
