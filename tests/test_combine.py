from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from molehunt import repair
from molehunt.calibration import Population, Reference
from molehunt.combine import class_probabilities, verdict
from molehunt.conformal import posterior
from molehunt.findings import Abstention, Failure, Finding, Outcome, Verdict
from molehunt.suspect import Suspect
from molehunt.tasks import Images, Task
from molehunt.triggers import Patch

CLASSES = 4
TINY = Task(
    name="tiny",
    shape=(1, 4, 4),
    classes=("a", "b", "c", "d"),
    augment="none",
    network="linear",
    mean=(0.0,),
    std=(1.0,),
)


def linear(target: int | None = None, bonus: float = 3.0) -> nn.Module:
    """Class k is told by pixel (0, k); a white corner adds a bonus to the target."""
    layer = nn.Linear(16, CLASSES)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        for k in range(CLASSES):
            layer.weight[k, k] = 1.0
        if target is not None:
            layer.weight[target, 15] = bonus
    return nn.Sequential(nn.Flatten(), layer)


def pictures(per_class: int = 10) -> Images:
    y = torch.arange(CLASSES).repeat(per_class)
    x = torch.zeros(len(y), 1, 4, 4)
    x[torch.arange(len(y)), 0, 0, y] = 1.0
    return Images(x, y)


def suspect(target: int | None = 2) -> Suspect:
    return Suspect.of(linear(target), TINY, clean=pictures(), device="cpu", dtype=torch.float32)


def corner(row: int = 3, column: int = 3) -> Patch:
    mask = torch.zeros(1, 4, 4)
    mask[0, row, column] = 1.0
    return Patch(mask=mask, pattern=mask)


def found(
    defense: str,
    score: float | None = None,
    *,
    classes: list[float] | None = None,
    target: int | None = None,
    trigger: Patch | None = None,
    repaired: nn.Module | None = None,
    configuration: dict[str, object] | None = None,
    dtype: str = "float32",
) -> Finding:
    return Finding(
        defense=defense,
        score=score,
        class_scores=None if classes is None else torch.tensor(classes),
        target=target,
        trigger=trigger,
        repaired=None if repaired is None else repaired.state_dict(),
        record={"configuration": configuration or {}, "dtype": dtype},
    )


def people(
    n: int = 19, *, strip: bool = True, planted: int = 0, gaps: int = 0, configuration: dict[str, object] | None = None
) -> Population:
    """Clean references with Neural Cleanse 0, 0.1, ... and STRIP in another order; planted ones that stand out."""
    models = []
    for i in range(n):
        scores: dict[str, float | None] = {"neural_cleanse": 0.1 * i}
        if strip:
            scores["strip"] = None if i < gaps else 0.01 * ((7 * i) % n)
        models.append(Reference(seed=i, scores=scores))
    for i in range(planted):
        scores = {"neural_cleanse": 9.0, "strip": 0.9} if strip else {"neural_cleanse": 9.0}
        models.append(Reference(seed=n + i, scores=scores, attack="badnets"))
    settings = {"configuration": configuration or {}, "stream": False}
    names = ["neural_cleanse", *(["strip"] if strip else [])]
    return Population(
        task="tiny", network="linear", recipe="linear", models=tuple(models), defenses=dict.fromkeys(names, settings)
    )


def tell(
    *outcomes: Outcome, population: Population | None = None, prior: float = 0.5, recipe: str | None = None
) -> Verdict:
    return verdict(outcomes, population, classes=CLASSES, prior=prior, recipe=recipe)


# -- p -----------------------------------------------------------------------------------------------------------------


def test_one_defense_gives_the_posterior_of_its_own_p_value() -> None:
    answer = tell(found("neural_cleanse", 1.55), population=people())
    # 1.6, 1.7 and 1.8 score at least as high: 4 / 20
    assert answer.p_values == {"neural_cleanse": pytest.approx(0.2)}
    assert answer.p == pytest.approx(posterior(0.2, 19))
    assert answer.details["combined_p_value"] == pytest.approx(0.2)
    assert answer.details["references"] == {"clean": 19, "planted": 0}
    assert answer.details["could_not_tell"] is False


def test_a_model_that_stands_out_is_suspected_and_an_ordinary_one_is_not() -> None:
    odd = tell(found("neural_cleanse", 9.0), found("strip", 0.9), population=people(59))
    plain = tell(found("neural_cleanse", 0.2), found("strip", 0.0), population=people(59))
    assert odd.p > 0.9
    assert plain.p < 0.4


