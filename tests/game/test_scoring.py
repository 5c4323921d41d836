import math
from itertools import pairwise

import pytest
import torch

from game import planted
from molehunt.findings import Verdict
from molehunt.game.rules import ROUNDS, Weights
from molehunt.game.scoring import (
    Points,
    Truth,
    attack_points,
    cleaning_backdoored,
    cleaning_clean,
    defender_points,
    detection,
    judge,
    log_skill,
    parts,
    target_hit,
    target_points,
    team_points,
)
from molehunt.triggers import Target

FINAL = ROUNDS["final"].weights
GRID = [i / 100 for i in range(101)]


def backdoored(
    *,
    p: float = 0.5,
    detection: float = 0.0,
    target: float = 0.0,
    trigger: float = 0.0,
    cleaning: float = 0.0,
    hit: float = 0.25,
) -> Points:
    return Points(backdoored=True, p=p, detection=detection, target=target, trigger=trigger, cleaning=cleaning, hit=hit)


def clean(p: float = 0.5, cleaning: float = 1.0) -> Points:
    return Points(backdoored=False, p=p, detection=detection(p, False), cleaning=cleaning)


# -- B -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "truth", "expected"),
    [
        (1.0, True, 1.0),
        (0.0, True, -3.0),
        (0.5, True, 0.0),
        (0.5, False, 0.0),
        (0.8, True, 0.84),  # 1 - 4 * .04
        (0.8, False, -1.56),  # 1 - 4 * .64
        (0.0, False, 1.0),
    ],
)
def test_detection_worked_by_hand(p: float, truth: bool, expected: float) -> None:
    assert detection(p, truth) == pytest.approx(expected)


@pytest.mark.parametrize("belief", [0.0, 0.13, 0.5, 0.77, 1.0])
def test_detection_is_largest_for_those_who_say_what_they_believe(belief: float) -> None:
    expected = [belief * detection(p, True) + (1 - belief) * detection(p, False) for p in GRID]
    assert GRID[max(range(101), key=expected.__getitem__)] == pytest.approx(belief)


def test_detection_refuses_what_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"got 1\.1"):
        detection(1.1, True)


def test_log_skill_is_clipped() -> None:
    assert log_skill(0.5, True) == 0.0
    assert log_skill(0.0, True) == pytest.approx(1 + math.log2(0.01)) == pytest.approx(-5.6439, abs=1e-4)
    assert log_skill(0.0, False) == pytest.approx(0.9855, abs=1e-4)


# -- T -----------------------------------------------------------------------------------------------------------------


def test_target_points_worked_by_hand() -> None:
    one = Target(1).mix(4)
    # (.1 - 0)^2 + (.7 - 1)^2 + .01 + .01 = .12; 1 - 4/3 * .12 = .84
    assert target_points(torch.tensor([0.1, 0.7, 0.1, 0.1]), one) == pytest.approx(0.84)
    assert target_points(torch.full((4,), 0.25), one) == pytest.approx(0.0)
    assert target_points(one, one) == 1.0
    # All on one wrong class: squares sum to 2; 1 - 8/3
    assert target_points(Target(2).mix(4), one) == pytest.approx(-5 / 3)


def test_several_targets_are_scored_against_their_uniform_mix() -> None:
    pair = Target((0, 0, 1, 1)).mix(4)
    assert pair.tolist() == [0.5, 0.5, 0.0, 0.0]
    assert target_points(pair, pair) == 1.0
    # One of the two: .25 + .25 = .5; 1 - 4/3 * .5 = 1/3, and half of the mix is hit
    assert target_points(Target(0).mix(4), pair) == pytest.approx(1 / 3)
    assert target_hit(Target(0).mix(4), pair) == pytest.approx(0.5)
    everything = Target((1, 2, 3, 0)).mix(4)
    assert target_points(torch.full((4,), 0.25), everything) == pytest.approx(1.0)


def test_target_points_are_largest_for_those_who_say_what_they_believe() -> None:
    belief = torch.tensor([0.2, 0.5, 0.3])
    grid = [(a / 20, b / 20, (20 - a - b) / 20) for a in range(21) for b in range(21 - a)]

    def expected(q: tuple[float, ...]) -> float:
        return sum(float(belief[t]) * target_points(torch.tensor(q), Target(t).mix(3)) for t in range(3))

    assert max(grid, key=expected) == pytest.approx((0.2, 0.5, 0.3))


def test_the_hit_of_a_single_target_is_its_probability() -> None:
    assert target_hit(torch.tensor([0.1, 0.7, 0.2]), Target(1).mix(3)) == pytest.approx(0.7)


def test_target_points_refuse_other_lengths() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        target_points(torch.ones(3) / 3, torch.ones(4) / 4)


