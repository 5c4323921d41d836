import math
import re
import string
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy.stats import betabinom

from molehunt.conformal import (
    STRENGTHS,
    _indices,
    chance,
    combined,
    conformal,
    index_null,
    indicative,
    posterior,
    shift,
)
from molehunt.defenses._statistics import smallness


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- p-values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "expected"),
    [(9.0, 1 / 6), (5.0, 2 / 6), (4.5, 2 / 6), (3.0, 5 / 6), (0.0, 1.0)],  # a tie counts against suspicion
)
def test_a_conformal_p_value_worked_by_hand(score: float, expected: float) -> None:
    assert conformal(score, [1.0, 3.0, 3.0, 4.0, 5.0]) == pytest.approx(expected)


def test_p_values_of_clean_models_are_uniform() -> None:
    scores = normal(2000, 20).tolist()
    values = [conformal(row[0], row[1:]) for row in scores]
    # Discrete: every multiple of 1/20 alike. Chi-square with 19 degrees of freedom, 99.9 % point 43.8.
    counts = [sum(round(20 * v) == k for v in values) for k in range(1, 21)]
    assert sum((c - 100) ** 2 / 100 for c in counts) < 43.8


def test_scores_must_be_finite_and_references_exist() -> None:
    with pytest.raises(ValueError, match="no reference scores"):
        conformal(1.0, [])
    with pytest.raises(ValueError, match="finite"):
        conformal(math.nan, [1.0])
    with pytest.raises(ValueError, match="finite"):
        conformal(1.0, [math.inf])


# -- combination -------------------------------------------------------------------------------------------------------


def test_one_score_combines_to_its_own_p_value() -> None:
    references = normal(19).tolist()
    for score in (-3.0, references[4], 0.1, 3.0):
        assert combined([score], [[r] for r in references]) == pytest.approx(conformal(score, references))


def test_a_combination_worked_by_hand() -> None:
    # Pool of five, two scores. Suspect (9, 1) against (1, 0), (2, 3), (3, 4), (4, 2).
    # Counts of "at least as high", first score: suspect 1; 5, 4, 3, 2. Second: suspect 4; 5, 2, 1, 3.
    # Sums of reciprocals: suspect 5/4; 2/5, 3/4, 4/3, 5/6. One reference is above: p = 2/5. (By mean rank, 5 against
    # 10, 6, 4, 5, it would be 3/5: where the suspect leads counts for more than where it trails.)
    assert combined([9.0, 1.0], [[1.0, 0.0], [2.0, 3.0], [3.0, 4.0], [4.0, 2.0]]) == pytest.approx(2 / 5)
    # A tie with a reference counts against suspicion: (4, 9) mirrors (9, 4).
    assert combined([9.0, 4.0], [[4.0, 9.0], [1.0, 1.0]]) == pytest.approx(2 / 3)


def test_best_in_everything_has_the_smallest_p_value_there_is() -> None:
    references = normal(19, 4).tolist()
    assert combined([9.0] * 4, references) == pytest.approx(1 / 20)
    assert combined([-9.0] * 4, references) == 1.0


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.95])
def test_combined_p_values_of_clean_models_are_valid_however_scores_depend(correlation: float) -> None:
    shared, own = normal(1500, 20, 1), normal(1500, 20, 5, seed=1)
    scores = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    values = [combined(rows[0], rows[1:]) for rows in scores.tolist()]
    for level in (0.05, 0.1, 0.2, 0.5):
        rate = sum(v <= level + 1e-9 for v in values) / len(values)
        assert rate <= level + 3 * math.sqrt(level * (1 - level) / len(values))
    assert sum(v <= 0.2 for v in values) > 0.1 * len(values), "valid, but not by never being small"


def test_monotone_in_every_score_and_blind_to_units_and_order() -> None:
    references = normal(30, 3).tolist()
    suspect = [0.5, 0.2, -0.3]
    p = combined(suspect, references)
    for j in range(3):
        higher = [s + (2.0 if i == j else 0.0) for i, s in enumerate(suspect)]
        assert combined(higher, references) <= p
    scaled = [[math.exp(a), 10 * b, c] for a, b, c in references]
    assert combined([math.exp(suspect[0]), 10 * suspect[1], suspect[2]], scaled) == p
    assert combined(suspect, references[::-1]) == p
    assert combined(suspect[::-1], [row[::-1] for row in references]) == p


def test_a_combination_refuses_ragged_rows() -> None:
    with pytest.raises(ValueError, match="rows of 2"):
        combined([1.0, 2.0], [[1.0, 2.0], [1.0]])
    with pytest.raises(ValueError, match="rows of 1"):
        combined([1.0], [])
    with pytest.raises(ValueError, match="finite"):
        combined([math.nan], [[1.0]])


# -- probabilities -----------------------------------------------------------------------------------------------------


