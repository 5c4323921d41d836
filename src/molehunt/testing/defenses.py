"""The contract of a defense, as checks that anybody can run over anybody's class."""

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from molehunt.defenses.contract import Defense
from molehunt.engine import Run
from molehunt.findings import Abstention, Failure, Finding, Outcome, load, save
from molehunt.runner import configuration, inspect
from molehunt.suspect import Access
from molehunt.testing.declaration import check_dataclass, check_docstring, global_generators_at_rest, require
from molehunt.testing.planted import Planted, attack_success, auc, planted
from molehunt.triggers import Target

Need = frozenset[Access]
TRUTHS = ((3, 0), (7, 1))  # target class and seed of the planted models that every defense is tried on


class Trial:
    """A defense and its answers about planted suspects, each asked for once.

    Args:
        defense: the configured method.
    """

    def __init__(self, defense: Defense) -> None:
        self.defense = defense
        self._suspects: dict[tuple[object, ...], Planted] = {}
        self._findings: dict[tuple[object, ...], Finding] = {}

    def suspect(self, need: Need, backdoored: bool, target: int = 3, seed: int = 0) -> Planted:
        """Return the planted model or its twin, with exactly this evidence."""
        key = (need, backdoored, target, seed)
        if key not in self._suspects:
            self._suspects[key] = planted(backdoored=backdoored, target=target, seed=seed, grants=need)
        return self._suspects[key]

    def ask(self, need: Need, backdoored: bool, target: int = 3, seed: int = 0) -> Outcome:
        """Run the defense through the runner, as a game does."""
        return inspect(self.defense, self.suspect(need, backdoored, target, seed).suspect, seed=seed)

    def finding(self, need: Need, backdoored: bool, target: int = 3, seed: int = 0) -> Finding:
        """Return what the defense finds; anything but a finding breaks the contract."""
        key = (need, backdoored, target, seed)
        if key not in self._findings:
            outcome = self.ask(need, backdoored, target, seed)
            require(isinstance(outcome, Finding), f"expected a Finding, got {_short(outcome)}")
            assert isinstance(outcome, Finding)
            self._findings[key] = outcome
        return self._findings[key]


def is_a_frozen_dataclass(trial: Trial) -> None:
    """The dataclass is the configuration: frozen, with defaults, equal when made again from its repr, and JSON."""
    check_dataclass(trial.defense)
    json.dumps(configuration(trial.defense), allow_nan=False)


def documents_itself(trial: Trial) -> None:
    """The docstring says what the score means, where the method comes from and where it departs from that."""
    check_docstring(trial.defense, ("Score", "Reference", "Departures"))


def states_its_needs(trial: Trial) -> None:
    """`needs` holds sets of evidence, any one of which suffices."""
    needs = trial.defense.needs
    require(isinstance(needs, tuple) and len(needs) > 0, f"needs must be a tuple of sets, got {needs!r}")
    for need in needs:
        fits = isinstance(need, frozenset) and all(isinstance(access, Access) for access in need)
        require(fits, f"needs must hold frozensets of Access, got {need!r}")


def abstains_without_its_needs(trial: Trial) -> None:
    """Without one piece of what it needs the answer is an abstention."""
    for need in trial.defense.needs:
        for access in sorted(need):
            granted = need - {access}
            if any(other <= granted for other in trial.defense.needs):
                continue
            outcome = trial.ask(granted, True)
            require(isinstance(outcome, Abstention), f"without {access} it should abstain, got {_short(outcome)}")


def answers_something(trial: Trial) -> None:
    """Whatever it needs is enough for a finding that says something, about a planted model and about its twin."""
    for need in trial.defense.needs:
        answers = [trial.finding(need, backdoored) for backdoored in (True, False)]
        said = [_fields(finding) for finding in answers]
        require(bool(said[0]), f"with {sorted(need)} the finding is empty")
        judged = [("score" in fields) for fields in said]
        require(judged[0] == judged[1], "it scores one of a planted model and its twin, but not the other")


