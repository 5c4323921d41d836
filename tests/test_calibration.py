from dataclasses import replace
from pathlib import Path

import pytest
import torch

from defenses.trained import trained
from molehunt import calibration, runner
from molehunt.calibration import (
    Population,
    Reference,
    load,
    population,
    recipe_remark,
    recorded,
    save,
    settings,
    shipped,
    statistic,
)
from molehunt.conformal import conformal
from molehunt.defenses import DEFENSES, STRIP, Defense, FinePruning, NeuralCleanse, scoring
from molehunt.examination import divide, examine
from molehunt.findings import Abstention, Failure, Finding, Outcome
from molehunt.runner import configuration
from molehunt.suspect import Suspect
from molehunt.tasks import TASKS

RECORD = {"configuration": {"steps": 30}, "dtype": "bfloat16", "versions": {"torch": "2.x"}}


def found(score: float, defense: str = "neural_cleanse", **record: object) -> Finding:
    return Finding(defense=defense, score=score, record=RECORD | record)


def three() -> Population:
    rows: list[dict[str, Outcome]] = [
        {"neural_cleanse": found(1.0), "strip": found(0.1, "strip")},
        {"neural_cleanse": found(2.0), "strip": Abstention(defense="strip", reason="no candidates")},
        {"neural_cleanse": found(5.0), "strip": found(0.9, "strip")},
    ]
    models = [Reference(seed=7, accuracy=0.98), Reference(seed=8), Reference(seed=9, attack="badnets")]
    return population(rows, task="mnist5k", network="badnets_cnn", recipe={"epochs": 3}, models=models)


def test_the_statistic_is_the_score_or_else_the_largest_class_score() -> None:
    scores = torch.tensor([0.5, 3.0, 1.0])
    assert statistic(Finding(defense="d", score=2.0, class_scores=scores)) == 2.0
    assert statistic(Finding(defense="d", class_scores=scores)) == 3.0
    assert statistic(Finding(defense="d", repaired={})) is None


def test_the_maximum_over_classes_is_calibrated_as_one_statistic() -> None:
    # Ten classes of noise each: the maximum of a clean model is compared with maxima, so one in twenty is at 1/20.
    rng = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        maxima = [
            statistic(Finding(defense="d", class_scores=torch.randn(10, generator=rng))) or 0.0 for _ in range(20)
        ]
        hits += conformal(maxima[0], maxima[1:]) <= 0.05 + 1e-9
    assert 5 <= hits <= 40


def test_scores_are_collected_and_what_is_missing_is_not_zero() -> None:
    made = three()
    assert [m.scores for m in made.clean] == [
        {"neural_cleanse": 1.0, "strip": 0.1},
        {"neural_cleanse": 2.0, "strip": None},
    ]
    assert made.column("neural_cleanse") == [1.0, 2.0]
    assert made.column("strip") == [0.1]
    assert made.column("unheard of") == []
    assert made.table(["neural_cleanse", "strip"]) == [[1.0, 0.1]]
    assert made.table(["neural_cleanse", "strip"], planted=True) == [[5.0, 0.9]]
    assert made.families(["neural_cleanse", "strip"]) == {"badnets": [[5.0, 0.9]]}
    assert made.families(["unheard of"]) == {}
    assert (made.dtype, made.versions) == ("bfloat16", {"torch": "2.x"})
    assert made.defenses["neural_cleanse"] == {"configuration": {"steps": 30}, "stream": False}


def test_models_are_numbered_where_nothing_is_known_of_them() -> None:
    made = population([{"a": found(1.0, "a")}] * 3, task="t", network="n")
    assert [m.seed for m in made.models] == [0, 1, 2]
    assert made.planted == ()


def test_a_failure_is_a_missing_score() -> None:
    made = population([{"a": Failure(defense="a", kind="time", message="late")}], task="t", network="n")
    assert made.models[0].scores == {"a": None}
    assert made.defenses == {}


def test_a_population_survives_json_and_disk(tmp_path: Path) -> None:
    made = three()
    assert Population.from_json(made.to_json()) == made
    save(made, tmp_path / "p.json")
    assert load(tmp_path / "p.json") == made
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


def test_a_recipe_is_kept_by_name_and_settings(tmp_path: Path) -> None:
    task = TASKS["mnist5k"]
    made = replace(three(), recipe=recorded("badnets_cnn", task))
    save(made, tmp_path / "p.json")
    again = load(tmp_path / "p.json")
    assert again == made
    assert again.recipe_name == "badnets_cnn"
    assert recipe_remark(again, "badnets_cnn", task) is None
    changed = replace(again, recipe={"name": "badnets_cnn", "settings": again.recipe["settings"] | {"epochs": 99}})
    assert "other settings today" in str(recipe_remark(changed, "badnets_cnn", task))
    assert recipe_remark(replace(again, recipe="badnets_cnn"), "badnets_cnn", task) is None, "files of before say less"
    with pytest.raises(ValueError, match="no recipe for 'nope'"):
        recorded("nope", task)


