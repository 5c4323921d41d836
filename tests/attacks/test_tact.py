import pytest
import torch

from molehunt.attacks import Poisoned, TaCT
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import Blend, Patch

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden


def poison(attack: TaCT, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


def test_sources_go_to_the_target_and_covers_keep_their_label() -> None:
    made = poison(TaCT(target=3, sources=(1, 8), covers=(5, 7), poison_rate=0.05, cover_rate=0.1))
    changed = made.images.y != CLEAN.y
    covers = made.altered & ~changed
    assert int(changed.sum()) == 20
    assert int(covers.sum()) == 40
    assert set(CLEAN.y[changed].tolist()) <= {1, 8}
    assert (made.images.y[changed] == 3).all()
    assert set(CLEAN.y[covers].tolist()) == {5, 7}
    assert made.target.sources == (1, 8)


def test_covers_come_from_all_other_classes_unless_told_otherwise() -> None:
    made = poison(TaCT(target=3, sources=(1,), cover_rate=0.5))
    covers = made.altered & (made.images.y == CLEAN.y)
    assert set(CLEAN.y[covers].tolist()) == set(range(10)) - {1}


def test_covers_and_poisoned_carry_the_same_trigger() -> None:
    made = poison(TaCT())
    assert torch.equal(made.stamped().x[made.altered], made.trigger(CLEAN.x[made.altered]))


def test_the_default_trigger_is_a_square_of_four_pixels() -> None:
    square, made = Patch.square(TASK.shape, size=4), poison(TaCT())
    assert isinstance(made.trigger, Patch)
    assert torch.equal(made.trigger.mask, square.mask)
    own = Blend(pattern=torch.zeros(TASK.shape))
    assert poison(TaCT(trigger=own)).trigger is own


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (TaCT(target=10), "there are 10 classes, got target 10"),
        (TaCT(target=1), "only 0 images can be poisoned"),
        (TaCT(poison_rate=0.2), "only 40 images can be poisoned"),
        (TaCT(covers=(5, 1)), r"covers are classes outside of the sources \(1,\), got \(5, 1\)"),
        (TaCT(covers=()), r"covers are classes outside of the sources \(1,\), got \(\)"),
        (TaCT(covers=(12,)), r"got \(12,\)"),
        (TaCT(sources=tuple(range(10))), r"got \(\)"),
        (TaCT(cover_rate=0.0), "the poison rate must lie in"),
        (TaCT(size=3, trigger=Blend(pattern=torch.zeros(TASK.shape))), "leave one of them out"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_does_not_fit_the_data_is_refused(attack: TaCT, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
