import pytest
import torch

from molehunt.attacks import MultiTrigger, Poisoned
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import Blend, Patch, Several, Target

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden
TWO = (Patch.square(TASK.shape, size=2), Blend(pattern=torch.full(TASK.shape, 0.25), opacity=0.1))


def poison(attack: MultiTrigger, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


def test_with_one_target_the_sealed_trigger_is_several_and_stamps_what_training_sees() -> None:
    made = poison(MultiTrigger(target=6, poison_rate=0.2))
    assert isinstance(made.trigger, Several)
    assert len(made.trigger.triggers) == 4
    assert made.target == Target(classes=6)
    assert made.further == ()
    changed = made.images.y != CLEAN.y
    assert int(changed.sum()) == 80
    assert torch.equal(changed, made.altered)
    assert torch.equal(made.stamped().x[changed], made.trigger(CLEAN.x[changed]))
    assert (made.trigger.choice(CLEAN.x[changed]).bincount(minlength=4) > 8).all()


def test_the_default_triggers_are_squares_in_different_corners_and_colors() -> None:
    made = poison(MultiTrigger())
    assert isinstance(made.trigger, Several)
    patches = [part for part in made.trigger.triggers if isinstance(part, Patch)]
    assert len(patches) == 4
    assert float(torch.stack([patch.mask for patch in patches]).sum(0).max()) == 1.0
    assert all(float(patch.mask.sum()) == 16 for patch in patches)
    colors = {tuple(patch.pattern.flatten(1).amax(1).tolist()) for patch in patches}
    assert len(colors) == 4


@pytest.mark.parametrize("rate", [0.1, 0.1025, 0.105])
def test_with_a_target_each_the_first_backdoor_is_sealed_and_the_others_are_further(rate: float) -> None:
    made = poison(MultiTrigger(target=(2, 5, 7, 9), poison_rate=rate))
    backdoors = ((made.trigger, made.target), *made.further)
    assert [target for _, target in backdoors] == [Target(classes=k) for k in (2, 5, 7, 9)]
    assert isinstance(made.trigger, Patch)
    x = made.stamped().x
    sizes = []
    for (trigger, target), mark in zip(backdoors, made.marks, strict=True):
        assert torch.equal(x[mark.rows], trigger(CLEAN.x[mark.rows]))
        assert set(made.images.y[mark.rows].tolist()) == {target.classes}
        assert target.classes not in CLEAN.y[mark.rows].tolist()
        sizes.append(int(mark.rows.sum()))
    assert sum(sizes) == round(400 * rate)
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.stack([mark.rows for mark in made.marks]).sum(0), made.altered.long())
    assert torch.equal(made.altered, made.images.y != CLEAN.y)


def test_triggers_of_ones_own_may_be_of_different_kinds() -> None:
    made = poison(MultiTrigger(triggers=TWO))
    assert isinstance(made.trigger, Several)
    assert made.trigger.triggers == TWO
    assert poison(MultiTrigger(triggers=TWO, target=(1, 2))).trigger is TWO[0]


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (MultiTrigger(target=10), "there are 10 classes, got target 10"),
        (MultiTrigger(target=(0, 1, 2, 10)), "there are 10 classes, got target 10"),
        (MultiTrigger(target=(0, 1)), r"4 triggers need as many targets, or one; got \(0, 1\)"),
        (MultiTrigger(target=(0, 1, 2, 3), poison_rate=0.005), "2 poisoned images are too few for 4 triggers"),
        (MultiTrigger(poison_rate=0.95), "only 360 images can be poisoned"),
        (MultiTrigger(triggers=TWO[:1]), "several triggers are 2 to 16, got 1"),
        (MultiTrigger(triggers=TWO, size=3), "size 3 is of the default triggers, and triggers are given"),
        (MultiTrigger(size=13), "does not fit into 12x12"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_does_not_fit_the_data_is_refused(attack: MultiTrigger, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
