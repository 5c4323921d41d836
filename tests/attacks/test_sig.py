import math

import pytest
import torch

from molehunt.attacks import SIG, Poisoned
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import Sinusoid

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden


def poison(attack: SIG, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


def test_only_images_of_the_target_class_are_altered_and_no_label_is() -> None:
    made = poison(SIG(target=6, poison_rate=0.05))
    assert int(made.altered.sum()) == 20
    assert (CLEAN.y[made.altered] == 6).all()
    assert torch.equal(made.images.y, CLEAN.y)


def test_every_column_is_shifted_by_its_sine() -> None:
    made = poison(SIG(amplitude=0.04, frequency=2.0))
    x = made.stamped().x[made.altered]
    for j in range(12):
        shift = 0.04 * math.sin(2 * math.pi * 2.0 * j / 12)
        expected = (CLEAN.x[made.altered][..., j] + shift).clamp(0.0, 1.0)
        torch.testing.assert_close(x[..., j], expected)


def test_training_may_be_fainter_than_the_attack() -> None:
    made = poison(SIG(amplitude=0.1, training_amplitude=0.02))
    assert made.trigger.footprint().linf == 0.1
    change = (made.stamped().x - CLEAN.x).abs()
    assert float(change.max()) == pytest.approx(0.02, abs=1e-6)
    assert (change.flatten(1).amax(1) > 0.015).equal(made.altered)


def test_there_are_six_stripes_where_they_can_be_seen() -> None:
    frequencies = []
    for width in (12, 24, 32):
        task = planted().suspect.task
        shape = (3, 12, width)
        object.__setattr__(task, "shape", shape)
        images = Images(torch.rand(400, *shape, generator=torch.Generator()), CLEAN.y)
        trigger = SIG()(images, task, torch.Generator()).trigger
        assert isinstance(trigger, Sinusoid)
        frequencies.append(trigger.frequency)
    assert frequencies == [3.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (SIG(target=10), "there are 10 classes, got target 10"),
        (SIG(poison_rate=0.11), "only 40 images can be poisoned, 44 were asked for: lower the poison rate"),
        (SIG(amplitude=1.5), "amplitude must lie in"),
        (SIG(training_amplitude=-0.1), "amplitude must lie in"),
        (SIG(frequency=0.0), "frequency must lie in"),
        (
            SIG(frequency=6.0),
            "frequency 6.0 do not show on 12 columns: choose a larger amplitude, or a frequency below",
        ),
        (SIG(amplitude=0.001), "amplitude 0.001 and frequency 3.0 do not show"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_does_not_fit_the_data_is_refused(attack: SIG, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
