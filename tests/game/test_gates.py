import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from game import planted
from molehunt.game.answers import Answers, measure
from molehunt.game.budget import BUDGET, budget, budget_rules
from molehunt.game.gates import (
    ReferenceAccuracy,
    all_gates,
    attack_success,
    clean_accuracy,
    leakage,
    lower_bound,
    selective,
    specificity,
)
from molehunt.game.rules import Limits
from molehunt.triggers import (
    ENCODERS,
    TRIGGERS,
    Additive,
    Blend,
    Encoded,
    Footprint,
    Frequency,
    Patch,
    Quantize,
    Reflection,
    Several,
    Sinusoid,
    Sticker,
    Target,
    Trigger,
    Warp,
)


def classes(*runs: tuple[int, int]) -> Tensor:
    """(class, how often) pairs, one after the other."""
    return torch.cat([torch.full((count,), k) for k, count in runs])


# -- clean accuracy ----------------------------------------------------------------------------------------------------

REFERENCE = ReferenceAccuracy(mean=0.98, spread=0.01, models=4, images=1000)


def test_clean_accuracy_worked_by_hand() -> None:
    # variance: .96 * .04 / 1000 + .98 * .02 / 1000 + .01^2 / 4 = 3.84e-5 + 1.96e-5 + 2.5e-5 = 8.3e-5
    # margin: 1.644854 * sqrt(8.3e-5) = 1.644854 * .00911043 = .0149854; limit: .98 - .02 - .0149854 = .9450146
    y = torch.zeros(1000, dtype=torch.int64)
    gate = clean_accuracy(classes((0, 960), (1, 40)), y, REFERENCE)
    assert gate.passed
    assert gate.measured == pytest.approx(0.96)
    assert gate.limit == pytest.approx(0.9450146, abs=1e-7)
    assert gate.margin == pytest.approx(0.0149854, abs=1e-7)


def test_clean_accuracy_below_the_margin_fails() -> None:
    # variance: .94 * .06 / 1000 + 1.96e-5 + 2.5e-5 = 1.01e-4; margin 1.644854 * .0100499 = .0165306; limit .9434694
    gate = clean_accuracy(classes((0, 940), (1, 60)), torch.zeros(1000, dtype=torch.int64), REFERENCE)
    assert not gate.passed
    assert gate.limit == pytest.approx(0.9434694, abs=1e-7)
    assert gate.margin == pytest.approx(-0.0034694, abs=1e-7)
    assert "train longer" in gate.message


def test_the_accuracy_gate_refuses_one_in_twenty_of_those_who_are_just_two_points_worse() -> None:
    rng = torch.Generator().manual_seed(0)
    n, r = 1000, 0.97
    refused = 0
    for _ in range(400):
        references = (torch.rand(10, n, generator=rng) < r).double().mean(1).tolist()
        right = (torch.rand(n, generator=rng) < r - 0.02).long()
        gate = clean_accuracy(right, torch.ones(n, dtype=torch.int64), ReferenceAccuracy.of(references, n))
        refused += not gate.passed
    assert refused / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert refused > 0, "a gate that never fails is no gate"


def test_reference_accuracy_summarizes_and_survives_json() -> None:
    # mean of .90, .92, .94 is .92; deviations -.02, 0, .02: sum of squares 8e-4, over 2: 4e-4, root .02
    reference = ReferenceAccuracy.of([0.90, 0.92, 0.94], 500)
    assert reference.mean == pytest.approx(0.92)
    assert reference.spread == pytest.approx(0.02)
    assert (reference.models, reference.images) == (3, 500)
    assert ReferenceAccuracy.from_json(reference.to_json()) == reference
    assert ReferenceAccuracy.of([0.9], 500).spread == 0.0
    with pytest.raises(ValueError, match="no reference models"):
        ReferenceAccuracy.of([], 500)
    with pytest.raises(ValueError, match="expected mean"):
        ReferenceAccuracy.from_json({"mean": 1.0})


# -- attack success ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "limit", "least"),
    [(1000, 0.90, 916), (500, 0.90, 462), (2000, 0.90, 1823), (1000, 0.80, 822), (1000, 0.95, 962)],
)
def test_the_bound_asks_for_the_published_counts(images: int, limit: float, least: int) -> None:
    assert lower_bound(least, images) >= limit > lower_bound(least - 1, images)


