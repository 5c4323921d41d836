import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molehunt.defenses import _tuning
from molehunt.defenses._held_out import split
from molehunt.defenses._tuning import Plan, repair, tunable, tune
from molehunt.defenses.fine_tuning import FineTuning
from molehunt.engine import OutOfTime, Run
from molehunt.findings import Finding
from molehunt.networks import Network, build
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images
from molehunt.testing import DEFENSE_CHECKS, Trial, attack_success, planted, share_right
from molehunt.training import Recipe, train
from molehunt.training.batches import Batches

from . import tiny
from .tiny import moved
from .trained import trained


def run(defense: FineTuning, suspect: Suspect, seed: int = 0) -> dict[str, Tensor]:
    return dict(find(defense, suspect, seed).repaired or {})


def find(defense: FineTuning, suspect: Suspect, seed: int = 0) -> Finding:
    return defense(suspect, Run(rng=torch.Generator().manual_seed(seed)))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def parts(suspect: Suspect, seed: int = 0) -> tuple[Images, torch.Generator]:
    """The images that a call tunes on by default, and the generator as it is when tuning begins."""
    rng = torch.Generator().manual_seed(seed)
    assert suspect.clean is not None
    return split(suspect.clean, FineTuning().held_out, rng)[0], rng


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of every optimizer step that is made."""
    seen: list[float] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *arguments: Any) -> Any:
        (lr,) = {group["lr"] for group in self.param_groups}
        seen.append(lr)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    return seen


def sabotaged(when: Callable[[int], bool], model: nn.Module | None = None) -> tuple[Suspect, list[Tensor]]:
    """A suspect whose input is NaN in those passes in training mode, counted from 0, and the batches that it saw."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if not module.training:
            return None
        seen.append(inputs[0].detach().clone())
        return (inputs[0] * math.nan,) if when(len(seen) - 1) else None

    model = model or tiny.network()
    model.register_forward_pre_hook(hook)
    return tiny.suspect(model), seen


# --------------------------------------------------------------------------------------- the contract


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial(FineTuning(steps=12, batch=32))


CANNOT = pytest.mark.xfail(
    reason="clean images never wake the planted channel: no gradient reaches it, and fine-tuning leaves it as it is"
)


@pytest.mark.parametrize(
    "check", [pytest.param(name, marks=[CANNOT] if name == "repairs" else []) for name in DEFENSE_CHECKS]
)
def test_the_contract(trial: Trial, check: str) -> None:
    DEFENSE_CHECKS[check](trial)


# --------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_it_is_the_training_of_the_package_bit_for_bit(schedule: Any) -> None:
    suspect = tiny.suspect(augment="flip_crop")
    defense = FineTuning(steps=9, batch=24, lr=0.05, schedule=schedule, attempts=1)
    images, rng = parts(suspect)
    model = copy.deepcopy(suspect.model)
    model.requires_grad_(True)
    recipe = Recipe(
        epochs=9 * 24 / 64, batch=24, lr=0.05, schedule=schedule, augment="flip_crop", initialize=False,
        momentum=0.9, weight_decay=5e-4, precision="float32",
    )  # fmt: skip
    assert train(model, images, recipe, rng=rng).steps == 9
    assert same(run(defense, suspect), model.state_dict())


def test_a_constant_rate_is_constant_and_a_cosine_falls(rates: list[float]) -> None:
    run(FineTuning(steps=10, schedule="constant", lr=0.02, attempts=1), tiny.suspect())
    assert rates == [0.02] * 10
    rates.clear()
    run(FineTuning(steps=10, lr=0.02, attempts=1), tiny.suspect())
    expected = [0.01 * (1 + math.cos(math.pi * (step + 0.5) / 10)) for step in range(10)]
    assert rates == pytest.approx(expected)


def test_without_steps_every_bit_stays() -> None:
    suspect = tiny.suspect()
    found = find(FineTuning(steps=0), suspect)
    assert same(dict(found.repaired or {}), suspect.model.state_dict())
    assert found.score is None
    assert found.details["accuracy"]["before"] == found.details["accuracy"]["repaired"]


def test_the_model_of_the_caller_is_never_changed() -> None:
    suspect = tiny.suspect()
    before = copy.deepcopy(suspect.model.state_dict())
    repaired = run(FineTuning(steps=4, lr=0.1), suspect)
    assert not moved(suspect.model, before)
    assert not suspect.model.training
    assert not any(p.requires_grad or p.grad is not None for p in suspect.model.parameters())
    assert not {value.data_ptr() for value in repaired.values()} & {p.data_ptr() for p in suspect.model.parameters()}