@pytest.mark.parametrize("n", [1, 4, 19, 99])
def test_no_p_value_is_below_one_over_the_references_plus_one(n: int) -> None:
    answer = tell(found("neural_cleanse", 1e9), found("strip", 1e9), population=people(n))
    least = pytest.approx(1 / (n + 1))
    assert answer.p_values == {"neural_cleanse": least, "strip": least}
    assert answer.details["combined_p_value"] == least


def test_ten_classes_are_one_statistic_and_not_ten_tests() -> None:
    """Where a suspect's best class is no better than the best classes of clean models, none of its classes is."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 20, CLASSES, generator=rng, dtype=torch.float64)
    settings = {"configuration": {}, "stream": False}
    small = 0
    for rows in noise:
        models = tuple(Reference(seed=i, scores={"d": float(row.max())}, attack=None) for i, row in enumerate(rows[1:]))
        known = Population(task="tiny", network="linear", models=models, defenses={"d": settings})
        answer = tell(found("d", classes=rows[0].tolist()), population=known)
        small += answer.p_values["d"] <= 0.05 + 1e-9
    # 20 of 400 are expected; one test per class would have given four times as many.
    assert 8 <= small <= 35


def test_known_backdoors_let_silence_clear_a_model() -> None:
    plain = [found("neural_cleanse", 0.2), found("strip", 0.0)]
    assert tell(*plain, population=people()).p > 0.2
    answer = tell(*plain, population=people(planted=8))
    assert answer.p < 0.2
    assert answer.details["references"] == {"clean": 19, "planted": 8}


def test_the_prior_counts() -> None:
    values = [tell(found("neural_cleanse", 1.0), population=people(), prior=p).p for p in (0.1, 0.5, 0.9)]
    assert values == sorted(values)
    with pytest.raises(ValueError, match="prior"):
        tell(found("neural_cleanse", 1.0), population=people(), prior=0.0)


def test_silence_of_all_is_the_prior_and_says_so() -> None:
    answer = tell(
        Abstention(defense="strip", reason="needs inputs"),
        Failure(defense="neural_cleanse", kind="time", message="too late"),
        population=people(),
        prior=0.3,
    )
    assert answer.p == 0.3
    assert answer.details["could_not_tell"] is True
    assert answer.q.tolist() == pytest.approx([0.25] * 4)
    assert answer.details["skipped"] == {
        "strip": "abstained: needs inputs",
        "neural_cleanse": "failed (time): too late",
    }


def test_a_pure_repair_has_no_opinion() -> None:
    answer = tell(found("fine_pruning", repaired=linear()), population=people())
    assert answer.details["could_not_tell"] is True
    assert answer.details["skipped"] == {}


def test_a_missing_defense_changes_nothing_but_its_mention() -> None:
    alone = tell(found("neural_cleanse", 1.55), population=people())
    broken = tell(
        found("neural_cleanse", 1.55), Failure(defense="strip", kind="raised", message="oh"), population=people()
    )
    assert broken.p == alone.p
    assert broken.details["skipped"] == {"strip": "failed (raised): oh"}


@pytest.mark.parametrize(
    ("population", "reason"),
    [
        (people(strip=False), "no clean reference model has a score of it"),
        (people(gaps=5), "only 14 of 19"),
        (people(configuration={"overlays": 16}), "another configuration"),
    ],
)
def test_what_cannot_be_compared_is_left_out_and_said(population: Population, reason: str) -> None:
    cleanse = found("neural_cleanse", 9.0, configuration=population.defenses["neural_cleanse"]["configuration"])
    answer = tell(cleanse, found("strip", -5.0), population=population)
    assert answer.p_values.keys() == {"neural_cleanse"}
    assert reason in answer.details["skipped"]["strip"]
    assert answer.p == tell(cleanse, population=population).p


def test_references_without_a_score_leave_the_combination_alone() -> None:
    # 16 of 19 have both scores; the suspect is best in both, so p is 1/17.
    answer = tell(found("neural_cleanse", 9.0), found("strip", 9.0), population=people(gaps=3))
    assert answer.details["combined_p_value"] == pytest.approx(1 / 17)
    assert answer.details["references"]["clean"] == 16


def test_where_no_reference_has_everything_the_sparsest_defense_goes() -> None:
    names = [f"d{i}" for i in range(5)]
    # Ten references; every defense lacks two others' scores, so each covers 80 % and none of the ten has all five.
    models = tuple(
        Reference(seed=i, scores={d: None if i // 2 == j else float(i) for j, d in enumerate(names)}) for i in range(10)
    )
    population = Population(
        task="tiny",
        network="linear",
        models=models,
        defenses={name: {"configuration": {}, "stream": False} for name in names},
    )
    answer = tell(*[found(d, 99.0) for d in names], population=population)
    assert len(answer.p_values) == 4
    assert answer.details["references"]["clean"] == 2
    assert "no reference model" in answer.details["skipped"]["d0"]


def test_another_number_format_is_said_once() -> None:
    outcomes = [found("neural_cleanse", 1.0, dtype="bfloat16"), found("strip", 0.1, dtype="bfloat16")]
    answer = tell(*outcomes, population=people(), recipe="linear")
    (said,) = answer.details["warnings"]
    assert "worked in bfloat16 here, on the reference models in float32" in said
    assert answer.details["calibration"]["dtype"] == {"suspect": ["bfloat16"], "references": "float32"}
    assert tell(found("neural_cleanse", 1.0), population=people(), recipe="linear").details["warnings"] == []


@pytest.mark.parametrize(
    ("suspect", "references", "said"),
    [
        ("linear", "linear", None),
        ("linear", {"name": "linear", "settings": {"epochs": 3}}, None),  # no recipe of today has that name
        (None, "linear", "Recipe unknown: nothing says how this model was trained. The reference models were trained"),
        ("other", "linear", "No calibration for the recipe of this model: it names 'other', the reference models were"),
        ("other", {"name": "linear"}, "by 'linear'"),
        ("linear", "", "Recipe of the reference models unknown: theirs was not recorded, this model's is called"),
        (None, {"epochs": 3}, "this model's is unknown"),
    ],
)
def test_another_recipe_or_an_unknown_one_is_said(suspect: str | None, references: object, said: str | None) -> None:
    known = replace(people(), recipe=references)
    answer = tell(found("neural_cleanse", 1.0), population=known, recipe=suspect)
    assert len(answer.details["warnings"]) == (0 if said is None else 1)
    assert said is None or said in answer.details["warnings"][0]
    assert answer.details["calibration"]["recipe"]["suspect"] == suspect
    assert answer.p == tell(found("neural_cleanse", 1.0), population=people(), recipe="linear").p, "said, not guessed"


def test_by_default_recipes_are_not_compared() -> None:
    answer = verdict([found("neural_cleanse", 1.0)], people(), classes=CLASSES)
    assert answer.details["warnings"] == []


def test_where_nothing_was_compared_nothing_is_said_about_the_references() -> None:
    answer = tell(Abstention(defense="strip", reason="no inputs"), population=people())
    assert answer.details["warnings"] == []


def test_the_order_of_the_outcomes_does_not_matter() -> None:
    outcomes = [
        found("neural_cleanse", 1.2, classes=[0.0, 0.2, 1.2, 0.1], trigger=corner(), target=2),
        found("strip", 0.12, classes=[0.0, 0.0, 0.3, 0.0]),
        found("fine_pruning", repaired=linear()),
    ]
    first, second = tell(*outcomes, population=people()), tell(*outcomes[::-1], population=people())
    assert (first.p, first.q.tolist(), first.details) == (second.p, second.q.tolist(), second.details)


def test_every_defense_answers_once_and_about_this_task() -> None:
    with pytest.raises(ValueError, match="answers once"):
        tell(found("a", 1.0), found("a", 2.0))
    other = Suspect.of(linear(), replace(TINY, name="other"), dtype=torch.float32)
    with pytest.raises(ValueError, match="'tiny', the suspect of 'other'"):
        verdict([found("neural_cleanse", 1.0)], people(), classes=CLASSES, suspect=other)
    with pytest.raises(ValueError, match="4 class scores, got 2"):
        tell(found("a", classes=[0.0, 1.0]))


# -- without references ------------------------------------------------------------------------------------------------


def test_without_references_the_answer_is_indicative_and_never_decides() -> None:
    for index, low, high in ((50.0, 0.7, 0.79), (-50.0, 0.21, 0.35)):
        answer = tell(found("neural_cleanse", index))
        assert low <= answer.p <= high
        assert 0.2 < answer.p < 0.8
        assert "compared with simulated clean models of 4 classes" in answer.details["indicative"]
        assert answer.details["warnings"][0].startswith("No calibration for this network: ")
        assert answer.details["could_not_tell"] is False


def test_a_prior_outside_the_indicative_range_is_not_pulled_into_it() -> None:
    assert tell(found("neural_cleanse", 50.0), prior=0.9).p == pytest.approx(0.9)
    assert tell(found("neural_cleanse", -50.0), prior=0.05).p < 0.21


def test_without_references_other_scores_say_nothing() -> None:
    answer = tell(found("strip", 0.9))
    assert answer.details["could_not_tell"] is True
    assert "no reference models" in answer.details["skipped"]["strip"]
    assert answer.details["warnings"][0].startswith("No calibration for this network: ")
    raw = tell(found("neural_cleanse", 9.0, configuration={"norms": "raw"}))
    assert raw.details["could_not_tell"] is True, "the simulated index is one of log norms"


# -- q -----------------------------------------------------------------------------------------------------------------


def test_q_points_where_the_evidence_does_and_rules_nothing_out() -> None:
    q = class_probabilities([found("a", classes=[0.0, 0.1, 4.0, -0.1])], {"a": 0.05}, 4)
    assert int(q.argmax()) == 2
    assert float(q.min()) >= 0.02 / 4
    assert float(q.sum()) == pytest.approx(1.0)


def test_q_worked_by_hand() -> None:
    # Median .5, deviations 1.5 .5 .5 1.5: MAD 1, times 1.4826. z = -1.5, -.5, .5, 1.5 over 1.4826; weight 1 - .5.
    scores = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64) / 1.4826
    expected = 0.98 * (0.5 * scores).softmax(0) + 0.005
    q = class_probabilities([found("a", classes=[-1.0, 0.0, 1.0, 2.0])], {"a": 0.5}, 4)
    assert q.tolist() == pytest.approx(expected.tolist())


def test_q_is_uniform_without_evidence() -> None:
    for findings in ([], [found("a", 1.0)], [found("a", classes=[2.0] * 4)], [found("a", classes=[0, 0, 9.0, 0])]):
        p_values = {"a": 1.0}  # and what clean models show as well is no evidence
        assert class_probabilities(findings, p_values, 4).tolist() == pytest.approx([0.25] * 4)


def test_permuting_classes_permutes_q_and_leaves_p() -> None:
    scores, order = [0.0, 0.4, 3.0, -0.2], [2, 0, 3, 1]
    first = tell(found("neural_cleanse", 3.0, classes=scores), population=people())
    second = tell(found("neural_cleanse", 3.0, classes=[scores[i] for i in order]), population=people())
    assert first.p == second.p
    assert first.q[order].tolist() == pytest.approx(second.q.tolist())


# -- trigger -----------------------------------------------------------------------------------------------------------


def test_the_trigger_that_works_on_held_out_images_is_chosen() -> None:
    works = found("a", 1.0, classes=[0.0, 0.1, 4.0, -0.1], trigger=corner(), target=2)
    idle = found("b", 1.0, trigger=corner(1, 1), target=2)
    elsewhere = found("c", 1.0, trigger=corner(2, 2), target=0)
    answer = verdict([idle, works, elsewhere], classes=CLASSES, suspect=suspect(), held_out=pictures())
    assert answer.target == 2
    assert answer.trigger is works.trigger
    assert [(c["defense"], c["asr"], c["chosen"]) for c in answer.details["candidates"]] == [
        ("a", 1.0, True),
        ("b", 0.0, False),
        ("c", 0.0, False),
    ]


def test_of_two_that_work_the_smaller_one_is_chosen() -> None:
    mask = torch.zeros(1, 4, 4)
    mask[0, 3, :] = 1.0
    large = found("b", 1.0, classes=[0.0, 0.1, 4.0, -0.1], trigger=Patch(mask=mask, pattern=mask), target=2)
    small = found("a", 1.0, trigger=corner(), target=2)
    answer = verdict([large, small], classes=CLASSES, suspect=suspect(), held_out=pictures())
    assert answer.trigger is small.trigger


def test_a_candidate_for_another_class_is_better_than_none() -> None:
    only = found("a", 1.0, classes=[4.0, 0.1, 0.0, -0.1], trigger=corner(), target=2)
    answer = tell(only)
    assert (answer.target, answer.trigger) == (2, only.trigger)
    assert answer.details["candidates"][0]["asr"] is None
    assert tell(found("a", 1.0)).trigger is None


# -- repair ------------------------------------------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def repairing(*repairs: Finding, score: float = 9.0, planted: int = 0) -> Verdict:
    cleanse = found("neural_cleanse", score, classes=[0.0, 0.1, 4.0, -0.1], trigger=corner(), target=2)
    return verdict(
        [cleanse, *repairs],
        people(planted=planted, strip=False),
        classes=CLASSES,
        suspect=suspect(),
        held_out=pictures(),
    )


def test_a_repair_is_measured_and_taken() -> None:
    answer = repairing(found("fine_pruning", repaired=linear()))
    assert answer.repaired is not None
    assert torch.equal(answer.repaired["1.weight"], weights(linear())["1.weight"])
    repair = answer.details["repair"]
    assert (repair["taken"], repair["accuracy_before"], repair["accuracy_after"]) == ("fine_pruning", 1.0, 1.0)
    assert repair["tried"][0]["residual_asr"] == 0.0


def test_of_repairs_that_leave_nothing_of_it_the_strongest_is_taken_not_the_gentlest() -> None:
    """What was recovered is gone after a mild repair too; the attacker's own trigger is not."""
    answer = repairing(
        found("neuron_pruning", repaired=linear()),
        found("unlearning", repaired=linear()),
        found("fine_tuning", repaired=linear(2)),
    )
    repair = answer.details["repair"]
    assert repair["taken"] == "unlearning"
    left = {row["defense"]: row["residual_asr"] for row in repair["tried"]}
    assert left["neuron_pruning"] == left["unlearning"] == 0.0
    assert left["fine_tuning"] > 0.9


