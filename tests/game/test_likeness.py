import math

import pytest
import torch

from game import planted
from molehunt.game.likeness import Likeness, compare, soft_iou, trigger_points
from molehunt.tasks import Images
from molehunt.triggers import Additive, Blend, Patch, Sinusoid, Target, Trigger, Warp


def points(recovered: Trigger, true: Trigger, target: Target | None = None) -> float:
    """R on the planted model."""
    goal = target or Target(2)
    likeness = compare(recovered, true, goal, planted.images(), planted.model(goal))
    return trigger_points(likeness, soft_iou(recovered, true) if isinstance(true, Patch) else None)


def rectangle(width: int, opacity: float = 1.0) -> Patch:
    mask = torch.zeros(1, 4, 4)
    mask[0, 3, 4 - width :] = 1.0
    return Patch(mask=mask, pattern=mask.clone(), opacity=opacity)


def test_iou_worked_by_hand() -> None:
    # One pixel of weight 1 against two of weight .8: min .8 + 0, max 1 + .8; .8 / 1.8 = 4 / 9
    assert soft_iou(rectangle(2, 0.8), rectangle(1)) == pytest.approx(4 / 9)
    assert soft_iou(rectangle(1), rectangle(1)) == 1.0
    assert soft_iou(planted.pixel(0, 0), rectangle(1)) == 0.0
    assert soft_iou(Blend(torch.ones(1, 4, 4)), rectangle(1)) == 0.0, "a blend has no mask"
    # Binary masks of 2 and 3 pixels that share 2: 2 / 3, and Dice 2 J / (1 + J) = 4 / 5
    j = soft_iou(rectangle(2), rectangle(3))
    assert j == pytest.approx(2 / 3)
    assert 2 * j / (1 + j) == pytest.approx(4 / 5)


def test_the_true_trigger_earns_everything() -> None:
    assert points(planted.pixel(), planted.pixel()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "true",
    [
        Blend(torch.linspace(0, 1, 16).view(1, 4, 4), 0.2),
        Additive(torch.linspace(-0.1, 0.1, 16).view(1, 4, 4)),
        Sinusoid((1, 4, 4), amplitude=0.1, frequency=1.0),
        Warp(torch.full((2, 4, 4), 0.3)),
    ],
)
def test_the_true_global_trigger_earns_everything(true: Trigger) -> None:
    # A model that is woken by any change at all, so that every kind of trigger works on it.
    images, target = planted.images(), Target(2)
    clean = {row.numpy().tobytes() for row in images.x}

    def logits(x: torch.Tensor) -> torch.Tensor:
        scores = x.new_zeros(len(x), 4)
        for i, row in enumerate(x):
            scores[i, 2 if row.contiguous().numpy().tobytes() not in clean else 0] = 1.0
        return scores

    assert trigger_points(compare(true, true, target, images, logits), None) == pytest.approx(1.0)


def test_a_wider_patch_worked_by_hand() -> None:
    # True: one corner pixel from 0 to 1, E = 1. Recovered: it and two neighbors, energy 3, works on all images.
    # F = 1 * min(1, 2 * 1 / 3) = 2/3, J = 1/3, cosine = 1 / (1 * sqrt 3).
    expected = 0.5 * 2 / 3 + 0.3 / 3 + 0.2 / math.sqrt(3)
    assert points(rectangle(3), rectangle(1)) == pytest.approx(expected)
    # Twice the energy costs nothing in F: 0.5 + 0.3 / 2 + 0.2 / sqrt 2
    assert points(rectangle(2), rectangle(1)) == pytest.approx(0.65 + 0.2 / math.sqrt(2))


def test_a_patch_elsewhere_earns_nothing_but_what_it_does() -> None:
    assert points(planted.pixel(1, 1), planted.pixel()) == 0.0


def test_a_perturbation_of_the_whole_image_earns_little_although_it_works() -> None:
    # In a 4x4 picture one pixel is a sixteenth, so the arithmetic is done on 32x32, as in the real thing.
    true = Patch.square((3, 32, 32))
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    everything = Patch(mask=torch.ones(1, 32, 32), pattern=noise)
    x = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    always = planted.constant(2)
    likeness = compare(everything, true, Target(2), Images(x, torch.zeros(20, dtype=torch.int64)), always)
    assert likeness.success == 1.0
    assert trigger_points(likeness, soft_iou(everything, true)) < 0.3


def test_a_trigger_that_does_nothing_earns_nothing() -> None:
    nothing = Patch(mask=torch.zeros(1, 4, 4), pattern=torch.ones(1, 4, 4))
    likeness = compare(nothing, planted.pixel(), Target(2), planted.images(), planted.constant(2))
    assert likeness.success == 1.0
    assert likeness.energy == 0.0
    assert trigger_points(likeness, soft_iou(nothing, planted.pixel())) == 0.0


def test_images_that_neither_trigger_changes_say_nothing_about_alignment() -> None:
    # The corner is white in half of the images already; there the true trigger changes nothing.
    images = planted.images()
    images.x[::2, 0, 3, 3] = 1.0
    same = compare(planted.pixel(), planted.pixel(), Target(2), images, planted.model(Target(2)))
    assert same.alignment == pytest.approx(1.0)
    # A second pixel changes every image: cosine 1 / sqrt 2 on one half, 0 on the other.
    counted = images.x[images.y != 2]
    white = float((counted[:, 0, 3, 3] == 1.0).double().mean())
    wider = compare(rectangle(2), planted.pixel(), Target(2), images, planted.model(Target(2)))
    assert wider.alignment == pytest.approx((1 - white) / math.sqrt(2))


def test_the_opposite_change_is_not_rewarded() -> None:
    likeness = Likeness(success=0.0, energy=1.0, true_energy=1.0, alignment=-1.0)
    assert trigger_points(likeness, 0.0) == 0.0 == trigger_points(likeness, None)


def test_success_is_counted_on_the_images_that_the_asr_counts() -> None:
    # Only class 0 is a source: the recovered pixel works on all of its images and on none of the others.
    goal = Target(2, sources=(0,))
    likeness = compare(planted.pixel(), planted.pixel(), goal, planted.images(), planted.model(goal))
    assert likeness.success == 1.0


def test_one_class_of_an_all_to_all_backdoor_is_one_quarter_of_it() -> None:
    # The recovered trigger sends everything to class 1, where only images of class 0 had to go.
    goal = Target((1, 2, 3, 0))
    likeness = compare(planted.pixel(), planted.pixel(), goal, planted.images(), planted.constant(1))
    assert likeness.success == pytest.approx(0.25)


def test_batches_do_not_matter() -> None:
    goal = Target(2)
    arguments = (rectangle(2), planted.pixel(), goal, planted.images(), planted.model(goal))
    assert compare(*arguments, batch=3) == compare(*arguments)


def test_without_an_image_that_counts_there_is_nothing_to_compare() -> None:
    images = planted.images()
    only = Images(images.x[images.y == 2], images.y[images.y == 2])
    with pytest.raises(ValueError, match="no hidden image counts"):
        compare(planted.pixel(), planted.pixel(), Target(2), only, planted.model())
