import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from molehunt.defenses import _tuning
from molehunt.defenses._held_out import split
from molehunt.defenses._tuning import triangular
from molehunt.defenses.fine_tuning import FineTuning
from molehunt.defenses.super_fine_tuning import SuperFineTuning
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect
from molehunt.testing import DEFENSE_CHECKS, Trial, attack_success, share_right

from . import tiny
from .test_fine_tuning import CANNOT, dormant, rates, sabotaged, same
from .tiny import moved
from .trained import trained

__all__ = ["rates"]  # a fixture


def run(defense: SuperFineTuning | FineTuning, suspect: Suspect, seed: int = 0) -> dict[str, Tensor]:
    return dict(find(defense, suspect, seed).repaired or {})


def find(defense: SuperFineTuning | FineTuning, suspect: Suspect, seed: int = 0) -> Finding:
    return defense(suspect, Run(rng=torch.Generator().manual_seed(seed)))


# --------------------------------------------------------------------------------------- the schedule

PEAKS = st.tuples(*[st.floats(1e-6, 1.0)] * 3).map(sorted)


@given(peaks=PEAKS, cycles=st.integers(6, 12), half=st.integers(1, 40))
def test_the_rate_is_a_triangle_that_hits_both_ends_exactly(peaks: list[float], cycles: int, half: int) -> None:
    base, max2, max1 = peaks
    cycle = 2 * half
    defense = SuperFineTuning(base=base, max1=max1, max2=max2, cycles=cycles, steps=2 * cycles * cycle)
    assert defense.cycle == cycle
    switch = defense.steps // 2
    for first, peak in ((0, max1), (switch, max2)):
        for start in range(first, first + switch, cycle):
            assert defense.rate(start) == base
            assert defense.rate(start + half) == peak
    listed = [defense.rate(step) for step in range(defense.steps)]
    assert all(base <= rate <= max1 for rate in listed[:switch])
    assert all(base <= rate <= max2 for rate in listed[switch:])
    assert listed[:cycle] * cycles == listed[:switch]
    assert listed[switch : switch + cycle] * cycles == listed[switch:]


@given(step=st.integers(0, 1499))
def test_the_rate_is_the_formula_of_the_paper(step: int) -> None:
    u = (step % 125) / 125
    tri = 2 * u if u <= 0.5 else 2 - 2 * u
    peak = 0.1 if step < 750 else 1e-3
    assert SuperFineTuning().rate(step) == pytest.approx(3e-4 + (peak - 3e-4) * tri, rel=1e-9, abs=1e-12)


def test_nothing_jumps_where_the_phases_meet() -> None:
    defense = SuperFineTuning()
    slope = (0.1 - 3e-4) * 2 / 125
    assert defense.rate(62.5) == 0.1, "an odd cycle has its peak between two steps"
    assert defense.rate(750) == 3e-4
    assert defense.rate(749) == pytest.approx(3e-4 + slope)
    steps = torch.tensor([defense.rate(step) for step in range(1500)]).double().diff().abs()
    assert float(steps.max()) == pytest.approx(slope, rel=1e-5)


@given(low=st.floats(1e-6, 1.0), more=st.floats(0.0, 1.0), step=st.floats(0.0, 1000.0), cycle=st.integers(1, 300))
def test_a_triangle_stays_between_its_ends(low: float, more: float, step: float, cycle: int) -> None:
    assert low <= triangular(step, cycle, low, low + more) <= low + more
    assert triangular(step, cycle, low, low) == low


def test_the_rate_is_set_before_the_step_and_every_step_has_its_own(rates: list[float]) -> None:
    defense = SuperFineTuning(steps=48, max1=0.05, attempts=1)
    run(defense, tiny.suspect())
    assert rates == [defense.rate(step) for step in range(48)]
    assert rates[:4] == [3e-4, pytest.approx(0.02515), 0.05, pytest.approx(0.02515)]
    assert rates[24:28] == [3e-4, pytest.approx(6.5e-4), 1e-3, pytest.approx(6.5e-4)]


