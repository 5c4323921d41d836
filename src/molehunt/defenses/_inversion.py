"""Trigger inversion: search many small patches at once, one per row of a batch axis.

A *row* is one search: a target class and a start. Rows never influence each other, so all classes (and all restarts)
share one forward and one backward pass per update, and each row ends where a search of its own would.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Logits: TypeAlias = Callable[[Tensor], Tensor]

# Keeps masks and patterns strictly inside (0, 1) after rounding to float32. The 1e-7 of the official code does not:
# it *divides* by 2 - 1e-7, so that a saturated tanh lands outside [0, 1].
MARGIN = 1e-6


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a search lasts and how its mask penalty lambda follows success.

    One *step* is `updates` Adam updates, each on a batch of its own; success and mask norm are averaged over them,
    and every counter below moves once per step.

    Attributes:
        steps: steps at most.
        updates: Adam updates per step.
        batch: images per update, the same ones for every row.
        rate: Adam's learning rate.
        betas: Adam's two decay rates.
        success: share of the images that must reach the target class for a step to count as a success.
        penalty: the first lambda above zero.
        from_zero: begin with lambda 0 until `patience` successes in a row; otherwise begin with `penalty`.
        patience: successes in a row that raise lambda, and failures in a row that lower it.
        up: factor by which lambda is raised.
        down: divisor by which it is lowered.
        progress: a best norm of at least `progress` times the one before counts as standing still.
        stop_after: steps of standing still that end the search, once lambda has been both raised and lowered.

    Raises:
        ValueError: a number that no search can work with.
    """

    steps: int
    updates: int
    batch: int
    rate: float = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    success: float = 0.99
    penalty: float = 1e-3
    from_zero: bool = True
    patience: int = 5
    up: float = 2.0
    down: float = 2.0**1.5
    progress: float = 1.0
    stop_after: int = 25

    def __post_init__(self) -> None:
        for name in ("steps", "updates", "batch", "patience", "stop_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate", "penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("up", "down"):
            if not getattr(self, name) > 1:
                raise ValueError(f"{name} must be above 1, got {getattr(self, name)}")
        if not 0 < self.success <= 1:
            raise ValueError(f"success must lie in (0, 1], got {self.success}")

    def shortened(self, steps: int) -> "Schedule":
        """The same schedule with fewer steps; lambda begins above 0, since there is no time to wait for it."""
        return replace(self, steps=steps, from_zero=False)


class Penalty:
    """Lambda of every row, its counters, and which rows are done; a transition table and nothing else.

    Attributes:
        value: (R,) lambda.
        best: (R,) smallest step norm of a successful step, infinity before there is one.
        done: bool (R,), rows whose search has ended early.
    """

    def __init__(self, rule: Schedule, rows: int, device: torch.device | str = "cpu") -> None:
        self.rule = rule
        self.value = torch.full((rows,), 0.0 if rule.from_zero else rule.penalty, device=device)
        self.best = torch.full((rows,), torch.inf, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        # First successes (while lambda is 0), successes and failures in a row, steps without a smaller norm.
        self._first, self._hits, self._misses, self._still = self.done.new_zeros(4, rows, dtype=torch.int64).unbind()
        self._raised, self._lowered = self.done.clone(), self.done.clone()

    def step(self, success: Tensor, norm: Tensor) -> Tensor:
        """Account for one step and answer which rows have a new best mask.

        Args:
            success: (R,) share of images that reached the target, mean over the step.
            norm: (R,) L1 norm of the mask, mean over the step.

        Returns:
            bool (R,).
        """
        rule = self.rule
        works = success >= rule.success
        better = works & (norm < self.best)
        best = torch.where(better, norm, self.best)
        # The infinity test comes first: inf >= 1.0 * inf holds, and no search may end before anything has worked.
        still = torch.isfinite(best) & (best >= rule.progress * self.best)
        self._still = torch.where(still, self._still + 1, 0)
        self.best = best
        self.done = self._raised & self._lowered & (self._still >= rule.stop_after)

        # A row that is done keeps the lambda it ended with; its counters no longer matter.
        last = self.value
        self._first = torch.where((self.value == 0) & works, self._first + 1, 0)
        begin = self._first >= rule.patience
        self.value = torch.where(begin, rule.penalty, self.value)
        # Clearing comes before counting: the step that sets lambda is itself the first success under it.
        self._hits = torch.where(works, torch.where(begin, 0, self._hits) + 1, 0)
        self._misses = torch.where(works, 0, self._misses + 1)
        rises = self._hits >= rule.patience
        falls = self._misses >= rule.patience
        self._raised = (self._raised & ~begin) | rises
        self._lowered = (self._lowered & ~begin) | falls
        self._hits = torch.where(rises, 0, self._hits)
        self._misses = torch.where(falls, 0, self._misses)
        moved = torch.where(rises, self.value * rule.up, torch.where(falls, self.value / rule.down, self.value))
        self.value = torch.where(self.done, last, moved)
        return better

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but those of a bool (R,)."""
        for name in ("value", "best", "done", "_first", "_hits", "_misses", "_still", "_raised", "_lowered"):
            setattr(self, name, getattr(self, name)[rows])


class Inversion(NamedTuple):
    """What the searches ended with, row by row.

    `mask` (R, 1, H, W) and `pattern` (R, C, H, W) are the best that worked, or the last ones where none did; `works`
    bool (R,) tells which; `penalty` (R,) is the last lambda, `steps` int64 (R,) how many were taken.
    """

    mask: Tensor
    pattern: Tensor
    works: Tensor
    penalty: Tensor
    steps: Tensor


def stamp(x: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Paste R patches on the same B images: (R, B, C, H, W), (1 - m) x + m p; bit-identical to x where m is 0.

    Args:
        x: images (B, C, H, W).
        mask: (R, 1, H, W).
        pattern: (R, C, H, W).
    """
    weight = mask[:, None]
    return (1.0 - weight) * x + weight * pattern[:, None]


def schedule_batches(images: int, rule: Schedule, rng: torch.Generator) -> Tensor:
    """Which images each update sees: int64 (steps * updates, B), sweeps over all images in fresh random orders.

    B is `rule.batch`, or all images where there are fewer; the rest of a sweep that does not fill a batch is dropped.
    """
    size = min(rule.batch, images)
    per_sweep = images // size
    total = rule.steps * rule.updates
    sweeps = [torch.randperm(images, generator=rng)[: per_sweep * size] for _ in range(-(-total // per_sweep))]
    return torch.cat(sweeps).view(-1, size)[:total]


def random_start(
    rows: int, shape: tuple[int, int, int], rng: torch.Generator, level: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw masks (rows, 1, H, W) in U(0, `level`) and patterns (rows, C, H, W) in U(0, 1)."""
    channels, height, width = shape
    mask = torch.rand(rows, 1, height, width, generator=rng) * level
    return mask, torch.rand(rows, channels, height, width, generator=rng)


def invert(
    logits: Logits,
    x: Tensor,
    targets: Tensor,
    start: tuple[Tensor, Tensor],
    batches: Tensor,
    rule: Schedule,
    *,
    limit: int = 500,
    tick: Callable[[int, int], None] | None = None,
) -> Inversion:
    """Search for every row the smallest patch that sends all images to the row's target class.

    Minimizes the mean over the images of CE(f((1 - m) x + m p), t) plus lambda times the L1 norm of m, with Adam.
    Finished rows leave the batch: a zero gradient would not stop Adam, whose momentum keeps moving them.

    Args:
        logits: differentiable (N, C, H, W) to float32 (N, K); its weights must not require gradients.
        x: clean images (N, C, H, W) in [0, 1].
        targets: int64 (R,), the class that each row aims at.
        start: masks (R, 1, H, W) and patterns (R, C, H, W) in [0, 1] to begin with.
        batches: int64 (steps * updates, B), from `schedule_batches`.
        rule: length and lambda.
        limit: images per forward pass at most; more rows than fit are searched one block after the other.
        tick: called after every update with (done, total) updates over all blocks; may raise to stop the search.

    Raises:
        ValueError: start or batches do not fit the rows, the images or the schedule.
    """
    masks, patterns = start
    if masks.shape != (len(targets), 1, *x.shape[2:]) or patterns.shape != (len(targets), *x.shape[1:]):
        raise ValueError(f"{len(targets)} rows need as many masks and patterns, got {masks.shape}, {patterns.shape}")
    if len(batches) != rule.steps * rule.updates:
        raise ValueError(f"expected {rule.steps * rule.updates} batches, got {len(batches)}")
    rows = max(1, limit // batches.shape[1])
    blocks = -(-len(targets) // rows)
    parts = []
    for block in range(blocks):
        cut = slice(block * rows, (block + 1) * rows)

        def beat(done: int, begun: int = block) -> None:
            if tick is not None:
                tick(begun * len(batches) + done, blocks * len(batches))

        parts.append(_search(logits, x, targets[cut], masks[cut], patterns[cut], batches, rule, beat))
    return Inversion(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _search(
    logits: Logits,
    x: Tensor,
    targets: Tensor,
    mask: Tensor,
    pattern: Tensor,
    batches: Tensor,
    rule: Schedule,
    beat: Callable[[int], None],
) -> Inversion:
    """Search one block of rows; see `invert`."""
    device = x.device
    targets = targets.to(device)
    batches = batches.to(device)
    # Leaves of the search: mask and pattern in front of the tanh, then Adam's two moments of each.
    free = [_unsquash(mask.to(x)), _unsquash(pattern.to(x))]
    first, second = [torch.zeros_like(v) for v in free], [torch.zeros_like(v) for v in free]
    penalty = Penalty(rule, len(targets), device)
    alive = torch.arange(len(targets), device=device)
    answer = Inversion(
        mask=squash(free[0]),
        pattern=squash(free[1]),
        works=torch.zeros(len(targets), dtype=torch.bool, device=device),
        penalty=penalty.value.clone(),
        steps=torch.full_like(alive, rule.steps),
    )
    size = batches.shape[1]
    hits, norms = penalty.value.new_zeros(2, len(targets)).unbind()
    middle = answer.mask, answer.pattern
    for number, chosen in enumerate(batches, start=1):
        leaves = [v.requires_grad_() for v in free]
        m, p = squash(leaves[0]), squash(leaves[1])
        if (number - 1) % rule.updates == rule.updates // 2:
            middle = m.detach(), p.detach()
        goal = targets[alive].repeat_interleave(size)
        out = logits(stamp(x[chosen], m, p).flatten(0, 1))
        norm = m.sum(dim=(1, 2, 3))
        # A sum over rows, not a mean: every row then has the gradient of a search of its own.
        loss = F.cross_entropy(out, goal, reduction="sum") / size + (penalty.value * norm).sum()
        grads = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            hits += (out.argmax(1) == goal).view(len(alive), size).float().mean(1)
            norms += norm
            free = [
                adam_step(v.detach(), g, a, b, number, rule)
                for v, g, a, b in zip(free, grads, first, second, strict=True)
            ]
        beat(number)
        if number % rule.updates:
            continue
        better = penalty.step(hits / rule.updates, norms / rule.updates)
        won = alive[better]
        # The step's averages are about the patch in its middle. At its end, where the official code takes it, a mask
        # that lambda is pushing below the edge of success no longer works.
        answer.mask[won], answer.pattern[won] = middle[0][better], middle[1][better]
        answer.works[won] = True
        answer.penalty[alive] = penalty.value
        # Asks the device once per step, never per update.
        if bool(penalty.done.any()):
            left = ~penalty.done
            answer.steps[alive[penalty.done]] = number // rule.updates
            alive = alive[left]
            free, first, second = ([v[left] for v in group] for group in (free, first, second))
            penalty.keep(left)
            if len(alive) == 0:
                break
        hits, norms = penalty.value.new_zeros(2, len(alive)).unbind()
    fallen = alive[~answer.works[alive]]
    lost = ~answer.works[alive]
    answer.mask[fallen], answer.pattern[fallen] = squash(free[0][lost]), squash(free[1][lost])
    return answer


def squash(free: Tensor) -> Tensor:
    """Any real number into (0, 1)."""
    return free.tanh() / (2.0 + MARGIN) + 0.5


def _unsquash(value: Tensor) -> Tensor:
    """The number that `squash` takes to a value in [0, 1]; 0 and 1 themselves go to large finite numbers."""
    return ((value.clamp(MARGIN, 1.0 - MARGIN) - 0.5) * (2.0 + MARGIN)).clamp(-1 + MARGIN, 1 - MARGIN).atanh()


def adam_step(value: Tensor, grad: Tensor, first: Tensor, second: Tensor, number: int, rule: Schedule) -> Tensor:
    """One Adam update, number 1, 2, ...; the moments change in place. Written out so that rows can leave."""
    early, late = rule.betas
    first.mul_(early).add_(grad, alpha=1 - early)
    second.mul_(late).addcmul_(grad, grad, value=1 - late)
    scale = second.div(1 - late**number).sqrt_().add_(1e-8)
    return value - rule.rate * (first / (1 - early**number)) / scale
