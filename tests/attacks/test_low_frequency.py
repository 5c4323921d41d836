import pytest
import torch
from scipy.fft import dctn

from molehunt.attacks import Poisoned
from molehunt.attacks.low_frequency import LowFrequency, fainter, smooth_pattern, waves
from molehunt.attacks.surrogate import quickly_trained
from molehunt.game.budget import budget
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import Additive, Target

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def poison(attack: LowFrequency) -> Poisoned:
    return attack(CLEAN, TASK, rng())


def test_the_waves_are_those_of_the_orthonormal_cosine_transform() -> None:
    full = waves(9, 9)
    torch.testing.assert_close(full @ full.T, torch.eye(9), atol=1e-5, rtol=0)
    assert torch.equal(waves(9, 3), full[:3])


@pytest.mark.parametrize("band", [0.25, 0.5])
def test_nothing_of_the_pattern_lies_outside_its_band(band: float) -> None:
    made = poison(LowFrequency(band=band)).trigger
    assert isinstance(made, Additive)
    cells = torch.from_numpy(dctn(made.delta.double().numpy(), axes=(1, 2), norm="ortho"))
    kept = round(12 * band)
    inside = cells[:, :kept, :kept].square().sum()
    assert float(inside / cells.square().sum()) == pytest.approx(1.0, abs=1e-9)
    assert budget(made.footprint(), TASK.shape).passed


def test_the_pattern_is_optimized_and_then_so_faint_that_a_clean_network_hardly_follows() -> None:
    model, goal = quickly_trained(CLEAN, TASK, rng(), 40), Target(classes=2)

    def sent(trigger: Additive) -> float:
        others = CLEAN.y != 2
        return float((model(trigger(CLEAN.x[others])).argmax(1) == 2).float().mean())

    # Five times over, so that there are a hundred steps; prototypes are noise, so the whole band is needed.
    often = Images(CLEAN.x.repeat(5, 1, 1, 1), CLEAN.y.repeat(5))
    strong = smooth_pattern(model, often, 2, linf=0.6, band=1.0, steps=100, rng=rng())
    assert float(strong.delta.abs().max()) == pytest.approx(0.6, abs=1e-6)
    faint = fainter(strong, model, CLEAN, goal, 0.05, rng())
    assert sent(strong) > 0.5, "the optimizer did nothing"
    assert sent(faint) <= 0.05
    scale = faint.delta / strong.delta
    assert float(scale.std()) < 1e-4, "fainter, and otherwise the same"


def test_a_pattern_of_ones_own_is_used_as_it_is() -> None:
    own = Additive(delta=torch.full(TASK.shape, 0.05))
    assert poison(LowFrequency(trigger=own)).trigger is own


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (LowFrequency(target=10), "there are 10 classes"),
        (LowFrequency(linf=0.0), "linf and band must lie in"),
        (LowFrequency(band=1.5), "linf and band must lie in"),
        (LowFrequency(moved=-1.0), "moved must lie in"),
        (LowFrequency(steps=0), "at least one step"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_does_not_fit_is_refused(attack: LowFrequency, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