def test_the_whole_network_moves_and_its_statistics_too() -> None:
    suspect = tiny.suspect()
    still = {"normalize.mean", "normalize.std"}
    assert moved(suspect.model, run(FineTuning(steps=4), suspect)) == suspect.model.state_dict().keys() - still


def test_in_head_only_mode_the_head_alone_moves() -> None:
    suspect = tiny.suspect()
    assert moved(suspect.model, run(FineTuning(steps=4, layers="head"), suspect)) == {"head.weight", "head.bias"}


def test_the_head_is_trained_on_features_of_the_network_as_it_was() -> None:
    """Head-only fine-tuning is logistic regression on fixed features, made here by hand."""
    suspect = tiny.suspect()
    images, _ = parts(suspect)
    state = suspect.model.state_dict()
    repaired = run(FineTuning(steps=1, batch=64, lr=0.5, layers="head", momentum=0.0, weight_decay=0.0), suspect)
    with torch.no_grad():
        z = suspect.model.neck(suspect.model.trunk(suspect.model.normalize(images.x)))  # type: ignore[operator]
        error = suspect.model(images.x).softmax(1) - torch.nn.functional.one_hot(images.y, 4)
    lr = 0.5 * 0.5  # the middle of the cosine
    torch.testing.assert_close(repaired["head.weight"], state["head.weight"] - lr * error.T @ z / 64)
    torch.testing.assert_close(repaired["head.bias"], state["head.bias"] - lr * error.mean(0))


def test_a_whitening_layer_is_left_as_it_is() -> None:
    task = tiny.task(shape=(3, 16, 16), classes=5)
    model = build("narrow_cifar", (3, 16, 16), 5, mean=task.mean, std=task.std, rng=torch.Generator().manual_seed(0))
    assert isinstance(model, Network)
    x = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.initialize(x)
    clean = Images(x, torch.arange(20) % 5)
    suspect = Suspect.of(model, tiny.task(shape=(3, 16, 16), classes=5), clean=clean, dtype=torch.float32)
    changed = moved(suspect.model, run(FineTuning(steps=2, batch=8), suspect))
    assert "trunk.0.weight" not in changed
    assert {"trunk.2.weight", "head.weight", "head.bias"} <= changed


def dormant(count: int = 40) -> Suspect:
    """A linear model with one large weight on a pixel that is 0 in every clean picture."""
    x = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0, 0] = 0.0
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model[1].weight[0, 0] = 50.0  # type: ignore[operator]
    task = tiny.task(shape=(1, 2, 2), classes=3)
    return Suspect.of(model, task, clean=Images(x, torch.arange(count) % 3), dtype=torch.float32)


def test_what_clean_images_never_wake_stays_exactly() -> None:
    suspect = dormant()
    repaired = run(FineTuning(steps=30, lr=0.1, weight_decay=0.0), suspect)
    before = suspect.model.state_dict()
    assert torch.equal(repaired["1.weight"][:, 0], before["1.weight"][:, 0])
    assert bool((repaired["1.weight"][:, 1:] != before["1.weight"][:, 1:]).all())