def test_the_first_step_has_the_lowest_rate() -> None:
    """One that is set after the step would make the first step with the optimizer's own, the highest: 12 by hand."""
    suspect = tiny.suspect(count=20)
    assert suspect.clean is not None
    images, _ = split(suspect.clean, 0.2, torch.Generator().manual_seed(0))
    defense = SuperFineTuning(steps=12, base=0.01, max1=0.3, max2=0.2, momentum=0.0, weight_decay=0.0, attempts=1)
    model = copy.deepcopy(suspect.model).train().requires_grad_(True)
    for step in range(12):  # a cycle of one step: never above the base
        assert defense.rate(step) == 0.01
        gradients = torch.autograd.grad(
            nn.functional.cross_entropy(model(images.x), images.y), list(model.parameters())
        )
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(0.01 * gradient)
    repaired = run(defense, suspect)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(repaired[name], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_the_defaults_are_those_of_the_page() -> None:
    """Public ports have rates that are 8 to 100 times as high, and no momentum or decay."""
    d = SuperFineTuning()
    assert (d.base, d.max1, d.max2, d.momentum, d.weight_decay) == (3e-4, 0.1, 1e-3, 0.9, 5e-4)
    assert (d.steps, d.batch, d.cycles, d.cycle) == (1500, 128, 6, 125)


def test_momentum_and_decay_reach_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *arguments: Any) -> Any:
        seen.extend((group["momentum"], group["weight_decay"]) for group in self.param_groups)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    run(SuperFineTuning(steps=12), tiny.suspect())
    assert set(seen) == {(0.9, 5e-4), (0.9, 0.0)}  # biases and norms do not decay


# ---------------------------------------------------------------------------------- beside fine-tuning


@pytest.mark.parametrize("lr", [0.01, 0.07, 3e-4])
def test_without_peaks_it_is_fine_tuning_bit_for_bit(lr: float) -> None:
    suspect = tiny.suspect(augment="crop")
    shared: dict[str, Any] = {"steps": 24, "batch": 16}
    plain = find(FineTuning(lr=lr, schedule="constant", **shared), suspect)
    cyclic = find(SuperFineTuning(base=lr, max1=lr, max2=lr, **shared), suspect)
    assert same(dict(plain.repaired or {}), dict(cyclic.repaired or {}))
    assert plain.details == cyclic.details


def answers(monkeypatch: pytest.MonkeyPatch, listed: list[float]) -> None:
    """Let the held-out accuracies be these, the first one before the repair."""
    left = iter(listed)
    monkeypatch.setattr(_tuning, "accuracy", lambda *_: next(left))


def test_without_peaks_it_is_fine_tuning_also_after_bad_batches_and_at_lower_rates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for defense in (
        FineTuning(lr=0.1, schedule="constant", steps=24),
        SuperFineTuning(base=0.1, max1=0.1, max2=0.1, steps=24),
    ):
        answers(monkeypatch, [1.0, 0.5, 0.6, 0.4])
        found.append(find(defense, sabotaged(lambda count: count % 24 in (5, 17))[0]))
    assert [one["restored"] for one in found[0].details["rates"]] == [2, 2, 2]
    assert found[0].details["lr"] == pytest.approx(0.1 / 3)
    assert found[0].details == found[1].details
    assert same(dict(found[0].repaired or {}), dict(found[1].repaired or {}))


def test_only_the_peaks_make_the_difference() -> None:
    suspect = tiny.suspect()
    low = run(SuperFineTuning(base=0.01, max1=0.01, max2=0.01, steps=48), suspect)
    assert not same(low, run(SuperFineTuning(base=0.01, max1=0.02, max2=0.01, steps=48), suspect))
    first = run(SuperFineTuning(base=0.01, max1=0.02, max2=0.01, steps=48), suspect)
    assert not same(first, run(SuperFineTuning(base=0.01, max1=0.02, max2=0.02, steps=48), suspect))


