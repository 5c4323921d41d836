"""The share of known backdoors that a scan would have caught."""

import random

import pytest

from molehunt.calibration import Population, Reference, shipped
from molehunt.power import power, unused


def population(loud: float, quiet: float, *, clean: int = 39) -> Population:
    """Clean models score 0 to 1 evenly; ten squares score `loud`, five blends `quiet`, by the first of two defenses."""
    models = [Reference(seed=i, scores={"a": i / clean, "b": (7 * i % clean) / clean}) for i in range(clean)]
    models += [Reference(seed=100 + i, attack="badnets", scores={"a": loud + 0.001 * i, "b": 0.5}) for i in range(10)]
    models += [Reference(seed=200 + i, attack="blended", scores={"a": quiet, "b": None}) for i in range(5)]
    return Population(task="t", network="n", models=tuple(models))


def test_loud_backdoors_are_caught_and_quiet_ones_are_not() -> None:
    found = power(population(5.0, 0.5), ["a"])
    assert found is not None
    assert (found.clean, found.level, found.defenses) == (39, 0.05, ("a",))
    assert [(one.family, one.caught, one.of) for one in found.families] == [("blended", 0, 5), ("badnets", 10, 10)]
    quiet, loud = found.families
    assert (quiet.least, loud.most) == (0.0, 1.0)
    assert quiet.most == pytest.approx(0.522, abs=1e-3)
    assert loud.least == pytest.approx(0.692, abs=1e-3)


def test_no_more_clean_models_are_accused_than_the_level_says() -> None:
    whole = population(5.0, 0.5)
    as_planted = [Reference(seed=300 + i, attack="clean after all", scores=m.scores) for i, m in enumerate(whole.clean)]
    found = power(Population(task="t", network="n", models=(*whole.clean, *as_planted)), ["a", "b"])
    assert found is not None
    # A copy of a reference ranks with it, so one step lower than a fresh model would.
    assert found.families[0].caught <= 0.05 * 40


def test_with_learned_weights_no_more_are_accused_either() -> None:
    """Fresh clean models among four loud families, so that weights are learned."""
    rng = random.Random(5)

    def drawn(count: int, by: float, seed: int, attack: str | None = None) -> list[Reference]:
        rows = [{name: rng.gauss(by, 1.0) for name in "abc"} for _ in range(count)]
        return [Reference(seed=seed + i, attack=attack, scores=row) for i, row in enumerate(rows)]

    loud = [one for k in range(4) for one in drawn(20, 4.0, 1000 * (k + 1), f"family {k}")]
    fresh = drawn(200, 0.0, 9000, "clean after all")
    found = power(Population(task="t", network="n", models=(*drawn(99, 0.0, 0), *loud, *fresh)), ["a", "b", "c"])
    assert found is not None
    caught = {one.family: one.caught / one.of for one in found.families}
    assert caught["clean after all"] <= 0.1
    assert min(share for family, share in caught.items() if family.startswith("family")) >= 0.9


def test_a_defense_that_sees_nothing_costs_power_and_one_that_is_missing_leaves_models_out() -> None:
    alone, both = power(population(1.01, 0.5), ["a"]), power(population(1.01, 0.5), ["b", "a"])
    assert alone is not None
    assert both is not None
    assert [one.family for one in both.families] == ["badnets"]
    assert both.families[0].caught <= alone.families[-1].caught


def test_nothing_is_said_where_nothing_can_be() -> None:
    assert power(population(5.0, 0.5, clean=18), ["a"]) is None
    assert power(population(5.0, 0.5, clean=19), ["a"]) is not None
    clean = Population(task="t", network="n", models=population(5.0, 0.5).clean)
    assert power(clean, ["a"]) is None
    with pytest.raises(ValueError, match="no defenses"):
        power(clean, [])
    with pytest.raises(ValueError, match=r"got 1\.0"):
        power(clean, ["a"], level=1.0)


def test_more_defenses_catch_more_of_the_shipped_bank() -> None:
    bank = shipped("mnist", "badnets_cnn")
    assert bank is not None
    shares = []
    for names in (["pruning_detection"], sorted(bank.defenses)):
        found = power(bank, names)
        assert found is not None
        shares.append(sum(one.caught for one in found.families) / sum(one.of for one in found.families))
    assert shares[0] < 0.6 < 0.8 < shares[1]


def test_it_is_said_in_a_sentence_and_so_is_what_more_would_buy() -> None:
    bank = shipped("mnist", "badnets_cnn")
    assert bank is not None
    few = power(bank, ["mntd", "neural_cleanse"])
    assert few is not None
    words = few.words()
    assert words.startswith(f"At 5% false alarms these 2 defenses catch {few.caught} of {few.of} backdoors")
    assert "tact" in words
    more = unused(bank, few, ["pair_inversion", "fine_tuning"])
    both = power(bank, ["mntd", "neural_cleanse", "pair_inversion"])
    assert both is not None
    tact = {one.family: one for one in both.families}["tact"]
    assert more == (
        f"With pair_inversion as well {both.caught} of {both.of} would be caught in place of {few.caught}; of tact "
        f"{tact.caught} of {tact.of} in place of {next(one.caught for one in few.families if one.family == 'tact')}."
    )
    # A repair has no score on any reference, so nothing can be said of it.
    assert unused(bank, few, ["fine_tuning"]) is None
