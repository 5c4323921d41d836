"""Calibration: scores are kept per model, an interrupted run gives the same file, and what changed is scored again."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import molehunt
from molehunt import meta_files, runner
from molehunt.bank import roster, scores
from molehunt.bank.roster import Entry
from molehunt.bank.rows import build, poisoned, read_rows, regrow
from molehunt.bank.scored import FINDERS, Scored
from molehunt.bank.scores import failures, population, score
from molehunt.calibration import load, save
from molehunt.defenses import DEFENSES, REPAIRS, STRIP, Defense, FinePruning
from molehunt.engine import Run
from molehunt.examination import Inspect, searched
from molehunt.findings import Finding, Outcome
from molehunt.game.answers import measure
from molehunt.metas import Meta, Settings, digest
from molehunt.runner import inspect
from molehunt.suspect import Access, Suspect
from molehunt.tasks import get_task
from molehunt.testing import attack_success, planted, share_right
from molehunt.training import Recipe
from molehunt.triggers import Patch

HURRIED = Recipe(epochs=0.1, batch=50, optimizer="adamw", lr=4e-3, augment="crop", shift=1)
LEARNING = replace(HURRIED, epochs=5.0, batch=25, warmup=0.25)
LISTED = tuple(
    Entry(task="mnist5k", network="badnets_cnn", partition="calibrate", planted=planted, number=0)
    for planted in (False, True)
)
# A BadNets model, whose patch is learned in no time, beside a clean one.
LEARNED = (LISTED[0], replace(LISTED[1], number=9), replace(LISTED[0], number=2))


@dataclass(frozen=True, kw_only=True)
class Heavy:
    """Scores a model by the norm of its weights."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(),)
    scale: float = 1.0

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        noise = float(torch.rand((), generator=run.rng))
        norm = sum(float(p.square().sum()) for p in suspect.model.parameters())
        return Finding(defense="heavy", score=self.scale * norm + noise)


@dataclass(frozen=True, kw_only=True)
class Knowing:
    """Scores a model by how often the trigger that was planted here moves clean pictures to its class."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        made = poisoned(LEARNED[1])
        assert made is not None
        assert suspect.clean is not None
        return Finding(defense="knowing", score=attack_success(suspect.model, suspect.clean, made.trigger, made.target))


@dataclass(frozen=True, kw_only=True)
class Broken:
    """Fails as long as a file is there, and scores after that."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(),)
    while_there: str

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        if Path(self.while_there).exists():
            raise RuntimeError("not today")
        return Finding(defense="broken", score=1.0)


@dataclass(frozen=True, kw_only=True)
class Demanding:
    """Needs what nobody grants."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.TRAINING}),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        raise AssertionError("nobody asks it")


@dataclass(frozen=True, kw_only=True)
class Blank:
    """Repairs a model by taking everything out of it: what is left says one class to everything."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        model = copy.deepcopy(suspect.model)
        for parameter in model.parameters():
            parameter.data.zero_()
        return Finding(defense="fine_pruning", repaired=model.state_dict())


def inspecting(seed: int) -> Inspect:
    def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        return runner.inspect(defense, suspect, name=name, seed=seed)

    return inspect


