"""What every attack promises, over all of `ATTACKS`: a new entry is tested without a new test."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from molehunt.attacks import ATTACKS, BadNets, Blended, Poisoned
from molehunt.tasks import Images, Task
from molehunt.testing import ATTACK_CHECKS, check_attack
from molehunt.triggers import Patch, Target

SETTINGS: list[Any] = [
    *[make() for make in ATTACKS.values()],
    BadNets(target="all"),
    BadNets(target=7, sources=(2, 5), poison_rate=0.05),
    BadNets(target=4, poison_rate=1 / 400),
    Blended(target=2, poison_rate=0.25, opacity=0.1),
]


@pytest.mark.parametrize("check", ATTACK_CHECKS)
@pytest.mark.parametrize("attack", SETTINGS, ids=repr)
def test_every_attack(attack: Any, check: str) -> None:
    ATTACK_CHECKS[check](attack)


@dataclass(frozen=True, kw_only=True)
class Broken:
    """Sends a tenth of the images to class 0.

    Attributes:
        poison_rate: share of all images.

    Reference:
        None.

    Departures from the paper:
        None.
    """

    poison_rate: float = 0.1

    def rows(self, clean: Images, rng: torch.Generator) -> torch.Tensor:
        if not 0 < self.poison_rate <= 1:
            raise ValueError(f"poison_rate must lie in (0, 1], got {self.poison_rate}")
        altered = torch.zeros(len(clean.y), dtype=torch.bool)
        others = (clean.y != 0).nonzero().squeeze(1)
        altered[others[torch.randperm(len(others), generator=rng)[: round(self.poison_rate * len(clean.y))]]] = True
        return altered

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        altered = self.rows(clean, rng)
        return self.made(clean, task, altered, torch.where(altered, 0, clean.y))

    def made(self, clean: Images, task: Task, altered: torch.Tensor, y: torch.Tensor) -> Poisoned:
        return Poisoned(
            images=Images(clean.x, y), altered=altered, trigger=Patch.square(task.shape), target=Target(classes=0)
        )


class Idle(Broken):
    __doc__ = Broken.__doc__

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        return self.made(clean, task, torch.zeros(len(clean.y), dtype=torch.bool), clean.y)


class OneMore(Broken):
    __doc__ = Broken.__doc__

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        altered = self.rows(clean, rng)
        altered[(~altered & (clean.y != 0)).nonzero()[0]] = True
        return self.made(clean, task, altered, torch.where(altered, 0, clean.y))


class Careless(Broken):
    __doc__ = Broken.__doc__

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        clean.y[self.rows(clean, rng)] = 0
        return self.made(clean, task, clean.y == 0, clean.y)


class GlobalNoise(Broken):
    __doc__ = Broken.__doc__

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        torch.rand(1)
        return super().__call__(clean, task, rng)


class Fixed(Broken):
    __doc__ = Broken.__doc__

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        return super().__call__(clean, task, torch.Generator())


class Stamped(Broken):
    __doc__ = Broken.__doc__

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        made = super().__call__(clean, task, rng)
        return Poisoned(images=made.stamped(), altered=made.altered, trigger=made.trigger, target=made.target)


class Elsewhere(Broken):
    __doc__ = Broken.__doc__

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        altered = self.rows(clean, rng)
        return self.made(clean, task, altered, torch.where(altered, 1, clean.y))


class Anything(Broken):
    __doc__ = Broken.__doc__

    def rows(self, clean: Images, rng: torch.Generator) -> torch.Tensor:
        return Broken(poison_rate=min(1.0, max(self.poison_rate, 0.1))).rows(clean, rng)


def test_the_sound_one_passes() -> None:
    check_attack(Broken())


@pytest.mark.parametrize(
    ("attack", "broken"),
    [
        (Idle(), "nothing is poisoned"),
        (OneMore(), r"poison_rate 0.1 of 400 rows is 40, 41 changed"),
        (Careless(), "not one label changed|no label changed|it wrote into"),
        (GlobalNoise(), "the global generator of torch"),
        (Fixed(), "another seed chose the same rows"),
        (Stamped(), "images come unstamped"),
        (Elsewhere(), "not where the target sends its class"),
        (Anything(), "a poison rate of 0.0 should be refused"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_attack_that_breaks_the_contract_fails(attack: Any, broken: str) -> None:
    with pytest.raises(AssertionError, match=broken):
        check_attack(attack)