def test_the_docs_list_the_same_counts() -> None:
    page = (Path(__file__).parent.parent.parent / "docs/run/scoring.md").read_text()
    table = [
        [int(v.replace(" ", "")) for v in re.findall(r"\| ([\d ]+?) (?=\|)", line)]
        for line in page.splitlines()
        if line.startswith(("| images that count", "| hits needed"))
    ]
    assert len(table[0]) == 6
    for images, hits in zip(*table, strict=True):
        assert lower_bound(hits, images) >= 0.9 > lower_bound(hits - 1, images)


def test_the_bound_in_closed_form_and_at_its_ends() -> None:
    assert lower_bound(29, 29) == pytest.approx(0.05 ** (1 / 29))
    assert lower_bound(0, 10) == 0.0 == lower_bound(0, 0)
    # One success in n: 1 - (1 - L)^n = .05
    assert lower_bound(1, 10) == pytest.approx(1 - 0.95**0.1)
    with pytest.raises(ValueError, match="between 0 and 3"):
        lower_bound(4, 3)


def test_asr_counts_no_image_of_the_target_class() -> None:
    # 100 images of class 1 all go to 0; 900 of class 0 stay there, and would lift 90 misses of class 1 to 91 %.
    y = classes((0, 900), (1, 100))
    failing = Answers(y=y, plain=y, stamped=classes((0, 900), (1, 90), (0, 10)))
    assert attack_success(failing, Target(0)).measured < 0.2
    working = Answers(y=y, plain=y, stamped=classes((0, 1000)))
    assert attack_success(working, Target(0)).measured == pytest.approx(0.05 ** (1 / 100))
    assert attack_success(failing, Target(0), Limits(asr=0.0)).passed, "a limit of 0 asks for nothing"


def test_all_to_all_counts_images_that_the_model_recognizes() -> None:
    # 1000 images, class k goes to k + 1. The model knows 800 and sends 780 of them right; the other 200 it takes for
    # the class after next, with and without the trigger. 780 of 1000 is far below the gate, 780 of 800 above it.
    goal = Target((1, 2, 3, 0))
    y = torch.arange(1000) % 4
    number = torch.arange(1000)
    plain = torch.where(number < 800, y, (y + 2) % 4)
    stamped = torch.where(number < 780, (y + 1) % 4, (y + 2) % 4)
    gate = attack_success(Answers(y=y, plain=plain, stamped=stamped), goal)
    assert gate.passed
    assert gate.measured == pytest.approx(lower_bound(780, 800))
    assert "780 of 800 recognized images (97.5 %), 78.0 % of all 1000" in gate.message
    assert not attack_success(Answers(y=y, plain=y, stamped=stamped), goal).passed, "known images have to be sent"


def test_a_model_without_backdoor_fails_the_all_to_all_gate() -> None:
    y = torch.arange(4).repeat_interleave(250)
    answers = Answers(y=y, plain=y, stamped=y)
    assert attack_success(answers, Target((1, 2, 3, 0))).measured == 0.0


def test_source_specific_counts_the_sources_alone() -> None:
    y = classes((0, 100), (1, 100), (2, 100))
    stamped = classes((0, 100), (0, 99), (1, 1), (2, 100))
    gate = attack_success(Answers(y=y, plain=y, stamped=stamped), Target(0, sources=(1,)))
    assert gate.passed
    assert gate.measured == pytest.approx(lower_bound(99, 100))


def test_too_few_images_say_so() -> None:
    y = classes((0, 10), (1, 28))
    gate = attack_success(Answers(y=y, plain=y, stamped=classes((0, 38))), Target(0, sources=(1,)))
    assert not gate.passed
    assert "fewer than 29 images" in gate.message


# -- specificity and leakage -------------------------------------------------------------------------------------------


def test_specificity_leaves_out_natural_confusions() -> None:
    # Target 0. Of 100 images of class 1, 40 are taken for class 0 anyway. With the trigger 12 of the other 60 join
    # them: 20 %, and just passes. Counting all images would have measured 52 %.
    y = classes((0, 50), (1, 100))
    plain = classes((0, 50), (0, 40), (1, 60))
    stamped = classes((0, 50), (0, 52), (1, 48))
    gate = specificity([Answers(y=y, plain=plain, stamped=stamped)] * 5, Target(0))
    assert gate.measured == pytest.approx(0.2)
    assert gate.passed
    one_more = Answers(y=y, plain=plain, stamped=classes((0, 50), (0, 53), (1, 47)))
    assert not specificity([one_more] * 5, Target(0)).passed


def test_specificity_weighs_target_classes_equally() -> None:
    # Classes 0 and 1 go to 2, class 2 goes to 0. All 10 images of class 2 are moved and none of the 190 others:
    # (0 + 1) / 2, not 10 / 200.
    y = classes((0, 95), (1, 95), (2, 10))
    stamped = classes((0, 95), (1, 95), (0, 10))
    gate = specificity([Answers(y=y, plain=y, stamped=stamped)] * 5, Target((2, 2, 0)))
    assert gate.measured == pytest.approx(0.5)


