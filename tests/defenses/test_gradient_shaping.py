import copy
import dataclasses
import importlib.util
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.defenses import gradient_shaping
from molehunt.defenses._accountant import epsilon
from molehunt.defenses._fresh import fresh, trainable
from molehunt.defenses._per_sample import PerSample
from molehunt.defenses._sample_log import Log
from molehunt.defenses.gradient_shaping import GradientShaping, class_accuracy, shaped_gradient
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.networks import Dropout, build
from molehunt.runner import inspect
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images
from molehunt.testing import DEFENSE_CHECKS, Trial, attack_success, planted, share_right

from .trained import trained

SHAPE = (3, 8, 8)
CLASSES = 4


def run(defense: GradientShaping, suspect: Suspect, seed: int = 0) -> Finding:
    return defense(suspect, Run(rng=torch.Generator().manual_seed(seed)))


def pictures(count: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Images:
    rng = torch.Generator().manual_seed(seed)
    return Images(torch.rand(count, *shape, generator=rng), torch.arange(count) % CLASSES)


def small(kind: str = "plain", seed: int = 0) -> Any:
    norm: nn.Module = nn.BatchNorm2d(5) if kind == "batch norm" else nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), norm, nn.ReLU(), nn.Flatten(), nn.Linear(45, CLASSES))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            norm.running_mean.copy_(torch.rand(5, generator=rng))
    return model.eval()


def suspect_of(
    model: nn.Module, *, training: Images | None = None, clean: Images | None = None, **task: Any
) -> Suspect:
    about = dataclasses.replace(planted().suspect.task, shape=SHAPE, classes=tuple("abcd"), **task)
    return Suspect.of(model, about, training=training, clean=clean, dtype=torch.float32, device="cpu")


