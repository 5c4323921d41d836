import pytest
import torch
import torch.nn.functional as F

from molehunt.attacks import Poisoned
from molehunt.attacks.issba import ISSBA
from molehunt.tasks import Images, Task, get_task
from molehunt.testing import planted
from molehunt.triggers import ENCODERS, Encoded

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def poison(attack: ISSBA, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, rng(seed))


def test_the_decoder_reads_the_bits_of_digits() -> None:
    x, y = get_task("mnist5k").load("train")
    small = Images(F.avg_pool2d(x, 2), y)
    encoder, read = ISSBA(bits=4, fidelity=0.1, steps=150).encoder(small, (1, 14, 14), rng())
    assert read > 0.9, "half of the bits are read by guessing"
    x = small.x[:50]
    change = encoder(x) - x
    assert 0.0 < float(change.abs().max()) <= 0.1 + 1e-6
    assert float((change[0] - change[1]).abs().max()) > 1e-3, "every picture is changed in its own way"


def test_altered_rows_get_the_encoders_picture_and_the_target() -> None:
    made = poison(ISSBA(target=6, poison_rate=0.05, steps=5))
    assert int(made.altered.sum()) == 20
    assert torch.equal(made.altered, made.images.y != CLEAN.y)
    assert (made.images.y[made.altered] == 6).all()
    torch.testing.assert_close(made.stamped().x[made.altered], made.trigger(CLEAN.x[made.altered]))


def test_training_repeats_itself_and_another_seed_hides_another_message() -> None:
    one, same, other = (poison(ISSBA(steps=5), seed).trigger.tensors()["weights"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_an_encoder_of_ones_own_is_used_as_it_is() -> None:
    weights = ENCODERS["residual"].initial(TASK.shape, rng())
    own = Encoded(network="residual", shape=TASK.shape, linf=0.05, area=1.0, weights=weights)
    assert poison(ISSBA(trigger=own)).trigger is own


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (ISSBA(target=10), "there are 10 classes"),
        (ISSBA(bits=0), r"bits must lie in \[1, 256\]"),
        (ISSBA(linf=1.5), r"linf in \[0, 1\]"),
        (ISSBA(fidelity=-1.0), "fidelity be 0 or more"),
        (ISSBA(steps=0), "at least one step"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_does_not_fit_is_refused(attack: ISSBA, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