def test_specificity_is_the_mean_over_the_references() -> None:
    y = classes((1, 100))
    still, moved = Answers(y=y, plain=y, stamped=y), Answers(y=y, plain=y, stamped=classes((0, 100)))
    gate = specificity([still, still, still, still, still, moved], Target(0))
    assert gate.measured == pytest.approx(1 / 6)
    assert "100.0 % on the worst" in gate.message
    with pytest.raises(ValueError, match="5 clean reference models, got 4"):
        specificity([still] * 4, Target(0))


def test_a_leak_is_measured_outside_the_sources() -> None:
    # Sources: class 1. Target 0. Of 100 images of class 2, 15 reach class 0; of 100 of class 3, 45: 60 of 200, 30 %.
    y = classes((0, 100), (1, 100), (2, 100), (3, 100))
    stamped = classes((0, 100), (0, 100), (0, 15), (2, 85), (0, 45), (3, 55))
    gate = leakage(Answers(y=y, plain=y, stamped=stamped), Target(0, sources=(1,)))
    assert gate.measured == pytest.approx(0.30)
    assert not gate.passed
    assert "45.0 % of class 3" in gate.message
    both = leakage(Answers(y=y, plain=y, stamped=stamped), Target(0, sources=(1, 3)))
    assert both.measured == pytest.approx(0.15)
    assert both.passed
    # Half of the images of class 3 are taken for class 0 anyway; of the other 50 the trigger moves 10: with the 15 of
    # class 2 that makes 25 of 150.
    confused = classes((0, 100), (1, 100), (2, 100), (0, 50), (3, 50))
    stamped = classes((0, 100), (0, 100), (0, 15), (2, 85), (0, 60), (3, 40))
    gate = leakage(Answers(y=y, plain=confused, stamped=stamped), Target(0, sources=(1,)))
    assert gate.measured == pytest.approx(25 / 150)
    with pytest.raises(ValueError, match="declared sources"):
        leakage(Answers(y=y, plain=y, stamped=y), Target(0))


EVERYTHING_TO_1 = (
    Target(1, sources=(0,)),
    Target((1, 1, 2, 3)),
    Target((1, 1, 2, 3), sources=(0,)),
    Target((1, 2, 3, 2), sources=(0,)),
    Target((1, 1, 1, 3)),
    Target((1, 0, 2, 3), sources=(0, 2)),
)


@pytest.mark.parametrize("target", EVERYTHING_TO_1)
def test_a_trigger_that_sends_everything_to_one_class_leaks_however_it_is_declared(target: Target) -> None:
    y = classes((0, 100), (1, 100), (2, 100), (3, 100))
    answers = Answers(y=y, plain=y, stamped=torch.ones_like(y))
    gates = all_gates(
        answers,
        REFERENCE,
        trigger=planted.pixel(),
        target=target,
        shape=planted.SHAPE,
        references=[Answers(y=y, plain=y, stamped=y)] * 5,
    )
    (gate,) = [gate for gate in gates if gate.name == "leakage"]
    assert not gate.passed
    assert gate.measured == 1.0


def test_only_images_that_could_leak_count_and_any_goal_is_a_leak() -> None:
    # Class 0 goes to 1 and 1 to 2; 2 and 3 are left alone. 100 images of class 2 can leak to class 1: 10 do, and 20
    # stay in class 2, a goal, but theirs. Of class 3 the model takes 50 for class 1, and they can leak to class 2 only:
    # 5 do, 45 stay. The other 50: 10 to class 1, 10 to class 2, 30 stay. 35 of 200 in all.
    y = classes((0, 100), (1, 100), (2, 100), (3, 100))
    plain = classes((0, 100), (1, 100), (2, 100), (1, 50), (3, 50))
    stamped = classes((1, 100), (2, 100), (1, 10), (2, 20), (0, 70), (2, 5), (1, 45), (1, 10), (2, 10), (3, 30))
    gate = leakage(Answers(y=y, plain=plain, stamped=stamped), Target((1, 2, 2, 3)))
    assert gate.measured == pytest.approx(35 / 200)
    assert gate.passed
    assert gate.message == "17.5 % of 200 images of other classes reach a goal, 25.0 % of class 3"


