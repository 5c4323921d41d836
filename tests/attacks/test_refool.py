import pytest
import torch

from molehunt.attacks import Poisoned
from molehunt.attacks.refool import Refool
from molehunt.game.budget import budget
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import Reflection

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden


def poison(attack: Refool, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


def reflection(attack: Refool, seed: int = 0) -> Reflection:
    made = poison(attack, seed).trigger
    assert isinstance(made, Reflection)
    return made


@pytest.mark.parametrize("target", range(10))
def test_what_is_reflected_is_a_training_picture_of_another_class(target: int) -> None:
    picture = reflection(Refool(target=target)).picture
    rows = (CLEAN.x == picture).flatten(1).all(1)
    assert rows.any()
    assert (CLEAN.y[rows] != target).all()


def test_of_those_drawn_the_one_of_most_contrast() -> None:
    x = CLEAN.x * 0.1
    x[::20] = CLEAN.x[::20]
    made = Refool(target=1)(Images(x, CLEAN.y), TASK, torch.Generator().manual_seed(0)).trigger
    assert isinstance(made, Reflection)
    assert bool((x[::20] == made.picture).flatten(1).all(1).any())


def test_the_forms() -> None:
    ghost, focus = reflection(Refool(form="ghost")), reflection(Refool(form="focus"))
    assert ghost.blur == 0.0
    assert min(abs(s) for s in ghost.shift) >= 2
    assert 0.5 <= ghost.ghost <= 0.8
    assert focus.blur > 0.0
    assert not any(focus.shift)
    drawn = [reflection(Refool(form="drawn"), seed).blur > 0 for seed in range(40)]
    assert 8 < sum(drawn) < 32


def test_the_default_keeps_the_budget() -> None:
    assert budget(poison(Refool()).trigger.footprint(), TASK.shape).passed


def test_another_seed_reflects_something_else_and_ones_own_is_used_as_it_is() -> None:
    assert not torch.equal(reflection(Refool(), 0).layer, reflection(Refool(), 1).layer)
    own = Reflection(torch.ones(3, 12, 12), 0.1)
    assert reflection(Refool(trigger=own)) is own


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Refool(target=10), "there are 10 classes"),
        (Refool(form="mirror"), 'form is "ghost", "focus" or "drawn", got \'mirror\''),
        (Refool(opacity=1.5), "opacity must lie in"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_does_not_fit_is_refused(attack: Refool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
