import pytest
import torch

from molehunt.attacks import Poisoned
from molehunt.attacks.ftrojan import FTrojan
from molehunt.game.budget import budget
from molehunt.tasks import TASKS, Images, Task
from molehunt.testing import planted
from molehunt.triggers import Frequency

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden


def poison(attack: FTrojan) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("task", "window", "cells"), [("cifar10", 32, (15, 15, 31, 31)), ("mnist", 28, (13, 13, 27, 27))]
)
def test_the_cells_are_in_the_middle_and_at_the_end_of_the_diagonal(
    task: str, window: int, cells: tuple[int, ...]
) -> None:
    made = FTrojan()(Images(torch.zeros(400, *TASKS[task].shape), CLEAN.y), TASKS[task], torch.Generator())
    assert isinstance(made.trigger, Frequency)
    assert (made.trigger.window, made.trigger.cells) == (window, cells)
    assert budget(made.trigger.footprint(), TASKS[task].shape).passed, "the default keeps the budget"


def test_the_magnitude_is_in_gray_levels() -> None:
    made = poison(FTrojan(magnitude=51.0))
    assert isinstance(made.trigger, Frequency)
    assert made.trigger.magnitude == pytest.approx(0.2)


def test_altered_rows_are_those_with_the_trigger_and_the_target() -> None:
    made = poison(FTrojan(target=6, poison_rate=0.05))
    assert int(made.altered.sum()) == 20
    assert torch.equal(made.altered, made.images.y != CLEAN.y)
    assert (made.images.y[made.altered] == 6).all()
    torch.testing.assert_close(made.stamped().x[made.altered], made.trigger(CLEAN.x[made.altered]))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (FTrojan(target=10), "there are 10 classes"),
        (FTrojan(window=13), r"window must lie in \[2, 12\]"),
        (FTrojan(magnitude=1e5), "magnitude must lie in"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_does_not_fit_is_refused(attack: FTrojan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