def test_peaks_remove_a_backdoor_that_a_low_rate_leaves() -> None:
    """Over three such networks: ASR .92 to .94 before, .78 to .88 after a low rate, .01 to .12 after peaks."""
    case = tiny.poisoned()

    def judged(weights: dict[str, Tensor] | None) -> tuple[float, float]:
        model = copy.deepcopy(case.model)
        if weights is not None:
            model.load_state_dict(weights)
        return share_right(model, case.hidden), attack_success(model, case.hidden, tiny.TRIGGER, tiny.TARGET)

    before = judged(None)
    low = judged(run(FineTuning(steps=240, batch=64, lr=3e-4, schedule="constant"), case.suspect))
    after = judged(run(SuperFineTuning(steps=240, batch=64), case.suspect))
    assert before[1] > 0.9
    assert after[1] < 0.2
    assert low[1] > after[1] + 0.2
    assert after[0] >= before[0] - 0.03


# ------------------------------------------------------------------------------------------- invariants


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial(SuperFineTuning(steps=12, batch=32))


@pytest.mark.parametrize(
    "check", [pytest.param(name, marks=[CANNOT] if name == "repairs" else []) for name in DEFENSE_CHECKS]
)
def test_the_contract(trial: Trial, check: str) -> None:
    DEFENSE_CHECKS[check](trial)


def test_without_steps_every_bit_stays() -> None:
    suspect = tiny.suspect()
    assert same(run(SuperFineTuning(steps=0), suspect), suspect.model.state_dict())


def test_the_model_of_the_caller_is_never_changed_and_the_whole_network_moves() -> None:
    suspect = tiny.suspect()
    before = copy.deepcopy(suspect.model.state_dict())
    repaired = run(SuperFineTuning(steps=24), suspect)
    assert not moved(suspect.model, before)
    assert moved(suspect.model, repaired) == before.keys() - {"normalize.mean", "normalize.std"}


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_what_clean_images_never_wake_keeps_all_but_the_decay(decay: float) -> None:
    """So peaks matter to it, but for their decay alone, and no repair can be expected of a dormant trigger."""
    suspect = dormant()
    defense = SuperFineTuning(steps=48, max1=0.5, weight_decay=decay, momentum=0.0, tolerance=1.0)
    repaired = run(defense, suspect)["1.weight"][:, 0]
    before = suspect.model.state_dict()["1.weight"][:, 0]
    expected = before * math.prod(1 - defense.rate(step) * decay for step in range(48))
    if decay:
        torch.testing.assert_close(repaired, expected, rtol=1e-5, atol=0)
        assert float(repaired.max()) < 49
    else:
        assert torch.equal(repaired, before)


def test_few_images_are_all_used_in_every_step() -> None:
    suspect, seen = sabotaged(lambda step: False)
    assert suspect.clean is not None
    clean = type(suspect.clean)(suspect.clean.x[:10], suspect.clean.y[:10])
    suspect = Suspect.of(suspect.model, suspect.task, clean=clean, dtype=torch.float32)
    run(SuperFineTuning(steps=12, attempts=1), suspect)
    assert [len({x.numpy().tobytes() for x in batch}) for batch in seen] == [8] * 12


@pytest.mark.parametrize(("bad", "noticed"), [(5, 8), (9, 10), (50, 50)])
def test_a_bad_batch_halves_the_peaks_that_are_left(bad: int, noticed: int, rates: list[float]) -> None:
    """Cycles of four steps: one is looked at where it begins, and every tenth step."""
    suspect, _ = sabotaged(lambda count: count == bad)
    defense = SuperFineTuning(steps=96, cycles=12, max1=0.04, tolerance=1.0)
    found = find(defense, suspect)
    assert found.details["rates"] == [{"lr": 0.04, "accuracy": found.details["accuracy"]["repaired"], "restored": 1}]
    before = [defense.rate(step) for step in range(noticed)]
    after = [defense.rate(step, 0.02) for step in range(noticed + 1, 96)]
    assert rates == before + after
    assert max(after) == (0.02 if noticed < 48 else 1e-3), "the peaks of the second phase stay"
    assert found.repaired is not None
    assert all(bool(torch.isfinite(value).all()) for value in found.repaired.values())