def gathered(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def shape(model: nn.Module, images: Images, *, clip: float = math.inf, sigma: float = 0.0, **more: Any) -> Tensor:
    noise = more.pop("noise", None) or torch.Generator().manual_seed(0)
    more.setdefault("expected", len(images.y))
    shaped_gradient(model, images.x, images.y, clip=clip, sigma=sigma, noise=noise, **more)
    return gathered(model)


# ------------------------------------------------------------------------------------- the gradient of one step


def test_without_clipping_and_noise_training_is_ordinary() -> None:
    shaped, plain = small().double(), small().double()
    images = pictures(40)
    x, y = images.x.double(), images.y
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (shaped, plain)]
    for step in range(6):
        rows = torch.arange(step, 40, 3)
        found = shape(shaped, Images(x[rows], y[rows]))
        plain.zero_grad()
        F.cross_entropy(plain(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(found, gathered(plain), rtol=1e-9, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(shaped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_no_sample_moves_the_sum_by_more_than_the_clip_norm() -> None:
    """The sensitivity: what the whole defense, and any statement about privacy, rests on."""
    model, clip = small().double(), 0.7
    images = pictures(9)
    x, y = images.x.double(), images.y
    whole = shape(model, Images(x, y), clip=clip) * 9
    assert float(whole.norm()) <= 9 * clip
    for row in range(9):
        others = torch.arange(9) != row
        without = shape(model, Images(x[others], y[others]), clip=clip, expected=9) * 9
        assert float((whole - without).norm()) <= clip * (1 + 1e-9)
        changed, label = x.clone(), y.clone()
        changed[row], label[row] = 1e6, (y[row] + 1) % CLASSES
        replaced = shape(model, Images(changed, label), clip=clip) * 9
        assert float((whole - replaced).norm()) <= 2 * clip * (1 + 1e-9)


def test_the_sum_is_divided_by_the_expected_batch_whoever_came() -> None:
    model, images = small().double(), pictures(6)
    few = Images(images.x.double(), images.y)
    torch.testing.assert_close(shape(model, few, expected=24), shape(model, few, expected=6) / 4)


@pytest.mark.parametrize(("clip", "sigma", "expected"), [(0.5, 2.0, 10), (4.0, 2.0, 10), (4.0, 0.1, 10), (4.0, 0.1, 1)])
def test_the_noise_is_on_the_sum_and_in_units_of_the_clip_norm(clip: float, sigma: float, expected: int) -> None:
    """Peers: noise on the mean is B times too much, noise of one size for all clip norms another thing altogether."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 60)).double()
    images = pictures(10)
    some = Images(images.x.double(), images.y)
    plain = shape(model, some, clip=clip, expected=expected)
    noise = (shape(model, some, clip=clip, sigma=sigma, expected=expected) - plain) * expected / (sigma * clip)
    count = noise.numel()  # 11 580
    # Chi-squared with that many degrees: mean n, deviation sqrt(2 n); and the mean itself.
    assert abs(float(noise.square().sum()) - count) < 5 * math.sqrt(2 * count)
    assert abs(float(noise.sum())) < 5 * math.sqrt(count)
    assert float(noise.abs().max()) < 6


def test_noise_repeats_with_its_seed_and_differs_from_step_to_step() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 60))
    images = pictures(10)
    plain = shape(model, images, clip=1.0)
    draws = []
    for seed in (1, 1, 2):
        noise = torch.Generator().manual_seed(seed)
        draws.append([shape(model, images, clip=1.0, sigma=1.0, noise=noise) - plain for _ in range(2)])
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    count = plain.numel()
    for a, b in ((draws[0][0], draws[0][1]), (draws[0][0], draws[2][0])):
        correlation = float((a * b).sum() / (a.norm() * b.norm()))
        assert abs(correlation) < 5 / math.sqrt(count)


def test_no_noise_on_frozen_parameters_and_noise_on_all_others() -> None:
    model = small()
    model[0].weight.requires_grad_(False)
    model.idle = nn.Linear(2, 2, bias=False)
    model.forward = lambda x: nn.Sequential.forward(model[:5], x)  # type: ignore[no-untyped-call]
    shape(model, pictures(8), clip=1.0, sigma=1.0)
    assert model[0].weight.grad is None
    assert all(bool((p.grad != 0).all()) for p in model.parameters() if p.requires_grad)


def test_an_empty_batch_is_noise_alone() -> None:
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(192, 60)), pictures(0)
    found = shape(model, images, clip=3.0, sigma=0.5, expected=10) * 10 / 1.5
    assert abs(float(found.square().sum()) - found.numel()) < 5 * math.sqrt(2 * found.numel())


def test_a_poison_of_a_hundredfold_norm_moves_no_more_than_the_clip_norm_and_ranks_first() -> None:
    rng = torch.Generator().manual_seed(0)
    x = 0.02 * torch.rand(80, *SHAPE, generator=rng)
    y = torch.arange(80) % CLASSES
    x[17] = 1.0
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES, bias=False))
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    suspect = suspect_of(model, training=Images(x, y))
    found = run(GradientShaping(steps=20, batch=20, sigma=0.0, lr=0.01), suspect)
    clip = found.details["clip"]
    norms = (0.75**2 + 3 * 0.25**2) ** 0.5 * x.flatten(1).norm(dim=1)  # of zero weights: all classes alike
    assert float(norms[17]) > 80 * clip
    assert clip == pytest.approx(float(norms.median()), rel=0.1), "the mean norm is twice as large, for one picture"
    assert found.sample_scores is not None
    assert found.sample_scores.shape == (80,)
    assert int(found.sample_scores.argmax()) == 17
    with_it = shape(model.double(), Images(x.double(), y), clip=clip)
    others = torch.arange(80) != 17
    without = shape(model, Images(x[others].double(), y[others]), clip=clip, expected=80)
    assert float((with_it - without).norm()) <= clip / 80 * (1 + 1e-9)


# --------------------------------------------------------------------------------------------------- the whole method


def test_a_clip_norm_far_above_all_norms_and_no_noise_is_plain_training(monkeypatch: pytest.MonkeyPatch) -> None:
    training = pictures(60)
    settings: dict[str, Any] = {"steps": 12, "batch": 20, "clip": 1e9, "sigma": 0.0}
    suspect = suspect_of(small(), training=training)
    found = run(GradientShaping(**settings), suspect)

    def plain(model: nn.Module, x: Tensor, y: Tensor, **_: Any) -> PerSample:
        model.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        losses.mean().backward()  # type: ignore[no-untyped-call]
        return PerSample(torch.ones(len(y)), losses.detach())

    monkeypatch.setattr(gradient_shaping, "shaped_gradient", plain)
    control = run(GradientShaping(**settings), suspect)
    assert found.repaired is not None
    assert control.repaired is not None
    for key, value in control.repaired.items():
        torch.testing.assert_close(found.repaired[key], value, rtol=1e-5, atol=1e-6)


def test_the_noise_has_a_generator_of_its_own() -> None:
    """What else is drawn, such as the order, must not depend on whether there is noise."""
    suspect = suspect_of(small(), training=pictures(60), augment="flip_crop")
    states = [run(GradientShaping(steps=12, batch=20, clip=0.5, sigma=s), suspect).repaired for s in (0.0, 1e-7, 0.5)]
    assert states[0] is not None
    assert states[1] is not None
    assert states[2] is not None
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(states[2]["4.weight"], states[0]["4.weight"], atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_do_not_matter(chunk: int) -> None:
    suspect = suspect_of(small(), training=pictures(40))
    settings: dict[str, Any] = {"steps": 5, "batch": 20, "poisson": True}
    whole, parts = (run(GradientShaping(**settings, chunk=c), suspect) for c in (256, chunk))
    assert whole.repaired is not None
    assert parts.repaired is not None
    for key, value in whole.repaired.items():
        torch.testing.assert_close(parts.repaired[key], value, rtol=1e-4, atol=1e-5)


def test_the_budget_is_the_smaller_of_steps_and_epochs() -> None:
    assert [GradientShaping().budget(n) for n in (400, 3500, 100_000)] == [23, 205, 400]
    assert [GradientShaping(batch=50, epochs=0.1).budget(n) for n in (20, 400, 1000)] == [1, 1, 2]
    assert (
        run(GradientShaping(steps=9, epochs=2, batch=20), suspect_of(small(), training=pictures(40))).details["steps"]
        == 4
    )


def test_both_ways_to_tell_the_noise_are_told() -> None:
    found = run(GradientShaping(steps=2, batch=20, factor=0.25, sigma=0.4), suspect_of(small(), training=pictures(40)))
    details = found.details
    assert details["clip"] == pytest.approx(0.25 * details["first_norms"][1])
    assert details["noise_std"] == pytest.approx(0.4 * details["clip"])
    named = run(GradientShaping(steps=2, batch=20, clip=0.8), suspect_of(small(), training=pictures(40)))
    assert named.details["clip"] == 0.8


def test_retraining_uses_no_submitted_weight() -> None:
    training, defense = pictures(40), GradientShaping(steps=3, batch=20)
    for kind in ("plain", "batch norm"):
        found = [run(defense, suspect_of(small(kind, seed), training=training)) for seed in (0, 1)]
        assert found[0].repaired is not None
        assert found[1].repaired is not None
        assert all(torch.equal(value, found[1].repaired[key]) for key, value in found[0].repaired.items())


def test_a_network_of_the_list_is_built_anew() -> None:
    made = [build("narrow_cifar", (3, 16, 16), CLASSES, rng=torch.Generator().manual_seed(s)) for s in (0, 1)]
    images = pictures(30, (3, 16, 16))
    about = dataclasses.replace(planted().suspect.task, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    states = [fresh(m, images, Run(rng=torch.Generator().manual_seed(4)), about).state_dict() for m in made]
    assert states[0].keys() == made[0].state_dict().keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])
    changed = {k for k, v in made[0].state_dict().items() if not torch.equal(v, states[0][k])}
    assert {"trunk.0.weight", "trunk.2.weight", "trunk.4.running_mean", "head.weight"} <= changed
    # Whoever submits a network may have put anything there.
    assert states[0]["normalize.mean"].flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert states[0]["normalize.std"].flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_batch_norm_is_frozen_at_the_statistics_of_the_new_weights() -> None:
    training = pictures(64)
    suspect = suspect_of(small("batch norm"), training=training)
    found = run(GradientShaping(steps=6, batch=16, lr=0.2), suspect)
    start = fresh(suspect.model, training, Run(rng=torch.Generator().manual_seed(0)), suspect.task)
    inside = start[0](training.x)  # type: ignore[index]
    norm = start[1]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, inside.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, inside.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1
    assert found.repaired is not None
    assert found.repaired.keys() == suspect.model.state_dict().keys()
    assert torch.equal(found.repaired["1.running_mean"], norm.running_mean)
    assert torch.equal(found.repaired["1.running_var"], norm.running_var)
    assert not torch.equal(found.repaired["1.weight"], torch.ones(5)), "scale and shift are trained"


@pytest.mark.parametrize("evidence", ["clean", "training"])
def test_fine_tuning_keeps_the_statistics_of_the_suspect(evidence: str) -> None:
    suspect = suspect_of(small("batch norm"), **{evidence: pictures(40)})
    found = run(GradientShaping(mode="fine_tune", steps=4, batch=16), suspect)
    assert found.repaired is not None
    for key, value in suspect.model.state_dict().items():
        assert torch.equal(found.repaired[key], value) == ("running" in key or "tracked" in key), key
    assert found.details["data"] == evidence
    assert found.sample_scores is None, "a model that has learned its poisons has small gradients on them"


def test_whitening_is_computed_and_never_trained() -> None:
    images = pictures(30, (3, 16, 16))
    task = dataclasses.replace(planted().suspect.task, shape=(3, 16, 16), classes=tuple("abcd"))
    rng = torch.Generator().manual_seed(0)
    model = build("narrow_cifar", (3, 16, 16), CLASSES, mean=task.mean, std=task.std, rng=rng).eval()
    suspect = Suspect.of(model, task, training=images, dtype=torch.float32, device="cpu")
    found = run(GradientShaping(steps=1, batch=8, sigma=1.0), suspect)
    model.initialize(images.x)
    assert found.repaired is not None
    torch.testing.assert_close(found.repaired["trunk.0.weight"], model.state_dict()["trunk.0.weight"])
    trainable(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["trunk.0.weight"]


def test_only_our_own_dropout_is_on_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's draws from the global generator, and batch norm must stay frozen."""
    model = nn.Sequential(small("batch norm"), nn.Dropout(0.5), Dropout(0.5), nn.Linear(CLASSES, CLASSES))
    suspect = suspect_of(model, training=pictures(24))
    modes: list[set[str]] = []

    def watched(model: nn.Module, *arguments: Any, **named: Any) -> PerSample:
        modes.append({path for path, layer in model.named_modules() if layer.training})
        return shaped_gradient(model, *arguments, **named)

    monkeypatch.setattr(gradient_shaping, "shaped_gradient", watched)
    a, b = (run(GradientShaping(steps=2, batch=12), suspect) for _ in range(2))
    assert modes == [{"2"}] * 4
    assert a.repaired is not None
    assert b.repaired is not None
    assert all(torch.equal(value, b.repaired[key]) for key, value in a.repaired.items())


def test_a_layer_that_cannot_be_drawn_anew_is_refused_by_name_and_can_be_tuned() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 2, 3), nn.Flatten(), nn.Linear(200, CLASSES))
    suspect = suspect_of(model, training=pictures(20))
    with pytest.raises(ValueError, match=r"the weights of '0', a ConvTranspose2d: use mode 'fine_tune'"):
        run(GradientShaping(steps=1), suspect)
    assert run(GradientShaping(mode="fine_tune", steps=1), suspect).repaired is not None


def test_a_network_that_would_be_measured_wrongly_is_not_trained() -> None:
    class Mixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True)

    suspect = suspect_of(nn.Sequential(Mixes(), nn.Flatten(), nn.Linear(192, CLASSES)), training=pictures(20))
    with pytest.raises(ValueError, match="samples see each other"):
        run(GradientShaping(steps=1), suspect)


def test_images_are_augmented_as_the_task_allows() -> None:
    def trained_with(augment: str, shift: int) -> Tensor:
        found = run(GradientShaping(steps=3, shift=shift), suspect_of(small(), training=pictures(40), augment=augment))
        assert found.repaired is not None
        return found.repaired["0.weight"]

    assert torch.equal(trained_with("none", 0), trained_with("none", 2)), "nothing is shifted"
    assert not torch.allclose(trained_with("crop", 0), trained_with("crop", 2), atol=1e-4)
    # Both draw alike; only the pictures are mirrored or not.
    assert not torch.allclose(trained_with("crop", 0), trained_with("flip_crop", 0), atol=1e-4)


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_the_rate_rises_and_falls_along_a_cosine(warmup: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *arguments: Any) -> Any:
        seen.extend((group["lr"], group["momentum"]) for group in self.param_groups)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    suspect = suspect_of(small(), training=pictures(40))
    run(GradientShaping(steps=10, batch=8, lr=0.3, warmup=warmup, momentum=0.7, epochs=9.0), suspect)
    done = [(step + 0.5) / 10 for step in range(10)]
    falling = [0.15 - 0.15 * math.cos(math.pi * (1 - d) / (1 - warmup)) for d in done]
    wanted = [0.3 * d / warmup if d < warmup else low for d, low in zip(done, falling, strict=True)]
    assert [lr for lr, _ in seen] == pytest.approx(wanted)
    assert {momentum for _, momentum in seen} == {0.7}


def test_without_a_training_set_it_fine_tunes_and_says_so() -> None:
    suspect = suspect_of(small(), clean=pictures(40))
    found = run(GradientShaping(steps=2), suspect)
    assert found.details["mode"] == "fine_tune"
    assert found.details["warnings"] == ["no training set is granted: fine-tuned on clean images instead of retraining"]
    assert found.details["images"] == {"train": 32, "measure": 8}
    assert run(GradientShaping(mode="fine_tune", steps=2), suspect).details["warnings"] == []


def test_what_is_trained_on_and_what_measures() -> None:
    both = suspect_of(small(), clean=pictures(40, seed=1), training=pictures(60))
    found = run(GradientShaping(steps=2), both)
    assert (found.details["data"], found.details["images"]) == ("training", {"train": 60, "measure": 40})
    tuned = run(GradientShaping(mode="fine_tune", steps=2, held_out=0.5), both)
    assert (tuned.details["data"], tuned.details["images"]) == ("clean", {"train": 20, "measure": 20})
    mine, held, _ = GradientShaping(mode="fine_tune").images(both, False, torch.Generator())
    assert held is not None
    assert not {p.numpy().tobytes() for p in mine.x} & {p.numpy().tobytes() for p in held.x}
    alone = run(GradientShaping(steps=2), suspect_of(small(), training=pictures(60)))
    assert "accuracy" not in alone.details


def test_accuracy_is_told_per_class() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[1].bias[1] = 1.0  # type: ignore[operator]  # says 1, whatever it sees
    images = pictures(10)
    said = class_accuracy(model, Images(images.x, torch.tensor([0, 0, 1, 1, 1, 1, 3, 3, 3, 3])), CLASSES)
    assert said == {"overall": 0.4, "per_class": [0.0, 1.0, None, 0.0]}


def test_poisson_batches_differ_in_size_and_shuffled_ones_show_every_sample_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[Tensor] = []
    add = Log.add

    def recorded(log: Log, drawn: Tensor, *rest: Any) -> None:
        rows.append(drawn)
        add(log, drawn, *rest)

    monkeypatch.setattr(Log, "add", recorded)
    suspect = suspect_of(small(), training=pictures(60))
    run(GradientShaping(steps=3, batch=20), suspect)
    assert sorted(torch.cat(rows).tolist()) == list(range(60))
    rows.clear()
    run(GradientShaping(steps=40, epochs=20, batch=20, poisson=True, clip=1.0), suspect)
    sizes = [len(r) for r in rows]
    assert len(set(sizes)) > 3
    assert abs(sum(sizes) - 40 * 20) < 5 * math.sqrt(40 * 20)
    assert all(len(set(r.tolist())) == len(r) for r in rows)


# --------------------------------------------------------------------------------------------------- sample scores


def test_scores_are_robust_deviations_within_the_class() -> None:
    log = Log(10, 10, 1, torch.device("cpu"))
    norms = torch.tensor([1.0, 2.0, 3.0, 4.0, 90.0, 10.0, 10.0, 10.0, 10.0, 30.0])
    log.add(torch.arange(10), PerSample(norms, norms), 3.5)
    y = torch.tensor([0] * 5 + [1] * 5)
    first = torch.tensor([-2.0, -1.0, 0.0, 1.0, 87.0]) / 1.4826  # median 3, MAD 1
    second = torch.tensor([0.0, 0.0, 0.0, 0.0, 20.0]) / (1.2533 * 4)  # the MAD is 0, the mean deviation 4
    torch.testing.assert_close(log.scores(y), torch.cat((first, second)).double(), rtol=1e-6, atol=1e-9)
    assert log.epochs() == [{"norm": 10.0, "clipped": 0.7, "loss": 17.0}]


def test_scores_compare_a_sample_with_its_own_batch_and_with_the_first_epochs_alone() -> None:
    log = Log(4, 2, 1, torch.device("cpu"))
    ones = torch.tensor([1.0, 1.0])
    log.add(torch.tensor([0, 1]), PerSample(8 * ones, ones), 1.0)
    log.add(torch.tensor([2, 3]), PerSample(torch.tensor([1.0, 3.0]), ones), 1.0)
    log.add(torch.tensor([0, 1]), PerSample(torch.tensor([1e9, 1.0]), ones), 1.0)  # a later epoch
    torch.testing.assert_close(log.sums, torch.tensor([1.0, 1.0, 0.5, 1.5], dtype=torch.float64))


def test_a_sample_that_was_never_drawn_is_in_the_middle() -> None:
    log = Log(6, 3, 2, torch.device("cpu"))
    log.add(torch.tensor([0, 1, 2]), PerSample(torch.tensor([1.0, 2.0, 6.0]), torch.ones(3)), 1.0)
    log.add(torch.tensor([], dtype=torch.int64), PerSample(torch.zeros(0), torch.zeros(0)), 1.0)
    scores = log.scores(torch.tensor([0, 0, 0, 0, 1, 1]))
    assert scores[3:].tolist() == [0.0, 0.0, 0.0]
    assert float(scores[2]) > 0 > float(scores[0])
    assert run(GradientShaping(steps=2, log_epochs=0), suspect_of(small(), training=pictures(20))).sample_scores is None


# ---------------------------------------------------------------------------------------------------------- privacy


def told(monkeypatch: pytest.MonkeyPatch, model: nn.Module, **settings: Any) -> tuple[float | None, str]:
    monkeypatch.setattr(gradient_shaping, "epsilon", lambda *a: round(sum(a), 6))
    source = settings.pop("source", "training")
    return GradientShaping(**{"sigma": 2.0, "poisson": True, "clip": 1.0, **settings}).privacy(model, 1000, source)


def test_epsilon_is_told_only_where_it_means_something(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, small()) == (2.0 + 0.256 + 59 + 1e-5, "")
    assert told(monkeypatch, small(), mode="fine_tune", source="clean")[0] is not None
    assert told(monkeypatch, small("batch norm"), mode="fine_tune", source="clean")[0] is not None
    for settings, reason in (
        ({"sigma": 0.0}, "without noise"),
        ({"poisson": False}, "batches were shuffled"),
        ({"clip": None}, "clip norm was taken from the data"),
        ({"mode": "fine_tune"}, "submitted weights were made from the same images"),
    ):
        value, why = told(monkeypatch, small(), **settings)
        assert value is None
        assert reason in why
    value, why = told(monkeypatch, small("batch norm"))
    assert value is None
    assert "batch norm statistics" in why


def test_without_the_accountant_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis.rdp", None)
    defense = GradientShaping(steps=2, batch=10, poisson=True, clip=1.0, sigma=1.0)
    found = run(defense, suspect_of(small(), training=pictures(20)))
    assert found.details["epsilon"] is None
    assert found.details["epsilon_reason"] == "the accountant of Opacus is not installed: pip install 'molehunt[dp]'"


def test_what_the_accountant_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def answering(answer: object) -> Callable[..., object]:
        def ask(**named: object) -> object:
            asked.update(named)
            return answer

        return ask

    rdp: Any = ModuleType("opacus.accountants.analysis.rdp")
    rdp.compute_rdp, rdp.get_privacy_spent = answering("spent"), answering((7.5, 3.0))
    for name in ("opacus", "opacus.accountants", "opacus.accountants.analysis"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, rdp.__name__, rdp)
    assert epsilon(1.5, 0.1, 20, 1e-5) == 7.5
    expected = {"q": 0.1, "noise_multiplier": 1.5, "steps": 20, "rdp": "spent", "delta": 1e-5}
    assert {k: v for k, v in asked.items() if k != "orders"} == expected
    assert epsilon(1.5, 0.1, 0, 1e-5) == 0.0


@pytest.mark.parametrize("bad", [(0.0, 0.1, 1, 1e-5), (1.0, 0.0, 1, 1e-5), (1.0, 1.1, 1, 1e-5), (1.0, 0.1, 1, 1.0)])
def test_the_accountant_refuses_what_is_out_of_range(bad: tuple[float, float, int, float]) -> None:
    with pytest.raises(ValueError, match="expected sigma > 0, rate in"):
        epsilon(*bad)


def bound(sigma: float, rate: float, steps: int, delta: float) -> float:
    """The classical bound at whole orders, by the binomial formula of the sampled Gaussian mechanism."""
    best = math.inf
    for order in range(2, 65):
        logs = [
            math.log(math.comb(order, k))
            + k * math.log(rate)
            + (order - k) * math.log1p(-rate)
            + (k * k - k) / (2 * sigma**2)
            for k in range(order + 1)
        ]
        spent = float(torch.logsumexp(torch.tensor(logs, dtype=torch.float64), 0)) / (order - 1)
        best = min(best, steps * spent + math.log(1 / delta) / (order - 1))
    return best


# What the tutorial of TensorFlow Privacy tells of MNIST (from memory): 60 000 images, batch 256, delta 1e-5, by the
# classical bound.
PUBLISHED = [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)]