def test_the_chance_of_a_rank_is_beta_binomial() -> None:
    for strength in (0.6, 0.75, 0.9):
        a = 1 / strength - 1
        for count in (0, 1, 7, 19):
            assert chance(count, 19, strength) == pytest.approx(betabinom.pmf(count, 19, a, 1))
    # A coin toss ranks every model alike.
    assert [chance(k, 4, 0.5) for k in range(5)] == pytest.approx([0.2] * 5)
    # AUC .75: a = 1/3; one reference is beaten with probability 3/4.
    assert chance(0, 1, 0.75) == pytest.approx(0.75)


def test_a_posterior_worked_by_hand() -> None:
    # One clean reference, beaten: the chance is the strength itself, .75 on average over .5 to 1; against 1/2 for a
    # clean model that makes 3 : 2. The clip for one reference, 1/3 to 2/3, does not reach .6.
    assert posterior(0.5, 1) == pytest.approx(0.6)
    # Not beaten: .25 against .5.
    assert posterior(1.0, 1) == pytest.approx(1 / 3)
    # Prior odds 1 : 4 and 3 : 2 make 3 : 8.
    assert posterior(0.5, 1, prior=0.2) == pytest.approx(1 / 3)  # 3 / 11 is below the clip


def test_known_families_and_an_unknown_one_count_alike_by_hand() -> None:
    # Strengths lie evenly over .505, .515, ..., .995: mean .75, variance (50² - 1) / 12 / 10^4 = .020825. A family
    # whose one model beat the only reference weighs a strength s by s: its next one beats it with probability
    # (.75² + .020825) / .75, a family that was not beaten with (.75 - .75² - .020825) / .25, an unknown one with .75.
    found, missed = 0.583325 / 0.75, 0.166675 / 0.25
    odds = (found + 0.75) / 2 / 0.5
    assert posterior(0.5, 1, planted={"a": [0.5]}) == pytest.approx(odds / (1 + odds))
    odds = (found + missed + 0.75) / 3 / 0.5
    assert posterior(0.5, 1, planted={"a": [0.5], "b": [1.0]}) == pytest.approx(odds / (1 + odds))


def test_many_models_of_a_loud_family_say_nothing_about_another() -> None:
    found = [1 / 100] * 20
    few = posterior(0.5, 99, planted={"loud": found, "quiet": [0.5, 0.7]})
    many = posterior(0.5, 99, planted={"loud": found * 5, "quiet": [0.5, 0.7]})
    assert many == pytest.approx(few, abs=0.01)
    # However sure the known families are, one that nobody has met keeps its share.
    loud = dict.fromkeys("abcd", found)
    unknown = posterior(0.5, 99) / (1 - posterior(0.5, 99))
    p = posterior(0.5, 99, planted=loud)
    assert unknown / 5 < p / (1 - p) < unknown / 5 + 0.02
    assert posterior(0.5, 99, planted={**loud, "e": []}) == p


def test_the_posterior_falls_with_the_p_value_and_grows_with_the_prior() -> None:
    values = [posterior(k / 20, 19) for k in range(1, 21)]
    assert all(a > b for a, b in pairwise(values))
    assert [posterior(1 / 20, 19, prior=p) for p in (0.1, 0.5, 0.9)] == sorted(
        posterior(1 / 20, 19, prior=p) for p in (0.1, 0.5, 0.9)
    )


