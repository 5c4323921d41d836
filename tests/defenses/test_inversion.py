"""The batched search against the obvious one: a class at a time, plain numbers, torch's own Adam."""

import copy
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.defenses._inversion import (
    MARGIN,
    Inversion,
    Penalty,
    Schedule,
    invert,
    random_start,
    schedule_batches,
    stamp,
)
from molehunt.testing import planted

RULE = Schedule(steps=24, updates=3, batch=8, penalty=0.02, from_zero=False, patience=2, stop_after=3, success=0.9)


@dataclass
class Scalar:
    """One class of the official algorithm, statement by statement."""

    rule: Schedule
    cost: float = 0.0
    best: float = math.inf
    previous: float = math.inf
    first: int = 0
    ups: int = 0
    downs: int = 0
    still: int = 0
    raised: bool = False
    lowered: bool = False
    trace: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cost = 0.0 if self.rule.from_zero else self.rule.penalty

    def step(self, success: float, norm: float) -> tuple[bool, bool]:
        """Answer (a new best, the search ends here)."""
        rule, works = self.rule, success >= self.rule.success
        better = works and norm < self.best
        if better:
            self.best = norm
        if self.best < math.inf:
            self.still = self.still + 1 if self.best >= rule.progress * self.previous else 0
            self.previous = min(self.best, self.previous)
            if self.raised and self.lowered and self.still >= rule.stop_after:
                return better, True
        if self.cost == 0 and works:
            self.first += 1
            if self.first >= rule.patience:
                self.cost, self.ups, self.downs, self.raised, self.lowered = rule.penalty, 0, 0, False, False
        else:
            self.first = 0
        self.ups, self.downs = (self.ups + 1, 0) if works else (0, self.downs + 1)
        if self.ups >= rule.patience:
            self.ups, self.cost, self.raised = 0, self.cost * rule.up, True
        elif self.downs >= rule.patience:
            self.downs, self.cost, self.lowered = 0, self.cost / rule.down, True
        self.trace.append(self.cost)
        return better, False


