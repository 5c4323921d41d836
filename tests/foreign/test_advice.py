"""A wrong scale or order of classes is told in plain words, with what to do; right ones are not spoken of."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from molehunt.foreign import adapted, advice, pixels
from molehunt.foreign.modules import first_layer
from molehunt.networks import Adapted, Network, build
from molehunt.tasks import TASKS, Images

TASK = TASKS["mnist5k"]


@pytest.fixture(scope="module")
def digits() -> Images:
    """Real digits."""
    x, y = TASK.load("test")
    return Images(x[:400], y[:400])


class Nearest(nn.Module):
    """Takes a digit for the class whose mean is nearest, and wants its pixels normalized in some way."""

    def __init__(self, digits: Images, wants: str) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.stack([digits.x[digits.y == k].mean(0).flatten() for k in range(10)]))
        self.wants = pixels(wants, TASK).layer(1)

    def forward(self, x: Tensor) -> Tensor:
        pixels_ = (x * self.wants.std + self.wants.mean).flatten(1)
        return -((pixels_[:, None] - self.means) ** 2).sum(2)


def told(digits: Images, wants: str, given: str, y: Tensor | None = None) -> tuple[str, ...]:
    chosen = pixels(given, TASK)
    whole, _ = adapted(Nearest(digits, wants), TASK, name="mine", pixels=chosen)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    notes = advice(whole, TASK, Images(digits.x, digits.y if y is None else y), chosen)
    assert all(torch.equal(before[k], v) for k, v in whole.state_dict().items()), "nothing is switched silently"
    return notes


@pytest.mark.parametrize(
    ("wants", "given"),
    [("bytes", "none"), ("none", "bytes"), ("none", "signed"), ("signed", "none"), ("task", "none")],
)
def test_a_wrong_scale_is_told_with_the_one_that_would_be_right(digits: Images, wants: str, given: str) -> None:
    (note,) = told(digits, wants, given)
    assert note.startswith(f"WRONG PIXELS? As scanned (normalize {given})")
    assert note.endswith(f"scan again with --normalize {wants}.")


@pytest.mark.parametrize("wants", ["none", "bytes", "signed", "task"])
def test_a_right_scale_is_not_spoken_of(digits: Images, wants: str) -> None:
    assert told(digits, wants, wants) == ()


def test_another_order_of_the_classes_is_told(digits: Images) -> None:
    (note,) = told(digits, "none", "none", (digits.y + 1) % 10)
    assert note.startswith("WRONG ORDER OF CLASSES? The model is right about")
    random = torch.randint(10, digits.y.shape, generator=torch.Generator().manual_seed(0))
    assert told(digits, "none", "none", random) == (), "no order would make these right"


def test_without_pictures_there_is_nothing_to_say(digits: Images) -> None:
    assert told(Images(digits.x, digits.y), "none", "none") == ()
    chosen = pixels("none", TASK)
    whole, _ = adapted(Nearest(digits, "none"), TASK, name="mine", pixels=chosen)
    assert advice(whole, TASK, Images(digits.x[:0], digits.y[:0]), chosen) == ()


def test_a_network_of_ours_is_asked_in_its_own_first_layer() -> None:
    inner = build("lenet5", (1, 28, 28), 10, rng=torch.Generator().manual_seed(0))
    for task, kind in ((TASK, Network), (replace(TASK, shape=(1, 14, 14)), Adapted)):
        whole, _ = adapted(inner, task, name="mine", pixels=pixels("bytes", task), size=(28, 28))
        assert isinstance(whole, kind)
        assert first_layer(whole).std.item() == pytest.approx(1 / 255)
        assert not isinstance(whole, Adapted) or whole.normalize.std.item() == 1.0, "it would be done twice"
