import pytest
import torch

from molehunt.attacks import Blended, Poisoned
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import Blend

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden


def poison(attack: Blended, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


def test_a_tenth_of_all_images_from_other_classes_goes_to_the_target() -> None:
    made = poison(Blended(target=6))
    changed = made.images.y != CLEAN.y
    assert torch.equal(changed, made.altered)
    assert int(changed.sum()) == 40
    assert (made.images.y[changed] == 6).all()
    assert (CLEAN.y[changed] != 6).all()


@pytest.mark.parametrize("opacity", [0.1, 0.2, 0.5])
def test_altered_rows_are_the_mixture_of_image_and_picture(opacity: float) -> None:
    made = poison(Blended(opacity=opacity))
    assert isinstance(made.trigger, Blend)
    expected = (1 - opacity) * CLEAN.x[made.altered] + opacity * made.trigger.pattern
    torch.testing.assert_close(made.stamped().x[made.altered], expected)


def test_the_noise_comes_from_the_generator() -> None:
    one, same, other = (poison(Blended(), seed).trigger for seed in (0, 0, 1))
    assert isinstance(one, Blend)
    assert isinstance(same, Blend)
    assert isinstance(other, Blend)
    assert torch.equal(one.pattern, same.pattern)
    assert not torch.equal(one.pattern, other.pattern)


def test_a_picture_of_ones_own_is_used_as_it_is() -> None:
    picture = Blend(pattern=torch.full(TASK.shape, 0.25), opacity=0.3)
    made = poison(Blended(trigger=picture))
    assert made.trigger is picture


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Blended(target=10), "there are 10 classes, got target 10"),
        (Blended(poison_rate=0.95), "only 360 images can be poisoned"),
        (Blended(opacity=1.5), "opacity must lie in"),
        (
            Blended(opacity=0.2, trigger=Blend(pattern=torch.zeros(TASK.shape), opacity=0.3)),
            "opacity is 0.2, but a trigger has its own: give it there, or leave one of them out",
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_does_not_fit_the_data_is_refused(attack: Blended, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