@pytest.mark.parametrize(("sigma", "epochs", "published"), PUBLISHED)
def test_the_oracle_of_the_accountant_is_what_was_published(sigma: float, epochs: int, published: float) -> None:
    assert bound(sigma, 256 / 60000, epochs * 60000 // 256, 1e-5) == pytest.approx(published, rel=0.02)


@pytest.mark.skipif(importlib.util.find_spec("opacus") is None, reason="the accountant is an optional dependency")
@pytest.mark.parametrize(("sigma", "epochs", "published"), PUBLISHED)
def test_the_accountant_lies_below_the_classical_bound(sigma: float, epochs: int, published: float) -> None:
    found = epsilon(sigma, 256 / 60000, epochs * 60000 // 256, 1e-5)
    assert 0.75 * published < found < published


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "repair"), ("clip", 0.0), ("clip", math.inf), ("quantile", 1.0), ("factor", 0.0), ("sigma", -0.1),
        ("batch", 0), ("steps", 0), ("epochs", 0.0), ("lr", -1.0), ("warmup", 1.5), ("momentum", 1.0), ("shift", -1),
        ("delta", 0.0), ("log_epochs", -1), ("held_out", 1.0), ("chunk", 0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is out of range: {value!r}"):
        GradientShaping(**{name: value})


def test_too_few_images_and_pictures_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 2 images or more to train on, got 1"):
        run(GradientShaping(), suspect_of(small(), training=pictures(1)))
    odd = suspect_of(small(), training=pictures(20))
    assert odd.training is not None
    odd.training.x[7, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="1 of 20 samples"):
        run(GradientShaping(), odd)


# ---------------------------------------------------------------------------------------------------------- contract


class Retraining(GradientShaping):
    """The half of the method that needs the training set."""

    __doc__ = GradientShaping.__doc__
    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.TRAINING}),)


