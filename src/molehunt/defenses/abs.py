"""ABS: stimulate every channel of a network, and turn those that flip all images to one class into triggers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from molehunt.defenses._filters import Filters, mix, similarity, surroundings
from molehunt.defenses._held_out import turns
from molehunt.defenses._inversion import Schedule, schedule_batches, stamp
from molehunt.defenses._maximization import Aim, Kind, Patches, harden, maximize
from molehunt.defenses._reasr import Held, Trial, hold, judge, same_class, suspicion
from molehunt.defenses._stimulation import (
    Channel,
    Layer,
    channels_at_once,
    elevations,
    hidden_layers,
    largest,
    passes,
    shortlist,
    stimulate,
    suspicious,
)
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images
from molehunt.triggers import Patch


class Row(NamedTuple):
    """One trigger that was searched: kind, channel, what it does, how suspicious that is, and the trigger itself."""

    kind: str
    channel: Channel
    trial: Trial
    suspicion: float
    patch: Patch | None
    matrix: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ABS:
    """Stimulate every channel, and reverse-engineer a trigger for those that flip nearly all images to one class.

    Score: the largest suspicion of any trigger, in [0, 1 + 1/H) with H held-out images; higher is more suspicious, 0
    where no channel is a candidate. A trigger's suspicion is its REASR, the share of held-out images of other classes
    that it sends to the channel's class, less, for patches, the share that a real image of that class sends there
    through the same mask (at least 0), plus a part below 1/H that breaks ties: the squashed mean lead of the target's
    logit. The paper flags REASR above 0.8; compare with clean reference models instead.

    Class scores: the largest suspicion of the triggers for every class, 0 where no candidate aims at it.

    The trigger is the most suspicious *patch*, with `target`, also on a clean model; None if none sends a single
    held-out image anywhere. A filter has no declarative form: where one is the most suspicious of all,
    `details["best"]` says so and `details["filter"]` is its matrix (C, 4 C) over [pixel, max, min, mean].

    Details: `stimulated`, channels per layer; `compromised`, how many were candidates before the shortlist; `best`, the
    most suspicious trigger; `candidates`, the best one of every shortlisted channel and kind as {kind, layer, channel,
    target, value, reasr, baseline, margin, images, suspicion}; `stimulation`, of the channel of `best`: its `levels`
    and at each the `logits` (n, K), means over the stimulated images of other classes than its target; `warnings`.

    Attributes:
        seeds: images that are stimulated, drawn class by class in turn; more than twice `spare`.
        spare: of them, how many may disagree about the class that a channel lifts.
        levels: multiples of the layer's largest activation that a channel is set to, ascending, the first 0.
        top_n: candidates that triggers are searched for, at most.
        per_layer: of one layer among the first half of them.
        size: share of the pixels that a patch may cover, in (0, 1).
        steps: Adam steps of a search.
        restarts: patches searched per candidate, from different starts.
        images: of every step.
        pool: clean images that searches draw from, at most.
        look: share of the steps after which hopeless searches end, in (0, 1].
        keep: share of them that goes on, in (0, 1].
        rate: Adam's learning rate for masks and patterns.
        filters: also search filters.
        filter_rate: Adam's learning rate for filters.
        likeness: smallest mean structural similarity of filtered pictures to the images, in [-1, 1].
        logit: weight of the cross-entropy with the target class beside the channel's activation; 0 is the paper's.
        held: images that measure REASR, at most.
        limit: pictures per forward pass at most in searches; four times as many in stimulation.

    Raises:
        ValueError: a setting out of its range, or too few clean images.

    Reference:
        Liu, Lee, Tao, Ma, Aafer, Zhang, "ABS: Scanning Neural Networks for Back-doors by Artificial Brain Stimulation",
        CCS 2019.

    Departures from the paper:
        Images for stimulation, search and REASR are disjoint. Activations are means in units of the layer's largest,
        and the penalty of a mask that is too large is what the best pixel without room is worth, instead of 500 and
        1000, so that one setting fits all layers. Few steps at twice the rate, several starts per candidate, most of
        which end early. Masks are binary when they are judged. A filter whose pictures fall below `likeness` does not
        count. A same-class baseline is subtracted, after the remark of EX-RAY that natural features flip labels too.
        Images that the network sends to the class anyway are no success. Images of the class itself vote for a channel
        but do not set its value; those that disagree are left out of it.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)

    seeds: int = 10
    spare: int = 2
    levels: tuple[float, ...] = (0.0, 1.6, 3.2, 4.8, 6.4)
    top_n: int = 20
    per_layer: int = 3
    size: float = 0.06
    steps: int = 100
    restarts: int = 3
    images: int = 8
    pool: int = 40
    look: float = 0.3
    keep: float = 0.2
    rate: float = 0.2
    filters: bool = True
    filter_rate: float = 0.01
    likeness: float = 0.5
    logit: float = 0.0
    held: int = 200
    limit: int = 500

    def __post_init__(self) -> None:
        for name in ("seeds", "top_n", "per_layer", "steps", "restarts", "images", "pool", "held", "limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= 2 * self.spare < self.seeds:
            raise ValueError(f"more than half of {self.seeds} seeds must agree, so spare cannot be {self.spare}")
        rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if len(self.levels) < 2 or self.levels[0] != 0 or not rising or not math.isfinite(self.levels[-1]):
            raise ValueError(f"levels must be two or more rising numbers that begin with 0, got {self.levels}")
        if not 0 < self.size < 1:
            raise ValueError(f"size must lie in (0, 1), got {self.size}")
        for name in ("look", "keep"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        for name in ("rate", "filter_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not -1 <= self.likeness <= 1:
            raise ValueError(f"likeness must lie in [-1, 1], got {self.likeness}")
        if not 0 <= self.logit < math.inf:
            raise ValueError(f"logit must not be negative, got {self.logit}")

    @classmethod
    def official(cls) -> "ABS":
        """The authors' published settings for CIFAR-10, as far as they have a counterpart here."""
        return cls(steps=1000, restarts=1, look=1.0, rate=0.1, filter_rate=2e-3)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Stimulate the suspect and search triggers; see the class."""
        if suspect.clean is None or len(suspect.clean.y) < 3 * self.seeds:
            count = 0 if suspect.clean is None else len(suspect.clean.y)
            raise ValueError(f"ABS needs {3 * self.seeds} clean images or more for {self.seeds} seeds, got {count}")
        run.check()
        seeds, pool, rest = self.split(suspect.clean, run.rng)
        layers = hidden_layers(suspect.anatomy)
        at_once = channels_at_once(self.levels, len(seeds.y), 4 * self.limit)
        kinds = 2 if self.filters else 1
        done, total = 0, passes(layers, at_once) + kinds * self.steps

        def tick() -> None:
            nonlocal done
            run.check()
            done += 1
            run.report(done, total)

        with suspect.autocast():
            lifted = elevations(suspect.frozen, layers, seeds.x, self.levels, limit=4 * self.limit, tick=tick)
            tops = largest(suspect.frozen, layers, seeds.x)
        compromised = [c for path in layers for c in suspicious(path, lifted[path], seeds.y, self.spare)]
        chosen = shortlist(compromised, self.top_n, self.per_layer)
        rows: list[Row] = []
        if chosen:
            work = Work(suspect, tops, pool, hold(suspect, rest), run, tick)
            rows += self._patches(work, chosen)
            if self.filters:
                rows += self._filters(work, chosen)
        finding = self._answer(suspect, {path: len(a) for path, a in lifted.items()}, len(compromised), rows)
        if (best := finding.details["best"]) is None:
            return finding
        layer = best["layer"]
        curve = self._curve(suspect, layers[layer], tops[layer], seeds, best)
        return replace(finding, details={**finding.details, "stimulation": curve})

    def _curve(self, suspect: Suspect, layer: Layer, top: float, seeds: Images, best: dict[str, Any]) -> dict[str, Any]:
        """What stimulating the reported channel does to the logits; see the class."""
        channel, values = torch.tensor([best["channel"]]), torch.tensor(self.levels) * top
        with suspect.autocast():
            logits = stimulate([("", suspect.frozen)], seeds.x, best["layer"], layer, channel, values)[0]
        others = (seeds.y != best["target"]).to(logits.device)
        return {"levels": list(self.levels), "logits": logits[:, others].mean(1).cpu()}

    def split(self, clean: Images, rng: torch.Generator) -> tuple[Images, Images, Images]:
        """Images to stimulate, to search with and to measure REASR on: disjoint, every class in turn.

        Half of every class at least is left to measure on: a class that has no image there cannot be judged.
        """
        order = torch.randperm(len(clean.y), generator=rng)
        y = clean.y.cpu()[order]
        turn = turns(y)
        first = turn.argsort(stable=True)
        order, y, turn = order[first], y[first], turn[first]
        used = (turn < (torch.bincount(y)[y] + 1) // 2).nonzero().flatten()[: self.seeds + self.pool]
        left = torch.ones(len(order), dtype=torch.bool)
        left[used] = False
        cuts = (used[: self.seeds], used[self.seeds :], left.nonzero().flatten()[: self.held])
        seeds, search, held = (
            Images(clean.x[rows], clean.y[rows]) for rows in (order[cut].to(clean.y.device) for cut in cuts)
        )
        return seeds, search, held

    def _patches(self, work: "Work", chosen: list[Channel]) -> list[Row]:
        """Search patches for all candidates and starts together, and judge them."""
        aims = [channel for channel in chosen for _ in range(self.restarts)]
        size = max(1, round(self.size * work.pool.x[0, 0].numel()))
        start = Patches.start(work.pool.x, size, len(aims), work.run.rng)

        def tried(kind: Kind, row: slice, own: Held, target: int) -> Trial:
            assert isinstance(kind, Patches)
            mask = harden(kind.mask[row], size)
            natural = same_class(own, target, mask[0])
            return judge(work.suspect, own, target, stamp(own.x, mask, kind.pattern[row])[0], natural)

        found = self._search(work, aims, start, self.rate, tried)
        assert isinstance(found, Patches)
        rows = []
        for channel, mask, pattern in zip(aims, harden(found.mask, size), found.pattern, strict=True):
            work.run.check()
            patch = Patch(mask=mask.cpu(), pattern=pattern.cpu())
            natural = same_class(work.held, channel.target, mask)
            trial = judge(work.suspect, work.held, channel.target, patch(work.held.x), natural)
            rows.append(Row("patch", channel, trial, suspicion(trial, work.held), patch, None))
        return rows

    def _filters(self, work: "Work", chosen: list[Channel]) -> list[Row]:
        """Search filters for all candidates together, and judge them."""

        def tried(matrix: Tensor, bases: Tensor, own: Held, target: int) -> Trial:
            filtered = mix(matrix[None], bases)
            trial = judge(work.suspect, own, target, filtered[0])
            if float(similarity(filtered, own.x).mean()) < self.likeness:
                return Trial(0.0, 0.0, -math.inf, trial.images)
            return trial

        def on_pool(kind: Kind, row: slice, own: Held, target: int) -> Trial:
            assert isinstance(kind, Filters)
            return tried(kind.matrix[row][0], kind.bases, own, target)

        start = Filters.start(work.pool.x, self.likeness, len(chosen))
        found = self._search(work, chosen, start, self.filter_rate, on_pool)
        assert isinstance(found, Filters)
        bases = surroundings(work.held.x)
        rows = []
        for channel, matrix in zip(chosen, found.matrix, strict=True):
            work.run.check()
            trial = tried(matrix, bases, work.held, channel.target)
            rows.append(Row("filter", channel, trial, suspicion(trial, work.held), None, matrix.cpu()))
        return rows

    def _search(
        self,
        work: "Work",
        aims: Sequence[Channel],
        start: Kind,
        rate: float,
        tried: Callable[[Kind, slice, Held, int], Trial],
    ) -> Kind:
        """Search one kind of trigger; rows that do worst on the pool's own images, judged as at the end, end early."""
        suspect, device = work.suspect, work.suspect.device
        aim = Aim(
            layers=tuple(c.layer for c in aims),
            channels=torch.tensor([c.channel for c in aims], device=device),
            targets=torch.tensor([c.target for c in aims], device=device),
            scales=torch.tensor([work.tops[c.layer] for c in aims], device=device),
        )
        own = hold(suspect, work.pool)

        def best(kind: Kind, now: Aim) -> Tensor:
            worth = []
            for row, target in enumerate(now.targets.tolist()):
                work.run.check()
                worth.append(suspicion(tried(kind, slice(row, row + 1), own, target), own))
            order = torch.tensor(worth, dtype=torch.float64).argsort(descending=True, stable=True)
            return order[: math.ceil(self.keep * len(worth))].sort().values.to(device)

        rule = Schedule(steps=self.steps, updates=1, batch=self.images, rate=rate, betas=(0.9, 0.999))
        batches = schedule_batches(len(work.pool.y), rule, work.run.rng).to(device)
        drop = (math.ceil(self.look * self.steps), best) if self.look < 1 and self.keep < 1 else None
        layers, limit = hidden_layers(suspect.anatomy), self.limit
        return maximize(
            suspect.forward, layers, aim, start, batches, rule, logit=self.logit, limit=limit, drop=drop, tick=work.tick
        )

    def _answer(self, suspect: Suspect, stimulated: dict[str, int], compromised: int, rows: list[Row]) -> Finding:
        """Make the finding."""
        ranked = sorted(rows, key=lambda row: -row.suspicion)
        class_scores = torch.zeros(suspect.classes, dtype=torch.float64)
        best: dict[tuple[str, Channel], Row] = {}
        for row in ranked:
            class_scores[row.channel.target] = max(float(class_scores[row.channel.target]), row.suspicion)
            best.setdefault((row.kind, row.channel), row)
        patch = next((row for row in ranked if row.patch is not None and row.trial.reasr > 0), None)
        details: dict[str, Any] = {
            "stimulated": stimulated,
            "compromised": compromised,
            "candidates": [_told(row) for row in best.values()],
            "best": _told(ranked[0]) if ranked else None,
            "warnings": _warnings(rows, suspect.task.classes),
        }
        if ranked and ranked[0].matrix is not None:
            details["filter"] = ranked[0].matrix
        return Finding(
            defense="abs",
            score=ranked[0].suspicion if ranked else 0.0,
            class_scores=class_scores,
            trigger=patch.patch if patch else None,
            target=patch.channel.target if patch else None,
            details=details,
        )


class Work(NamedTuple):
    """What searches share: the suspect, the largest activation per layer, images, and whom to tell."""

    suspect: Suspect
    tops: dict[str, float]
    pool: Images
    held: Held
    run: Run
    tick: Callable[[], None]


def _warnings(rows: Sequence[Row], names: tuple[str, ...]) -> list[str]:
    """What a reader of the score must know."""
    if not rows:
        return ["no channel lifts one class on nearly all images: no trigger was searched"]
    blind = sorted({row.channel.target for row in rows if row.trial.images == 0})
    return [f"no image of another class than {names[k]} was left to measure on: not judged" for k in blind]


def _told(row: Row) -> dict[str, Any]:
    """A row as JSON values."""
    return {
        "kind": row.kind,
        **row.channel._asdict(),
        **{name: value for name, value in row.trial._asdict().items() if math.isfinite(value)},
        "suspicion": row.suspicion,
    }
