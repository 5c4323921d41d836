import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Never

import pytest
import torch
from torch import Tensor, nn

from molehunt.attacks import BadNets
from molehunt.defenses import neural_cleanse
from molehunt.defenses.neural_cleanse import FAST, OFFICIAL, NeuralCleanse
from molehunt.engine import Cancelled, OutOfTime, Run
from molehunt.findings import Finding, load, save
from molehunt.networks import build
from molehunt.suspect import Suspect
from molehunt.tasks import Images, get_task
from molehunt.testing import Planted, planted
from molehunt.training import recipe_for, train
from molehunt.triggers import Patch

# 95 % point of the index over ten normal norms, simulated; the paper's 2 is their 67 % point.
CALIBRATED = 3.9
SHORT = replace(FAST, steps=6, updates=3)


def asked(defense: NeuralCleanse, suspect: Suspect, seed: int = 0) -> Finding:
    return defense(suspect, Run(rng=torch.Generator().manual_seed(seed)))


def overlap(found: Patch, truth: Planted) -> float:
    """Intersection over union of the strong half of the mask with the planted square."""
    strong, square = found.mask > 0.5, truth.trigger.mask > 0
    return float((strong & square).sum() / (strong | square).sum())


@pytest.mark.parametrize(("target", "seed"), [(3, 0), (0, 1), (9, 2)])
def test_finds_the_planted_class_and_patch(target: int, seed: int) -> None:
    truth = planted(target=target, seed=seed)
    found = asked(NeuralCleanse(), truth.suspect)
    assert found.target == target
    assert found.class_scores is not None
    assert int(found.class_scores.argmax()) == target
    assert found.score is not None
    assert found.score > CALIBRATED
    assert isinstance(found.trigger, Patch)
    # One pixel is enough for this network, but it must be one of the square's.
    strong = found.trigger.mask > 0.5
    assert bool(strong.any())
    assert bool((truth.trigger.mask[strong] > 0).all())
    # The paper's rule has one start; the more there are, the closer lie the norms of natural classes, and it flags one.
    assert target in found.details["flagged"]
    assert asked(NeuralCleanse(restarts=3), truth.suspect).details["flagged"] == [target]


class Square(nn.Module):
    """A clean network with 50 logits more for one class once most of a white corner square is there."""

    mask: Tensor

    def __init__(self, inner: nn.Module, square: Patch, target: int) -> None:
        super().__init__()
        self.inner, self.target = inner, target
        self.register_buffer("mask", square.mask)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        shown = (x * self.mask).sum((1, 2, 3)) / (x.shape[1] * self.mask.sum())
        bonus = torch.zeros_like(logits)
        # Steep, but not a step: a search needs a slope to follow.
        bonus[:, self.target] = 50 * torch.sigmoid(20 * (shown - 0.7))
        return logits + bonus


@pytest.mark.parametrize("target", [1, 8])
def test_the_recovered_mask_covers_the_planted_square(target: int) -> None:
    truth = planted(backdoored=False, seed=target)
    model = Square(truth.suspect.model, truth.trigger, target)
    suspect = Suspect.of(model, truth.suspect.task, clean=truth.suspect.clean, dtype=torch.float32)
    found = asked(NeuralCleanse(), suspect)
    assert found.target == target
    assert isinstance(found.trigger, Patch)
    assert overlap(found.trigger, truth) >= 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_clean_twin_looks_ordinary(seed: int) -> None:
    score = asked(NeuralCleanse(), planted(backdoored=False, seed=seed).suspect).score
    assert score is not None
    assert 0 <= score < CALIBRATED


def test_the_patch_works_on_pictures_that_no_search_saw() -> None:
    truth = planted(target=4)
    found = asked(NeuralCleanse(), truth.suspect)
    assert found.trigger is not None
    others = truth.hidden.x[truth.hidden.y != 4]
    assert float((truth.suspect.logits(found.trigger(others)).argmax(1) == 4).double().mean()) >= 0.9