def test_the_table_of_the_docs() -> None:
    page = (Path(__file__).parent.parent / "docs/reference/verdict.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|((?: 0\.\d{3} \|){4})$", page, re.MULTILINE)
    assert len(rows) >= 5
    for n, families, m, values in rows:
        references, planted = int(n), {name: [1 / (int(n) + 1)] * int(m) for name in "abcdefg"[: int(families)]}
        for count, value in zip(
            (0, 1, (references + 1) // 2 - 1, references), re.findall(r"[\d.]+", values), strict=True
        ):
            p = posterior((count + 1) / (references + 1), references, planted=planted)
            assert f"{p:.3f}" == value, f"{n} references, {families} families of {m}, {count} as high"


LOUD = {name: [1 / 20] * 15 for name in "ab"}
LOUDER = {name: [1 / 5001] * 50 for name in string.ascii_letters}


def test_perfect_separation_never_leaves_the_clip() -> None:
    assert posterior(1 / 20, 19, planted=LOUD, prior=0.99) == pytest.approx(1 - 1 / 51)
    assert posterior(1.0, 19, planted=LOUD, prior=0.01) == pytest.approx(1 / 51)
    assert posterior(1 / 5001, 5000, planted=LOUDER) == pytest.approx(0.99)
    assert posterior(1.0, 5000, planted=LOUDER, prior=0.3) == pytest.approx(0.01)


def test_known_backdoors_that_were_found_make_silence_reassuring() -> None:
    unknown = posterior(0.5, 19)
    found = posterior(0.5, 19, planted={"a": [1 / 20] * 8, "b": [1 / 20] * 8})
    missed = posterior(0.5, 19, planted={"a": [0.4, 0.6, 0.5, 0.9, 0.3, 0.7, 0.45, 0.8]})
    assert found < 0.2 < unknown < missed


def test_probabilities_are_calibrated_where_the_model_holds() -> None:
    # Half of the suspects are backdoored; the strength is drawn as the prior says. Among those who got a p in a range,
    # the share of backdoored ones must be about that p.
    rng = torch.Generator().manual_seed(0)
    said, true = [], []
    for _ in range(3000):
        hidden = bool(torch.rand((), generator=rng) < 0.5)
        u = float(torch.rand((), generator=rng))
        if hidden:
            strength = STRENGTHS[int(torch.randint(len(STRENGTHS), (), generator=rng))]
            u = u ** (1 / (1 / strength - 1))  # Beta(a, 1)
        count = int((torch.rand(19, generator=rng) < u).sum())
        said.append(posterior((1 + count) / 20, 19))
        true.append(hidden)
    for low, high in ((0.0, 0.35), (0.35, 0.6), (0.6, 1.0)):
        rows = [(p, y) for p, y in zip(said, true, strict=True) if low <= p < high]
        mean = sum(p for p, _ in rows) / len(rows)
        rate = sum(y for _, y in rows) / len(rows)
        assert rate == pytest.approx(mean, abs=3.5 * math.sqrt(mean * (1 - mean) / len(rows)))


def test_probabilities_are_calibrated_with_known_families_and_an_unknown_one() -> None:
    # Each of two known families has a strength of its own, which five planted models show; what is hidden is of one
    # of them or of a third, whose strength nothing shows.
    rng = torch.Generator().manual_seed(1)

    def share(strength: float) -> float:
        return math.pow(float(torch.rand((), generator=rng, dtype=torch.float64)), 1 / (1 / strength - 1))

    said, true = [], []
    for _ in range(2000):
        strengths = [STRENGTHS[int(i)] for i in torch.randint(len(STRENGTHS), (3,), generator=rng)]
        hidden = bool(torch.rand((), generator=rng) < 0.5)
        family = int(torch.randint(3, (), generator=rng))

        def p_value(u: float) -> float:
            return (1 + int((torch.rand(19, generator=rng, dtype=torch.float64) < u).sum())) / 20

        planted = {name: [p_value(share(s)) for _ in range(5)] for name, s in zip("ab", strengths, strict=False)}
        said.append(posterior(p_value(share(strengths[family] if hidden else 0.5)), 19, planted=planted))
        true.append(hidden)
    for low, high in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.8), (0.8, 1.0)):
        rows = [(p, y) for p, y in zip(said, true, strict=True) if low <= p < high]
        assert len(rows) > 100
        mean = sum(p for p, _ in rows) / len(rows)
        rate = sum(y for _, y in rows) / len(rows)
        assert rate == pytest.approx(mean, abs=3.5 * math.sqrt(mean * (1 - mean) / len(rows)))


@pytest.mark.parametrize(("p_value", "references"), [(0.07, 19), (0.0, 19), (1.05, 19), (0.5, 0)])
def test_impossible_p_values_are_refused(p_value: float, references: int) -> None:
    with pytest.raises(ValueError, match="cannot give"):
        posterior(p_value, references)


def test_a_prior_is_no_certainty() -> None:
    with pytest.raises(ValueError, match="prior"):
        posterior(0.5, 1, prior=1.0)
    with pytest.raises(ValueError, match="strength"):
        chance(0, 1, 1.0)


def test_a_shift_of_the_prior_worked_by_hand() -> None:
    # Odds 4 : 1 under even odds; with a prior of 1 in 10 they are 4 : 9.
    assert shift(0.8, old=0.5, new=0.1) == pytest.approx(4 / 13)
    assert shift(0.3, old=0.4, new=0.4) == pytest.approx(0.3)
    assert shift(posterior(0.2, 19), old=0.5, new=0.25) == pytest.approx(posterior(0.2, 19, prior=0.25))
    with pytest.raises(ValueError, match="strictly between"):
        shift(1.0, old=0.5, new=0.5)


# -- without references ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "above_two", "point"), [(5, 0.28, 5.7), (10, 0.33, 3.9), (43, 0.64, 3.5), (100, 0.88, 3.5)]
)
def test_the_simulated_index_is_what_the_literature_note_found(classes: int, above_two: float, point: float) -> None:
    null = index_null(classes)
    assert float((null > 2).double().mean()) == pytest.approx(above_two, abs=0.015)
    assert float(null.quantile(0.95)) == pytest.approx(point, abs=0.15)


def test_the_simulated_index_is_the_one_that_neural_cleanse_computes() -> None:
    norms = normal(50, 10)
    assert _indices(norms).tolist() == pytest.approx([float(smallness(row).max()) for row in norms])


def test_an_indicative_p_value_is_worth_no_more_than_nineteen_references() -> None:
    assert indicative(50.0, 10) == pytest.approx(1 / 20)
    assert indicative(-50.0, 10) == 1.0
    # A third of clean ten-class models exceed 2: seven of twenty, rounded up.
    assert indicative(2.0, 10) == pytest.approx(7 / 20)
    with pytest.raises(ValueError, match="at least 3"):
        index_null(2)