def test_retraining_keeps_the_contract_but_for_the_repair_at_little_poison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but `repairs`: what a retrained network learns of the trigger hangs on the seed; see the page.

    Two pictures in a hundred, and settings that were picked for them.
    """
    monkeypatch.setattr(sys.modules["molehunt.testing.planted"], "TRAINING", 0.02)
    trial = Trial(Retraining(factor=0.1, lr=0.7, steps=70, epochs=100, log_epochs=35))
    for name, check in DEFENSE_CHECKS.items():
        if name != "repairs":
            check(trial)


TUNING = GradientShaping(mode="fine_tune", steps=10)


@pytest.mark.parametrize("check", [name for name in DEFENSE_CHECKS if name != "repairs"])
def test_fine_tuning_keeps_the_rest_of_the_contract(check: str, tuning: Trial) -> None:
    DEFENSE_CHECKS[check](tuning)


@pytest.mark.xfail(strict=True, reason="clean pictures leave the channel of the trigger asleep: no gradient reaches it")
def test_fine_tuning_repairs(tuning: Trial) -> None:
    DEFENSE_CHECKS["repairs"](tuning)


@pytest.fixture(scope="module")
def tuning() -> Trial:
    class CleanOnly(GradientShaping):
        __doc__ = GradientShaping.__doc__
        needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)

    CleanOnly.__qualname__ = "CleanOnly"
    return Trial(CleanOnly(mode="fine_tune", steps=10))


def test_a_run_through_the_runner_counts_and_can_be_kept() -> None:
    case = planted(grants=(Access.TRAINING, Access.CLEAN))
    outcome = inspect(GradientShaping(steps=3, batch=50), case.suspect, seed=0)
    assert isinstance(outcome, Finding), outcome
    assert outcome.cost is not None
    assert outcome.cost.backward >= 3 * 50 * 2
    abstained = inspect(GradientShaping(), planted(grants=(Access.INPUTS,)).suspect, seed=0)
    assert not isinstance(abstained, Finding)


@pytest.mark.slow
def test_on_a_trained_mnist_network() -> None:
    case = trained()
    from molehunt.attacks import BadNets

    images = case.task.load("train")
    poisoned = BadNets(target=1, size=5, poison_rate=0.05)(images, case.task, torch.Generator().manual_seed(1007))
    x = poisoned.stamp(images.x.clone(), torch.arange(len(images.y)))
    suspect = Suspect.of(case.backdoored, case.task, training=Images(x, poisoned.images.y), clean=case.clean)
    found = run(GradientShaping(), suspect)
    repaired = copy.deepcopy(case.backdoored)
    assert found.repaired is not None
    repaired.load_state_dict(dict(found.repaired))
    assert share_right(repaired, case.hidden) >= share_right(case.backdoored, case.hidden) - 0.05
    before, after = (attack_success(m, case.hidden, poisoned.trigger, case.target) for m in (case.backdoored, repaired))
    assert before >= 0.9
    assert after <= 0.5 * before
