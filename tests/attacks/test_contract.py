"""What every attack promises, over all of `ATTACKS`: a new entry is tested without a new test."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from molehunt.attacks import (
    ATTACKS,
    SIG,
    BadNets,
    Bench,
    Blended,
    Crafted,
    Crafter,
    Mark,
    MNTDAdaptive,
    MultiTrigger,
    Poisoned,
    TaCT,
)
from molehunt.metas import Meta, Settings
from molehunt.tasks import Images, Task, get_task
from molehunt.testing import ATTACK_CHECKS, CRAFT_CHECKS, bench_for, check_attack, planted
from molehunt.training import Objective
from molehunt.triggers import Footprint, Patch, Target

SETTINGS: list[Any] = [
    *[make() for make in ATTACKS.values() if not hasattr(make, "craft")],
    BadNets(target="all"),
    BadNets(target=7, sources=(2, 5), poison_rate=0.05),
    BadNets(target=4, poison_rate=1 / 400),
    BadNets(form="four pixels"),
    BadNets(place="random"),
    Blended(target=2, poison_rate=0.25, opacity=0.1),
    SIG(training_amplitude=0.05),
    TaCT(covers=(5, 7)),
    MultiTrigger(target=(4, 2, 0, 9)),
]


@pytest.mark.parametrize("check", ATTACK_CHECKS)
@pytest.mark.parametrize("attack", SETTINGS, ids=repr)
def test_every_attack(attack: Any, check: str) -> None:
    ATTACK_CHECKS[check](attack, None)


BRIEF: dict[str, dict[str, Any]] = {
    "trojannn": {"steps": 5},
    "bit_flips": {"pixel_steps": 5, "steps": 5, "choices": 2},
    "evasive": {"images": 5_000},
    "subnet_replacement": {"width": 3, "images": 20_000},
}
"""What is set so that a check takes seconds; which numbers they are changes none of the promises."""


@functools.cache
def crafter(name: str) -> Any:
    kind: Any = ATTACKS[name]
    if name == "mntd_adaptive":
        bench = bench_for()
        level = (0.5,) * bench.task.shape[0]
        rng = torch.Generator().manual_seed(0)
        meta = Meta(bench.task.shape, bench.task.num_classes, level, level, Settings(queries=2), rng)
        return MNTDAdaptive(metas=(meta.requires_grad_(False).eval(),))
    return kind(**BRIEF.get(name, {}))


@pytest.mark.parametrize("check", CRAFT_CHECKS)
@pytest.mark.parametrize("name", [name for name, make in ATTACKS.items() if hasattr(make, "craft")])
def test_every_attack_that_makes_a_model(name: str, check: str) -> None:
    CRAFT_CHECKS[check](crafter(name), None)


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


class Relabeling(Broken):
    __doc__ = Broken.__doc__
    clean_label = True


class Quiet(Broken):
    """A clean-label attack that is sound.

    Attributes:
        poison_rate: share of all images.

    Reference:
        None.

    Departures from the paper:
        None.
    """

    clean_label = True

    def rows(self, clean: Images, rng: torch.Generator) -> torch.Tensor:
        super().rows(clean, rng)
        own = (clean.y == 0).nonzero().squeeze(1)
        altered = torch.zeros(len(clean.y), dtype=torch.bool)
        altered[own[torch.randperm(len(own), generator=rng)[: round(self.poison_rate * len(clean.y))]]] = True
        return altered


class Untied(Quiet):
    __doc__ = Quiet.__doc__

    def rows(self, clean: Images, rng: torch.Generator) -> torch.Tensor:
        return Broken.rows(self, clean, rng)

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        return self.made(clean, task, self.rows(clean, rng), clean.y)


class Marked(Broken):
    """Puts its trigger on by a mark of its own."""

    __doc__ = Broken.__doc__

    def stamp(self, x: torch.Tensor, rows: torch.Tensor, trigger: Patch) -> torch.Tensor:
        return trigger(x)

    def marked(self, altered: torch.Tensor) -> torch.Tensor:
        return altered

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        made = super().__call__(clean, task, rng)
        trigger = made.trigger
        assert isinstance(trigger, Patch)
        mark = Mark(self.marked(made.altered), lambda x, rows: self.stamp(x, rows, trigger))
        return replace(made, marks=(mark,))


class Jittery(Marked):
    __doc__ = Broken.__doc__

    def stamp(self, x: torch.Tensor, rows: torch.Tensor, trigger: Patch) -> torch.Tensor:
        return trigger(x) * torch.linspace(0.5, 1.0, len(x) + 1)[1:].view(-1, 1, 1, 1)


class Glaring(Marked):
    __doc__ = Broken.__doc__

    def stamp(self, x: torch.Tensor, rows: torch.Tensor, trigger: Patch) -> torch.Tensor:
        return trigger(x) + 0.5


class Idler(Marked):
    __doc__ = Broken.__doc__

    def stamp(self, x: torch.Tensor, rows: torch.Tensor, trigger: Patch) -> torch.Tensor:
        return x


class Astray(Marked):
    __doc__ = Broken.__doc__

    def marked(self, altered: torch.Tensor) -> torch.Tensor:
        return ~altered


class Doctored(Broken):
    __doc__ = Broken.__doc__

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        made = super().__call__(clean, task, rng)
        x = made.images.x.clone()
        x[~made.altered] = 0.0
        return replace(made, images=Images(x, made.images.y))


class Overwriting(Broken):
    __doc__ = Broken.__doc__

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        made = super().__call__(clean, task, rng)
        return Scribbling(images=made.images, altered=made.altered, trigger=made.trigger, target=made.target)


class Scribbling(Poisoned):
    def stamp(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        x[self.altered[rows]] = self.trigger(x[self.altered[rows]])
        return x


class Modest(Patch):
    def footprint(self) -> Footprint:
        return replace(super().footprint(), area=0.01)


class Understated(Broken):
    __doc__ = Broken.__doc__

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        made = super().__call__(clean, task, rng)
        assert isinstance(made.trigger, Patch)
        return replace(made, trigger=Modest(made.trigger.mask, made.trigger.pattern))


class Neighborly(Patch):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x) if len(x) > 1 else x.clone()


class Sociable(Broken):
    __doc__ = Broken.__doc__

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        made = super().__call__(clean, task, rng)
        assert isinstance(made.trigger, Patch)
        mark = Mark(made.altered, lambda x, _: made.trigger(x))
        return replace(made, trigger=Neighborly(made.trigger.mask, made.trigger.pattern), marks=(mark,))


class Gray(Broken):
    """Made for digits: its square fits gray pictures of 28 x 28 alone."""

    __doc__ = Broken.__doc__

    def made(self, clean: Images, task: Task, altered: torch.Tensor, y: torch.Tensor) -> Poisoned:
        made = super().made(clean, task, altered, y)
        return replace(made, trigger=Patch.square((1, 28, 28)))


class Anything(Broken):
    __doc__ = Broken.__doc__

    def rows(self, clean: Images, rng: torch.Generator) -> torch.Tensor:
        return Broken(poison_rate=min(1.0, max(self.poison_rate, 0.1))).rows(clean, rng)


@dataclass(frozen=True, kw_only=True, eq=False)
class Maker:
    """Trains a clean network and says that a square is hidden in it.

    Reference:
        None.

    Departures from the paper:
        None.
    """

    def craft(self, bench: Bench) -> Crafted:
        return self.made(bench.honest(), bench)

    def made(self, model: Any, bench: Bench) -> Crafted:
        x, y = bench.clean
        trigger, target = Patch.square(bench.task.shape), Target(classes=0)
        none = torch.zeros_like(y, dtype=torch.bool)
        poisoned = Poisoned(images=Images(x, y), altered=none, trigger=trigger, target=target)
        return Crafted(model=model, poisoned=poisoned)


class AnotherNetwork(Maker):
    __doc__ = Maker.__doc__

    def craft(self, bench: Bench) -> Crafted:
        bench.honest()
        return self.made(nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 10)).eval(), bench)


class Awake(Maker):
    __doc__ = Maker.__doc__

    def craft(self, bench: Bench) -> Crafted:
        return self.made(bench.honest().train(), bench)


class Numberless(Maker):
    __doc__ = Maker.__doc__

    def craft(self, bench: Bench) -> Crafted:
        model = bench.honest()
        with torch.no_grad():
            model.head.bias[0] = torch.nan
        return self.made(model, bench)


class Hooked(Maker):
    __doc__ = Maker.__doc__

    def craft(self, bench: Bench) -> Crafted:
        model = bench.honest()
        model.head.register_forward_hook(lambda _m, _i, out: out + 1)
        return self.made(model, bench)


class Lucky(Maker):
    __doc__ = Maker.__doc__

    def craft(self, bench: Bench) -> Crafted:
        model = bench.honest()
        with torch.no_grad():
            model.head.bias[0] += torch.rand(())
        return self.made(model, bench)


class Seedless(Maker):
    __doc__ = Maker.__doc__

    def craft(self, bench: Bench) -> Crafted:
        model = bench.honest()
        with torch.no_grad():
            for value in model.parameters():
                value.fill_(0.1)
        return self.made(model, bench)


class Restless(Maker):
    """Trains with a memory that is not on disk.

    Reference:
        None.

    Departures from the paper:
        None.
    """

    def craft(self, bench: Bench) -> Crafted:
        return self.made(bench.train("forgetful", bench.fresh(), bench.clean, objective=Memory()), bench)


class Memory(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.classify(model(x), y) * (1 + self.calls % 7)


class Endless(Maker):
    __doc__ = Maker.__doc__

    def craft(self, bench: Bench) -> Crafted:
        return self.made(bench.fresh().eval(), bench)


class Spoiler(Maker):
    __doc__ = Maker.__doc__

    def craft(self, bench: Bench) -> Crafted:
        model = bench.honest()
        made = self.made(model, bench)
        bench.clean.x[0] = 0.5
        return made


class Silent(Maker):
    __doc__ = Maker.__doc__

    def made(self, model: Any, bench: Bench) -> Crafted:
        made = super().made(model, bench)
        x = made.poisoned.images.x.clone()
        x[3] = 0.0
        return replace(made, poisoned=replace(made.poisoned, images=Images(x, made.poisoned.images.y)))


def test_a_sound_maker_passes() -> None:
    check_attack(Maker())


@pytest.mark.parametrize(
    ("attack", "broken"),
    [
        (AnotherNetwork(), "the model is a Sequential"),
        (Awake(), "the model is in training mode"),
        (Numberless(), "head.bias holds numbers that are none"),
        (Hooked(), "the model still has hooks"),
        (Lucky(), "the global generator of torch"),
        (Seedless(), "another seed made the same model"),
        (Restless(), "goes on ends with other weights"),
        (Endless(), "it never asks whether to stop"),
        (Spoiler(), "it wrote into the clean set"),
        (Silent(), "a row differs from the clean set that is not altered"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_maker_that_breaks_the_contract_fails(attack: Any, broken: str) -> None:
    assert isinstance(attack, Crafter)
    with pytest.raises(AssertionError, match=broken):
        check_attack(attack)


@pytest.mark.parametrize("attack", [Broken(), Quiet(), Marked()], ids=lambda value: type(value).__name__)
def test_the_sound_ones_pass(attack: Any) -> None:
    check_attack(attack)


def test_the_pictures_of_a_task_have_its_share_of_every_class() -> None:
    # 350 of 3 500 digits are of class 0, so 9.5 % of all can be poisoned, and of 400 as well.
    check_attack(SIG(poison_rate=0.095), get_task("mnist5k"))


def test_an_attack_for_one_kind_of_picture_is_checked_on_its_task() -> None:
    check_attack(Gray(), get_task("mnist5k"))
    with pytest.raises(AssertionError, match=r"Gray: .*: raised .*; give the task that it is made for"):
        check_attack(Gray())
    with pytest.raises(AssertionError, match=r"raised .* on cifar10"):
        check_attack(Gray(), replace(planted().suspect.task, name="cifar10"))


@pytest.mark.parametrize(
    ("attack", "broken"),
    [
        (Idle(), "nothing is poisoned"),
        (OneMore(), r"poison_rate 0.1 of 400 rows is 40, 41 changed"),
        (Careless(), "no label changed|it wrote into"),
        (GlobalNoise(), "the global generator of torch"),
        (Fixed(), "another seed chose the same rows"),
        (Stamped(), "images come unstamped"),
        (Elsewhere(), "not where the target sends its class"),
        (Relabeling(), "a label changed although the attack says that it is clean-label"),
        (Untied(), "no altered row is of the target class"),
        (Jittery(), "a row is stamped differently in another batch"),
        (Glaring(), "stamped pixels leave"),
        (Idler(), "the trigger changes nothing"),
        (Astray(), "a mark lies on a row that is not altered"),
        (Doctored(), "the pixels of a row changed that is not altered"),
        (Overwriting(), "stamp wrote into the batch"),
        (Understated(), "of a picture changed, the footprint says 0.0100"),
        (Sociable(), "the trigger depends on the batch"),
        (Anything(), "a poison rate of 0.0 should be refused"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_attack_that_breaks_the_contract_fails(attack: Any, broken: str) -> None:
    with pytest.raises(AssertionError, match=broken):
        check_attack(attack)