def repeats_itself(trial: Trial) -> None:
    """The same seed gives the same answer, and no global generator is used or moved."""
    for need in trial.defense.needs:
        first = trial.finding(need, True)
        with global_generators_at_rest():
            second = trial.ask(need, True)
        require(isinstance(second, Finding), f"it answered once, and then: {_short(second)}")
        assert isinstance(second, Finding)
        for name, value in _fields(first).items():
            require(_same(value, _fields(second).get(name)), f"two runs with one seed differ in {name}")


def leaves_the_suspect_alone(trial: Trial) -> None:
    """Weights, gradients, modes, hooks and evidence are afterwards what they were."""
    for need in trial.defense.needs:
        suspect = planted(grants=need).suspect
        models = [suspect.model, suspect.frozen, *(suspect.references or ()), *(suspect.metas or ())]
        evidence = [t for t in (suspect.inputs, *(suspect.clean or ()), *(suspect.training or ())) if t is not None]
        weights = [copy.deepcopy(model.state_dict()) for model in models]
        pictures = [t.clone() for t in evidence]
        trial.defense(suspect, Run(rng=torch.Generator().manual_seed(0)))
        for model, before in zip(models, weights, strict=True):
            state = model.state_dict()
            require(all(torch.equal(state[key], before[key]) for key in before), "it changed weights of the suspect")
            require(all(p.grad is None for p in model.parameters()), "it left gradients on the suspect's weights")
            require(not any(p.requires_grad for p in model.parameters()), "it made the suspect's weights trainable")
            require(not any(m.training for m in model.modules()), "it left the suspect in training mode")
            require(not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "it left a hook")
        same = all(torch.equal(a, b) for a, b in zip(evidence, pictures, strict=True))
        require(same, "it wrote into the evidence")


def ranks_the_planted_above_the_twin(trial: Trial) -> None:
    """Every planted model scores above every twin, whatever the target and the pictures."""
    for need in trial.defense.needs:
        scores = [[trial.finding(need, b, *truth).score for truth in TRUTHS] for b in (True, False)]
        bad = [s for s in scores[0] if s is not None]
        good = [s for s in scores[1] if s is not None]
        if bad and good:
            require(min(bad) > max(good), f"planted models score {bad}, their clean twins {good}")


def names_the_target(trial: Trial) -> None:
    """Where there are class scores, the planted target has the highest."""
    for need in trial.defense.needs:
        for target, seed in TRUTHS:
            scores = trial.finding(need, True, target, seed).class_scores
            if scores is not None:
                best = int(scores.argmax())
                require(best == target, f"the target is {target}, the highest class score is that of {best}")


def recovers_a_working_trigger(trial: Trial) -> None:
    """Where a trigger is recovered, it sends most hidden pictures to its class, and that is the planted one."""
    for need in trial.defense.needs:
        case, finding = trial.suspect(need, True), trial.finding(need, True)
        if finding.trigger is None:
            continue
        require(finding.target is not None, "a recovered trigger comes with its target")
        assert finding.target is not None
        require(finding.target == case.target.classes, f"the target is {case.target.classes}, got {finding.target}")
        success = attack_success(case.suspect.model, case.hidden, finding.trigger, Target(classes=finding.target))
        require(success >= 0.8, f"the recovered trigger works on {success:.0%} of hidden pictures")


def finds_stamped_pictures(trial: Trial) -> None:
    """Where inputs or training samples are scored, those with the trigger score higher: AUC 0.9 at least."""
    for need in trial.defense.needs:
        case, finding = trial.suspect(need, True), trial.finding(need, True)
        for name, truth in (("input_scores", case.inputs), ("sample_scores", case.training)):
            scores: Tensor | None = getattr(finding, name)
            if scores is not None:
                require(auc(scores, truth) >= 0.9, f"{name}: AUC {auc(scores, truth):.2f} on a planted stream")