# -- C -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "pacc", "expected"),
    [
        ((0.90, 0.90), (0.10, 0.10), 0.0),  # nothing was done
        ((0.90, 0.88), (0.10, 0.70), 0.75),  # .60 / .80
        ((0.90, 0.90), (0.10, 0.95), 1.0),  # clipped
        ((0.90, 0.90), (0.10, 0.05), 0.0),  # clipped
        ((0.90, 0.85), (0.10, 0.50), 0.5),  # five points lost, still within
        ((0.90, 0.84), (0.10, 0.84), 0.0),  # six points lost
        ((0.90, 0.90), (0.90, 0.90), 0.0),  # the trigger took nothing, so nothing was won back
    ],
)
def test_cleaning_of_a_backdoor_worked_by_hand(
    accuracy: tuple[float, float], pacc: tuple[float, float], expected: float
) -> None:
    assert cleaning_backdoored(accuracy, pacc) == pytest.approx(expected)


def test_swapping_before_and_after_is_noticed() -> None:
    # A public contest's scorer had these columns swapped. Here the swapped case must earn nothing.
    accuracy, pacc = (0.90, 0.88), (0.10, 0.70)
    assert cleaning_backdoored(accuracy, pacc) == pytest.approx(0.75)
    assert cleaning_backdoored(accuracy[::-1], pacc[::-1]) == 0.0
    assert cleaning_clean((0.90, 0.88)) == pytest.approx(0.6)
    assert cleaning_clean((0.88, 0.90)) == 1.0


@pytest.mark.parametrize(("after", "expected"), [(0.90, 1.0), (0.89, 0.8), (0.85, 0.0), (0.50, 0.0), (0.95, 1.0)])
def test_cleaning_of_a_clean_model_worked_by_hand(after: float, expected: float) -> None:
    assert cleaning_clean((0.90, after)) == pytest.approx(expected)


# -- one verdict -------------------------------------------------------------------------------------------------------

STATE = {"w": torch.zeros(1)}


def test_a_perfect_answer_earns_everything_and_leaves_the_attacker_nothing() -> None:
    target = Target(2)
    answer = Verdict(p=1 - 1e-12, q=target.mix(4), trigger=planted.pixel(), target=2, repaired=STATE)
    truth = Truth(backdoored=True, trigger=planted.pixel(), target=target)
    earned = judge(answer, truth, planted.images(), planted.model(target), planted.model())
    assert (earned.asr, earned.pacc, earned.accuracy) == ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    nothing = judge(
        Verdict(p=1e-12, q=torch.full((4,), 0.25)), Truth(backdoored=False), planted.images(), planted.model()
    )
    for name in ROUNDS:
        weights = ROUNDS[name].weights
        assert defender_points([earned, nothing], weights) == pytest.approx(100.0)
        assert attack_points(earned, weights) == pytest.approx(0.0)


def test_a_repair_before_and_after_is_not_mixed_up() -> None:
    # The "repaired" model is the backdoored one, and the submitted one was clean: nothing may be earned for that.
    target = Target(2)
    truth = Truth(backdoored=True, trigger=planted.pixel(), target=target)
    answer = Verdict(p=0.5, q=torch.full((4,), 0.25), repaired=STATE)
    worse = judge(answer, truth, planted.images(), planted.model(), planted.model(target))
    assert worse.cleaning == 0.0
    assert worse.asr == (0.0, 1.0)


def test_no_repair_earns_nothing_on_a_backdoor_and_everything_on_a_clean_model() -> None:
    answer = Verdict(p=0.5, q=torch.full((4,), 0.25))
    truth = Truth(backdoored=True, trigger=planted.pixel(), target=Target(2))
    assert judge(answer, truth, planted.images(), planted.model(Target(2))).cleaning == 0.0
    assert judge(answer, Truth(backdoored=False), planted.images(), planted.model()).cleaning == 1.0


def test_a_repair_that_answers_garbage_is_no_repair() -> None:
    target = Target(2)
    truth = Truth(backdoored=True, trigger=planted.pixel(), target=target)
    answer = Verdict(p=0.5, q=torch.full((4,), 0.25), repaired=STATE)
    earned = judge(answer, truth, planted.images(), planted.model(target), planted.constant(0))
    assert earned.asr == (1.0, 0.0), "the ASR alone would praise it"
    assert earned.cleaning == 0.0


def test_source_specific_and_all_to_all_players_are_judged_on_their_own_images() -> None:
    for target in (Target(2, sources=(0, 1)), Target((1, 2, 3, 0))):
        truth = Truth(backdoored=True, trigger=planted.pixel(), target=target)
        answer = Verdict(p=0.9, q=target.mix(4), trigger=planted.pixel(), target=2, repaired=STATE)
        earned = judge(answer, truth, planted.images(), planted.model(target), planted.model())
        assert earned.asr == (1.0, 0.0)
        assert (earned.target, earned.trigger, earned.cleaning) == pytest.approx((1.0, 1.0, 1.0))


def test_the_repaired_model_comes_with_repaired_weights() -> None:
    with pytest.raises(ValueError, match="exactly where"):
        judge(
            Verdict(p=0.5, q=torch.full((4,), 0.25), repaired=STATE),
            Truth(backdoored=False),
            planted.images(),
            planted.model(),
        )