def test_lower_peaks_never_go_below_where_they_start() -> None:
    defense = SuperFineTuning(base=0.01, max2=0.02, max1=0.1)
    for highest in (0.1, 0.05, 0.015, 0.005):
        listed = [defense.rate(step, highest) for step in range(1500)]
        assert max(listed[:750]) <= highest
        assert max(listed[750:]) <= min(0.02, highest)
        assert min(listed) == min(0.01, highest)


def test_a_peak_that_costs_too_much_is_followed_by_a_third_of_it(
    rates: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, [1.0, 0.5, 0.97])
    defense = SuperFineTuning(steps=48, max1=0.3)
    found = find(defense, tiny.suspect())
    third = 0.3 / 3
    assert rates == [defense.rate(step) for step in range(48)] + [defense.rate(step, third) for step in range(48)]
    assert max(rates[48:72]) == third
    assert rates[72:] == rates[24:48], "the second phase and the base stay"
    assert found.details["lr"] == third
    assert found.details["accuracy"] == {"before": 1.0, "repaired": 0.97}


def test_the_control_comes_along() -> None:
    found = find(SuperFineTuning(steps=12, control=True), tiny.suspect())
    plain = find(FineTuning(steps=12, control=True), tiny.suspect())
    assert same(found.details["scratch"], plain.details["scratch"]), "the same images, steps and seed"
    assert found.details["accuracy"]["scratch"] == plain.details["accuracy"]["scratch"]


# -------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1000}, "a multiple of 12, two phases of 6 cycles, got 1000; the nearest are 996 and 1008"),
        ({"steps": -12}, "steps must be 0 or more, got -12"),
        ({"cycles": 5}, "cycles must be 6 or more, got 5"),
        ({"base": -1e-3}, "expected 0 <= base <= max2 <= max1, got base -0.001"),
        ({"max1": 1e-4}, "max2 0.001, max1 0.0001"),
        ({"max2": 0.2}, "max2 0.2, max1 0.1"),
        ({"max2": 1e-4}, "expected 0 <= base <= max2"),
        ({"max1": math.inf}, "max1 inf"),
        ({"max1": math.nan}, "max1 nan"),
        ({"batch": 0}, "batch is out of range: 0"),
        ({"tolerance": -0.1}, "tolerance must lie in"),
        ({"held_out": 1.0}, "held_out must lie in"),
        ({"attempts": 0}, "attempts must be 1 or more"),
        ({"momentum": 1.0}, "momentum is out of range"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SuperFineTuning(**settings)


def test_too_few_clean_images_are_refused() -> None:
    with pytest.raises(ValueError, match="super_fine_tuning needs 4 clean images or more"):
        find(SuperFineTuning(steps=12), tiny.suspect(count=3))
    assert SuperFineTuning.needs == (frozenset({Access.CLEAN}),)


@pytest.mark.slow
def test_on_a_trained_mnist_network() -> None:
    case = trained()
    for model in (case.backdoored, case.twin):
        found = find(SuperFineTuning(), Suspect.of(model, case.task, clean=case.clean))
        repaired = copy.deepcopy(model)
        repaired.load_state_dict(dict(found.repaired or {}))
        assert share_right(repaired, case.hidden) >= share_right(model, case.hidden) - 0.05
        after = attack_success(repaired, case.hidden, case.trigger, case.target)
        assert after <= attack_success(model, case.hidden, case.trigger, case.target) + 0.02