def test_weight_decay_alone_shrinks_what_clean_images_never_wake() -> None:
    suspect = dormant()
    defense = FineTuning(steps=30, lr=0.1, schedule="constant", weight_decay=0.05, momentum=0.0, tolerance=1.0)
    repaired = run(defense, suspect)
    expected = suspect.model.state_dict()["1.weight"][:, 0] * (1 - 0.1 * 0.05) ** 30
    torch.testing.assert_close(repaired["1.weight"][:, 0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("images", "batch", "size"),
    [(10, 128, 8), (80, 40, 40)],
)
def test_no_image_is_lost_to_a_batch_that_is_not_full(images: int, batch: int, size: int) -> None:
    """8 images and a batch of 128: all 8 in every step. 64 and a batch of 40: 8 steps are exactly 5 passes."""
    suspect, seen = sabotaged(lambda step: False)
    assert suspect.clean is not None
    suspect = Suspect.of(
        suspect.model, suspect.task, clean=Images(*(t[:images] for t in suspect.clean)), dtype=torch.float32
    )
    tuned, _ = parts(suspect)
    run(FineTuning(steps=8, batch=batch, attempts=1), suspect)
    assert [len(x) for x in seen] == [size] * 8
    pictures = [x.numpy().tobytes() for x in torch.cat(seen)]
    passes = 8 * size // len(tuned.y)
    assert sorted(pictures) == sorted(x.numpy().tobytes() for x in tuned.x for _ in range(passes))


def test_held_out_images_never_train() -> None:
    clean = tiny.pictures(50, 0)
    tuned, held = split(clean, 0.3, torch.Generator().manual_seed(0))
    assert (len(tuned.y), len(held.y)) == (35, 15)
    rows = {x.numpy().tobytes(): int(y) for x, y in zip(clean.x, clean.y, strict=True)}
    both = [{x.numpy().tobytes(): int(y) for x, y in zip(*part, strict=True)} for part in (tuned, held)]
    assert not both[0].keys() & both[1].keys()
    assert both[0] | both[1] == rows
    assert [len(part.y) for part in split(tiny.pictures(4, 0), 0.01, torch.Generator())] == [3, 1]
    assert [len(part.y) for part in split(tiny.pictures(4, 0), 0.99, torch.Generator())] == [1, 3]


def test_bfloat16_keeps_float32_weights() -> None:
    clean = tiny.pictures(40, 0)
    suspect = Suspect.of(tiny.network(), tiny.task(), clean=clean, dtype=torch.bfloat16)
    repaired = run(FineTuning(steps=2, lr=0.1), suspect)
    assert {name: value.dtype for name, value in repaired.items()} == {
        name: value.dtype for name, value in suspect.model.state_dict().items()
    }
    full = run(FineTuning(steps=2, lr=0.1), tiny.suspect(count=40, seed=0))
    assert not same(repaired, full)
    torch.testing.assert_close(repaired["head.weight"], full["head.weight"], rtol=0, atol=0.05)


def test_progress_is_told_in_images() -> None:
    told: list[tuple[int, int]] = []
    FineTuning(steps=5, batch=16, attempts=1)(tiny.suspect(), Run(report=lambda *numbers: told.append(numbers)))
    assert told == sorted(told)
    assert told[-1] == (80, 80)
    assert {total for _, total in told} == {80}


def test_it_can_be_stopped_at_any_step() -> None:
    suspect, seen = sabotaged(lambda step: False)
    with pytest.raises(Exception, match="stopped by the user"):
        FineTuning(steps=50)(suspect, Run(cancelled=lambda: len(seen) >= 3))
    assert len(seen) == 3


# -------------------------------------------------------------------------------- a loss that is no number


@pytest.mark.parametrize("step", [0, 7, 10, 13, 23])
def test_one_bad_batch_does_not_reach_the_weights(step: int, rates: list[float]) -> None:
    suspect, seen = sabotaged(lambda count: count == step)
    found = find(FineTuning(steps=24, lr=0.02, schedule="constant", tolerance=1.0), suspect)
    assert found.repaired is not None
    assert all(bool(torch.isfinite(value).all()) for value in found.repaired.values())
    assert found.details["rates"][0]["restored"] == 1
    assert len(found.details["rates"]) == 1
    assert len(seen) == 24, "it costs no further step"
    noticed = next(look for look in range(step, 24) if look % 10 == 0 or look % 2 == 0 or look == 23)
    assert rates == [0.02] * noticed + [0.01] * (23 - noticed)


def test_a_loss_that_was_infinite_between_two_looks_counts_although_the_weights_bore_it() -> None:
    """A class at minus infinity: the loss is infinite, and all gradients are finite."""
    passes = itertools.count()

    def hook(module: nn.Module, inputs: object, logits: Tensor) -> Tensor:
        forbidden = module.training and next(passes) == 7
        return logits + torch.tensor([-math.inf, 0.0, 0.0, 0.0]) if forbidden else logits

    model = tiny.network()
    model.register_forward_hook(hook)
    found = find(FineTuning(steps=24, tolerance=1.0), tiny.suspect(model))
    assert found.details["rates"][0]["restored"] == 1


def test_it_goes_back_to_the_last_good_state_with_its_statistics() -> None:
    """The last of 24 batches is bad: what is handed back is what came in at step 22, where a state was kept."""
    suspect, _ = sabotaged(lambda count: count == 23)
    repaired = run(FineTuning(steps=24, lr=0.02, schedule="constant", tolerance=1.0), suspect)
    well = tiny.suspect()
    expected = run(FineTuning(steps=22, lr=0.02, schedule="constant", tolerance=1.0), well)
    weights = {name for name, _ in well.model.named_parameters()}
    assert all(torch.equal(repaired[name], expected[name]) for name in weights)
    statistics = repaired["trunk.1.running_mean"]
    assert bool(torch.isfinite(statistics).all())
    assert int(repaired["trunk.1.num_batches_tracked"]) == 23


def test_after_going_back_it_goes_on_with_the_momentum_of_that_state() -> None:
    """The batch of step 3 of 5 is bad: steps 2 and 3 are as if they had not been, and step 4 has half the rate."""
    suspect, _ = sabotaged(lambda count: count == 3)
    repaired = run(FineTuning(steps=5, batch=16, lr=0.02, schedule="constant", tolerance=1.0), suspect)
    images, rng = parts(suspect)
    batches = Batches(images, Recipe(batch=16), rng)
    model = tiny.network().train().requires_grad_(True)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 5e-4},
        {"params": [p for p in model.parameters() if p.dim() == 1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True)
    for step in range(5):
        x, y = batches.next()
        if step in (2, 3):
            continue
        if step == 4:
            for group in optimizer.param_groups:
                group["lr"] = 0.01
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(repaired[name], parameter.detach())


def test_a_kept_state_can_be_gone_back_to_twice() -> None:
    """What an optimizer is given back becomes its own, and a bad step writes into it."""
    suspect, _ = sabotaged(lambda count: count in (7, 11))
    model = tunable(suspect.model, torch.rand(1, *suspect.task.shape), head_only=False)
    images, rng = parts(suspect)
    # Kept at steps 0, 6 and 12; the bad batches are noticed at 10 and 12, and both times it goes back to step 6.
    changes = {"steps": 14, "keep": 6}
    assert tune(model, images, plan(**changes), lr=0.02, run=Run(rng=rng), dtype=torch.float32) == 2
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def test_where_time_ends_the_best_finished_attempt_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def slow(*_: Any, **__: Any) -> int:
        tries.append(1)
        if len(tries) > 1:
            raise OutOfTime("the deadline passed")
        return 0

    monkeypatch.setattr(_tuning, "tune", slow)
    monkeypatch.setattr(_tuning, "accuracy", lambda *_: 0.9 if not tries else 0.5)
    found = find(FineTuning(steps=4), tiny.suspect())
    assert found.repaired is not None
    assert found.details["rates"] == [{"lr": 0.01, "accuracy": 0.5, "restored": 0}]
    assert any(warning.startswith("no time was left to try 0.0033") for warning in found.details["warnings"])
    tries.append(1)
    with pytest.raises(OutOfTime):
        find(FineTuning(steps=4), tiny.suspect())


def plan(**changes: Any) -> Plan:
    defense = FineTuning(schedule="constant", weight_decay=0.0)
    made = defense.plan(dataclasses.replace(defense.recipe(), batch=16, precision="float32"))
    return dataclasses.replace(made, **{"steps": 8, "keep": 4, **changes})


def test_a_last_step_that_ruins_the_weights_is_taken_back() -> None:
    """No loss is computed after it."""
    suspect = tiny.suspect()
    images, rng = parts(suspect)
    model = tunable(suspect.model, images.x[:1], head_only=False)
    rate = lambda step, highest: math.inf if step == 7 else highest  # noqa: E731
    assert tune(model, images, plan(rate=rate), lr=0.01, run=Run(rng=rng), dtype=torch.float32) == 1
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    assert not model.training


@pytest.mark.parametrize(("most", "passes"), [(20, 24), (3, 7)])
def test_a_loss_that_is_never_a_number_is_an_error(most: int, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are too few steps to give up; every second of 24 is looked at, and the last."""
    monkeypatch.setattr(_tuning, "MOST_RESTORES", most)
    suspect, seen = sabotaged(lambda count: True)
    with pytest.raises(FloatingPointError, match=r"not finite (4|13) times; lower the learning rate \(0.003"):
        run(FineTuning(steps=24, attempts=2), suspect)
    assert len(seen) == 2 * passes


# ------------------------------------------------------------------------------------------- the attempts


def answering(monkeypatch: pytest.MonkeyPatch, answers: list[float | None], before: float = 1.0) -> list[float]:
    """Let tunings reach these accuracies after one before; None for one that diverges. Returns their rates."""
    left = iter([before, *(answer for answer in answers if answer is not None)])
    fate = iter(answers)
    lrs: list[float] = []
    real = _tuning.tune

    def tuned(*arguments: Any, lr: float, **rest: Any) -> int:
        lrs.append(lr)
        if next(fate) is None:
            raise FloatingPointError("diverged")
        return real(*arguments, lr=lr, **rest)

    monkeypatch.setattr(_tuning, "accuracy", lambda *_: next(left))
    monkeypatch.setattr(_tuning, "tune", tuned)
    return lrs


@pytest.mark.parametrize(
    ("answers", "tried", "taken"),
    [
        ([0.96, 1.0, 1.0], 1, 0),
        ([0.95, 0.97, 1.0], 2, 1),
        ([0.9, 0.95, 0.93], 3, 1),
        ([0.95, 0.9, 0.8], 3, 0),
        ([None, 0.97, 1.0], 2, 1),
        ([0.9, None, 0.8], 3, 0),
        ([None, 0.5, None], 3, 1),
    ],
)
def test_a_rate_that_costs_too_much_is_followed_by_a_third_of_it(
    answers: list[float | None], tried: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspect = tiny.suspect()
    alone = [run(FineTuning(steps=1, lr=0.9 / 3**i, tolerance=1.0), suspect) for i in range(3)]
    lrs = answering(monkeypatch, answers)
    found = find(FineTuning(steps=1, lr=0.9), suspect)
    assert lrs == pytest.approx([0.9, 0.3, 0.1][:tried])
    assert [one["accuracy"] for one in found.details["rates"]] == answers[:tried]
    assert [one["lr"] for one in found.details["rates"]] == lrs
    assert found.details["lr"] == lrs[taken]
    assert found.details["accuracy"] == {"before": 1.0, "repaired": answers[taken]}
    # From the start, and on the same batches as if it had been the first.
    assert same(dict(found.repaired or {}), alone[taken])
    costly = [text for text in found.details["warnings"] if "costs more than 4 points" in text]
    assert len(costly) == (answers[taken] is not None and answers[taken] < 0.96)  # type: ignore[operator]


def test_exactly_the_tolerance_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.52 - 0.04 > 0.48, "in floating point"
    assert answering(monkeypatch, [0.48], before=0.52) == []
    assert len(find(FineTuning(steps=1), tiny.suspect()).details["rates"]) == 1


def test_tuning_that_diverges_at_every_rate_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lrs = answering(monkeypatch, [None, None])
    with pytest.raises(FloatingPointError):
        run(FineTuning(steps=1, attempts=2), tiny.suspect())
    assert len(lrs) == 2


def test_the_accuracy_reported_is_that_of_the_held_out_images() -> None:
    suspect = tiny.poisoned().suspect
    assert suspect.clean is not None
    found = find(FineTuning(steps=2, batch=16), suspect)
    _, held = split(suspect.clean, 0.2, torch.Generator().manual_seed(0))
    model = copy.deepcopy(suspect.model)
    assert found.details["accuracy"]["before"] == pytest.approx(share_right(model, held))
    model.load_state_dict(dict(found.repaired or {}))
    assert found.details["accuracy"]["repaired"] == pytest.approx(share_right(model, held))
    assert found.details["images"] == {"tune": 160, "held_out": 40}


# -------------------------------------------------------------------------------------------- the control


def test_the_control_leaves_the_repair_as_it_is() -> None:
    suspect = tiny.suspect()
    alone = find(FineTuning(steps=3), suspect)
    both = find(FineTuning(steps=3, control=True), suspect)
    assert same(dict(alone.repaired or {}), dict(both.repaired or {}))
    assert "scratch" not in alone.details
    assert both.details["scratch"].keys() == suspect.model.state_dict().keys()
    assert not both.details["warnings"]


def test_the_control_owes_nothing_to_the_suspect() -> None:
    """Other weights and statistics, the same control: only architecture and images count."""
    scratches = []
    for seed in (0, 1):
        model = tiny.network(seed)
        model.trunk[1].running_mean.fill_(float(seed))  # type: ignore[index]
        found = find(FineTuning(steps=3, control=True), tiny.suspect(model))
        scratches.append(found.details["scratch"])
        assert not same(scratches[-1], dict(found.repaired or {}))
    assert same(*scratches)
    assert not same(scratches[0], tiny.network().state_dict())


def test_the_control_has_the_same_images_and_steps() -> None:
    suspect, seen = sabotaged(lambda step: False)
    found = find(FineTuning(steps=7, batch=16, control=True, attempts=1), suspect)
    assert [len(x) for x in seen] == [16] * 14
    images, _ = parts(suspect)
    assert {x.numpy().tobytes() for x in torch.cat(seen[7:])} <= {x.numpy().tobytes() for x in images.x}
    assert 0 <= found.details["accuracy"]["scratch"] <= 1


def test_the_control_is_the_same_whatever_became_of_the_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    scratches = []
    for answers in ([1.0, 1.0], [0.5, 0.6, None, 1.0]):
        answering(monkeypatch, [*answers])
        scratches.append(find(FineTuning(steps=2, control=True), tiny.suspect()).details["scratch"])
        monkeypatch.undo()
    assert same(*scratches)


def test_the_control_learns() -> None:
    suspect = tiny.suspect(tiny.network(), count=120)
    found = find(FineTuning(steps=30, batch=32, control=True, lr=0.0), suspect)
    assert found.details["accuracy"]["scratch"] >= 0.9 > found.details["accuracy"]["before"]
    model = copy.deepcopy(suspect.model)
    model.load_state_dict(found.details["scratch"])
    assert share_right(model, tiny.pictures(100, 9)) >= 0.9


def test_the_control_computes_its_own_whitening() -> None:
    task = tiny.task(shape=(3, 16, 16), classes=5)
    model = build("narrow_cifar", (3, 16, 16), 5, mean=task.mean, std=task.std, rng=torch.Generator().manual_seed(0))
    assert isinstance(model, Network)
    x = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.initialize(x.square())
    clean = Images(x, torch.arange(20) % 5)
    suspect = Suspect.of(model, task, clean=clean, dtype=torch.float32)
    scratch = find(FineTuning(steps=1, batch=8, control=True), suspect).details["scratch"]
    expected = copy.deepcopy(model)
    expected.initialize(parts(suspect)[0].x)
    torch.testing.assert_close(scratch["trunk.0.weight"], expected.state_dict()["trunk.0.weight"])


class Learned(nn.Module):
    """A layer that nobody knows how to draw."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def test_where_no_control_can_be_made_the_repair_is_handed_back_with_a_warning() -> None:
    model = nn.Sequential(Learned(), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
    found = find(FineTuning(steps=2, control=True), tiny.suspect(model))
    assert found.repaired is not None
    assert "scratch" not in found.details
    # The weights are torch's own draw, so the repair may or may not cost too much, and be warned of as well.
    said = "no control trained from scratch: nobody here knows how to draw the weights of '0', a Learned"
    assert said in found.details["warnings"]


# -------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps must be 0 or more, got -1"),
        ({"batch": 0}, "batch is out of range: 0"),
        ({"lr": -1.0}, "lr is out of range: -1.0"),
        ({"lr": math.nan}, "lr is out of range"),
        ({"schedule": "linear"}, "schedule must be one of constant, cosine, got 'linear'"),
        ({"layers": "body"}, "layers must be one of all, head, got 'body'"),
        ({"tolerance": 1.5}, r"tolerance must lie in \[0, 1\], got 1.5"),
        ({"held_out": 0.0}, r"held_out must lie in \(0, 1\), got 0.0"),
        ({"held_out": 1.0}, r"held_out must lie in \(0, 1\), got 1.0"),
        ({"attempts": 0}, "attempts must be 1 or more, got 0"),
        ({"momentum": 1.0}, "momentum is out of range: 1.0"),
        ({"weight_decay": -1.0}, "weight_decay is out of range: -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuning(**settings)


def test_too_few_clean_images_are_refused() -> None:
    with pytest.raises(ValueError, match="fine_tuning needs 4 clean images or more"):
        find(FineTuning(steps=1), tiny.suspect(count=3))
    suspect = planted(grants=()).suspect
    with pytest.raises(ValueError, match="needs 4 clean images"):
        repair(suspect, Run(), plan())
    assert FineTuning.needs == (frozenset({Access.CLEAN}),)
    assert find(FineTuning(steps=1), tiny.suspect(count=4)).repaired is not None


def test_the_seed_decides() -> None:
    suspect = tiny.suspect()
    repaired = [run(FineTuning(steps=2), suspect, seed) for seed in (0, 0, 1)]
    assert [same(one, other) for one, other in itertools.pairwise(repaired)] == [True, False]


@pytest.mark.slow
def test_on_a_trained_mnist_network() -> None:
    case = trained()
    for model in (case.backdoored, case.twin):
        found = find(FineTuning(), Suspect.of(model, case.task, clean=case.clean))
        repaired = copy.deepcopy(model)
        repaired.load_state_dict(dict(found.repaired or {}))
        assert share_right(repaired, case.hidden) >= share_right(model, case.hidden) - 0.03
        after = attack_success(repaired, case.hidden, case.trigger, case.target)
        assert after <= attack_success(model, case.hidden, case.trigger, case.target) + 0.02
