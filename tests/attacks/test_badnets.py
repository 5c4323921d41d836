import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molehunt.attacks import BadNets, Poisoned
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import Patch

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden


def poison(attack: BadNets, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


@given(rate=st.floats(0.0025, 0.9), target=st.integers(0, 9), seed=st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_the_rate_is_the_share_of_all_images_whose_label_changes(rate: float, target: int, seed: int) -> None:
    made = poison(BadNets(target=target, poison_rate=rate), seed)
    changed = made.images.y != CLEAN.y
    assert int(changed.sum()) == max(1, round(rate * 400))
    assert torch.equal(changed, made.altered)
    assert (made.images.y[changed] == target).all()


def test_all_to_all_moves_every_class_to_the_next_and_the_last_to_the_first() -> None:
    made = poison(BadNets(target="all", poison_rate=0.5))
    assert torch.equal(made.images.y[made.altered], (CLEAN.y[made.altered] + 1) % 10)
    assert set(CLEAN.y[made.altered].tolist()) == set(range(10))


def test_source_specific_relabels_sources_and_covers_as_many_others() -> None:
    made = poison(BadNets(target=3, sources=(1, 8), poison_rate=0.05))
    changed = made.images.y != CLEAN.y
    covers = made.altered & ~changed
    assert int(changed.sum()) == int(covers.sum()) == 20
    assert set(CLEAN.y[changed].tolist()) <= {1, 8}
    assert not set(CLEAN.y[covers].tolist()) & {1, 8}
    assert torch.equal(made.images.y[covers], CLEAN.y[covers])


def test_covers_can_be_left_out_or_counted_by_hand() -> None:
    none = poison(BadNets(target=3, sources=(1, 8), poison_rate=0.05, cover_rate=0.0))
    assert torch.equal(none.altered, none.images.y != CLEAN.y)
    more = poison(BadNets(target=3, sources=(1, 8), poison_rate=0.05, cover_rate=0.2))
    assert int(more.altered.sum()) == 20 + 80


def test_the_default_trigger_is_the_yellow_square() -> None:
    square, made = Patch.square(TASK.shape, size=4), poison(BadNets(size=4))
    assert isinstance(made.trigger, Patch)
    assert torch.equal(made.trigger.mask, square.mask)
    assert torch.equal(made.trigger.pattern, square.pattern)


@pytest.mark.parametrize(
    ("form", "places"), [("pixel", {(10, 10)}), ("four pixels", {(10, 10), (9, 9), (8, 10), (10, 8)})]
)
def test_single_pixels_are_white_and_a_step_away_from_the_corner(form: str, places: set[tuple[int, int]]) -> None:
    trigger = poison(BadNets(form=form)).trigger
    black = torch.zeros(1, *TASK.shape)
    stamped = trigger(black)[0]
    assert {tuple(place) for place in stamped.amin(0).nonzero().tolist()} == places
    assert set(stamped.flatten().tolist()) == {0.0, 1.0}


def test_a_square_may_lie_elsewhere_on_each_picture() -> None:
    made = poison(BadNets(place="random", size=2))
    changed = (made.stamped().x != CLEAN.x).any(1)[made.altered]
    assert (changed.flatten(1).sum(1) == 4).all()
    assert len({tuple(one.nonzero()[0].tolist()) for one in changed}) > 15


def test_stamp_acts_on_the_rows_of_a_batch_wherever_they_are() -> None:
    made = poison(BadNets())
    rows = torch.tensor([5, 3, int(made.altered.nonzero()[0]), 5])
    x = CLEAN.x[rows]
    before = x.clone()
    stamped = made.stamp(x, rows)
    assert torch.equal(x, before)
    for i, row in enumerate(rows.tolist()):
        expected = made.trigger(x[i : i + 1])[0] if made.altered[row] else x[i]
        assert torch.equal(stamped[i], expected)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (BadNets(target=10), "there are 10 classes, got target 10"),
        (BadNets(target="some"), "the target is a class or \"all\", got 'some'"),
        (BadNets(target=1, sources=(11,)), "there are 10 classes"),
        (BadNets(target=1, sources=()), "sources must name at least one class"),
        (BadNets(target=1, sources=(1,)), "only 0 images can be poisoned"),
        (BadNets(poison_rate=0.95), "only 360 images can be poisoned, 380 were asked for: lower the poison rate"),
        (BadNets(target=1, sources=(0,), poison_rate=0.2), "only 40 images can be poisoned"),
        (BadNets(size=13), "does not fit into 12x12"),
        (BadNets(target=1, cover_rate=0.1), "covers need sources"),
        (BadNets(form="circle"), "form is"),
        (BadNets(place="middle"), "form is"),
        (BadNets(form="pixel", size=3), "size and random places are for squares"),
        (BadNets(form="four pixels", place="random"), "size and random places are for squares"),
        (BadNets(size=3, trigger=Patch.square(TASK.shape)), "a trigger is given"),
        (BadNets(place="random", trigger=Patch.square(TASK.shape)), "a trigger is given"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_does_not_fit_the_data_is_refused(attack: BadNets, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