def search_one(
    x: Tensor, target: int, start: tuple[Tensor, Tensor], batches: Tensor, rule: Schedule
) -> tuple[Tensor, Tensor, bool, float, int]:
    """Search one class with torch's own optimizer; mask, pattern, works, lambda, steps."""

    def squash(v: Tensor) -> Tensor:
        return torch.tanh(v) / (2 + MARGIN) + 0.5

    raw = [torch.atanh((v.double() - 0.5) * (2 + MARGIN)).requires_grad_() for v in start]
    adam = torch.optim.Adam(raw, lr=rule.rate, betas=rule.betas)
    lam = Scalar(rule)
    kept: tuple[Tensor, Tensor] | None = None
    steps = 0
    for steps in range(1, rule.steps + 1):
        hits, norms, seen = [], [], []
        for chosen in batches[(steps - 1) * rule.updates : steps * rule.updates]:
            m, p = squash(raw[0]), squash(raw[1])
            seen.append((m.detach(), p.detach()))
            out = LOGITS((1 - m) * x[chosen] + m * p)
            goal = torch.full((len(chosen),), target)
            loss = F.cross_entropy(out, goal) + lam.cost * m.sum()
            raw[0].grad, raw[1].grad = torch.autograd.grad(loss, raw)
            adam.step()
            hits.append(float((out.argmax(1) == target).float().mean()))
            norms.append(float(m.detach().sum()))
        better, ends = lam.step(sum(hits) / len(hits), sum(norms) / len(norms))
        if better:
            kept = seen[rule.updates // 2]
        if ends:
            break
    mask, pattern = kept or (squash(raw[0]).detach(), squash(raw[1]).detach())
    return mask, pattern, kept is not None, lam.cost, steps


SUSPECT = planted(classes=5, images=60).suspect
# float64: in float32 a rounded gradient close to 0 changes its sign, of which Adam makes a full step.
LOGITS = copy.deepcopy(SUSPECT.model).double()
assert SUSPECT.clean is not None
X = SUSPECT.clean.x.double()


def searched(rule: Schedule, targets: list[int], *, seed: int = 0, limit: int = 500) -> Inversion:
    """Search some classes; starts and batches depend on the seed alone."""
    start = random_start(5, SUSPECT.task.shape, torch.Generator().manual_seed(seed))
    batches = schedule_batches(len(X), rule, torch.Generator().manual_seed(seed + 1))
    rows = torch.tensor(targets)
    return invert(LOGITS, X, rows, (start[0][rows], start[1][rows]), batches, rule, limit=limit)


def test_all_classes_at_once_equal_one_after_the_other() -> None:
    start = random_start(5, SUSPECT.task.shape, torch.Generator().manual_seed(0))
    batches = schedule_batches(len(X), RULE, torch.Generator().manual_seed(1))
    found = searched(RULE, [0, 1, 2, 3, 4])
    assert len(set(found.steps.tolist())) > 1, "no row left early: compaction was not tested"
    for k in range(5):
        mask, pattern, works, penalty, steps = search_one(X, k, (start[0][k], start[1][k]), batches, RULE)
        assert torch.allclose(found.mask[k], mask, atol=1e-4)
        assert torch.allclose(found.pattern[k], pattern, atol=1e-4)
        assert (bool(found.works[k]), int(found.steps[k])) == (works, steps)
        assert float(found.penalty[k]) == pytest.approx(penalty, rel=1e-5)


@pytest.mark.parametrize("limit", [8, 17, 500])
def test_neither_order_nor_company_nor_block_size_matters(limit: int) -> None:
    every = searched(RULE, [0, 1, 2, 3, 4])
    some = searched(RULE, [4, 2, 0], limit=limit)
    assert torch.allclose(some.mask, every.mask[[4, 2, 0]], atol=1e-4)
    assert torch.allclose(some.pattern, every.pattern[[4, 2, 0]], atol=1e-4)
    assert torch.equal(some.steps, every.steps[[4, 2, 0]])


def test_the_same_arguments_give_the_same_bytes() -> None:
    assert torch.equal(searched(RULE, [1, 3]).mask, searched(RULE, [1, 3]).mask)


def test_lambda_on_scripted_successes() -> None:
    rule = Schedule(steps=1, updates=1, batch=1, patience=5, up=2.0, down=2.0**1.5, penalty=1e-3)
    penalty = Penalty(rule, 1)
    trace = []
    for success in [1.0] * 14 + [0.0] * 5:
        penalty.step(torch.tensor([success]), torch.tensor([10.0]))
        trace.append(float(penalty.value))
    assert trace[:4] == [0.0] * 4
    assert trace[4:8] == pytest.approx([1e-3] * 4)
    # The step that sets lambda already counts: the first doubling comes four steps later, the next after five.
    assert trace[8:13] == pytest.approx([2e-3] * 5)
    assert trace[13:18] == pytest.approx([4e-3] * 5)
    assert trace[18] == pytest.approx(4e-3 / 2**1.5)


def test_lambda_keeps_rising_while_the_trigger_works() -> None:
    # A peer sets lambda back to its start on every success, so that it never rises and the search never ends.
    penalty = Penalty(replace(RULE, patience=1), 1)
    for _ in range(6):
        penalty.step(torch.tensor([1.0]), torch.tensor([10.0]))
    assert float(penalty.value) == pytest.approx(RULE.penalty * RULE.up**6)


@pytest.mark.parametrize("from_zero", [False, True])
def test_every_row_counts_as_if_it_were_alone(from_zero: bool) -> None:
    rule = Schedule(steps=1, updates=1, batch=1, patience=3, stop_after=4, progress=0.98, from_zero=from_zero)
    rng = torch.Generator().manual_seed(5)
    rows, steps = 20, 120
    # Runs of successes and failures long enough to reach every branch.
    success = (torch.rand(steps // 4, rows, generator=rng) < 0.6).float().repeat_interleave(4, 0)
    norm = 100 * torch.rand(steps, rows, generator=rng)
    penalty, singles = Penalty(rule, rows), [Scalar(rule) for _ in range(rows)]
    ended = [False] * rows
    for s, n in zip(success, norm, strict=True):
        better = penalty.step(s, n)
        for row, single in enumerate(singles):
            if ended[row]:
                continue
            assert single.step(float(s[row]), float(n[row])) == (bool(better[row]), bool(penalty.done[row]))
            ended[row] = bool(penalty.done[row])
            if not ended[row]:
                assert float(penalty.value[row]) == pytest.approx(single.cost, rel=1e-4)
    assert any(ended)


def test_no_search_ends_before_lambda_went_up_and_down_or_before_anything_worked() -> None:
    rule = replace(RULE, patience=1, stop_after=2)
    only_up, nothing = Penalty(rule, 1), Penalty(rule, 1)
    for _ in range(30):
        only_up.step(torch.tensor([1.0]), torch.tensor([10.0]))
        nothing.step(torch.tensor([0.0]), torch.tensor([10.0]))
    assert not bool(only_up.done)
    assert not bool(nothing.done)
    only_up.step(torch.tensor([0.0]), torch.tensor([10.0]))
    only_up.step(torch.tensor([0.0]), torch.tensor([10.0]))
    assert bool(only_up.done)


def test_the_best_mask_is_the_smallest_that_works_neither_the_last_nor_the_smallest() -> None:
    penalty = Penalty(RULE, 1)
    script = [(1.0, 9.0), (1.0, 5.0), (0.2, 1.0), (1.0, 7.0)]
    better = [bool(penalty.step(torch.tensor([s]), torch.tensor([n]))) for s, n in script]
    assert better == [True, True, False, False]
    assert float(penalty.best) == 5.0


def test_a_class_that_cannot_be_reached_is_marked() -> None:
    def without(x: Tensor) -> Tensor:
        reached: Tensor = LOGITS(x)
        return reached - 1e4 * F.one_hot(torch.tensor(2), 5)

    start = random_start(5, SUSPECT.task.shape, torch.Generator().manual_seed(0))
    batches = schedule_batches(len(X), RULE, torch.Generator().manual_seed(1))
    found = invert(without, X, torch.arange(5), start, batches, RULE)
    assert found.works.tolist() == [True, True, False, True, True]
    assert int(found.steps[2]) == RULE.steps


def test_an_empty_mask_leaves_the_bits_alone_and_a_full_one_shows_the_pattern() -> None:
    mask = torch.stack((torch.zeros(1, 12, 12), torch.ones(1, 12, 12)))
    pattern = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    stamped = stamp(X, mask, pattern)
    assert torch.equal(stamped[0], X)
    assert torch.equal(stamped[1], pattern[1].expand_as(X).double())


def test_masks_and_patterns_stay_inside_the_unit_interval() -> None:
    # The official code divides by 2 - 1e-7, so that a saturated tanh leaves [0, 1]; a strong pull shows it here.
    rule = replace(RULE, steps=40, rate=3.0, penalty=5.0)
    edge = torch.ones(2, 1, 12, 12), torch.zeros(2, 3, 12, 12)
    batches = schedule_batches(len(X), rule, torch.Generator().manual_seed(1))
    found = invert(LOGITS, X, torch.tensor([0, 3]), edge, batches, rule)
    for value in (found.mask, found.pattern):
        assert float(value.min()) > 0.0
        assert float(value.max()) < 1.0


def test_every_sweep_shows_every_image_once() -> None:
    rule = Schedule(steps=5, updates=4, batch=3)
    order = schedule_batches(12, rule, torch.Generator().manual_seed(0))
    assert order.shape == (20, 3)
    for sweep in order.view(5, 12):
        assert sweep.sort().values.tolist() == list(range(12))
    assert not torch.equal(order[:4], order[4:8])


def test_fewer_images_than_a_batch_make_the_batch_smaller() -> None:
    assert schedule_batches(5, Schedule(steps=2, updates=3, batch=16), torch.Generator()).shape == (6, 5)


def test_ticks_count_all_blocks_and_may_stop_the_search() -> None:
    class Stop(Exception):
        """Raised by a tick."""

    seen: list[tuple[int, int]] = []

    def tick(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 80:
            raise Stop

    rule = replace(RULE, success=1.0)
    start = random_start(2, SUSPECT.task.shape, torch.Generator())
    batches = schedule_batches(len(X), rule, torch.Generator())
    with pytest.raises(Stop):
        invert(LOGITS, X, torch.tensor([0, 1]), start, batches, rule, limit=8, tick=tick)
    assert seen[-1] == (80, 144)


def test_the_short_schedule_of_a_screening_does_not_wait_for_lambda() -> None:
    official = Schedule(steps=1000, updates=31, batch=32)
    assert official.shortened(50) == replace(official, steps=50, from_zero=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("updates", 0), ("batch", 0), ("patience", 0), ("stop_after", 0),
        ("rate", 0.0), ("penalty", 0.0), ("penalty", math.nan), ("up", 1.0), ("down", 0.5), ("success", 1.01),
    ],
)  # fmt: skip
def test_a_schedule_refuses_what_cannot_work(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must .*{value}"):
        replace(RULE, **{name: value})  # type: ignore[arg-type]


def test_refuses_starts_and_batches_that_do_not_fit() -> None:
    start = random_start(2, SUSPECT.task.shape, torch.Generator())
    batches = schedule_batches(len(X), RULE, torch.Generator())
    with pytest.raises(ValueError, match="3 rows"):
        invert(LOGITS, X, torch.arange(3), start, batches, RULE)
    with pytest.raises(ValueError, match="expected 72 batches, got 71"):
        invert(LOGITS, X, torch.arange(2), start, batches[1:], RULE)
