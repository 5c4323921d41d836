import pytest
import torch

from molehunt.attacks import AdapPatch, Poisoned
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import Patch

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden
CORNER = (slice(0, 2), slice(10, 12))  # patches of two pixels


def poison(attack: AdapPatch, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


def test_as_many_covers_as_asked_for_keep_their_label() -> None:
    made = poison(AdapPatch(target=6, poison_rate=0.05, cover_rate=0.15))
    changed = made.images.y != CLEAN.y
    assert int(changed.sum()) == 20
    assert (made.images.y[changed] == 6).all()
    assert int(made.altered.sum()) == 80


def test_each_row_gets_one_patch_at_its_opacity() -> None:
    made = poison(AdapPatch(poison_rate=0.2, cover_rate=0.4))
    x, counts = made.stamped().x, []
    for row in made.altered.nonzero().squeeze(1).tolist():
        difference = (x[row] - CLEAN.x[row]).abs()
        corners = {
            number: float(difference[:, rows, columns].max())
            for number, (rows, columns) in enumerate((r, c) for r in CORNER for c in CORNER)
        }
        touched = [number for number, most in corners.items() if most > 0]
        assert len(touched) == 1
        counts.append(touched[0])
        assert float(difference.sum()) == pytest.approx(
            sum(float(difference[:, r, c].sum()) for r in CORNER for c in CORNER), abs=1e-5
        )
    assert min(counts.count(k) for k in range(4)) > 40
    for mark, opacity in zip(made.marks, (0.8, 0.4, 0.8, 0.5), strict=True):
        rows = mark.rows.nonzero().squeeze(1)
        gray = torch.full((len(rows), *TASK.shape), 0.5)
        assert float((made.stamp(gray, rows) - gray).abs().max()) == pytest.approx(opacity / 2, abs=1e-6)


def test_the_attack_stamps_two_of_them_in_full() -> None:
    made = poison(AdapPatch(stamped=(1, 2)))
    assert isinstance(made.trigger, Patch)
    wanted = Patch.square(TASK.shape, size=2, corner="upper right").mask
    wanted = wanted + Patch.square(TASK.shape, size=2, corner="lower left").mask
    assert torch.equal(made.trigger.mask, wanted)
    assert made.trigger.opacity == 1.0
    gray = torch.full((1, *TASK.shape), 0.5)
    for mark in (made.marks[1], made.marks[2]):
        rows = mark.rows.nonzero()[:1, 0]
        faint = made.stamp(gray, rows) - gray
        full = made.trigger(gray) - gray
        touched = faint != 0
        assert bool((faint[touched].sign() == full[touched].sign()).all()), (
            "another pattern in training than in the attack"
        )


def test_the_patches_come_from_the_generator() -> None:
    one, same, other = (poison(AdapPatch(size=5), seed).trigger.tensors()["pattern"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (AdapPatch(target=10), "there are 10 classes, got target 10"),
        (AdapPatch(poison_rate=0.95), "only 360 images can be poisoned"),
        (AdapPatch(cover_rate=0.0), "the poison rate must lie in"),
        (AdapPatch(opacities=(0.5, 0.5)), r"one value for each of the 4 corners, got \(0.5, 0.5\)"),
        (AdapPatch(opacities=(0.5, 0.5, 0.5, 2.0)), "opacity must lie in"),
        (AdapPatch(stamped=()), r"stamped names patches from 0 to 3, got \(\)"),
        (AdapPatch(stamped=(0, 4)), r"stamped names patches from 0 to 3, got \(0, 4\)"),
        (AdapPatch(opacity=1.5), "opacity must lie in"),
        (AdapPatch(size=13), "does not fit into 12x12"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_does_not_fit_the_data_is_refused(attack: AdapPatch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