def repairs(trial: Trial) -> None:
    """A repair at least halves the success of the planted trigger and costs at most 5 points, also on the twin."""
    for need in trial.defense.needs:
        for backdoored in (True, False):
            case, finding = trial.suspect(need, backdoored), trial.finding(need, backdoored)
            if finding.repaired is None:
                continue
            before = case.suspect.model
            after: nn.Module = copy.deepcopy(before)
            after.load_state_dict(dict(finding.repaired))
            lost = case.accuracy(before) - case.accuracy(after)
            require(lost <= 0.05, f"the repair costs {lost:.1%} accuracy (backdoored: {backdoored})")
            left, had = case.success(after), case.success(before)
            require(left <= max(0.5 * had, 0.05), f"the trigger worked on {had:.0%}, after the repair on {left:.0%}")


def claims_something_true(trial: Trial) -> None:
    """At least one of its answers depends on whether something is hidden: a score, scores of pictures, or a repair."""
    for need in trial.defense.needs:
        said = _fields(trial.finding(need, True))
        useful = said.keys() & {"score", "input_scores", "sample_scores", "repaired", "radius"}
        require(bool(useful), f"nothing in its finding can be right or wrong: {sorted(said)}")


def stops_when_told(trial: Trial) -> None:
    """A cancelled run and a deadline that has passed end as failures of that kind, not as answers."""
    for need in trial.defense.needs:
        suspect = trial.suspect(need, True).suspect
        outcome = inspect(trial.defense, suspect, seed=0, cancelled=lambda: True)
        told = isinstance(outcome, Failure) and outcome.kind == "cancelled"
        require(told, f"cancelled from the start it should stop at run.check(), got {_short(outcome)}")
        outcome = inspect(trial.defense, suspect, seed=0, seconds=0.0)
        late = isinstance(outcome, Failure) and outcome.kind == "time"
        require(late, f"with no time left it should stop at run.check(), got {_short(outcome)}")


def can_be_kept(trial: Trial) -> None:
    """A finding goes to disk and comes back as it was."""
    for need in trial.defense.needs:
        finding = trial.finding(need, True)
        with tempfile.TemporaryDirectory() as folder:
            save(finding, Path(folder) / "finding.json")
            again = load(Path(folder) / "finding.json")
        require(isinstance(again, Finding), f"a kept finding came back as {type(again).__name__}")
        assert isinstance(again, Finding)
        for name, value in _fields(finding).items():
            require(_same(value, _fields(again).get(name)), f"{name} is not the same after being kept")


DEFENSE_CHECKS: dict[str, Callable[[Trial], None]] = {
    check.__name__: check
    for check in (
        is_a_frozen_dataclass,
        documents_itself,
        states_its_needs,
        abstains_without_its_needs,
        answers_something,
        claims_something_true,
        repeats_itself,
        leaves_the_suspect_alone,
        ranks_the_planted_above_the_twin,
        names_the_target,
        recovers_a_working_trigger,
        finds_stamped_pictures,
        repairs,
        stops_when_told,
        can_be_kept,
    )
}


def check_defense(defense: Defense) -> None:
    """Run every check of `DEFENSE_CHECKS` on a defense.

    A defense that always says clean, or always says backdoored, does not pass, nor does one that answers nothing.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    trial = Trial(defense)
    for name, check in DEFENSE_CHECKS.items():
        try:
            check(trial)
        except AssertionError as error:
            raise AssertionError(f"{type(defense).__name__}: {name}: {error}") from error


def _fields(finding: Finding) -> dict[str, object]:
    """What a finding says, without its cost and record."""
    said = {f.name: getattr(finding, f.name) for f in dataclasses.fields(finding)}
    return {k: v for k, v in said.items() if v is not None and v != {} and k not in {"defense", "cost", "record"}}


def _same(one: object, other: object) -> bool:
    """Equality that looks into tensors, triggers, mappings and lists; a tuple equals its list, as in JSON."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if hasattr(one, "tensors") and hasattr(other, "tensors"):
        return bool(one.to_json() == other.to_json() and _same(one.tensors(), other.tensors()))  # type: ignore[attr-defined]
    return bool(one == other)


def _short(outcome: Outcome) -> str:
    """An outcome in a few words."""
    match outcome:
        case Failure():
            return f"a Failure ({outcome.kind}): {outcome.message}"
        case Abstention():
            return f"an Abstention: {outcome.reason}"
        case _:
            return "a Finding"