def test_the_truth_is_whole_or_nothing() -> None:
    with pytest.raises(ValueError, match="has neither"):
        Truth(backdoored=False, trigger=planted.pixel(), target=Target(1))
    with pytest.raises(ValueError, match="a trigger and a target"):
        Truth(backdoored=True, trigger=planted.pixel())
    with pytest.raises(ValueError, match="target exists for backdoored"):
        Points(backdoored=False, p=0.5, detection=0.0, cleaning=0.0, target=1.0)


# -- a round -----------------------------------------------------------------------------------------------------------


def test_defender_points_worked_by_hand() -> None:
    judged = [
        backdoored(p=0.9, detection=0.96, target=0.6, trigger=0.5, cleaning=0.4),
        backdoored(p=0.5, detection=0.0, target=0.0, trigger=0.1, cleaning=0.0),
        Points(backdoored=False, p=0.1, detection=0.96, cleaning=1.0),
        Points(backdoored=False, p=0.6, detection=-0.44, cleaning=0.8),
    ]
    # B (.96 + 0 + .96 - .44) / 4 = .37; T .6 / 2 = .3; R .6 / 2 = .3; C (.4 + 0 + 1 + .8) / 4 = .55
    assert parts(judged) == pytest.approx({"detection": 0.37, "target": 0.3, "trigger": 0.3, "cleaning": 0.55})
    # .40 * .37 + .15 * .3 + .25 * .3 + .20 * .55 = .148 + .045 + .075 + .11 = .378
    assert defender_points(judged, FINAL) == pytest.approx(37.8)
    # Round II: .60 * .37 + .20 * .3 + .20 * .3 = .342
    assert defender_points(judged, ROUNDS["II"].weights) == pytest.approx(34.2)


def test_without_backdoors_the_other_parts_carry_the_weight() -> None:
    # B = 1 - 4 * .04 = .84, C = .7: (.40 * .84 + .20 * .7) / .60 = .476 / .6
    judged = [clean(p=0.2, cleaning=0.7)]
    assert parts(judged)["target"] is None
    assert defender_points(judged, FINAL) == pytest.approx(100 * 0.476 / 0.6)
    with pytest.raises(ValueError, match="no judged models"):
        defender_points([], FINAL)


def test_the_order_of_models_does_not_matter() -> None:
    judged = [backdoored(p=i / 10, detection=detection(i / 10, True)) for i in range(5)] + [clean(0.3), clean(0.1)]
    assert defender_points(judged, FINAL) == defender_points(judged[::-1], FINAL)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7])
def test_the_best_constant_p_is_the_share_of_backdoors(share: float) -> None:
    # B must weigh the same on clean and backdoored models, else this optimum moves.
    n = 40
    positive = round(share * n)

    def points(p: float) -> float:
        judged = [backdoored(p=p, detection=detection(p, True))] * positive
        return defender_points([*judged, *[clean(p, 0.0)] * (n - positive)], FINAL)

    best = max(GRID, key=points)
    assert best == pytest.approx(share)


def test_attack_points_worked_by_hand() -> None:
    # .40 * (1 - .3) + .15 * (1 - .2) + .25 * (1 - .4) + .20 * (1 - .5) = .28 + .12 + .15 + .10
    earned = backdoored(p=0.3, hit=0.2, trigger=0.4, cleaning=0.5)
    assert attack_points(earned, FINAL) == pytest.approx(0.65)
    # Round I: .25 * .7 + .75 * .5
    assert attack_points(earned, ROUNDS["I"].weights) == pytest.approx(0.55)
    with pytest.raises(ValueError, match="only backdoored"):
        attack_points(clean(), FINAL)


def test_attack_points_stay_between_0_and_1_and_fall_with_every_success_of_the_defender() -> None:
    for name in ("p", "hit", "trigger", "cleaning"):
        values = [attack_points(backdoored(**{name: v}), FINAL) for v in GRID]
        assert all(a > b for a, b in pairwise(values))
        assert min(values) >= 0.0
        assert max(values) <= 1.0


@pytest.mark.parametrize(
    ("earned", "expected"),
    [
        ([0.6], 0.6),
        ([None], 0.0),
        ([0.2, 0.8], 0.8),  # best 1 of 2
        ([0.2, 0.8, 0.5], 0.65),  # best 2 of 3
        ([0.2, 0.8, None], 0.5 * 2 / 3),  # best 2 of 3: .8 and .2; two thirds are valid
        ([0.9, None, None, None], 0.9 / 4),  # best 2 of 4, but one is valid: .9; a quarter is valid
        ([0.4, 0.6, 0.8, None, None], 0.6 * 3 / 5),  # best 3 of 5; three fifths are valid
    ],
)
def test_team_points_worked_by_hand(earned: list[float | None], expected: float) -> None:
    assert team_points(earned) == pytest.approx(expected)
    assert team_points(earned[::-1]) == pytest.approx(expected)


def test_a_team_of_honest_models_has_no_points() -> None:
    with pytest.raises(ValueError, match="without submitted backdoors"):
        team_points([])


def test_a_weight_of_its_own_can_be_played() -> None:
    only = Weights(detection=0.0, target=1.0, trigger=0.0, cleaning=0.0)
    assert defender_points([backdoored(target=0.3), clean()], only) == pytest.approx(30.0)