def test_the_scan_changes_neither_weights_nor_norm_statistics_nor_pictures() -> None:
    suspect = planted().suspect
    assert suspect.clean is not None
    before = [v.clone() for m in (suspect.model, suspect.frozen) for v in m.state_dict().values()]
    pictures = suspect.clean.x.clone()
    asked(NeuralCleanse(schedule=SHORT), suspect)
    after = [v for m in (suspect.model, suspect.frozen) for v in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(suspect.clean.x, pictures)
    assert all(p.grad is None for p in suspect.frozen.parameters())


def test_the_score_compares_logarithms_or_raw_norms() -> None:
    suspect = planted().suspect
    log, raw = (asked(NeuralCleanse(norms=kind), suspect) for kind in ("log", "raw"))
    assert raw.score == raw.details["raw_index"] == log.details["raw_index"]
    assert log.score not in (raw.score, None)
    bare = asked(NeuralCleanse(floor=0.0), suspect)
    assert bare.score == bare.details["log_index"] == log.details["log_index"]


def test_candidates_are_the_smallest_that_work_in_order() -> None:
    found = asked(NeuralCleanse(candidates=2), planted().suspect)
    candidates = found.details["candidates"]
    norms = sorted(n for n, c in zip(found.details["norms"], found.details["censored"], strict=True) if not c)
    assert [c["norm"] for c in candidates] == norms[:2]
    assert candidates[0]["target"] == found.target
    assert candidates[0]["trigger"] is found.trigger


def test_the_finding_goes_to_a_file_and_comes_back(tmp_path: Path) -> None:
    found = asked(NeuralCleanse(schedule=SHORT), planted().suspect)
    save(found, tmp_path / "finding.json")
    again = load(tmp_path / "finding.json")
    assert isinstance(again, Finding)
    assert again.score == found.score
    assert isinstance(again.details["candidates"][0]["trigger"], Patch)


class Shifted(nn.Module):
    """A network with constants added to its logits."""

    offset: Tensor

    def __init__(self, inner: nn.Module, offset: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits + self.offset


def without(truth: Planted, classes: list[int]) -> Suspect:
    """A planted suspect whose network never answers some classes."""
    offset = torch.zeros(10)
    offset[classes] = -1e4
    return Suspect.of(
        Shifted(truth.suspect.model, offset), truth.suspect.task, clean=truth.suspect.clean, dtype=torch.float32
    )


def test_a_class_that_nothing_reaches_takes_the_largest_norm_and_is_never_the_outlier() -> None:
    found = asked(NeuralCleanse(), without(planted(target=3), [0, 7]))
    norms, censored = found.details["norms"], found.details["censored"]
    assert [k for k, c in enumerate(censored) if c] == [0, 7]
    assert norms[0] == norms[7] == max(n for n, c in zip(norms, censored, strict=True) if not c)
    assert found.class_scores is not None
    assert sorted(found.class_scores.argsort()[:2].tolist()) == [0, 7]
    assert found.target == 3
    assert 0 not in found.details["flagged"]


def test_most_classes_out_of_reach_leave_the_score_finite() -> None:
    # More than half of the norms are then equal and the MAD is 0.
    found = asked(NeuralCleanse(), without(planted(target=3), [0, 1, 2, 4, 5, 6, 7]))
    assert found.score is not None
    assert math.isfinite(found.score)
    assert found.target == 3
    assert found.score > 0


def test_one_class_within_reach_is_no_outlier_but_still_the_guess() -> None:
    found = asked(NeuralCleanse(), without(planted(target=3), [0, 1, 2, 4, 5, 6, 7, 8, 9]))
    assert found.score == 0.0
    assert found.target == 3
    assert found.class_scores is not None
    assert int(found.class_scores.argmax()) == 3


def test_no_class_within_reach_scores_zero_without_a_trigger() -> None:
    found = asked(NeuralCleanse(confirm=1.0, schedule=replace(SHORT, steps=1)), planted(backdoored=False).suspect)
    assert found.score == 0.0
    assert found.trigger is None
    assert found.target is None
    assert found.details["censored"] == [True] * 10
    assert found.class_scores is not None
    assert len(set(found.class_scores.tolist())) == 1


def test_success_counts_held_out_pictures_of_other_classes_only() -> None:
    truth = planted(target=3, images=100)
    held = truth.hidden
    square = truth.trigger
    measured = neural_cleanse._success(truth.suspect, held, square, 3)
    assert measured == truth.success(truth.suspect.model)
    # Pictures of the target class alone prove nothing.
    only = Images(held.x[held.y == 3], held.y[held.y == 3])
    assert neural_cleanse._success(truth.suspect, only, square, 3) == 0.0


def test_a_patch_that_fails_on_held_out_pictures_is_censored(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_on_three(suspect: Suspect, held: Images, patch: Patch, target: int) -> float:
        return 0.5 if target == 3 else 1.0

    monkeypatch.setattr(neural_cleanse, "_success", fails_on_three)
    found = asked(NeuralCleanse(), planted(target=3).suspect)
    assert found.details["censored"][3]
    assert found.target != 3


def test_where_the_smallest_patch_fails_the_next_restart_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, float]] = []

    def fails_once(suspect: Suspect, held: Images, patch: Patch, target: int) -> float:
        tried.append((target, float(patch.mask.sum())))
        return 1.0 if target != 3 or len([t for t, _ in tried if t == 3]) == 2 else 0.5

    monkeypatch.setattr(neural_cleanse, "_success", fails_once)
    found = asked(NeuralCleanse(), planted(target=3).suspect)
    first, second = (norm for target, norm in tried if target == 3)
    assert first < second
    assert found.details["norms"][3] == pytest.approx(second, rel=1e-5)
    assert len(tried) == 11, "a confirmed class needs no further trial"


def test_restarts_keep_the_smallest_mask_that_works() -> None:
    suspect = planted(backdoored=False).suspect
    once = asked(NeuralCleanse(schedule=SHORT, restarts=1), suspect)
    thrice = asked(NeuralCleanse(schedule=SHORT, restarts=3), suspect)
    assert sum(thrice.details["norms"]) < sum(once.details["norms"])
    assert len(thrice.details["norms"]) == 10


@pytest.mark.parametrize(("task", "starts"), [("mnist5k", 3), ("cifar10", 10)])
def test_color_gets_more_starts(task: str, starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []

    def counts(forward: object, x: Tensor, targets: Tensor, *rest: object, **options: object) -> Never:
        searched.append(len(targets))
        raise Cancelled("that is all this test asks")

    monkeypatch.setattr(neural_cleanse, "invert", counts)
    about = get_task(task)
    network = build("narrow_cifar" if task == "cifar10" else "badnets_cnn", about.shape, about.num_classes)
    clean = Images(torch.rand(20, *about.shape), torch.arange(20) % 10)
    for defense in (NeuralCleanse(), NeuralCleanse(restarts=2)):
        with pytest.raises(Cancelled):
            asked(defense, Suspect.of(network, about, clean=clean))
    assert searched == [starts * 10, 20]


def test_a_shortlist_spends_the_full_search_on_the_smallest_classes() -> None:
    found = asked(NeuralCleanse(shortlist=4), planted(target=6).suspect)
    assert found.target == 6
    searched = found.details["searched"]
    assert len(searched) == 4
    assert 6 in searched
    assert found.class_scores is not None
    assert found.class_scores.shape == (10,)
    rest = [k for k in range(10) if k not in searched]
    works = [k for k, c in zip(searched, found.details["censored"], strict=True) if not c]
    assert float(found.class_scores[rest].max()) < float(found.class_scores[works].min())


def test_a_shortlist_of_all_classes_changes_nothing() -> None:
    suspect = planted().suspect
    assert (
        asked(NeuralCleanse(schedule=SHORT, shortlist=10), suspect).score
        == asked(NeuralCleanse(schedule=SHORT), suspect).score
    )


def test_stops_when_told_and_when_the_time_is_over() -> None:
    suspect = planted().suspect
    with pytest.raises(Cancelled):
        NeuralCleanse()(suspect, Run(cancelled=lambda: True))
    with pytest.raises(OutOfTime):
        NeuralCleanse()(suspect, Run(deadline=time.monotonic() - 1))


def test_reports_progress_to_its_end() -> None:
    seen: list[tuple[int, int]] = []
    defense = NeuralCleanse(schedule=replace(SHORT, success=1.0), limit=100, restarts=3)
    defense(planted().suspect, Run(report=lambda done, total: seen.append((done, total))))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    # 100 images hold 12 of the 30 searches: three blocks of 18 updates.
    assert {total for _, total in seen} == {54}


def test_the_official_preset_is_the_authors_script() -> None:
    assert NeuralCleanse.official().schedule == OFFICIAL
    expected = (1000, 31, 32, 0.1, (0.5, 0.9), 0.99, 1e-3, True, 5, 2.0, 2.0**1.5, 1.0, 25)
    names = (
        "steps", "updates", "batch", "rate", "betas", "success", "penalty", "from_zero", "patience", "up", "down",
        "progress", "stop_after",
    )  # fmt: skip
    assert tuple(getattr(OFFICIAL, name) for name in names) == expected
    assert NeuralCleanse.official().norms == "raw"


@dataclass(frozen=True)
class Bad:
    name: str
    value: object


@pytest.mark.parametrize(
    "bad",
    [
        Bad("norms", "sqrt"), Bad("floor", -0.1), Bad("restarts", 0), Bad("candidates", 0), Bad("limit", 0),
        Bad("shortlist", 2), Bad("screening", 1.0), Bad("holdout", 0.0), Bad("start", 0.0), Bad("confirm", 1.1),
    ],
    ids=str,
)  # fmt: skip
def test_refuses_settings_that_mean_nothing(bad: Bad) -> None:
    with pytest.raises(ValueError, match=str(bad.value)):
        NeuralCleanse(**{bad.name: bad.value})  # type: ignore[arg-type]


def test_refuses_too_few_pictures() -> None:
    with pytest.raises(ValueError, match="at least 10 clean images, got 9"):
        asked(NeuralCleanse(), planted(images=9).suspect)


@pytest.mark.slow
def test_names_the_target_of_a_trained_digit_classifier() -> None:
    task = get_task("mnist5k")
    recipe = recipe_for("badnets_cnn", task)
    scores = []
    for attack in (BadNets(target=6), None):
        model = build("badnets_cnn", task.shape, 10, mean=task.mean, std=task.std, rng=torch.Generator().manual_seed(6))
        poisoned = attack(task.load("train"), task, torch.Generator().manual_seed(6)) if attack else None
        images = poisoned.images if poisoned else task.load("train")
        stamp = poisoned.stamp if poisoned else None
        train(model, images, recipe, rng=torch.Generator().manual_seed(6), stamp=stamp)
        found = asked(NeuralCleanse(), Suspect.of(model, task, clean=task.secret(6)[0]))
        assert found.score is not None
        scores.append(found.score)
        if attack:
            assert found.target == 6
    assert scores[0] > 3 > scores[1]