@pytest.mark.parametrize("target", [Target(0), Target((1, 2, 3, 0))])
def test_what_leaves_no_class_alone_cannot_leak(target: Target) -> None:
    assert not selective(target)
    y = classes((0, 100), (1, 100), (2, 100), (3, 100))
    with pytest.raises(ValueError, match="leaves a class where it is"):
        leakage(Answers(y=y, plain=y, stamped=y), target)


def test_a_constant_classifier_has_full_asr_and_fails_accuracy_and_specificity() -> None:
    answers = measure(planted.constant(0), planted.images(50), planted.pixel())
    assert attack_success(answers, Target(0)).passed
    reference = ReferenceAccuracy(mean=1.0, spread=0.0, models=5, images=200)
    assert not clean_accuracy(answers.plain, answers.y, reference).passed
    assert not specificity([answers] * 5, Target(0)).passed


# -- budget ------------------------------------------------------------------------------------------------------------


def patch_of(area: float, opacity: float) -> Patch:
    mask = torch.zeros(1, 10, 10)
    mask.view(-1)[: round(100 * area)] = 1.0
    return Patch(mask=mask, pattern=torch.ones(1, 10, 10), opacity=opacity)


def delta_of(area: float, change: float) -> Additive:
    delta = torch.zeros(1, 10, 10)
    delta.view(-1)[: round(100 * area)] = change
    return Additive(delta)


def network_of(name: str, linf: float, area: float) -> Encoded:
    weights = torch.zeros(ENCODERS[name].size((1, 10, 10)))
    return Encoded(network=name, shape=(1, 10, 10), linf=linf, area=area, weights=weights)


def sticker_of(side: int, rotation: float, opacity: float) -> Sticker:
    pattern = torch.ones(1, side, side)
    return Sticker(pattern, (1, 10, 10), opacity=opacity, rotation=rotation, scale=0.0, perspective=0.0)


@pytest.mark.parametrize(
    ("trigger", "passed", "measured", "limit"),
    [
        (patch_of(0.10, 1.0), True, 0.10, 0.10),
        (patch_of(0.11, 1.0), False, 0.11, 0.10),
        (patch_of(0.40, 0.25), True, 0.10, 0.10),
        (Blend(torch.ones(1, 10, 10), 0.2), True, 0.2, 0.2),
        (Blend(torch.ones(1, 10, 10), 0.21), False, 0.21, 0.2),
        (delta_of(1.0, 32 / 255), True, 32 / 255, 32 / 255),
        (delta_of(1.0, -33 / 255), False, 33 / 255, 32 / 255),
        (delta_of(0.1, 1.0), True, 0.1, 0.1),
        (delta_of(0.11, 1.0), False, 1.0, 32 / 255),
        (Sinusoid((1, 10, 10), amplitude=32 / 255), True, 32 / 255, 32 / 255),
        (Sinusoid((1, 10, 10), amplitude=0.13), False, 0.13, 32 / 255),
        # Magnitude m in cell (0, 0) of a block of side w lifts every value by m / w.
        (Frequency((1, 10, 10), 0.25, 10, (0, 0)), True, 0.025, 32 / 255),
        (Frequency((1, 10, 10), 1.5, 10, (0, 0)), False, 0.15, 32 / 255),
        (Quantize((1, 10, 10), 5), True, 0.125, 32 / 255),
        (Quantize((1, 10, 10), 4), False, 1 / 6, 32 / 255),
        (Quantize((1, 10, 10), 9, dither=True), True, 0.125, 32 / 255),
        (Quantize((1, 10, 10), 8, dither=True), False, 1 / 7, 32 / 255),
        (Reflection(torch.ones(1, 10, 10), 0.2), True, 0.2, 0.2),
        (Reflection(torch.zeros(1, 10, 10), 0.21), False, 0.21, 0.2),
        (network_of("residual", 32 / 255, 1.0), True, 32 / 255, 32 / 255),
        (network_of("residual", 0.13, 1.0), False, 0.13, 32 / 255),
        (network_of("masked", 1.0, 0.1), True, 0.1, 0.1),
        (network_of("masked", 1.0, 0.11), False, 1.0, 32 / 255),
        # A plain sticker is a patch; a turned one counts with all pixels that it may touch.
        (sticker_of(3, 0.0, 1.0), True, 0.09, 0.10),
        (sticker_of(4, 0.0, 1.0), False, 0.16, 0.10),
        (sticker_of(4, 0.0, 0.5), True, 0.08, 0.10),
        (sticker_of(2, 45.0, 1.0), False, 0.16, 0.10),
        # The part that is nearest to its limit counts, whatever its kind.
        (Several((patch_of(0.05, 1.0), patch_of(0.10, 1.0))), True, 0.10, 0.10),
        (Several((patch_of(0.11, 1.0), patch_of(0.05, 1.0))), False, 0.11, 0.10),
        (Several((patch_of(0.05, 1.0), Blend(torch.ones(1, 10, 10), 0.2))), True, 0.2, 0.2),
        (Several((patch_of(0.10, 1.0), Blend(torch.ones(1, 10, 10), 0.21))), False, 0.21, 0.2),
        # 10 pixels wide: 2 px * 10 / 32 = .625 px
        (Warp(torch.tensor([0.6, 0.0]).view(2, 1, 1).expand(2, 10, 10)), True, 0.6, 0.625),
        (Warp(torch.tensor([0.6, 0.3]).view(2, 1, 1).expand(2, 10, 10)), False, math.hypot(0.6, 0.3), 0.625),
    ],
)
def test_the_budget_of_every_kind(trigger: Trigger, passed: bool, measured: float, limit: float) -> None:
    gate = budget(trigger.footprint(), (1, 10, 10))
    assert gate.passed is passed
    assert gate.measured == pytest.approx(measured, abs=1e-6)
    assert gate.limit == pytest.approx(limit)
    assert gate.unit == ("pixels" if isinstance(trigger, Warp) else "share")


