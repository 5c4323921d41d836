"""What the three mitigations of Neural Cleanse do with triggers that others recovered."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molehunt.defenses._held_out import split
from molehunt.defenses._recovered import Recovered, success, told, working
from molehunt.defenses.activation_filter import ActivationFilter
from molehunt.defenses.contract import Defense
from molehunt.defenses.neuron_pruning import NeuronPruning, gaps, levels, penultimate
from molehunt.defenses.unlearning import Unlearning
from molehunt.engine import OutOfTime, Run
from molehunt.findings import Candidate, Finding
from molehunt.networks import anatomy
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images
from molehunt.testing import DEFENSE_CHECKS, Planted, Trial, attack_success, auc, planted, share_right
from molehunt.training import accuracy

from . import tiny

JUDGES = (Access.CLEAN, Access.CANDIDATES)
DEFENSES: list[Defense] = [Unlearning(), NeuronPruning(), ActivationFilter()]
NAMES = ["unlearning", "neuron_pruning", "activation_filter"]


def run(defense: Defense, suspect: Suspect, seed: int = 0) -> Finding:
    return defense(suspect, Run(rng=torch.Generator().manual_seed(seed)))


def loaded(suspect: Suspect, finding: Finding) -> nn.Module:
    assert finding.repaired is not None
    model = copy.deepcopy(suspect.model)
    model.load_state_dict(dict(finding.repaired))
    return model


@pytest.fixture(scope="module")
def backdoored() -> Suspect:
    """A trained network whose trigger was recovered."""
    found = (Candidate(trigger=tiny.TRIGGER, target=0, defense="oracle"),)
    clean = tiny.pictures(400, 7)
    return Suspect.of(tiny.poisoned().model, tiny.task(), clean=clean, candidates=found, dtype=torch.float32)


def left(model: nn.Module) -> float:
    """Success of the trigger on pictures that nobody has seen."""
    return attack_success(model, tiny.poisoned().hidden, tiny.TRIGGER, tiny.TARGET)


@pytest.fixture(scope="module", params=DEFENSES, ids=NAMES)
def trial(request: pytest.FixtureRequest) -> Trial:
    return Trial(request.param)


@pytest.mark.parametrize("check", DEFENSE_CHECKS)
def test_the_contract(trial: Trial, check: str) -> None:
    DEFENSE_CHECKS[check](trial)


@pytest.mark.parametrize("defense", DEFENSES, ids=NAMES)
def test_without_a_trigger_that_works_nothing_is_done_and_the_reason_is_told(defense: Defense) -> None:
    grants = (*JUDGES, Access.INPUTS)
    for suspect, reason in (
        (replace(planted(grants=grants).suspect, candidates=()), "no trigger was recovered"),
        (
            planted(grants=grants, backdoored=False).suspect,
            "none of 1 recovered triggers sends 50 % of held-out images",
        ),
    ):
        finding = run(defense, suspect)
        assert finding.repaired is None
        assert finding.input_scores is None
        assert reason in finding.details["warnings"][0]
        assert finding.details["triggers"] == []


def test_success_is_measured_on_other_classes_than_the_target() -> None:
    case = planted(target=3)
    candidate = Candidate(trigger=case.trigger, target=3, defense="oracle")
    assert success(case.suspect.model, case.hidden, candidate) == case.success(case.suspect.model)
    own = case.hidden.y == 3
    # Absence is not zero.
    assert success(case.suspect.model, Images(case.hidden.x[own], case.hidden.y[own]), candidate) is None


@pytest.mark.parametrize("defense", DEFENSES, ids=NAMES)
def test_where_it_cannot_be_told_whether_a_trigger_works_nobody_says_that_it_does_not(defense: Defense) -> None:
    suspect = planted(target=3, grants=(*JUDGES, Access.INPUTS)).suspect
    assert suspect.clean is not None
    own = suspect.clean.y == 3
    lone = replace(suspect, clean=Images(suspect.clean.x[own], suspect.clean.y[own]))
    with pytest.raises(ValueError, match=r"all \d+ held-out images are of its target, class 3; grant more"):
        run(defense, lone)


def test_only_candidates_that_work_are_kept() -> None:
    case = planted(target=3)
    right = Candidate(trigger=case.trigger, target=3, defense="a")
    wrong = Candidate(trigger=case.trigger, target=4, defense="b")
    found = working(case.suspect.model, case.hidden, [wrong, right], 0.5)
    assert [one.candidate.defense for one in found] == ["a"]
    assert found[0].success == 1.0


def test_unlearning_takes_the_trigger_out_and_what_it_tells_is_true_of_what_it_hands_back(backdoored: Suspect) -> None:
    finding = run(Unlearning(), backdoored)
    model, hidden = loaded(backdoored, finding), tiny.poisoned().hidden
    (said,) = finding.details["triggers"]
    assert said["before"] >= 0.9
    assert left(backdoored.model) >= 0.9
    assert left(model) <= 0.1
    assert accuracy(model, hidden) >= accuracy(backdoored.model, hidden) - 0.04

    assert backdoored.clean is not None
    _, held = split(backdoored.clean, 0.2, torch.Generator().manual_seed(0))
    assert backdoored.candidates is not None
    # A public port unlearns one network and saves another, which was just loaded afresh.
    assert said["after"] == success(model, held, backdoored.candidates[0])
    assert finding.details["accuracy"]["repaired"] == accuracy(model, held)
    assert any(not torch.equal(v, model.state_dict()[k]) for k, v in backdoored.model.state_dict().items())


class Unstamped(Unlearning):
    """The same training on the same pictures, of which none carries a trigger."""

    def stamped(self, tune: Images, found: Sequence[Recovered], rng: torch.Generator) -> Tensor:
        return torch.full((len(tune.y),), -1)


def test_it_is_the_stamped_pictures_that_take_the_trigger_out_and_not_the_training(backdoored: Suspect) -> None:
    with_, without = (left(loaded(backdoored, run(kind(), backdoored))) for kind in (Unlearning, Unstamped))
    assert with_ <= 0.1
    assert without >= with_ + 0.3


def test_pictures_of_the_target_are_never_stamped_and_triggers_share_the_rest() -> None:
    tune = tiny.pictures(400, 1)
    found = [Recovered(Candidate(trigger=tiny.TRIGGER, target=target, defense="oracle"), 1.0) for target in (0, 2)]
    owner = Unlearning(share=0.2).stamped(tune, found, torch.Generator().manual_seed(0))
    assert [int((owner == k).sum()) for k in (0, 1)] == [40, 40]
    assert not bool((tune.y[owner == 0] == 0).any())
    assert not bool((tune.y[owner == 1] == 2).any())
    everything = Unlearning(share=1.0).stamped(tune, found[:1], torch.Generator().manual_seed(0))
    assert torch.equal(everything >= 0, tune.y != 0), "all that may be"


def test_the_rate_falls_until_accuracy_is_kept(backdoored: Suspect, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def spoil(model: nn.Module, images: Images, recipe: Any, **_: Any) -> None:
        seen.append(recipe.lr)
        if recipe.lr > 0.1:
            raise FloatingPointError("too fast")
        if recipe.lr > 0.05:
            with torch.no_grad():
                next(model.parameters()).zero_()

    monkeypatch.setattr("molehunt.defenses.unlearning.train", spoil)
    finding = run(Unlearning(lr=0.3), backdoored)
    assert seen == pytest.approx([0.3, 0.1, 0.1 / 3])
    first, second, third = finding.details["rates"]
    assert first["accuracy"] is None
    assert second["accuracy"] < third["accuracy"] == finding.details["accuracy"]["before"]
    assert finding.details["lr"] == third["lr"]
    assert finding.details["warnings"] == ["1 of 1 recovered triggers still work"], "this training did nothing"


def test_no_time_for_another_rate_leaves_the_repair_that_is_finished(
    backdoored: Suspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs more than it should, and says so; a repair that is finished is better than none."""

    def spoil(model: nn.Module, images: Images, recipe: Any, **_: Any) -> None:
        if recipe.lr < 0.3:
            raise OutOfTime("late")
        with torch.no_grad():
            next(model.parameters()).zero_()

    monkeypatch.setattr("molehunt.defenses.unlearning.train", spoil)
    finding = run(Unlearning(lr=0.3), backdoored)
    assert finding.repaired is not None
    assert finding.details["lr"] == 0.3
    assert finding.details["warnings"][:2] == [
        "no time was left to try 0.1",
        "the repair costs more than 4 points of held-out accuracy at every rate tried",
    ]
    with pytest.raises(OutOfTime):
        run(Unlearning(lr=0.2), backdoored)


