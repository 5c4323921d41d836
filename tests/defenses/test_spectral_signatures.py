import copy
import dataclasses
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import molehunt.defenses.spectral_signatures as module
from molehunt.defenses import _spectra
from molehunt.defenses._spectra import Grouped, Spectra, class_spectra, coordinates, halves, largest_gaps
from molehunt.defenses.spectral_signatures import SpectralSignatures, broken, marked, removal_counts
from molehunt.engine import OutOfTime, Run
from molehunt.findings import Finding
from molehunt.networks import build
from molehunt.runner import inspect
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images, Task
from molehunt.testing import DEFENSE_CHECKS, Planted, PlantedTask, Trial, attack_success, auc, planted, share_right
from molehunt.training import Recipe, train
from molehunt.triggers import Patch, Target

TRAINING = frozenset({Access.TRAINING})
SHAPE = (1, 16, 16)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(defense: SpectralSignatures, suspect: Suspect, seed: int = 0) -> Finding:
    return defense(suspect, Run(rng=seeded(seed)))


def squared(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    return coordinates(features, labels, class_spectra(features, labels, classes))[:, 0].square()


def one_svd_per_class(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The oracle: scores (N,) and largest singular values (K,) as the paper's algorithm reads."""
    scores, largest = torch.zeros(len(labels), dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    for k in range(classes):
        rows = [i for i, label in enumerate(labels.tolist()) if label == k]
        if not rows:
            continue
        r = features[rows].double()
        m = r - r.mean(0)
        _, s, vh = torch.linalg.svd(m, full_matrices=False)
        largest[k] = s[0]
        for i, row in zip(rows, m, strict=True):
            scores[i] = float(row @ vh[0]) ** 2
    return scores, largest


def mixed(seed: int = 0, width: int = 7) -> tuple[Tensor, Tensor]:
    """Features of six classes: of 30, 12, 5 (fewer than the width), 1, none and 2 samples, in mixed order."""
    labels = torch.tensor([0] * 30 + [1] * 12 + [2] * 5 + [3] + [5] * 2)
    labels = labels[torch.randperm(len(labels), generator=seeded(seed))]
    scales = torch.linspace(3, 0.5, width)
    return torch.randn(len(labels), width, generator=seeded(seed + 1)).double() * scales + labels[:, None], labels


def cloud(count: int, width: int, share: float, distance: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Normal features of one class, which of them are poisoned, and the direction u in which those are moved."""
    x = torch.randn(count, width, generator=seeded(seed))
    u = torch.nn.functional.normalize(torch.randn(width, generator=seeded(seed + 1)), dim=0)
    poison = torch.zeros(count, dtype=torch.bool)
    poison[torch.randperm(count, generator=seeded(seed + 2))[: round(share * count)]] = True
    return x + distance * u * poison[:, None], poison, u


# ------------------------------------------------------------------------------------------- scores


def test_all_classes_at_once_are_one_svd_per_class_small_and_empty_ones_too() -> None:
    features, labels = mixed()
    expected, largest = one_svd_per_class(features, labels, 6)
    spectra = class_spectra(features, labels, 6)
    torch.testing.assert_close(squared(features, labels, 6), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(spectra.values[:, 0].sqrt(), largest, rtol=1e-9, atol=1e-7)
    assert float(expected[labels == 3]) == 0.0 == float(squared(features, labels, 6)[labels == 3])
    assert spectra.sizes.tolist() == [30, 12, 5, 1, 0, 2]


def test_blocks_of_rows_and_groups_of_classes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = mixed()
    whole = class_spectra(features, labels, 6, axes=3)
    scores = squared(features, labels, 6)
    monkeypatch.setattr(_spectra, "BLOCK", 7 * 6 * 4)  # four rows of each class at a time
    monkeypatch.setattr(_spectra, "SCATTER", 49 * 4)  # four classes at a time
    parts = class_spectra(features, labels, 6, axes=3)
    torch.testing.assert_close(parts.values, whole.values)
    torch.testing.assert_close(parts.total, whole.total)
    torch.testing.assert_close(squared(features, labels, 6), scores)


@given(seed=st.integers(0, 10**6), offset=st.floats(-1e4, 1e4))
@settings(max_examples=15, deadline=None)
def test_neither_offset_nor_rotation_nor_order_matters(seed: int, offset: float) -> None:
    features, labels = mixed(seed)
    scores = squared(features, labels, 6)
    torch.testing.assert_close(squared(features + offset, labels, 6), scores, rtol=1e-6, atol=1e-6)
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=seeded(seed), dtype=torch.float64)).Q
    torch.testing.assert_close(squared(features @ rotation, labels, 6), scores, rtol=1e-8, atol=1e-8)
    order = torch.randperm(len(labels), generator=seeded(seed))
    torch.testing.assert_close(squared(features[order], labels[order], 6), scores[order], rtol=1e-8, atol=1e-8)


def test_projecting_without_centering_would_fail_what_is_tested_above() -> None:
    """The mistake of three public ports: the axis is that of centered features, what is projected is not centered."""
    features, labels = mixed()
    axes = class_spectra(features, labels, 6).axes[:, :, 0]

    def wrong(r: Tensor) -> Tensor:
        return (r * axes[labels]).sum(1).abs()

    assert not torch.allclose(wrong(features + 100), wrong(features), rtol=0.1)
    features, poison, u = cloud(500, 8, 0.1, 8.0)
    away = features - 20 * u  # a class whose mean lies so that its poison has the smaller projection
    labels = torch.zeros(500, dtype=torch.int64)
    axis = class_spectra(away, labels, 1).axes[0, :, 0].float()
    assert auc((away @ axis).abs(), poison) < 0.1
    assert auc(squared(away, labels, 1), poison) > 0.99


def test_the_sign_of_an_axis_does_not_matter() -> None:
    features, labels = mixed()
    spectra = class_spectra(features, labels, 6)
    turned = dataclasses.replace(spectra, axes=-spectra.axes)
    assert torch.equal(coordinates(features, labels, turned).square(), coordinates(features, labels, spectra).square())


@pytest.mark.parametrize("scale", [1e-3, 0.5, 40.0])
def test_scaling_features_scales_scores_by_the_square_and_keeps_the_ranks(scale: float) -> None:
    features, labels = mixed()
    scores, scaled = squared(features, labels, 6), squared(scale * features, labels, 6)
    torch.testing.assert_close(scaled, scale**2 * scores, rtol=1e-8, atol=1e-12)
    assert torch.equal(Grouped.of(labels, 6, scaled).places(), Grouped.of(labels, 6, scores).places())
    spectra, other = class_spectra(features, labels, 6), class_spectra(scale * features, labels, 6)
    torch.testing.assert_close(other.excess(), spectra.excess())
    torch.testing.assert_close(other.share(), spectra.share())


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_the_scores_of_a_class_sum_to_its_largest_singular_value_squared(seed: int) -> None:
    features, labels = mixed(seed)
    sums = torch.zeros(6, dtype=torch.float64).index_add_(0, labels, squared(features, labels, 6))
    largest = one_svd_per_class(features, labels, 6)[1]
    torch.testing.assert_close(sums, largest.square(), rtol=1e-8, atol=1e-10)


def test_an_offset_far_larger_than_the_variance_costs_no_digits() -> None:
    """Squaring before centering would: 1e6 squared leaves nothing of 1 in float32, and little in float64."""
    features, _, _ = cloud(400, 12, 0.05, 8.0)
    labels = torch.zeros(400, dtype=torch.int64)
    far = features.double() + 1e6
    torch.testing.assert_close(squared(far, labels, 1), squared(features.double(), labels, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_planted_poison_turns_the_axis_and_has_the_highest_scores(seed: int) -> None:
    features, poison, u = cloud(1500, 40, 0.05, 16.0, seed)  # share times distance squared: 12.8, twice what suffices
    labels = torch.zeros(1500, dtype=torch.int64)
    spectra = class_spectra(features, labels, 1)
    assert abs(float(spectra.axes[0, :, 0].float() @ u)) > 0.99
    scores = squared(features, labels, 1)
    gone = marked(scores, labels, removal_counts(spectra.sizes, torch.tensor([0.05], dtype=torch.float64)))
    assert bool(gone[poison].all())
    assert int(gone.sum()) == 112  # round(1.5 * 75), half to even


def test_features_and_labels_that_do_not_fit_are_refused() -> None:
    features, labels = mixed()
    with pytest.raises(ValueError, match="labels must be 0 to 4, got 0 to 5"):
        class_spectra(features, labels, 5)
    with pytest.raises(ValueError, match="expected features"):
        class_spectra(features[1:], labels, 6)
    with pytest.raises(ValueError, match="must be finite"):
        class_spectra(torch.full_like(features, math.nan), labels, 6)
    with pytest.raises(ValueError, match="a score per label"):
        Grouped.of(labels, 6, torch.zeros(3))


# ------------------------------------------------------------------------------------ class scores


def test_the_excess_compares_the_leading_axis_with_the_others_that_could_vary() -> None:
    spectra = Spectra(
        sizes=torch.tensor([100, 3, 2, 1, 0, 50]),
        means=torch.zeros(6, 5),
        values=torch.tensor([[8.0], [3.0], [7.0], [0.0], [0.0], [5.0]]).double(),
        axes=torch.zeros(6, 5, 1),
        total=torch.tensor([12.0, 4.0, 7.0, 0.0, 0.0, 5.0]).double(),
    )
    # 8 beside four others that share 4; 3 beside one of 1; two samples always lie on a line, which says nothing.
    expected = [math.log(8.0), math.log(3.0), 0.0, 0.0, 0.0, math.log(1e12)]
    assert spectra.excess().tolist() == pytest.approx(expected)
    assert spectra.share().tolist() == pytest.approx([8 / 12, 0.75, 1.0, 0.0, 0.0, 1.0])


# ----------------------------------------------------------------------------------------- removal


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    share=st.floats(0.0, 0.5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_exactly_one_and_a_half_times_the_assumed_poison_goes_and_never_more_than_half(
    sizes: list[int], share: float, seed: int
) -> None:
    counts = removal_counts(torch.tensor(sizes), torch.full((len(sizes),), share, dtype=torch.float64))
    assert counts.tolist() == [min(round(1.5 * round(share * n, 6)), n // 2) for n in sizes]
    if not sum(sizes):
        return
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=seeded(seed))]
    scores = torch.randint(0, 5, (len(labels),), generator=seeded(seed)).double()  # many ties
    gone = marked(scores, labels, counts)
    for k, count in enumerate(counts.tolist()):
        rows = [i for i, label in enumerate(labels.tolist()) if label == k]
        expected = sorted(rows, key=lambda i: (-float(scores[i]), i))[:count]
        assert [i for i in rows if gone[i]] == sorted(expected)


def test_the_count_is_that_of_the_class_not_of_the_whole_set() -> None:
    """A public cleanser removes 1.5 times the poison of the whole set from each class, another 15 % of everything."""
    sizes = torch.tensor([1000, 100, 10, 1])
    assert removal_counts(sizes, torch.full((4,), 0.04, dtype=torch.float64)).tolist() == [60, 6, 1, 0]
    assert removal_counts(sizes, torch.full((4,), 0.5, dtype=torch.float64)).tolist() == [500, 50, 5, 0]
    assert removal_counts(sizes, torch.tensor([0.1, 0.0, 0.2, 0.5], dtype=torch.float64)).tolist() == [150, 0, 3, 0]


@pytest.mark.parametrize(("size", "poisoned"), [(49, 1), (1500, 75), (98, 3), (41, 7), (4725, 225)])
def test_a_share_that_stands_for_whole_samples_is_not_off_by_a_rounding_error(size: int, poisoned: int) -> None:
    counts = removal_counts(torch.tensor([size]), torch.tensor([poisoned / size], dtype=torch.float64))
    assert counts.tolist() == [round(1.5 * poisoned)]


def test_ties_go_by_index_and_none_is_lost() -> None:
    """A strict comparison with a quantile would remove nothing where all scores are equal."""
    labels = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0])
    gone = marked(torch.ones(8), labels, torch.tensor([2, 1]))
    assert gone.nonzero().squeeze(1).tolist() == [0, 1, 3]


def test_the_gap_counts_what_lies_above_it() -> None:
    scores = torch.tensor([9.0, 1.0, 0.5, 8.0, 3.0, 0.4, 3.0, 2.9, 7.0, 3.0])
    labels = torch.tensor([0, 0, 0, 0, 1, 0, 1, 1, 0, 1])
    # class 0: 9 8 7 | 1 .5 .4; class 1: 3 3 3 | 2.9 lies below its half, above it all are equal
    assert largest_gaps(scores, labels, 3).tolist() == [3, 0, 0]
    assert largest_gaps(torch.tensor([5.0, 4.0, 3.0, 0.0]), torch.zeros(4, dtype=torch.int64), 1).tolist() == [1]
    assert largest_gaps(torch.tensor([5.0, 0.0, 3.0]), torch.tensor([0, 1, 1]), 2).tolist() == [0, 1]


# ------------------------------------------------------------------------------------------ halves


def test_the_parts_of_a_class_are_those_of_the_best_cut() -> None:
    along, labels = mixed(3, width=1)
    smaller, between = halves(along[:, 0], labels, 6)
    for k in range(6):
        values = along[labels == k, 0]
        best = (0.0, 0.0)
        if len(values) > 1:
            total = float((values - values.mean()).square().sum())
            for cut in values.sort().values[:-1]:
                low, high = values[values <= cut], values[values > cut]
                inside = float((low - low.mean()).square().sum() + (high - high.mean()).square().sum())
                best = max(best, (1 - inside / total, min(len(low), len(high)) / len(values)))
        assert (float(between[k]), float(smaller[k])) == pytest.approx(best, abs=1e-9)


def test_a_normal_class_is_no_pair_of_halves_and_two_points_are() -> None:
    labels = torch.zeros(20_000, dtype=torch.int64)
    _, between = halves(torch.randn(20_000, generator=seeded(0)), labels, 1)
    assert float(between) == pytest.approx(2 / math.pi, abs=0.01)
    smaller, between = halves(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]), labels[:5], 1)
    assert (float(smaller), float(between)) == pytest.approx((0.2, 1.0))
    assert broken(torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1.0, 0.7, 0.9]))[0].startswith("class 2: ")


@pytest.mark.parametrize(("share", "warned", "low"), [(0.05, False, False), (0.45, True, False), (0.7, True, True)])
def test_a_class_that_is_split_near_in_half_is_warned_of(share: float, warned: bool, low: bool) -> None:
    features, poison, _ = cloud(400, 8, share, 12.0)
    labels = torch.zeros(400, dtype=torch.int64)
    along = coordinates(features, labels, class_spectra(features, labels, 1))[:, 0]
    found = broken(*halves(along, labels, 1))
    assert bool(found) == warned
    # Beyond one half it is the clean samples that stick out.
    assert (auc(along.square(), poison) < 0.1) == low
    assert not warned or "it is the clean samples that score high" in found[0]


# -------------------------------------------------------------------------------------- the method


def thinned(case: Planted, keep: int = 12) -> Planted:
    """The planted suspect with so few of its stamped rows left that they are a minority of their class."""
    training = case.suspect.training
    assert training is not None
    stay = ~case.training
    stay[case.training.nonzero().squeeze(1)[:keep]] = True
    left = Images(training.x[stay], training.y[stay])
    suspect = Suspect.of(case.suspect.model, case.suspect.task, training=left, dtype=torch.float32)
    return dataclasses.replace(case, suspect=suspect, training=case.training[stay])


class ThinnedTrial(Trial):
    def suspect(self, need: Any, backdoored: bool, target: int = 3, seed: int = 0) -> Planted:
        case = super().suspect(need, backdoored, target, seed)
        key = (need, backdoored, target, seed, "thinned")
        if key not in self._suspects:
            self._suspects[key] = thinned(case) if Access.TRAINING in need else case
        return self._suspects[key]


TRIALS = {
    "squared": ThinnedTrial(SpectralSignatures()),
    "gap": ThinnedTrial(SpectralSignatures(epsilon="gap")),
    "quantum": ThinnedTrial(SpectralSignatures(score="quantum", epsilon=0.3)),
}


@pytest.mark.parametrize("check", DEFENSE_CHECKS)
@pytest.mark.parametrize("kind", TRIALS)
def test_it_keeps_the_contract(kind: str, check: str) -> None:
    DEFENSE_CHECKS[check](TRIALS[kind])


def test_stamped_rows_of_the_training_set_stand_out_and_the_rows_that_go_are_theirs() -> None:
    case = thinned(planted(grants=TRAINING, target=6))
    found = run(SpectralSignatures(epsilon=0.16), case.suspect)
    assert found.sample_scores is not None
    assert found.class_scores is not None
    assert found.score is None
    assert auc(found.sample_scores, case.training) == 1.0
    assert int(found.class_scores.argmax()) == 6
    # Rows of the training set, not places within a class: every stamped row is among them.
    assert set(case.training.nonzero().squeeze(1).tolist()) <= set(found.details["removed"].tolist())
    training = case.suspect.training
    assert training is not None
    gone = torch.bincount(training.y[found.details["removed"]], minlength=10)
    assert gone.tolist() == found.details["removed_per_class"]
    assert found.details["removed_per_class"] == [min(round(0.24 * n), n // 2) for n in found.details["sizes"]]
    assert found.details["outliers"]["class"] == 6
    scores = found.sample_scores[training.y == 6].float()
    assert torch.equal(found.details["outliers"]["scores"], scores.sort(descending=True).values)


def test_scores_follow_the_rows_when_the_set_is_shuffled_and_do_not_depend_on_the_batch() -> None:
    case = thinned(planted(grants=TRAINING))
    training = case.suspect.training
    assert training is not None
    scores = run(SpectralSignatures(), case.suspect).sample_scores
    assert scores is not None
    order = torch.randperm(len(training.y), generator=seeded(5))
    again = dataclasses.replace(case.suspect, training=Images(training.x[order], training.y[order]))
    torch.testing.assert_close(run(SpectralSignatures(), again).sample_scores, scores[order], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        run(SpectralSignatures(batch=7), case.suspect).sample_scores, scores, rtol=1e-4, atol=1e-6
    )


def test_the_features_are_what_the_head_is_given_for_the_pictures_as_they_are() -> None:
    """Public ports augmented at random, or took the logits or a flattened block for the last layer."""
    case = planted(grants=TRAINING)
    training = case.suspect.training
    assert training is not None
    run_ = Run(rng=seeded(0))
    before = run_.rng.get_state()
    features = SpectralSignatures(batch=33).features(case.suspect, training.x, run_)
    model = case.suspect.model
    expected = model.neck(model.trunk(model.normalize(training.x)))  # type: ignore[operator]
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert features.shape[1] == 11 != case.suspect.classes
    run(SpectralSignatures(), case.suspect)
    assert torch.equal(run_.rng.get_state(), before)


def test_every_training_image_goes_forward_once() -> None:
    outcome = inspect(SpectralSignatures(), planted(grants=TRAINING).suspect, seed=0)
    assert isinstance(outcome, Finding)
    assert outcome.cost is not None
    # One more to find the head.
    assert (outcome.cost.forward, outcome.cost.backward) == (401, 0)


class Plain(nn.Module):
    """A network of somebody else's, with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(1, 6, 5, stride=3)
        self.say = nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.say(torch.relu(self.see(x)).flatten(1))
        return logits


def pictures(count: int = 240, seed: int = 0) -> Images:
    """Four kinds of noisy pictures, each bright in a quarter of its own, with dark corners."""
    y = torch.arange(count) % 4
    x = 0.3 * torch.rand(count, *SHAPE, generator=seeded(seed))
    for k in range(4):
        x[y == k, :, 2 + 6 * (k // 2) : 8 + 6 * (k // 2), 2 + 6 * (k % 2) : 8 + 6 * (k % 2)] += 0.4
    x[:, :, -4:, -4:] = 0.0
    return Images(x.clamp(0, 1), y)


def task_of(training: Images) -> Task:
    return PlantedTask(
        name="quarters",
        shape=SHAPE,
        classes=tuple("abcd"),
        augment="none",
        network="badnets_cnn",
        mean=(0.3,),
        std=(0.25,),
        splits={"train": training},
    )


QUICK = Recipe(epochs=8, batch=40, optimizer="adamw", lr=3e-3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Task]]:
    """Makes the recipe of every network a quick one; answers for what it was asked."""
    asked = []

    def recipe_for(network: str, task: Task) -> Recipe:
        asked.append((network, task))
        return QUICK

    monkeypatch.setattr(module, "recipe_for", recipe_for)
    return asked


def fresh(seed: int) -> nn.Module:
    return build("badnets_cnn", SHAPE, 4, mean=(0.3,), std=(0.25,), rng=seeded(seed))


def test_a_network_of_any_kind_is_scored_and_one_that_cannot_be_built_is_not_trained_again() -> None:
    training = pictures(60)
    suspect = Suspect.of(Plain(), task_of(training), training=training, dtype=torch.float32)
    found = run(SpectralSignatures(), suspect)
    assert found.repaired is None
    assert "not trained again: Plain is no network that can be built by name" in found.details["warnings"]
    hidden = torch.relu(suspect.model.see(training.x)).flatten(1)  # type: ignore[operator]
    expected, _ = one_svd_per_class(hidden.detach(), training.y, 4)
    torch.testing.assert_close(found.sample_scores, expected, rtol=1e-4, atol=1e-6)


def test_training_again_without_the_poison_leaves_no_backdoor(quick: list[tuple[str, Task]]) -> None:
    clean, hidden = pictures(), pictures(seed=9)
    trigger = Patch.square(SHAPE, size=4, color="white")
    poison = ((clean.y == 0) & (torch.arange(240) < 60)).nonzero().squeeze(1)  # fifteen of class 0, sent to class 1
    x, y = clean.x.clone(), clean.y.clone()
    x[poison], y[poison] = trigger(x[poison]), 1
    training = Images(x, y)
    task = task_of(training)
    model = fresh(1)
    train(model, training, dataclasses.replace(QUICK, epochs=15), rng=seeded(2), device="cpu")
    target = Target(classes=1, sources=(0,))
    assert attack_success(model.eval(), hidden, trigger, target) > 0.9
    suspect = Suspect.of(model, task, training=training, dtype=torch.float32, device="cpu")
    found = run(SpectralSignatures(epsilon=0.2), suspect)
    assert set(poison.tolist()) <= set(found.details["removed"].tolist())
    assert quick == [("badnets_cnn", task)]
    assert found.repaired is not None
    again = copy.deepcopy(model)
    again.load_state_dict(dict(found.repaired))
    assert attack_success(again, hidden, trigger, target) < 0.1
    assert share_right(again, hidden) > 0.95
    assert found.details["retrained"]["images"] == 240 - len(found.details["removed"])


@pytest.mark.parametrize("score", ["squared", "quantum"])
def test_without_assumed_poison_nothing_goes_and_the_training_is_the_plain_one(
    score: Any, quick: list[tuple[str, Task]]
) -> None:
    training = pictures(80)
    suspect = Suspect.of(fresh(1), task_of(training), training=training, dtype=torch.float32, device="cpu")
    found = run(SpectralSignatures(epsilon=0.0, score=score), suspect, seed=4)
    assert found.details["removed"].tolist() == []
    rng = seeded(4)
    task = suspect.task
    model = build("badnets_cnn", SHAPE, 4, mean=task.mean, std=task.std, rng=rng)
    train(model, training, dataclasses.replace(QUICK, precision="float32"), rng=rng, device="cpu")
    assert found.repaired is not None
    assert found.repaired.keys() == model.state_dict().keys()
    assert all(torch.equal(found.repaired[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("error", [OutOfTime("the deadline passed"), FloatingPointError("it diverged")])
def test_scores_outlive_a_training_that_fails(
    error: Exception, quick: list[tuple[str, Task]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise error

    training = pictures(80)
    suspect = Suspect.of(fresh(1), task_of(training), training=training, dtype=torch.float32, device="cpu")
    whole = run(SpectralSignatures(), suspect)
    monkeypatch.setattr("molehunt.defenses.spectral_signatures.train", failing)
    found = run(SpectralSignatures(), suspect)
    assert found.repaired is None
    assert whole.repaired is not None
    assert found.sample_scores is not None
    assert whole.sample_scores is not None
    assert torch.equal(found.sample_scores, whole.sample_scores)
    assert found.details["warnings"][-1] == f"not trained again: {error}"


def test_training_again_begins_with_fresh_weights(quick: list[tuple[str, Task]]) -> None:
    """A public port went on with the suspect's, which keeps the backdoor."""
    training = pictures(80)
    task = task_of(training)
    states = []
    for weights in (1, 2):
        suspect = Suspect.of(fresh(weights), task, training=training, dtype=torch.float32, device="cpu")
        states.append(run(SpectralSignatures(epsilon=0.0), suspect).repaired)
    assert states[0] is not None
    assert states[1] is not None
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert run(SpectralSignatures(retrain=False), suspect).repaired is None
    assert len(quick) == 2


def test_every_setting_is_read() -> None:
    """One public port never reads its key."""
    suspect = thinned(planted(grants=TRAINING)).suspect
    plain = run(SpectralSignatures(), suspect)
    assert len(run(SpectralSignatures(epsilon=0.2), suspect).details["removed"]) > len(plain.details["removed"])
    gap = run(SpectralSignatures(epsilon="gap"), suspect)
    assert gap.details["epsilons"].unique().numel() > 1
    assert gap.details["removed_per_class"][3] == 18  # one and a half times the twelve that are stamped
    quantum = [run(SpectralSignatures(score="quantum", alpha=a), suspect).sample_scores for a in (0.0, 4.0)]
    assert quantum[0] is not None
    assert quantum[1] is not None
    assert plain.sample_scores is not None
    assert not torch.allclose(quantum[0], quantum[1])
    assert not torch.allclose(quantum[1], plain.sample_scores)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"epsilon": -0.1}, r'epsilon must lie in \[0, 0.5\] or be "gap", got -0.1'),
        ({"epsilon": 0.51}, "epsilon must lie in"),
        ({"epsilon": math.nan}, "epsilon must lie in"),
        ({"epsilon": "auto"}, "epsilon must lie in .* got 'auto'"),
        ({"score": "uncentered"}, "unknown score 'uncentered'; known: squared, quantum"),
        ({"score": "quantum", "epsilon": "gap"}, "the quantum score needs epsilon as a share"),
        ({"alpha": -1.0}, "alpha must be 0 or more and finite"),
        ({"alpha": math.inf}, "alpha must be 0 or more and finite"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralSignatures(**settings_)


def test_without_a_training_set_there_is_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="need the training set, with at least one sample"):
        run(SpectralSignatures(), planted().suspect)
    suspect = planted(grants=TRAINING).suspect
    assert suspect.training is not None
    empty = dataclasses.replace(suspect, training=Images(suspect.training.x[:0], suspect.training.y[:0]))
    with pytest.raises(ValueError, match="with at least one sample"):
        run(SpectralSignatures(), empty)


def test_the_planted_task_has_a_majority_of_poison_unless_it_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the method cannot do: with a quarter of all rows stamped, seven of ten in the target class are poison."""
    monkeypatch.setattr(sys.modules["molehunt.testing.planted"], "STREAM", 0.25)
    monkeypatch.setattr(sys.modules["molehunt.testing.planted"], "TRAINING", 0.25, raising=False)
    case = planted(grants=TRAINING)
    assert case.suspect.training is not None
    found = run(SpectralSignatures(), case.suspect)
    assert found.sample_scores is not None
    inside = case.suspect.training.y == 3
    assert auc(found.sample_scores[inside], case.training[inside]) < 0.1
    assert any(text.startswith("class 3: ") for text in found.details["warnings"])
