"""What the runner promises: seeded, timed, counted, caught, checked, and the suspect left alone."""

import copy
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from molehunt import findings, runner
from molehunt.defenses import DEFENSES
from molehunt.engine import Cancelled, Run
from molehunt.findings import Abstention, Candidate, Failure, Finding, Outcome
from molehunt.networks import build
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images, Task
from molehunt.triggers import Patch

TASK = Task(
    name="toy", shape=(1, 16, 16), classes=tuple("abcd"), augment="none", network="wrn_16_1", mean=(0.5,), std=(0.25,)
)
NEEDS_CLEAN = (frozenset({Access.CLEAN}),)


def pictures(count: int, seed: int = 0) -> Images:
    rng = torch.Generator().manual_seed(seed)
    return Images(torch.rand(count, *TASK.shape, generator=rng), torch.randint(4, (count,), generator=rng))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    network = build("wrn_16_1", TASK.shape, 4, rng=torch.Generator().manual_seed(0))
    return network.eval()


@pytest.fixture
def suspect(model: nn.Module) -> Suspect:
    return Suspect.of(model, TASK, clean=pictures(12), dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Doing:
    """A defense that does what a test tells it to."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = NEEDS_CLEAN
    do: Callable[[Suspect, Run], Any] = field(repr=False)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        answer = self.do(suspect, run)
        return Finding(defense="doing", score=0.0) if answer is None else answer


@pytest.fixture(autouse=True)
def _functions_are_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Doing` holds a function, which has no JSON form; nothing here is about its configuration."""
    original = runner.configuration
    monkeypatch.setattr(runner, "configuration", lambda d: {} if isinstance(d, Doing) else original(d))


def ask(do: Callable[[Suspect, Run], Any], suspect: Suspect, **settings: Any) -> Outcome:
    return runner.inspect(Doing(do=do), suspect, **{"seed": 1, **settings})


def found(outcome: Outcome) -> Finding:
    assert isinstance(outcome, Finding), outcome
    return outcome


def failed(outcome: Outcome) -> Failure:
    assert isinstance(outcome, Failure), outcome
    return outcome


@dataclass(frozen=True, kw_only=True)
class Alternatives:
    """Needs one of two kinds of evidence."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (
        frozenset({Access.CLEAN, Access.REFERENCES}),
        frozenset({Access.INPUTS}),
    )
    steps: int = 3
    shares: tuple[float, ...] = (0.5, 0.25)
    access: Access = Access.INPUTS

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        return Finding(defense="?", score=float(torch.rand((), generator=run.rng)))


class TestAbstention:
    def test_says_what_is_missing_and_what_was_granted(self, suspect: Suspect) -> None:
        outcome = runner.inspect(Alternatives(), suspect, seed=0)
        assert outcome == Abstention(
            defense="alternatives",
            reason="needs clean images and reference models, or a stream of inputs; granted: clean images",
        )

    def test_the_weights_alone_are_always_granted(self, model: nn.Module) -> None:
        @dataclass(frozen=True)
        class Weights(Alternatives):
            needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(),)

        assert isinstance(runner.inspect(Weights(), Suspect.of(model, TASK), seed=0), Finding)

    def test_one_alternative_is_enough(self, model: nn.Module) -> None:
        suspect = Suspect.of(model, TASK, inputs=pictures(3).x)
        assert isinstance(runner.inspect(Alternatives(), suspect, seed=0), Finding)

    @pytest.mark.parametrize("name", ["abs", "fine_pruning"])
    def test_a_model_without_the_part_that_is_looked_at_is_no_failure(self, name: str) -> None:
        flat = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 4))
        outcome = runner.inspect(DEFENSES[name](), Suspect.of(flat, TASK, clean=pictures(60)), seed=0)
        assert isinstance(outcome, Abstention)
        assert "runs no nn.Conv2d" in outcome.reason


class TestSeed:
    def score(self, suspect: Suspect, name: str, seed: int) -> float | None:
        return found(ask(lambda _s, run: Alternatives()(suspect, run), suspect, name=name, seed=seed)).score

    def test_equal_seeds_give_equal_answers(self, suspect: Suspect) -> None:
        assert self.score(suspect, "a", 1) == self.score(suspect, "a", 1)

    def test_seed_and_name_both_matter(self, suspect: Suspect) -> None:
        scores = {self.score(suspect, name, seed) for name in ("a", "b") for seed in (1, 2)}
        assert len(scores) == 4

    def test_a_name_and_seed_that_run_together_differ(self) -> None:
        assert runner.generator(1, "2/a").initial_seed() != runner.generator(12, "a").initial_seed()


class TestRecord:
    def test_is_enough_to_make_the_defense_again(self, model: nn.Module) -> None:
        suspect = Suspect.of(model, TASK, inputs=pictures(3).x, dtype=torch.float32)
        finding = found(runner.inspect(Alternatives(steps=7), suspect, seed=5, seconds=60, name="alt"))
        record = json.loads(json.dumps(finding.record))
        assert finding.defense == "alt"
        assert record["class"] == f"{__name__}:Alternatives"
        assert record["configuration"] == {"steps": 7, "shares": [0.5, 0.25], "access": "inputs"}
        assert record["seed"] == 5
        assert record["seconds"] == 60
        assert record["granted"] == ["inputs"]
        assert record["versions"].keys() == {"molehunt", "torch", "python"}
        assert (record["device"], record["dtype"], record["threads"]) == (str(suspect.device), "float32", 1)

    def test_failures_have_one_too(self, suspect: Suspect) -> None:
        failure = failed(ask(lambda _s, _r: 1 / 0, suspect, seed=9))
        assert failure.record["seed"] == 9
        assert failure.cost is not None

    def test_refuses_what_is_no_dataclass(self, suspect: Suspect) -> None:
        class Plain:
            needs: ClassVar[tuple[frozenset[Access], ...]] = NEEDS_CLEAN

            def __call__(self, suspect: Suspect, run: Run) -> Finding:
                raise AssertionError

        with pytest.raises(ValueError, match="a defense is a dataclass"):
            runner.inspect(Plain(), suspect, seed=0)

    def test_round_trip_to_disk(self, suspect: Suspect, tmp_path: Path) -> None:
        patch = Patch.square(TASK.shape)

        def do(s: Suspect, _r: Run) -> Finding:
            return Finding(
                defense="?", score=1.0, class_scores=s.logits(pictures(1).x)[0], trigger=patch, target=2,
                repaired=s.model.state_dict(), details={"norms": [1, 2.5], "masks": torch.ones(2)},
            )  # fmt: skip

        finding = found(ask(do, suspect))
        findings.save(finding, tmp_path / "finding.json")
        again = findings.load(tmp_path / "finding.json")
        assert isinstance(again, Finding)
        assert (again.score, again.target, again.cost, again.record) == (1.0, 2, finding.cost, finding.record)
        assert again.repaired is not None
        assert all(torch.equal(v, suspect.model.state_dict()[k]) for k, v in again.repaired.items())


class TestFailure:
    def test_keeps_the_traceback(self, suspect: Suspect) -> None:
        def unlucky(_s: Suspect, _r: Run) -> None:
            raise RuntimeError("thirteen")

        failure = failed(ask(unlucky, suspect))
        assert (failure.kind, failure.message) == ("raised", "RuntimeError: thirteen")
        assert "in unlucky" in failure.trace

    def test_exit_does_not_stop_the_program(self, suspect: Suspect) -> None:
        def leave(_s: Suspect, _r: Run) -> None:
            raise SystemExit(0)

        assert failed(ask(leave, suspect)).kind == "raised"

    def test_control_c_does(self, suspect: Suspect) -> None:
        def interrupted(s: Suspect, _r: Run) -> None:
            with torch.no_grad():
                next(s.model.parameters()).add_(1.0)
            raise KeyboardInterrupt

        before = copy.deepcopy(suspect.model.state_dict())
        with pytest.raises(KeyboardInterrupt):
            ask(interrupted, suspect)
        assert_equal(suspect.model.state_dict(), before)
        assert not torch.nn.modules.module._global_forward_hooks

    def test_cancelled(self, suspect: Suspect) -> None:
        failure = failed(ask(lambda _s, run: run.check(), suspect, cancelled=lambda: True))
        assert failure.kind == "cancelled"

    def test_cancelled_by_itself(self, suspect: Suspect) -> None:
        def give_up(_s: Suspect, _r: Run) -> None:
            raise Cancelled("enough")

        assert failed(ask(give_up, suspect)).kind == "cancelled"

    def test_out_of_time(self, suspect: Suspect) -> None:
        def dawdle(_s: Suspect, run: Run) -> None:
            while True:
                time.sleep(0.01)
                run.check()

        failure = failed(ask(dawdle, suspect, seconds=0.05))
        assert failure.kind == "time"
        assert failure.cost is not None
        assert 0.05 <= failure.cost.seconds < 30

    def test_an_answer_long_after_the_deadline_is_none(self, suspect: Suspect, monkeypatch: pytest.MonkeyPatch) -> None:
        assert runner.grace(100) == 11.0
        monkeypatch.setattr(runner, "grace", lambda seconds: 0.02)
        failure = failed(ask(lambda _s, _r: time.sleep(0.1), suspect, seconds=0.01))
        assert failure.kind == "time"
        assert "after its deadline of 0.01 s" in failure.message

    def test_a_little_late_is_in_time(self, suspect: Suspect, monkeypatch: pytest.MonkeyPatch) -> None:
        assert runner.grace(0) == 1.0
        monkeypatch.setattr(runner, "grace", lambda seconds: 30.0)  # a busy machine may sleep longer than it was told
        found(ask(lambda _s, _r: time.sleep(0.02), suspect, seconds=0.01))

    def test_somebody_elses_timeout_is_an_error(self, suspect: Suspect) -> None:
        def waits(_s: Suspect, _r: Run) -> None:
            raise TimeoutError("a lock")

        assert failed(ask(waits, suspect)).kind == "raised"

    @pytest.mark.parametrize("allocate", [bytearray, lambda size: torch.empty(size, dtype=torch.uint8)])
    def test_out_of_memory(self, suspect: Suspect, allocate: Callable[[int], object]) -> None:
        def greedy(_s: Suspect, _r: Run) -> None:
            allocate(2**55)

        assert failed(ask(greedy, suspect)).kind == "memory"


WRONG: dict[str, tuple[Callable[[Suspect], Any], str]] = {
    "no finding": (lambda s: {"score": 1.0}, "expected a Finding, got dict"),
    "NaN": (lambda s: Finding(defense="?", score=float("nan")), "score must be finite"),
    "class_scores": (lambda s: Finding(defense="?", class_scores=torch.ones(5)), r"expected shape \(4,\)"),
    "input_scores": (lambda s: Finding(defense="?", input_scores=torch.ones(5)), "not granted"),
    "sample_scores": (lambda s: Finding(defense="?", sample_scores=torch.ones(5)), "not granted"),
    "trigger": (lambda s: Finding(defense="?", trigger=Patch.square((3, 32, 32)), target=0), "does not fit"),
    "target": (lambda s: Finding(defense="?", trigger=Patch.square(TASK.shape), target=4), "from 0 to 3, got 4"),
    "radius": (lambda s: Finding(defense="?", radius=-1.0), "radius"),
    "missing key": (lambda s: Finding(defense="?", repaired={}), "expected the keys"),
    "other shape": (lambda s: repaired(s, lambda t: t[..., None]), "should be"),
    "other dtype": (lambda s: repaired(s, lambda t: t.double()), "should be torch.float32"),
    "NaN weight": (lambda s: repaired(s, lambda t: t * torch.nan), "not finite"),
    "detail": (lambda s: Finding(defense="?", details={"a": [{"b": float("inf")}]}), r"details\.a\[0\]\.b"),
    "odd detail": (lambda s: Finding(defense="?", details={"a": object()}), r"details\.a.*got object"),
}


def repaired(suspect: Suspect, change: Callable[[Tensor], Tensor]) -> Finding:
    state = suspect.model.state_dict()
    return Finding(defense="?", repaired={k: change(v) if k == "head.weight" else v for k, v in state.items()})


@pytest.mark.parametrize("case", WRONG)
def test_an_answer_that_does_not_fit_is_a_failure(suspect: Suspect, case: str) -> None:
    answer, message = WRONG[case]
    failure = failed(ask(lambda s, _r: answer(s), suspect))
    assert failure.kind == "raised"
    with pytest.raises(ValueError, match=message):
        raise ValueError(failure.message)


def test_scores_written_to_after_the_finding_was_made(suspect: Suspect) -> None:
    def do(_s: Suspect, _r: Run) -> Finding:
        finding = Finding(defense="?", class_scores=torch.zeros(4))
        assert finding.class_scores is not None
        finding.class_scores[0] = torch.nan
        return finding

    assert "not all values are finite" in failed(ask(do, suspect)).message


def test_a_finding_keeps_no_graph_and_no_buffer_of_the_suspect(suspect: Suspect) -> None:
    def do(s: Suspect, _r: Run) -> Finding:
        x = pictures(1).x.requires_grad_()
        details = {"logits": s.forward(x), "weight": s.model.state_dict()["head.weight"]}
        return Finding(defense="?", class_scores=s.forward(x)[0], repaired=s.model.state_dict(), details=details)

    finding = found(ask(do, suspect))
    assert finding.class_scores is not None
    assert not finding.class_scores.requires_grad
    assert not finding.details["logits"].requires_grad
    assert finding.repaired is not None
    own = {t.data_ptr() for t in suspect.model.state_dict().values()}
    assert not own & {t.data_ptr() for t in finding.repaired.values()}
    assert finding.details["weight"].data_ptr() not in own


def weight(module: nn.Module) -> nn.Parameter:
    parameter = module.get_parameter("head.weight")
    assert isinstance(parameter, nn.Parameter)
    return parameter


@torch.no_grad()
def add_one(tensor: Tensor) -> None:
    tensor.add_(1.0)


def train_it(s: Suspect) -> None:
    s.model.train()(pictures(4).x)


def leave_gradient(s: Suspect) -> None:
    weight(s.model).requires_grad_(True)
    s.model(pictures(4).x).sum().backward()


def replace(s: Suspect) -> None:
    s.model.get_submodule("head").weight = nn.Parameter(torch.zeros(4, 64), requires_grad=False)


DAMAGE: dict[str, tuple[Callable[[Suspect], object], str]] = {
    "weights": (lambda s: add_one(weight(s.model)), "changed head.weight of suspect.model"),
    "through .data": (lambda s: add_one(weight(s.model).data), "changed head.weight of suspect.model"),
    "fast copy": (lambda s: add_one(weight(s.frozen)), "changed head.weight of suspect.frozen"),
    "dtype": (lambda s: s.model.to(torch.float64), "suspect.model"),
    "replaced": (replace, "replaced head.weight of suspect.model"),
    "statistics": (train_it, "suspect.model"),
    "mode": (lambda s: s.frozen.train(), "between training and eval mode"),
    "gradient": (leave_gradient, "suspect.model"),
    "hook": (lambda s: s.frozen.register_forward_hook(lambda m, i, o: o * 0), "left a hook"),
}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype
        assert torch.equal(value, b[key]), key


@pytest.mark.parametrize("case", DAMAGE)
def test_a_changed_suspect_is_a_failure_and_is_put_back(suspect: Suspect, case: str) -> None:
    do, message = DAMAGE[case]
    before = [copy.deepcopy(m.state_dict()) for m in (suspect.model, suspect.frozen)]
    x = pictures(3).x
    logits = suspect.logits(x)
    failure = failed(ask(lambda s, _r: (do(s), None)[1], suspect))
    assert message in failure.message
    for module, state in zip((suspect.model, suspect.frozen), before, strict=True):
        assert_equal(module.state_dict(), state)
        for parameter in module.parameters():
            assert parameter.grad is None
            assert not parameter.requires_grad
        assert not any(m.training for m in module.modules())
    assert torch.equal(suspect.logits(x), logits)
    found(ask(lambda s, _r: None, suspect))


def test_other_layers_cannot_be_put_back_but_are_noticed(suspect: Suspect) -> None:
    def do(s: Suspect, _r: Run) -> None:
        s.model.add_module("extra", nn.Linear(1, 1))

    assert "changed the layers of suspect.model" in failed(ask(do, suspect)).message


def test_written_evidence_is_a_failure(model: nn.Module) -> None:
    reference = copy.deepcopy(model)
    suspect = Suspect.of(
        model, TASK, clean=pictures(3), training=pictures(4), inputs=pictures(2).x, references=(reference,)
    )
    assert suspect.clean is not None
    assert suspect.training is not None
    assert suspect.references is not None
    evidence: tuple[tuple[Tensor | None, str], ...] = (
        (suspect.clean.x, "clean.x"),
        (suspect.clean.y, "clean.y"),
        (suspect.training.x, "training.x"),
        (suspect.inputs, "inputs"),
        (weight(suspect.references[0]), "references[0].head.weight"),
    )
    for tensor, label in evidence:
        assert tensor is not None
        failure = failed(ask(functools.partial(lambda t, _s, _r: zero(t), tensor), suspect))
        assert f"wrote to suspect.{label}" in failure.message


@torch.no_grad()
def zero(tensor: Tensor) -> None:
    tensor.zero_()


def test_a_failure_of_its_own_is_not_hidden_by_the_damage(suspect: Suspect) -> None:
    def do(s: Suspect, _r: Run) -> None:
        add_one(weight(s.model))
        raise RuntimeError("first")

    assert failed(ask(do, suspect)).message == "RuntimeError: first"
    found(ask(lambda s, _r: None, suspect))


def test_scratch_progress_and_remaining_time(suspect: Suspect, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def do(_s: Suspect, run: Run) -> None:
        assert run.scratch == tmp_path
        left = run.remaining()
        assert left is not None
        assert 0 < left <= 30
        run.report(1, 2)

    found(ask(do, suspect, scratch=tmp_path, seconds=30, report=lambda done, total: seen.append((done, total))))
    assert seen == [(1, 2)]


def test_candidates_are_evidence(model: nn.Module) -> None:
    suspect = Suspect.of(model, TASK, candidates=(Candidate(trigger=Patch.square(TASK.shape), target=1, defense="a"),))
    found(ask_with({Access.CANDIDATES}, suspect))
    assert isinstance(ask_with({Access.CANDIDATES}, Suspect.of(model, TASK)), Abstention)


def ask_with(needs: set[Access], suspect: Suspect) -> Outcome:
    @dataclass(frozen=True, kw_only=True)
    class Needing(Doing):
        needs: ClassVar[tuple[frozenset[Access], ...]] = ()

    Needing.needs = (frozenset(needs),)
    return runner.inspect(Needing(do=lambda s, r: None), suspect, seed=0)


def test_names_are_those_of_the_table_or_follow_the_class() -> None:
    for name, kind in DEFENSES.items():
        assert runner.name_of(kind()) == name
    assert runner.name_of(dataclasses.make_dataclass("MyOwn", [])()) == "my_own"