def test_the_most_accurate_is_taken_where_no_rate_keeps_to_the_tolerance(
    backdoored: Suspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: nn.Module, images: Images, recipe: Any, **_: Any) -> None:
        with torch.no_grad():
            if 0.05 < recipe.lr < 0.2:
                model.get_parameter("head.bias")[0] = -1e3  # one class of four is lost
            else:
                model.get_parameter("head.weight").zero_()

    monkeypatch.setattr("molehunt.defenses.unlearning.train", spoil)
    finding = run(Unlearning(lr=0.3, tolerance=0.0), backdoored)
    reached = [rate["accuracy"] for rate in finding.details["rates"]]
    assert len(reached) == 3
    assert reached[1] > reached[0] == reached[2]
    assert reached[1] < finding.details["accuracy"]["before"]
    assert finding.details["lr"] == pytest.approx(0.1)


def test_a_training_that_diverges_at_every_rate_is_no_repair(
    backdoored: Suspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr("molehunt.defenses.unlearning.train", diverge)
    with pytest.raises(FloatingPointError):
        run(Unlearning(), backdoored)


def test_a_head_without_a_bias_is_pruned_too(backdoored: Suspect) -> None:
    model = copy.deepcopy(backdoored.model)
    head = model.get_submodule(anatomy(model, tiny.pictures(1, 0).x).head)
    head.register_parameter("bias", None)
    found = backdoored.candidates
    bare = Suspect.of(model, tiny.task(), clean=tiny.pictures(400, 7), candidates=found, dtype=torch.float32)
    finding = run(NeuronPruning(), bare)
    assert finding.details["successes"][finding.details["pruned"]] == finding.details["triggers"][0]["after"]


def test_pruning_cuts_the_neuron_of_the_backdoor_alone() -> None:
    case = planted(target=3, grants=JUDGES)
    finding = run(NeuronPruning(), case.suspect)
    model = loaded(case.suspect, finding)
    assert finding.details["pruned"] == 1
    assert case.success(model) <= 0.05
    assert case.accuracy(model) == case.accuracy(case.suspect.model)
    head = anatomy(case.suspect.model, case.hidden.x[:1]).head
    changed = [k for k, v in case.suspect.model.state_dict().items() if not torch.equal(v, model.state_dict()[k])]
    assert changed == [f"{head}.weight"]
    column = int(finding.details["order"][0])
    assert bool((model.get_parameter(f"{head}.weight")[:, column] == 0).all())


def test_all_levels_at_once_are_those_of_a_loop(backdoored: Suspect) -> None:
    assert backdoored.candidates is not None
    held = tiny.pictures(60, 3)
    found = [Recovered(candidate, 1.0) for candidate in backdoored.candidates]
    head = anatomy(backdoored.model, held.x[:1]).head
    width = penultimate(backdoored, held.x, Run(rng=torch.Generator())).shape[1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    accuracies, successes = levels(backdoored, head, held, found, order, Run(rng=torch.Generator()))
    assert len(accuracies) == len(successes) == width + 1
    for level in (0, 1, width // 2, width - 1, width):
        model = copy.deepcopy(backdoored.model)
        with torch.no_grad():
            model.get_parameter(f"{head}.weight")[:, order[:level]] = 0.0
        assert float(accuracies[level]) == pytest.approx(accuracy(model, held), abs=1e-9)
        assert float(successes[level]) == pytest.approx(success(model, held, found[0].candidate), abs=1e-9)


def shares(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("accuracies", "successes", "level"),
    [
        (shares(0.9, 0.9, 0.9, 0.9), shares(1.0, 0.5, 0.05, 0.0), 2),  # the fewest that kill it
        (shares(0.9, 0.87, 0.8, 0.9), shares(1.0, 0.5, 0.0, 0.0), 1),  # not across a crossing, nor behind it
        (shares(0.9, 0.86, 0.86, 0.86), shares(1.0, 1.0, 1.0, 1.0), 3),  # 4 points are allowed, and not less than 4
        (shares(0.9, 0.1, 0.1, 0.1), shares(1.0, 0.0, 0.0, 0.0), 0),
    ],
)
def test_as_few_neurons_are_pruned_as_kill_the_trigger_and_accuracy_bounds_them(
    accuracies: Tensor, successes: Tensor, level: int
) -> None:
    assert NeuronPruning().level(accuracies, successes) == level


def test_the_neuron_that_the_trigger_wakes_comes_first() -> None:
    case = planted(target=3, grants=JUDGES)
    found = [Recovered(Candidate(trigger=case.trigger, target=3, defense="oracle"), 1.0)]
    (gap,) = gaps(case.suspect, case.hidden, found, Run(rng=torch.Generator()))
    quiet = Run(rng=torch.Generator())
    usual, woken = (penultimate(case.suspect, x, quiet) for x in (case.hidden.x, case.trigger(case.hidden.x)))
    other = case.hidden.y != 3
    assert torch.allclose(gap, (woken - usual)[other].mean(0))
    assert gap[gap.argmax()] > 10 * gap.sort(descending=True).values[1]


def filtered(case: Planted, **settings: Any) -> Finding:
    return run(ActivationFilter(**settings), case.suspect)


def test_the_filter_tells_stamped_inputs_from_others_at_the_rate_that_it_promises() -> None:
    case = planted(target=3, grants=(*JUDGES, Access.INPUTS))
    finding = filtered(case)
    assert finding.input_scores is not None
    assert case.inputs is not None
    assert auc(finding.input_scores, case.inputs) == 1.0
    threshold = finding.details["threshold"]
    rejected = finding.input_scores > threshold
    assert bool(rejected[case.inputs].all())
    assert float(rejected[~case.inputs].double().mean()) <= 0.15, "one in twenty, of few pictures"
    assert finding.details["rejected"] == int(rejected.sum())
    strict = filtered(case, false_alarms=0.01)
    assert strict.details["threshold"] >= threshold


def test_the_share_of_the_neurons_is_looked_at_and_at_least_one() -> None:
    case = planted(target=3, grants=(*JUDGES, Access.INPUTS))
    head = anatomy(case.suspect.model, case.hidden.x[:1]).head
    width = case.suspect.model.get_parameter(f"{head}.weight").shape[1]
    for share, count in ((0.3, round(0.3 * width)), (0.001, 1)):
        (trigger,) = filtered(case, share=share).details["triggers"]
        assert len(trigger["neurons"]) == count


def test_told_measures_the_model_that_it_is_given(backdoored: Suspect) -> None:
    assert backdoored.candidates is not None
    held = tiny.pictures(100, 5)
    found = working(backdoored.model, held, backdoored.candidates, 0.5)
    (before,) = told(found, backdoored.model, held)
    assert (
        before["before"]
        == before["after"]
        == share_right(backdoored.model, Images(tiny.TRIGGER(held.x[held.y != 0]), torch.zeros(75).long()))
    )


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        (Unlearning, {"share": 0.0}, "share must lie in"),
        (Unlearning, {"works": 1.5}, "works must lie in"),
        (Unlearning, {"steps": 0}, "steps must be at least 1"),
        (Unlearning, {"tolerance": -0.1}, "tolerance must lie in"),
        (Unlearning, {"held_out": 1.0}, "held_out must lie in"),
        (Unlearning, {"lr": -1.0}, "lr"),
        (Unlearning, {"momentum": 1.5}, "momentum"),
        (NeuronPruning, {"until": 1.0}, "until must lie in"),
        (NeuronPruning, {"works": 0.0}, "works must lie in"),
        (ActivationFilter, {"false_alarms": 0.0}, "false_alarms must lie in"),
        (ActivationFilter, {"share": 0.0}, "share must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, setting: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**setting)