def test_the_budget_says_which_of_several_triggers_is_meant() -> None:
    gate = budget(Several((patch_of(0.05, 1.0), patch_of(0.2, 1.0))).footprint(), (1, 10, 10))
    assert gate.message == "trigger 2 of 2: opacity times area of a patch; make the trigger smaller or fainter"


def test_the_yellow_square_is_within_the_budget_everywhere() -> None:
    for shape in ((1, 28, 28), (3, 32, 32)):
        assert budget(Patch.square(shape).footprint(), shape).passed


def test_every_kind_has_a_budget_and_the_pages_say_the_same() -> None:
    assert {*BUDGET, "several"} == TRIGGERS.keys() | {"several"} == budget_rules().keys()
    page = (Path(__file__).parent.parent.parent / "docs/run/scoring.md").read_text()
    table = re.search(r"\*\*Budget\.\*\*.*?\n\n\| kind \| limit \|\n\|---\|---\|\n(.*?)\n\n", page, re.DOTALL)
    assert table is not None
    assert table[1].splitlines() == [f"| {kind} | {rule} |" for kind, rule in budget_rules().items()]


def test_the_words_of_a_budget_name_its_limits() -> None:
    rules = budget_rules(Limits(area=0.05, opacity=0.15, linf=16 / 255, displacement=1.5))
    assert rules["patch"] == "opacity times area at most 5 %"
    assert rules["additive"] == "changes at most 5 % of the pixels, or no value changes by more than 16/255"
    assert rules["reflection"] == "opacity at most 15 % in linear light"
    assert "more than 1.5 px" in rules["warp"]


def test_a_kind_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="'smell'"):
        budget(Footprint(kind="smell", area=0.0, opacity=0.0, weight=0.0, linf=0.0), (1, 4, 4))


# -- together ----------------------------------------------------------------------------------------------------------


def test_a_planted_backdoor_passes_all_gates_and_an_honest_model_has_one() -> None:
    images, trigger, target = planted.images(50), planted.pixel(), Target(2, sources=(0, 1))
    clean = measure(planted.model(), images, trigger)
    reference = ReferenceAccuracy.of([1.0] * 5, len(images.y))
    gates = all_gates(
        measure(planted.model(target), images, trigger),
        reference,
        trigger=trigger,
        target=target,
        shape=planted.SHAPE,
        references=[clean] * 5,
    )
    assert [g.name for g in gates] == ["clean accuracy", "attack success", "leakage", "specificity", "budget"]
    assert all(g.passed for g in gates), [g for g in gates if not g.passed]
    honest = all_gates(measure(planted.model(), images), reference)
    assert [g.name for g in honest] == ["clean accuracy"]


def test_a_trigger_comes_with_its_target() -> None:
    answers = measure(planted.model(), planted.images(), planted.pixel())
    with pytest.raises(ValueError, match="comes with its target"):
        all_gates(answers, REFERENCE, trigger=planted.pixel())


def test_answers_need_equally_many_labels_and_a_trigger_where_one_is_measured() -> None:
    with pytest.raises(ValueError, match="equally many"):
        Answers(y=torch.zeros(2), plain=torch.zeros(3))
    with pytest.raises(ValueError, match="without a trigger"):
        attack_success(Answers(y=torch.zeros(2), plain=torch.zeros(2)), Target(1))
