"""Pruning-based detection: how well a network does without some of its filters, as a fingerprint of what it learned."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from molehunt.defenses._held_out import turns
from molehunt.defenses._pruning import RANKINGS, Mode, Ranking, Sampling, chosen, filters, pruned
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import BATCH, Access, Suspect
from molehunt.tasks import Images


@dataclass(frozen=True, kw_only=True)
class PruningDetection:
    """Prune the suspect in many slightly different ways and see how much clean accuracy each way costs.

    Score: with `weights`, what the regression makes of the accuracies, higher is more suspicious; it is fitted to the
    labels 0 (clean) and 1 (backdoored), so 0.5 is in between, and it may leave [0, 1]. Without `weights` it is the
    coefficient of variation of the accuracies, standard deviation over mean, cut at 1: how much it matters *which*
    filters are gone. That backdoored networks have more of it was seen on the develop part of the model bank, and is
    no law: without a regression the score counts as much as a calibration says.

    `details` hold `accuracies` (S,), shares in [0, 1] that the copies get right; `accuracy`, that of the network as it
    is; `images`, how many; and `layers`, by path how many filters each copy loses.

    Attributes:
        mode: "reset" (filters and the norm behind them become 0), "remove" (cut out, with everything tied to them) or
            "trim" (weights clamped to half a standard deviation around their mean).
        sampling: which filters of a layer: "targeted", "uniform" or "random"; see `_pruning.chosen`.
        ranking: what orders the filters: "l1", "l2", "linf" or "std" of their weights.
        copies: S, pruned copies.
        share: of the filters of every layer that a copy loses, in [0, 1]; None is 1 / S, and 2 / S for "trim", in
            thousandths, rounded up.
        images: at most so many clean images, every class alike as far as they go.
        weights: intercept and S coefficients of a regression (`_regression.fit`) on populations of known models.

    Raises:
        ValueError: a setting out of range, no clean image, or a network without a convolution.

    Reference:
        Bajcsy, Majurski, "Baseline Pruning-Based Approach to Trojan Detection in Neural Networks", ICLR 2021 workshop
        on Security and Safety in Machine Learning Systems.

    Departures from the paper:
        A batch norm loses the channels of the convolution before it, not channels of its own ranking; one that follows
        anywhere else than in the same `nn.Sequential` is not found, and goes on adding its shift. At least one
        filter of every layer is pruned, and windows go from end to end however few filters a layer has. "linf" is the
        largest absolute value. 200 images, not 10. The regression is a ridge regression, judged by nested
        cross-validation. The file check is left out: a submission holds a listed network, or it is refused.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)
    mode: Mode = "reset"
    sampling: Sampling = "targeted"
    ranking: Ranking = "l1"
    copies: int = 15
    share: float | None = None
    images: int = 200
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("mode", self.mode, get_args(Mode)),
            ("sampling", self.sampling, get_args(Sampling)),
            ("ranking", self.ranking, tuple(RANKINGS)),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if self.copies < 2 or self.images < 1:
            raise ValueError(f"copies must be 2 or more and images 1 or more, got {self.copies} and {self.images}")
        if self.share is not None and not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share must lie in [0, 1], got {self.share}")
        if self.weights is not None and len(self.weights) != self.copies + 1:
            raise ValueError(
                f"a regression on {self.copies} copies has {self.copies + 1} weights, got {len(self.weights)}"
            )

    @property
    def fraction(self) -> float:
        """Share of the filters that every copy loses, in [0, 1]."""
        if self.share is not None:
            return self.share
        return min(1.0, (2 if self.mode == "trim" else 1) * math.ceil(1000 / self.copies) / 1000)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Measure the pruned copies; see the class."""
        if suspect.clean is None or len(suspect.clean.y) == 0:
            raise ValueError("pruning-based detection needs clean images to measure accuracy on")
        images = self.pick(suspect.clean, run.rng)
        lost = {
            path: chosen(layer.weight, self.copies, self.fraction, self.ranking, self.sampling, run.rng)
            for path in filters(suspect.model)
            if isinstance(layer := suspect.model.get_submodule(path), nn.Conv2d)
        }
        if not lost:
            raise ValueError("the network has no convolution whose filters could be pruned")
        right = reset_accuracies if self.mode == "reset" else self._copies
        accuracies = right(suspect, lost, images, run)
        return Finding(
            defense="pruning_detection",
            score=self.judge(accuracies),
            details={
                "accuracies": accuracies,
                "accuracy": float((suspect.logits(images.x).argmax(1) == images.y).double().mean()),
                "images": len(images.y),
                "layers": {path: int(rows[0].sum()) for path, rows in lost.items()},
            },
        )

    def judge(self, accuracies: Tensor) -> float:
        """Turn the accuracies (S,) of the copies into the score; see the class."""
        if self.weights is not None:
            return self.weights[0] + math.fsum(w * float(a) for w, a in zip(self.weights[1:], accuracies, strict=True))
        mean, deviation = float(accuracies.mean()), float(accuracies.std(correction=0))
        return min(1.0, deviation / mean) if mean > 0 else 1.0

    def pick(self, clean: Images, rng: torch.Generator) -> Images:
        """Draw the images to measure on, in turns through the classes."""
        order = torch.randperm(len(clean.y), generator=rng)
        turn = turns(clean.y.cpu()[order])
        rows = order[torch.argsort(turn, stable=True)][: self.images].to(clean.y.device)
        return Images(clean.x[rows], clean.y[rows])

    def _copies(self, suspect: Suspect, lost: dict[str, Tensor], images: Images, run: Run) -> Tensor:
        """Accuracies (S,) of copies that are made one by one: their weights or shapes differ."""
        found = []
        for s in range(self.copies):
            run.check()
            model = pruned(suspect.model, {path: rows[s] for path, rows in lost.items()}, self.mode, images.x[:1])
            made = Suspect.of(model, suspect.task, device=suspect.device, dtype=suspect.dtype)
            found.append(float((made.logits(images.x).argmax(1) == images.y).double().mean()))
            run.report(s + 1, self.copies)
        return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def reset_accuracies(suspect: Suspect, lost: dict[str, Tensor], images: Images, run: Run) -> Tensor:
    """Accuracies (S,) of all copies with reset filters at once: what is reset puts out 0, so outputs are masked.

    Args:
        suspect: the model; its fast copy runs.
        lost: bool (S, C) by path of the convolution.
        images: to measure on.
        run: for its clock.
    """
    copies = len(next(iter(lost.values())))
    right = torch.zeros(copies, dtype=torch.float64)
    parts = torch.split(torch.arange(len(images.y)), max(1, BATCH // copies))
    for done, rows in enumerate(parts):
        run.check()
        x = images.x[rows.to(images.x.device)].repeat_interleave(copies, 0)
        with masking(suspect, lost, len(rows)):
            said = suspect.logits(x, len(x)).argmax(1).view(len(rows), copies).cpu()
        right += (said == images.y[rows.to(images.y.device)].cpu().unsqueeze(1)).sum(0)
        run.report(done + 1, len(parts))
    return right / len(images.y)


@contextmanager
def masking(suspect: Suspect, lost: dict[str, Tensor], images: int) -> Iterator[None]:
    """Let the filters of copy s put out 0 in rows s, s + S, ... of a batch of S copies of so many images."""
    handles = []
    for path, norm in filters(suspect.model).items():
        kept = (~lost[path]).to(suspect.device).repeat(images, 1)[:, :, None, None]

        # Behind the norm, which is folded into the convolution or still there: it would make a constant of a 0.
        def mask(_module: nn.Module, _inputs: object, output: Tensor, kept: Tensor = kept) -> Tensor:
            return output * kept.to(output.dtype)

        handles.append(suspect.frozen.get_submodule(norm or path).register_forward_hook(mask))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
