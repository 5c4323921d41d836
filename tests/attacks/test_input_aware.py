import pytest
import torch
import torch.nn.functional as F

from molehunt.attacks import Poisoned, input_aware
from molehunt.attacks.input_aware import InputAware
from molehunt.game.budget import budget
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import ENCODERS, Encoded, Patch

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden
QUICK = 10


def poison(attack: InputAware, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


def test_poisoned_rows_get_their_own_trigger_and_cross_rows_that_of_another_image() -> None:
    made = poison(InputAware(target=6, cross_ratio=1.5, steps=QUICK))
    trigger = made.trigger
    assert isinstance(trigger, Encoded)
    moved = made.images.y != CLEAN.y
    crossed = made.altered & ~moved
    assert int(moved.sum()) == 40
    assert int(crossed.sum()) == 60
    x = made.stamped().x
    torch.testing.assert_close(x[moved], trigger(CLEAN.x[moved]))
    sources = 0
    for row in crossed.nonzero().flatten()[:10].tolist():
        every = trigger.transplant(CLEAN.x[row].expand_as(CLEAN.x), CLEAN.x)
        same = (every - x[row]).abs().flatten(1).amax(1) < 1e-5
        assert same.any(), "the trigger is that of no image of the set"
        sources += int(not same[row])
    assert sources >= 9, "its own trigger would contradict the label"


def test_a_trigger_keeps_its_area_by_construction_and_so_the_budget() -> None:
    made = poison(InputAware(area=0.05, steps=QUICK))
    moved = made.images.y != CLEAN.y
    changed = (made.stamped().x != CLEAN.x).any(1).sum((1, 2))
    assert int(changed[moved].max()) <= int(0.05 * 144)
    assert budget(made.trigger.footprint(), TASK.shape).passed


def test_training_makes_different_triggers_for_different_images() -> None:
    trigger = poison(InputAware(steps=60)).trigger
    gray = torch.full((20, *TASK.shape), 0.5)
    assert isinstance(trigger, Encoded)
    made = trigger.transplant(gray, CLEAN.x[:20])
    assert len(torch.unique(made.flatten(1).round(decimals=3), dim=0)) == 20


def test_training_repeats_itself() -> None:
    one, same, other = (poison(InputAware(steps=5), seed).trigger.tensors()["weights"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_networks_of_ones_own_are_used_as_they_are_and_cross_images_are_optional() -> None:
    weights = ENCODERS["masked"].initial(TASK.shape, torch.Generator().manual_seed(0))
    own = Encoded(network="masked", shape=TASK.shape, linf=1.0, area=0.1, weights=weights)
    made = poison(InputAware(trigger=own, cross_ratio=0.0))
    assert made.trigger is own
    assert torch.equal(made.altered, made.images.y != CLEAN.y)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (InputAware(target=10), "there are 10 classes"),
        (InputAware(area=0.0), "is less than one pixel"),
        (InputAware(cross_ratio=-1.0), "cross_ratio must be 0 or more"),
        (InputAware(steps=0), "at least one step"),
        (InputAware(trigger=Patch.square((3, 12, 12))), "the trigger of this attack is an Encoded, got Patch"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_does_not_fit_is_refused(attack: InputAware, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)


def test_the_networks_are_trained_on_own_triggers_with_the_target_and_on_foreign_ones_with_the_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Recording(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(1, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shown.append((x.detach(), torch.zeros(0)))
            logits: torch.Tensor = self.head(x.flatten(1).mean(1, keepdim=True))
            return logits

    def entropy(logits: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
        shown[-1] = (shown[-1][0], goals)
        return logits.sum() * 0 + 1

    monkeypatch.setattr(input_aware, "small_network", lambda *_: Recording())
    monkeypatch.setattr(F, "cross_entropy", entropy)
    InputAware(target=6, steps=2, area=0.05).networks(CLEAN, TASK, torch.Generator().manual_seed(0))
    seen, goals = shown[0]
    count = len(seen) // 3
    clean, own, cross = torch.split(seen, count)
    plain, poisoned, foreign = torch.split(goals, count)
    assert set(poisoned.tolist()) == {6}
    assert torch.equal(foreign, plain.roll(1))
    # A trigger covers a twentieth of the pixels; all others are those of the image below it.
    for stamped, under in ((own, clean), (cross, clean.roll(1, 0))):
        assert float((stamped != under).any(1).float().mean()) <= 0.05 + 1e-6
        assert bool((stamped != under).any())
