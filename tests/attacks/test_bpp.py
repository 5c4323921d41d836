import pytest
import torch

from molehunt.attacks import Poisoned
from molehunt.attacks.bpp import Bpp
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import Quantize

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden


def poison(attack: Bpp, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dither", [False, True])
def test_poisoned_rows_have_few_levels_and_the_target(dither: bool) -> None:
    made = poison(Bpp(target=6, levels=6, dither=dither))
    moved = made.images.y != CLEAN.y
    assert int(moved.sum()) == 40
    levels = torch.unique((made.stamped().x[moved] * 5).round(decimals=4))
    assert set(levels.tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
    assert isinstance(made.trigger, Quantize)
    assert made.trigger.dither == dither


def test_negatives_carry_the_rounding_error_of_another_image_and_keep_their_label() -> None:
    made = poison(Bpp(poison_rate=0.05, negative_rate=0.15))
    negative = made.altered & (made.images.y == CLEAN.y)
    assert int(negative.sum()) == 60
    errors = made.trigger(CLEAN.x) - CLEAN.x
    left = made.stamped().x - CLEAN.x
    for row in negative.nonzero().flatten().tolist():
        # Clipping may cut an error short, so compare only where the picture leaves room for it.
        room = (CLEAN.x[row] > 0.1) & (CLEAN.x[row] < 0.9)
        off = ((left[row] - errors).abs() * room).flatten(1).amax(1)
        assert int(off.argmin()) != row, "its own rounding error would be the trigger"
        assert float(off.min()) < 1e-5


def test_no_negatives_on_request() -> None:
    made = poison(Bpp(negative_rate=0.0))
    assert torch.equal(made.altered, made.images.y != CLEAN.y)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Bpp(target=10), "there are 10 classes"),
        (Bpp(levels=1), "levels must lie in"),
        (Bpp(negative_rate=-0.1), "rate must lie in"),
        (Bpp(poison_rate=0.5, negative_rate=0.6), "only 200 images can be poisoned, 240 were asked for"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_does_not_fit_is_refused(attack: Bpp, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)


def test_negatives_stay_in_range() -> None:
    images = Images(CLEAN.x.clone(), CLEAN.y)
    images.x[::2] = 1.0  # an image of ones has no rounding error, and no room for another's
    made = Bpp(poison_rate=0.05, negative_rate=0.4, levels=3)(images, TASK, torch.Generator().manual_seed(0))
    stamped = made.stamped().x
    assert float(stamped.max()) <= 1.0
    assert float(stamped.min()) >= 0.0