class Scoring:
    """Scores a bank and remembers which models were scored now."""

    def __init__(self, folder: Path, listed: tuple[Entry, ...] = LISTED) -> None:
        self.folder, self.listed = folder, listed
        self.fresh: list[str] = []

    def __call__(self, defenses: Mapping[str, Defense], **settings: Any) -> tuple[Scored, ...]:
        self.fresh = []
        return score(
            self.listed, self.folder, defenses, inspecting, report=lambda s: self.fresh.append(s.name), **settings
        )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOLEHUNT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roster, "recipe_for", lambda *_: HURRIED)
    build(LISTED, tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bank of models that were trained long enough for the backdoor to work, with its cache."""
    root = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLEHUNT_CACHE", str(root / "cache"))
        patch.setattr(roster, "recipe_for", lambda *_: LEARNING)
        build(LEARNED[:2], root / "bank")
        yield root / "bank"


class TestCandidates:
    """A defense that only judges triggers is worth nothing where nobody looks for them."""

    def test_who_looks_is_asked_too(self) -> None:
        found = scores.with_finders({"mine": STRIP(overlays=5)})
        assert list(found) == ["abs", "neural_cleanse", "mine"]
        assert found["mine"] == STRIP(overlays=5)

    def test_who_looks_is_who_names_triggers_or_scores_classes(self) -> None:
        suspect = planted().suspect
        outcomes = {n: inspect(kind(), suspect, name=n, seed=0) for n, kind in DEFENSES.items() if n not in REPAIRS}
        assert tuple(searched(outcomes)) == FINDERS

    def test_where_somebody_may_look_nobody_is_added(self) -> None:
        alone: tuple[dict[str, Defense], ...] = (
            {"heavy": Heavy()},
            {"strip": STRIP(), "knowing": Knowing()},
            {"fine_pruning": FinePruning()},
        )
        for asked in alone:
            assert scores.with_finders(asked) == asked
        assert "neural_cleanse" in scores.with_finders({"strip": STRIP(), "fine_pruning": FinePruning()})
        # Neither of these looks for triggers.
        for blind in ("pruning_detection", "spectral_signatures"):
            assert "abs" in scores.with_finders({"strip": STRIP(), blind: DEFENSES[blind]()})

    def test_alone_it_has_no_score(self, folder: Path) -> None:
        found = Scoring(folder)({"strip": STRIP()})
        assert all(set(scored.abstained) == {"strip"} and not scored.scores for scored in found)

    def test_where_a_search_failed_the_score_of_who_judges_is_left_out(self, folder: Path) -> None:
        found = Scoring(folder)({"heavy": Heavy(), "strip": STRIP()})
        three = {"configuration": {}, "stream": False, "producers": ["abs", "neural_cleanse"]}
        two = {**three, "producers": ["abs"]}
        whole, broken = (
            replace(found[i], settings={**found[i].settings, "strip": used}, scores={**found[i].scores, "strip": 0.1})
            for i, used in ((0, three), (1, two))
        )
        broken = replace(broken, failed={"neural_cleanse": "memory: none left"}, name=whole.name)
        listed = (LISTED[0], LISTED[0])
        made = population(listed, folder, (broken, whole))
        assert made.defenses["strip"] == three
        assert [model.scores["strip"] for model in made.clean] == [None, 0.1]
        with pytest.raises(ValueError, match="strip scored the models in different settings"):
            population(listed, folder, (replace(broken, failed={}), whole))


class TestResuming:
    def test_scores_of_another_release_are_made_again(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scoring = Scoring(folder)
        scoring({"heavy": Heavy()})
        scoring({"heavy": Heavy()})
        assert scoring.fresh == []
        monkeypatch.setattr(molehunt, "__version__", "99.0")
        scoring({"heavy": Heavy()})
        assert scoring.fresh == [entry.name for entry in LISTED]

    def test_scores_of_other_code_are_made_again(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scoring = Scoring(folder)
        scoring({"heavy": Heavy()})
        scoring({"heavy": Heavy()})
        assert scoring.fresh == []
        monkeypatch.setattr("molehunt.bank.scored.digest", lambda kind: f"other code of {kind.__name__}")
        scoring({"heavy": Heavy()})
        assert scoring.fresh == [entry.name for entry in LISTED]

    def test_the_recipe_is_recorded_with_its_settings(self, folder: Path) -> None:
        made = population(LISTED, folder, Scoring(folder)({"heavy": Heavy()}))
        assert made.recipe_name == "badnets_cnn"
        assert made.recipe["settings"]["batch"] == 100

    def test_an_interrupted_run_goes_on_and_gives_the_same_file(self, folder: Path, tmp_path: Path) -> None:
        def stop(scored: Scored) -> None:
            raise KeyboardInterrupt(scored)

        defenses = {"heavy": Heavy()}
        scoring = Scoring(folder)
        save(population(LISTED, folder, scoring(defenses)), tmp_path / "whole.json")
        for path in (folder / "scores").iterdir():
            path.unlink()
        with pytest.raises(KeyboardInterrupt):
            score(LISTED, folder, defenses, inspecting, report=stop)
        save(population(LISTED, folder, scoring(defenses)), tmp_path / "cut.json")
        assert scoring.fresh == [LISTED[1].name]
        assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
        found = load(tmp_path / "whole.json")
        # The backdoor of a model that hardly trained does not work, so it is no reference of either kind.
        assert [m.seed for m in found.models] == [LISTED[0].seed]
        assert len(found.column("heavy")) == 1
        assert found.versions["block"] == "1"

    def test_what_is_there_is_not_scored_again(self, folder: Path) -> None:
        scoring = Scoring(folder)
        first = scoring({"heavy": Heavy()})
        assert scoring({"heavy": Heavy()}) == first
        assert scoring.fresh == []

    def test_other_settings_are_scored_again(self, folder: Path) -> None:
        scoring = Scoring(folder, LISTED[:1])
        before = scoring({"heavy": Heavy()})[0].scores["heavy"]
        after = scoring({"heavy": Heavy(scale=2.0)})[0].scores["heavy"]
        assert before is not None
        assert after is not None
        assert after > 1.5 * before
        assert scoring.fresh == [LISTED[0].name]

    @pytest.mark.parametrize("changed", [{"weights": "0" * 64}, {"threads": 3}])
    def test_other_weights_and_other_threads_are_scored_again(self, changed: dict[str, Any], folder: Path) -> None:
        scoring = Scoring(folder)
        scored = scoring({"heavy": Heavy()})[0]
        path = folder / "scores" / f"{scored.name}.json"
        path.write_text(json.dumps(asdict(scored) | changed))
        assert scoring({"heavy": Heavy()})[0].scores == scored.scores
        assert scoring.fresh == [scored.name]

    def test_scores_of_an_older_format_are_made_again(self, folder: Path) -> None:
        scoring = Scoring(folder)
        scored = scoring({"heavy": Heavy()})[0]
        old = {"name": scored.name, "weights": scored.weights, "scores": {"heavy": 0.0}, "seconds": {}}
        (folder / "scores" / f"{scored.name}.json").write_text(json.dumps(old))
        assert scoring({"heavy": Heavy()})[0].scores == scored.scores
        assert scoring.fresh == [scored.name]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Counts how often it is asked, and finds a trigger."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(),)
    calls: ClassVar[list[str]] = []
    target: int = 1

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        self.calls.append("tally")
        trigger = Patch.square(suspect.task.shape)
        return Finding(defense="tally", score=0.5, trigger=trigger, target=self.target)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Answers which class the triggers aim at that others found."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CANDIDATES}),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        Tally.calls.append("judge")
        return Finding(defense="judge", score=float(sum(c.target for c in suspect.candidates or ())))


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Scores a model by what meta-classifiers say."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.METAS}),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        Tally.calls.append("asking")
        assert suspect.metas is not None
        return Finding(defense="asking", score=float(suspect.metas[0].scores([suspect.model]).amax()))


def meta(seed: int) -> Meta:
    """A meta-classifier that knows nothing."""
    return Meta((1, 28, 28), 10, (0.5,), (0.3,), Settings(), torch.Generator().manual_seed(seed))


class TestOneMoreDefense:
    """A defense that is new, or other than it was, is asked alone; what the others said stands."""

    @pytest.fixture
    def scoring(self, folder: Path) -> Scoring:
        Tally.calls.clear()
        return Scoring(folder, LISTED[:1])

    def test_a_new_one_is_asked_alone(self, scoring: Scoring) -> None:
        first = scoring({"tally": Tally()})[0]
        both = scoring({"tally": Tally(), "heavy": Heavy()})[0]
        assert Tally.calls == ["tally"]
        assert both.scores["tally"] == first.scores["tally"]
        assert both.asked.keys() == both.code.keys() == both.scores.keys() == {"tally", "heavy"}
        # Whoever else was asked, and when, it is the same score.
        Tally.calls.clear()
        again = Scoring(scoring.folder, LISTED[:1])({"heavy": Heavy()}, place="elsewhere")[0]
        assert again.scores["heavy"] == both.scores["heavy"]
        assert Tally.calls == []

    def test_who_is_not_asked_any_more_is_left_out_and_nobody_is_asked(self, scoring: Scoring) -> None:
        scoring({"tally": Tally(), "heavy": Heavy()})
        found = scoring({"heavy": Heavy()})[0]
        assert scoring.fresh == []
        for part in (found.asked, found.code, found.scores, found.settings, found.costs):
            assert part.keys() == {"heavy"}

    def test_with_one_that_judges_those_who_search_are_asked_again(self, scoring: Scoring) -> None:
        scoring({"tally": Tally(), "heavy": Heavy()})
        found = scoring({"tally": Tally(), "heavy": Heavy(), "judge": Judge()})[0]
        assert Tally.calls == ["tally", "tally", "judge"]
        assert found.scores["judge"] == 1.0

    def test_after_another_search_who_judges_is_asked_again(self, scoring: Scoring) -> None:
        asked: dict[str, Defense] = {"tally": Tally(), "judge": Judge()}
        scoring(asked)
        assert scoring(asked | {"tally": Tally(target=3)})[0].scores["judge"] == 3.0
        # One more that may search: there may be more triggers.
        more = scoring(asked | {"tally": Tally(target=3), "other": Tally(target=4)})[0]
        assert more.scores["judge"] == 7.0
        Tally.calls.clear()
        # And one less.
        assert scoring({"judge": Judge(), "tally": Tally(target=3)})[0].scores["judge"] == 3.0
        assert Tally.calls == ["tally", "judge"]

    def test_one_that_only_judges_is_asked_again_beside_those_who_search(self, scoring: Scoring) -> None:
        scoring({"tally": Tally(), "judge": Judge()})
        path = scoring.folder / "scores" / f"{LISTED[0].name}.json"
        row = json.loads(path.read_text())
        row["code"]["judge"], row["scores"]["judge"] = "0" * 64, 9.0
        path.write_text(json.dumps(row))
        Tally.calls.clear()
        assert scoring({"tally": Tally(), "judge": Judge()})[0].scores["judge"] == 1.0
        assert Tally.calls == ["tally", "judge"]

    def test_another_number_format_beside_what_is_kept_is_refused(self, scoring: Scoring) -> None:
        scoring({"heavy": Heavy()})
        path = scoring.folder / "scores" / f"{LISTED[0].name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float8"}))
        with pytest.raises(ValueError, match="was scored in float8, and now in"):
            scoring({"heavy": Heavy(), "tally": Tally()})

    def test_other_meta_classifiers_give_other_scores(self, scoring: Scoring) -> None:
        asked: dict[str, Defense] = {"tally": Tally(), "asking": Asking()}
        one = scoring(asked, metas=[meta(0)])[0]
        scoring(asked, metas=[meta(0)])
        assert Tally.calls == ["tally", "asking"]
        other = scoring(asked, metas=[meta(1)])[0]
        assert Tally.calls == ["tally", "asking", "asking"]
        assert one.scores["asking"] != other.scores["asking"]
        assert one.settings["asking"]["metas"] != other.settings["asking"]["metas"]
        # Without any it can have no opinion, and is not asked beside one that can.
        assert scoring(asked, metas=[])[0].asked.keys() == {"tally"}

    def test_silence_for_lack_of_meta_classifiers_does_not_outlast_it(self, scoring: Scoring) -> None:
        asked: dict[str, Defense] = {"asking": Asking()}
        silent = scoring(asked, metas=[])[0]
        assert "meta-classifiers" in silent.abstained["asking"]
        scoring(asked, metas=[])
        assert scoring.fresh == []
        assert scoring(asked, metas=[meta(0)])[0].scores.keys() == {"asking"}

    def test_after_a_failure_the_others_are_not_asked_again(self, scoring: Scoring, tmp_path: Path) -> None:
        there = tmp_path / "there"
        there.touch()
        asked: dict[str, Defense] = {"asking": Asking(), "broken": Broken(while_there=str(there))}
        scoring(asked, metas=[meta(0)])
        there.unlink()
        assert scoring(asked, metas=[meta(0)])[0].scores.keys() == {"asking", "broken"}
        assert Tally.calls == ["asking"]

    def test_meta_classifiers_of_the_package_are_granted(
        self, scoring: Scoring, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            meta_files, "shipped", lambda *names: (meta(2),) if names == ("mnist5k", "badnets_cnn") else None
        )
        found = scoring({"asking": Asking()})[0]
        assert found.settings["asking"]["metas"] == digest([meta(2)])


class TestFailures:
    def test_a_failure_is_no_score_and_is_tried_again(self, folder: Path, tmp_path: Path) -> None:
        there = tmp_path / "there"
        there.touch()
        defenses: dict[str, Defense] = {"heavy": Heavy(), "broken": Broken(while_there=str(there))}
        scoring = Scoring(folder)
        found = scoring(defenses)
        assert failures(found) == {"broken": 2}
        assert found[0].failed == {"broken": "raised: RuntimeError: not today"}
        assert found[0].scores.keys() == {"heavy"}
        # The others' scores are kept apart from it, and it is missing, not 0.
        assert population(LISTED, folder, found).table(["heavy"]) == [[found[0].scores["heavy"]]]

        scoring(defenses)
        assert scoring.fresh == [entry.name for entry in LISTED]
        there.unlink()
        found = scoring(defenses)
        assert scoring.fresh == [entry.name for entry in LISTED]
        assert failures(found) == {}
        assert found[0].scores["broken"] == 1.0
        scoring(defenses)
        assert scoring.fresh == []

    def test_an_abstention_is_none_and_is_not_tried_again(self, folder: Path) -> None:
        scoring = Scoring(folder)
        found = scoring({"demanding": Demanding()})
        assert failures(found) == {}
        assert "the training set" in found[0].abstained["demanding"]
        scoring({"demanding": Demanding()})
        assert scoring.fresh == []

    def test_who_can_have_no_opinion_is_not_asked_beside_others_and_changes_nothing(self, folder: Path) -> None:
        scoring = Scoring(folder)
        (found, *_) = scoring({"heavy": Heavy(), "demanding": Demanding()})
        assert set(found.asked) == set(found.code) == {"heavy"}
        assert found.abstained == {}
        scoring.fresh.clear()
        scoring({"heavy": Heavy()})
        assert scoring.fresh == []
        # Rows of a time when it was asked hold as well.
        path = folder / "scores" / f"{found.name}.json"
        row = json.loads(path.read_text())
        row["asked"]["demanding"], row["code"]["demanding"] = {}, "0" * 64
        row["abstained"]["demanding"] = "no training set"
        path.write_text(json.dumps(row))
        scoring({"heavy": Heavy()})
        assert scoring.fresh == []


class TestPlanted:
    """Real models whose backdoor works, beside those where it does not."""

    def test_working_backdoors_are_the_planted_half(self, learned: Path) -> None:
        listed = LEARNED[:2]
        found = score(listed, learned, {"knowing": Knowing(), "heavy": Heavy()}, inspecting, place="both")
        collected = population(listed, learned, found)
        (planted,) = collected.planted
        assert (planted.attack, planted.seed) == ("badnets", LEARNED[1].seed)
        assert planted.accuracy == read_rows(listed, learned)[1].accuracy
        # What was scored is the model that was trained: only there does its trigger work.
        assert collected.table(["knowing"], planted=True)[0][0] > 0.9
        assert collected.table(["knowing"])[0][0] < 0.5
        assert collected.table(["knowing", "heavy"], planted=True) == [
            [planted.scores["knowing"], planted.scores["heavy"]]
        ]

    def test_a_model_that_misses_a_gate_is_left_out_of_both_halves(self, learned: Path, tmp_path: Path) -> None:
        listed = LEARNED[:2]
        found = score(listed, learned, {"heavy": Heavy()}, inspecting, place="gate")
        rows = read_rows(listed, learned)
        missed = [{**gate, "passed": gate["name"] != "budget"} for gate in rows[1].gates]
        for row, gates in zip(rows, ([], missed), strict=True):
            (tmp_path / f"{row.name}.json").write_text(json.dumps(asdict(replace(row, gates=gates))))
        collected = population(listed, tmp_path, found)
        assert [model.seed for model in collected.models] == [LEARNED[0].seed]

    def test_repairs_are_measured_with_the_trigger_that_was_planted(self, learned: Path) -> None:
        listed = LEARNED[:2]
        clean, planted = score(
            listed, learned, {"heavy": Heavy(), "fine_pruning": Blank()}, inspecting, place="repairs"
        )
        made = poisoned(LEARNED[1])
        assert made is not None
        images = get_task("mnist5k").load("validation")
        row = read_rows(listed, learned)[1]
        model = regrow(LEARNED[1], row)
        before, after = planted.repairs["fine_pruning"]["asr"]
        assert before == attack_success(model, images, made.trigger, made.target) == row.asr
        assert after in {0.0, 1.0}, "an empty network sends everything to one class"
        before, after = planted.repairs["fine_pruning"]["accuracy"]
        assert before == share_right(model, images) == row.accuracy
        assert after < 0.2
        assert clean.repairs["fine_pruning"].keys() == {"accuracy"}
        assert clean.scores["fine_pruning"] is None
        assert population(listed, learned, (clean, planted)).defenses.keys() == {"heavy"}

    def test_the_curve_of_a_repair_is_kept(self, folder: Path) -> None:
        found = Scoring(folder)({"heavy": Heavy(), "fine_pruning": FinePruning(steps=1)})
        for scored in found:
            curve = scored.repairs["fine_pruning"]["curve"]
            assert len(curve) == 33, "one more than the channels of the last block"
            assert all(0 <= share <= 1 for share in curve)
            assert len(set(curve)) > 1

    def test_only_the_first_models_of_each_kind_are_repaired(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listed = (*LISTED, replace(LISTED[0], number=1), replace(LISTED[1], number=1))
        build(listed, folder)
        monkeypatch.setattr(scores, "REPAIRED", 1)
        defenses: dict[str, Defense] = {"heavy": Heavy(), "fine_pruning": Blank()}
        scoring = Scoring(folder, listed)
        found = scoring(defenses)
        assert [list(one.repairs) for one in found] == [["fine_pruning"], ["fine_pruning"], [], []]
        assert all("heavy" in one.scores for one in found)
        scoring(defenses)
        assert scoring.fresh == []
        # Who is repaired says nothing about what the others answer.
        alone = score(listed, folder, {"heavy": Heavy()}, inspecting, place="alone")
        assert [one.scores["heavy"] for one in alone] == [one.scores["heavy"] for one in found]

    def test_ten_of_each_kind(self) -> None:
        assert scores.REPAIRED == 10
        assert "fine_pruning" in REPAIRS


class Backwards:
    """An engine that does the last item first, as another process might."""

    def map(self, function: Any, items: Any) -> Iterator[Any]:
        done: list[Any] = [function(item) for item in reversed(list(items))]
        return iter(done[::-1])


def test_who_does_the_work_and_in_which_order_does_not_matter(folder: Path) -> None:
    def lasting(found: tuple[Scored, ...]) -> list[Scored]:
        return [replace(one, costs={}) for one in found]

    here = score(LISTED, folder, {"heavy": Heavy()}, inspecting, place="here")
    there = score(LISTED, folder, {"heavy": Heavy()}, inspecting, place="there", engine=Backwards())
    assert lasting(here) == lasting(there)


def test_costs_are_those_of_the_runner(folder: Path) -> None:
    (scored, _) = score(LISTED, folder, {"knowing": Knowing()}, inspecting)
    clean = get_task("mnist5k").secret(LISTED[0].seed)[0]
    asked = measure(regrow(LISTED[0], read_rows(LISTED, folder)[0]), clean).y
    assert 0 < scored.costs["knowing"]["forward"] <= len(asked)
    assert scored.costs["knowing"]["backward"] == 0
    assert scored.costs["knowing"]["seconds"] > 0


def test_what_cannot_be_calibrated_is_said(folder: Path) -> None:
    untrained = replace(LISTED[0], number=1)
    with pytest.raises(ValueError, match="calibrate-clean-001 first: run molehunt bank build"):
        score((*LISTED, untrained), folder, {"heavy": Heavy()}, inspecting)
    with pytest.raises(ValueError, match="no defense gave a score"):
        population(LISTED, folder, score(LISTED, folder, {}, inspecting))
    with pytest.raises(ValueError, match="no models to score"):
        score((), folder, {"heavy": Heavy()}, inspecting)
    found = score(LISTED, folder, {"heavy": Heavy()}, inspecting)
    with pytest.raises(ValueError, match="heavy scored the models in different settings"):
        population(LISTED, folder, (found[0], replace(found[1], settings={"heavy": {"configuration": {}}})))
    with pytest.raises(ValueError, match=r"different number formats: \['bfloat16', 'float64'\]"):
        population(LISTED, folder, (replace(found[0], dtype="bfloat16"), replace(found[1], dtype="float64")))
    (folder / "scores" / f"{LISTED[0].name}.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no scores"):
        score(LISTED, folder, {"heavy": Heavy()}, inspecting)
