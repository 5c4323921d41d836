"""Refool: a reflection on the picture, as of a pane of glass before the camera."""

from dataclasses import dataclass

import torch
from torch import Tensor

from molehunt.attacks.poisoning import Poisoned, choose, poison_count, relabel
from molehunt.tasks import Images, Task
from molehunt.triggers import Reflection, Target, Trigger
from molehunt.triggers.reflection import GAMMA

CANDIDATES = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Refool:
    """Let one picture be reflected in a share of the images and give them the target's label.

    The reflected picture comes from the training set, from outside the target class: the one of greatest contrast among
    32 drawn. A flat picture would reflect as fog, and one of the target class as a reason to say so.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that are poisoned.
        opacity: weight of the reflection in linear light, in [0, 1].
        form: "ghost" (two copies, pixels apart), "focus" (out of focus), or "drawn" (a ghost 49 times of 100).
        trigger: the reflection itself; None means one drawn as said.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, or a setting is out of range.

    Reference:
        Liu, Ma, Bailey, Lu, "Reflection Backdoor: A Natural Backdoor Attack on Deep Neural Networks", ECCV 2020.

    Departures from the paper:
        One reflection for the whole attack, because a sealed trigger is one function; the paper has a set of them and
        selects it by trial attacks. Labels are changed, the paper's are not. The weight of the reflection is far below
        the paper's, to keep the game's budget.
    """

    target: int = 0
    poison_rate: float = 0.1
    opacity: float = 0.2
    form: str = "ghost"
    trigger: Trigger | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        if self.form not in {"ghost", "focus", "drawn"}:
            raise ValueError(f'form is "ghost", "focus" or "drawn", got {self.form!r}')
        goal = Target(classes=self.target)
        goal.check(task.num_classes)
        altered = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        trigger = self.trigger or self._reflection(clean, goal, rng)
        return relabel(clean, altered, trigger, goal)

    def candidates(self, clean: Images, goal: Target) -> Tensor:
        """Return the rows (M,) whose pictures may be reflected: those outside the target class."""
        return goal.counts(clean.y).nonzero().squeeze(1)

    def _reflection(self, clean: Images, goal: Target, rng: torch.Generator) -> Reflection:
        """Choose a picture and how it is reflected."""
        others = self.candidates(clean, goal)
        drawn = clean.x[others[torch.randperm(len(others), generator=rng)[:CANDIDATES]]].float().cpu()
        picture = drawn[int(drawn.pow(GAMMA).flatten(1).std(1).argmax())]
        coin, sigma, weight = torch.rand(3, generator=rng).tolist()
        side = min(picture.shape[1:])
        # The paper's 3 to 8 pixels and 1 to 5 pixels of blur are for pictures of some 224; these are for a side of 32.
        most = max(2, side // 5)
        shift = torch.randint(2, most + 1, (2,), generator=rng) * (2 * torch.randint(0, 2, (2,), generator=rng) - 1)
        if self.form == "ghost" or (self.form == "drawn" and coin < 0.49):
            return Reflection(
                picture=picture, opacity=self.opacity, ghost=0.5 + 0.3 * weight, shift=tuple(shift.tolist())
            )
        return Reflection(picture=picture, opacity=self.opacity, blur=max(0.1, (1.0 + sigma) * side / 32))
