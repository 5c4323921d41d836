import pytest
import torch

from molehunt.attacks import PhysicalSticker, Poisoned
from molehunt.tasks import TASKS, Images, Task
from molehunt.testing import planted
from molehunt.triggers import Sticker

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden


def poison(attack: PhysicalSticker, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


def test_the_share_of_all_images_goes_to_the_target() -> None:
    made = poison(PhysicalSticker(target=6))
    changed = made.images.y != CLEAN.y
    assert torch.equal(changed, made.altered)
    assert int(changed.sum()) == 40
    assert (made.images.y[changed] == 6).all()


def test_pictures_show_the_sticker_in_different_views() -> None:
    made = poison(PhysicalSticker())
    change = (made.stamped().x - CLEAN.x)[made.altered]
    places = {tuple(one.abs().amax(0).nonzero()[0].tolist()) for one in change}
    assert len(places) > 10


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_default_sticker_is_within_a_tenth_of_the_picture(name: str) -> None:
    images = Images(torch.rand(100, *TASKS[name].shape, generator=torch.Generator()), torch.arange(100) % 10)
    made = PhysicalSticker()(images, TASKS[name], torch.Generator())
    assert 0.02 < made.trigger.footprint().weight <= 0.1


def test_a_sticker_of_ones_own_is_used_as_it_is() -> None:
    own = Sticker(torch.ones(3, 3, 3), TASK.shape, rotation=0.0)
    assert poison(PhysicalSticker(trigger=own)).trigger is own


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (PhysicalSticker(target=10), "there are 10 classes, got target 10"),
        (PhysicalSticker(poison_rate=0.95), "only 360 images can be poisoned"),
        (PhysicalSticker(size=0), "does not fit into 12x12"),
        (PhysicalSticker(size=13), "does not fit into 12x12"),
        (PhysicalSticker(size=11), "the largest view of the sticker takes"),
        (PhysicalSticker(size=3, trigger=Sticker(torch.ones(3, 3, 3), TASK.shape)), "leave them or it out"),
        (PhysicalSticker(travel=2.0), "travel must lie in"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_does_not_fit_the_data_is_refused(attack: PhysicalSticker, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
