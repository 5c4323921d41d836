import pytest
import torch
from torch import Tensor

from molehunt.attacks import AdapBlend, Poisoned
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import Blend

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden


def poison(attack: AdapBlend, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


def squares(made: Poisoned) -> Tensor:
    """Bool (altered rows, 4, 4), squares of three by three pixels that changed."""
    changed = (made.stamped().x != CLEAN.x)[made.altered].any(1)
    return changed.view(-1, 4, 3, 4, 3).any(4).any(2)


def test_as_many_covers_as_asked_for_keep_their_label() -> None:
    made = poison(AdapBlend(target=6, poison_rate=0.05, cover_rate=0.15))
    changed = made.images.y != CLEAN.y
    assert int(changed.sum()) == 20
    assert (made.images.y[changed] == 6).all()
    assert int(made.altered.sum()) == 80
    assert not bool((changed & ~made.altered).any())


def test_each_row_gets_half_of_the_squares_and_others_than_its_neighbors() -> None:
    found = squares(poison(AdapBlend(poison_rate=0.1, cover_rate=0.1)))
    assert (found.flatten(1).sum(1) == 8).all()
    assert len({tuple(one) for one in found.flatten(1).tolist()}) > 70
    share = found.flatten(1).double().mean(0)
    assert float((share - 0.5).abs().max()) < 0.2


@pytest.mark.parametrize(("kept", "count"), [(1.0, 16), (0.25, 4), (1 / 16, 1)])
def test_the_share_of_squares_can_be_chosen(kept: float, count: int) -> None:
    assert (squares(poison(AdapBlend(kept=kept))).flatten(1).sum(1) == count).all()


def test_training_is_fainter_than_the_attack() -> None:
    made = poison(AdapBlend(training_opacity=0.1, opacity=0.2))
    assert isinstance(made.trigger, Blend)
    x = made.stamped().x[made.altered]
    fainter = 0.9 * CLEAN.x[made.altered] + 0.1 * made.trigger.pattern
    plain = CLEAN.x[made.altered]
    assert torch.minimum((x - fainter).abs(), (x - plain).abs()).max() < 1e-6
    assert made.trigger.footprint().opacity == 0.2


def test_a_row_keeps_its_squares_whatever_the_image() -> None:
    made = poison(AdapBlend())
    rows = made.altered.nonzero().squeeze(1)[:5]
    gray, black = (made.stamp(torch.full((5, *TASK.shape), v), rows) != v for v in (0.5, 0.0))
    assert torch.equal(gray, black)


def test_a_picture_of_ones_own_is_used() -> None:
    own = Blend(pattern=torch.full(TASK.shape, 0.25), opacity=0.2)
    assert poison(AdapBlend(trigger=own)).trigger is own


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (AdapBlend(target=10), "there are 10 classes, got target 10"),
        (AdapBlend(poison_rate=0.95), "only 360 images can be poisoned"),
        (AdapBlend(poison_rate=0.5, cover_rate=0.6), "only 200 images can be poisoned, 240 were asked for"),
        (AdapBlend(cover_rate=0.0), "the poison rate must lie in"),
        (AdapBlend(pieces=0), r"pieces must lie in \[1, 12\], got 0"),
        (AdapBlend(pieces=13), r"pieces must lie in \[1, 12\], got 13"),
        (AdapBlend(kept=0.01), "at least one of 16 squares and at most all, got 0.01"),
        (AdapBlend(kept=1.1), "at least one of 16 squares and at most all, got 1.1"),
        (AdapBlend(opacity=1.5), "opacity must lie in"),
        (AdapBlend(training_opacity=-0.5), "opacity must lie in"),
        (
            AdapBlend(trigger=Blend(pattern=torch.zeros(TASK.shape), opacity=0.1)),
            "the trigger has opacity 0.1, and opacity is 0.2: make them equal",
        ),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_does_not_fit_the_data_is_refused(attack: AdapBlend, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