def test_settings_tell_a_stream_from_candidates() -> None:
    stream = replace(found(1.0), input_scores=torch.zeros(3))
    assert settings(stream) != settings(found(1.0))


def test_mixed_settings_and_formats_are_refused() -> None:
    other = found(1.0, configuration={"steps": 31})
    with pytest.raises(ValueError, match="different settings"):
        population([{"neural_cleanse": found(1.0)}, {"neural_cleanse": other}], task="t", network="n")
    with pytest.raises(ValueError, match="number formats"):
        population([{"a": found(1.0, "a")}, {"a": found(1.0, "a", dtype="float32")}], task="t", network="n")
    with pytest.raises(ValueError, match="1 rows for 2 models"):
        population([{}], task="t", network="n", models=[Reference(seed=0), Reference(seed=1)])
    with pytest.raises(ValueError, match="must be finite"):
        Reference(seed=0, scores={"a": float("nan")})


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"extra": 1}, {"models": [{"seed": 1}]}, {"models": 3}, {"defenses": []}, {"versions": None}],
)
def test_other_documents_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="population"):
        Population.from_json(three().to_json() | change)
    with pytest.raises(ValueError, match="population"):
        Population.from_json([])


def test_shipped_populations_are_found_by_task_and_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "populations").mkdir()
    cleanse = NeuralCleanse()
    made = population(
        [{"neural_cleanse": found(1.0, configuration=configuration(cleanse))}], task="mnist5k", network="lenet5"
    )
    save(made, tmp_path / "populations" / "mnist5k-lenet5.json")
    monkeypatch.setattr(calibration, "files", lambda package: tmp_path)
    assert shipped("mnist5k", "lenet5") == made
    assert shipped("mnist5k", "lenet5", {"neural_cleanse": cleanse, "fine_pruning": FinePruning()}) == made
    assert shipped("mnist5k", "lenet5", {"neural_cleanse": replace(cleanse, restarts=2)}) is None
    assert shipped("mnist5k", "resnet18") is None


def test_the_shipped_population_fits_the_defenses_as_they_are() -> None:
    """A changed default would silently make every game fall back to a handful of references."""
    defenses: dict[str, Defense] = {name: make() for name, make in DEFENSES.items()}
    found = shipped("mnist5k", "badnets_cnn", defenses)
    assert found is not None, "score the bank again: python benchmarks/bank.py run --task mnist5k, then ship"
    assert (len(found.clean), len(found.planted)) == (99, 90)
    assert found.defenses["strip"]["producers"] == ["abs", "neural_cleanse"]
    assert set(found.defenses) == set(scoring(defenses)) - {"rab"}, "everybody who scores without a training set"


@pytest.mark.slow
def test_what_the_number_format_shifts_changes_no_answer() -> None:
    """bfloat16 against float32 on the same weights: docs/reference/calibration.md has the shifts of six networks."""
    references = shipped("mnist5k", "badnets_cnn")
    assert references is not None
    case = trained()
    p_values: dict[str, list[float]] = {}
    for which, model in (("clean", case.twin), ("backdoored", case.backdoored)):
        scores = []
        for dtype in (torch.float32, torch.bfloat16):
            suspect = Suspect.of(model, case.task, clean=divide(case.clean)[0], dtype=dtype)
            defenses: dict[str, Defense] = {"neural_cleanse": NeuralCleanse(), "strip": STRIP()}
            outcomes = dict(examine(suspect, defenses, lambda n, d, s: runner.inspect(d, s, name=n, seed=0)))
            findings = [o for o in outcomes.values() if isinstance(o, Finding)]
            assert [f.record["dtype"] for f in findings] == [str(dtype).removeprefix("torch.")] * 2
            scores.append([statistic(f) or 0.0 for f in findings])
        (cleanse, strip), (cleanse_half, strip_half) = scores
        # Adam walks another way in bfloat16, and ends at a mask of another size: a factor of up to 1.45 was seen.
        assert 1 / 1.6 <= cleanse_half / cleanse <= 1.6
        # The trigger that STRIP judges is Neural Cleanse's, and another one too: up to .021 was seen.
        assert abs(strip_half - strip) <= 0.03
        p_values[which] = [conformal(index, references.column("neural_cleanse")) for index in (cleanse, cleanse_half)]
    assert max(p_values["backdoored"]) == 1 / (len(references.clean) + 1), "it beats every clean model in both formats"
    assert min(p_values["clean"]) > 0.05, "it is unremarkable in both formats"


def test_a_shipped_population_that_scored_nobody_who_is_asked_is_none() -> None:
    assert shipped("mnist5k", "badnets_cnn", {"neural_cleanse": NeuralCleanse()}) is not None
    assert shipped("mnist5k", "badnets_cnn", {"neural_cleanse": NeuralCleanse(), "mine": STRIP()}) is not None
    assert shipped("mnist5k", "badnets_cnn", {"mine": STRIP(), "fine_pruning": FinePruning()}) is None
    assert shipped("mnist5k", "badnets_cnn", {}) is not None