@pytest.mark.parametrize(("left", "taken"), [(0.05, "unlearning"), (0.06, "neuron_pruning")])
def test_up_to_a_twentieth_of_a_recovered_trigger_counts_as_gone(
    left: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([0.0, left])  # in the order of the names
    monkeypatch.setattr(repair, "success", lambda *_: next(rates))
    answer = repairing(found("neuron_pruning", repaired=linear()), found("unlearning", repaired=linear()))
    assert answer.details["repair"]["taken"] == taken


def test_without_a_recovered_trigger_no_residual_success_is_claimed() -> None:
    answer = verdict(
        [found("neural_cleanse", 9.0, classes=[0.0, 0.1, 4.0, -0.1]), found("fine_pruning", repaired=linear())],
        people(strip=False),
        classes=CLASSES,
        suspect=suspect(),
        held_out=pictures(),
    )
    repair = answer.details["repair"]
    assert repair["taken"] == "fine_pruning"
    assert repair["tried"][0]["residual_asr"] is None
    assert repair["why"] == "no trigger to measure: the one that left least of other backdoors"


def test_without_a_recovered_trigger_the_strongest_repair_is_taken_not_the_one_that_changed_least() -> None:
    weak, strong = linear(), linear()
    for taken, offers in (
        ("fine_pruning", {"fine_tuning": weak, "fine_pruning": strong, "super_fine_tuning": strong, "a plug-in": weak}),
        ("super_fine_tuning", {"fine_tuning": weak, "super_fine_tuning": strong}),
        ("a plug-in", {"a plug-in": weak}),
    ):
        answer = verdict(
            [found("neural_cleanse", 9.0, classes=[0.0, 0.1, 4.0, -0.1])]
            + [found(name, repaired=state) for name, state in offers.items()],
            people(strip=False),
            classes=CLASSES,
            suspect=suspect(),
            held_out=pictures(),
        )
        assert answer.details["repair"]["taken"] == taken


def test_triggers_of_other_producers_are_not_comparable_and_the_reason_names_them() -> None:
    population = people()
    settings = {**population.defenses["strip"], "producers": ["abs", "neural_cleanse"]}
    population = replace(population, defenses={**population.defenses, "strip": settings})
    cleanse, strip = found("neural_cleanse", 0.5), found("strip", 0.9)
    others = replace(strip, record={**strip.record, "producers": ["mine", "neural_cleanse"]})
    answer = tell(cleanse, others, population=population)
    assert "strip" not in answer.p_values
    assert answer.details["skipped"]["strip"] == (
        "it judges triggers that mine and neural_cleanse looked for; on the reference models abs and neural_cleanse did"
    )
    same = replace(strip, record={**strip.record, "producers": ["neural_cleanse", "abs"]})
    assert "strip" in tell(cleanse, same, population=population).p_values


def test_scores_of_other_meta_classifiers_are_not_comparable_and_the_reason_names_them() -> None:
    population = people()
    cleanse, strip = found("neural_cleanse", 0.5), found("strip", 0.9)
    settings = {**population.defenses["strip"], "metas": "a"}
    population = replace(population, defenses={**population.defenses, "strip": settings})
    other = replace(strip, record={**strip.record, "metas": "b"})
    said = tell(cleanse, other, population=population).details["skipped"]
    assert said == {"strip": "it asked other meta-classifiers than on the reference models"}
    assert not tell(cleanse, replace(other, record={**strip.record, "metas": "a"}), population=population).details[
        "skipped"
    ]


@pytest.mark.parametrize("name", ["strip", "sentinet"])
def test_after_fewer_searches_a_largest_score_counts_and_errs_towards_clean(name: str) -> None:
    population = people()
    settings = {**population.defenses["strip"], "producers": ["abs", "neural_cleanse"]}
    models = tuple(
        replace(m, scores={name if k == "strip" else k: v for k, v in m.scores.items()}) for m in population.models
    )
    population = replace(population, models=models, defenses={**population.defenses, name: settings})
    cleanse, strip = found("neural_cleanse", 0.5), found(name, 0.9)
    asked = {
        who: tell(cleanse, replace(strip, record={**strip.record, "producers": who.split()}), population=population)
        for who in ("abs", "abs neural_cleanse")
    }
    # One and the same score: the searches that were not made could only have raised it.
    assert asked["abs"].p_values[name] == asked["abs neural_cleanse"].p_values[name]
    assert any("errs towards a clean model" in told for told in asked["abs"].details["warnings"])
    assert not any("errs towards" in told for told in asked["abs neural_cleanse"].details["warnings"])
    nobody = tell(cleanse, replace(strip, record={**strip.record, "producers": []}), population=population)
    assert name not in nobody.p_values


def test_do_no_harm_a_model_that_looks_clean_keeps_its_weights() -> None:
    answer = repairing(found("fine_pruning", repaired=linear()), score=-1.0, planted=10)
    assert answer.p < 0.2
    assert answer.repaired is None
    assert "the submitted weights stand" in answer.details["repair"]["why"]


def test_a_repair_that_costs_too_much_is_refused() -> None:
    ruined = linear()
    with torch.no_grad():
        ruined[1].weight[0].zero_()  # type: ignore[index]
        ruined[1].bias[0] = -1.0  # type: ignore[index]
    answer = repairing(found("fine_pruning", repaired=ruined))
    assert answer.repaired is None
    repair = answer.details["repair"]
    assert repair["taken"] is None
    assert repair["accuracy_after"] == repair["accuracy_before"] == 1.0
    assert repair["tried"][0]["accuracy_after"] == pytest.approx(0.75)


def test_among_repairs_the_one_that_silences_the_trigger_is_taken() -> None:
    answer = repairing(
        found("a_nothing", repaired=linear(2)),
        found("z_thorough", repaired=linear()),
        found("b_broken", repaired=nn.Linear(3, 3)),
    )
    assert answer.details["repair"]["taken"] == "z_thorough"
    assert {t["defense"]: t["accepted"] for t in answer.details["repair"]["tried"]} == {
        "a_nothing": True,
        "b_broken": False,
        "z_thorough": True,
    }


def test_without_a_model_to_measure_a_repair_is_taken_on_trust_and_said() -> None:
    answer = tell(found("fine_pruning", repaired=linear()))
    assert answer.repaired is not None
    assert "on trust" in answer.details["repair"]["why"]
    assert tell().details["repair"]["why"] == "no defense offered a repair"


def test_the_suspect_is_left_as_it_was() -> None:
    seen = suspect()
    before = {k: v.clone() for k, v in seen.model.state_dict().items()}
    verdict([found("fine_pruning", repaired=linear())], classes=CLASSES, suspect=seen, held_out=pictures())
    assert all(torch.equal(v, before[k]) for k, v in seen.model.state_dict().items())
