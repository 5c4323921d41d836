"""Gradient shaping: train with clipped and noisy gradients of single samples, so that few of them cannot push far."""

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from molehunt.defenses._accountant import epsilon
from molehunt.defenses._fresh import fresh, trainable
from molehunt.defenses._held_out import split
from molehunt.defenses._per_sample import CHUNK, PerSample, clipped_sum, per_sample, verify
from molehunt.defenses._sample_log import Log
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.networks import Dropout, Whitening, dropout_rng
from molehunt.suspect import Access, Suspect, freeze
from molehunt.tasks import Images
from molehunt.training import Recipe
from molehunt.training.augmentation import crop
from molehunt.training.batches import Order
from molehunt.training.trainer import noise_generator

Mode = Literal["retrain", "fine_tune"]
PROBE = 2048  # samples whose norms settle the clip norm


@dataclass(frozen=True, kw_only=True)
class GradientShaping:
    """Train a network with gradients that are clipped per sample, and noise on their sum.

    Score: none; this is a repair. `repaired` is a state dict of the suspect's network. `sample_scores` (N,), of
    retraining alone, are robust z-scores within a class of how much larger a sample's gradient was than that of other
    samples in the first epochs: 0 is the middle of its class, larger is likelier to be poisoned.

    Mode "retrain" draws new weights for the suspect's network and trains them on the submitted training set. Where
    only clean images are granted it does as "fine_tune", and a warning says so. Mode "fine_tune" goes on from the
    submitted weights, on the clean images where they are granted (a share of them is held out to measure accuracy),
    else on the submitted training set. Clean images never train in mode "retrain"; they only measure.

    Batch norm gives samples no gradients of their own, so it is frozen, in eval mode: fine-tuning keeps the suspect's
    statistics; retraining takes those of the new weights on the training set, once, before the first step. Scale and
    shift are trained. A whitening layer is computed from the training set and not trained, as in every recipe.

    `details` hold the settings as they came out: `clip`, the clip norm, `sigma` and `noise_std`, the standard deviation
    sigma * clip of the noise on the sum, and `lr`; one entry per epoch in `epochs`, with the median norm, the share of
    samples that were clipped and the mean loss; `accuracy` before and after, overall and `per_class` (K,), on
    clean images that trained nothing, NaN-free: a class without images is None; `epsilon`, None with a reason in
    `epsilon_reason` where no honest number exists; and `warnings`.

    Attributes:
        mode: "retrain" or "fine_tune".
        clip: the clip norm C, positive; None takes it from the data: the `quantile` of the norms of up to 2048 samples
            at the first weights, times `factor`. A large number clips nothing.
        quantile: of the norms, in (0, 1); the median, for poisons may have norms far above all others.
        factor: positive.
        sigma: noise multiplier: the noise on the sum of gradients has the standard deviation sigma * C. 0 adds none.
        batch: samples per step, in expectation; the sum is always divided by it.
        steps: at most so many steps, 1 or more.
        epochs: at most so many passes over the data, positive, but one step at least: the more often a poison comes
            by, the less it matters that each of its visits is clipped.
        lr: highest learning rate; it falls to 0 along a cosine.
        warmup: share of the steps over which the learning rate rises to `lr`, in [0, 1].
        momentum: of stochastic gradient descent, in [0, 1).
        shift: largest shift in pixels where the task's images are augmented.
        poisson: every sample enters a batch on its own with probability batch / N; else shuffled passes.
        delta: at which epsilon is told, in (0, 1).
        log_epochs: epochs over which norms are collected for `sample_scores`; 0 for no scores.
        held_out: share of the clean images that measure accuracy while the others fine-tune, in (0, 1).
        chunk: samples that go through the network together: less memory, the same answer.

    Raises:
        ValueError: a setting out of range, too few images, or a layer without gradients per sample; it is named.
        FloatingPointError: training diverged, or a picture is not finite.

    Reference:
        Hong, Chandrasekaran, Kaya, Dumitras, Papernot, "On the Effectiveness of Mitigating Data Poisoning Attacks
        with Gradient Shaping", 2020; the norms as in Bu, Mao, Xu, "Scalable and Efficient Training of Large
        Convolutional Neural Networks with Differential Privacy", NeurIPS 2022.

    Departures from the paper:
        The clip norm is a quantile of the norms, not a number that fits one model. The noise is told as a multiple of
        the clip norm; the paper's code adds noise of one size whatever the clip norm. Convolutional networks, of any
        number of classes, a budget of steps, a learning rate that falls, and augmentation as the task allows.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.TRAINING}), frozenset({Access.CLEAN}))
    mode: Mode = "retrain"
    clip: float | None = None
    quantile: float = 0.5
    factor: float = 1.0
    sigma: float = 0.1
    batch: int = 256
    steps: int = 400
    epochs: float = 15.0
    lr: float = 0.2
    warmup: float = 0.1
    momentum: float = 0.9
    shift: int = 1
    poisson: bool = False
    delta: float = 1e-5
    log_epochs: int = 5
    held_out: float = 0.2
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        ranges = {
            "mode": self.mode in get_args(Mode),
            "clip": self.clip is None or 0 < self.clip < math.inf,
            "quantile": 0 < self.quantile < 1,
            "factor": 0 < self.factor < math.inf,
            "sigma": 0 <= self.sigma < math.inf,
            "batch": self.batch >= 1,
            "steps": self.steps >= 1,
            "epochs": 0 < self.epochs < math.inf,
            "lr": 0 <= self.lr < math.inf,
            "warmup": 0 <= self.warmup <= 1,
            "momentum": 0 <= self.momentum < 1,
            "shift": self.shift >= 0,
            "delta": 0 < self.delta < 1,
            "log_epochs": self.log_epochs >= 0,
            "held_out": 0 < self.held_out < 1,
            "chunk": self.chunk >= 1,
        }
        for name, fine in ranges.items():
            if not fine:
                raise ValueError(f"{name} is out of range: {getattr(self, name)!r}; see GradientShaping")

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Train a copy of the suspect's network; see the class."""
        warnings: list[str] = []
        again = self.mode == "retrain" and suspect.training is not None
        if self.mode == "retrain" and not again:
            warnings.append("no training set is granted: fine-tuned on clean images instead of retraining")
        images, held, source = self.images(suspect, again, run.rng)
        if len(images.y) < 2:
            raise ValueError(f"gradient shaping needs 2 images or more to train on, got {len(images.y)}")
        run.check()
        model = self.begin(suspect, images, run) if again else copy.deepcopy(suspect.model)
        trainable(model)
        verify(model, images.x[:2])
        clip, first = self.choose_clip(model, images, run)
        for layer in model.modules():
            layer.training = isinstance(layer, Dropout)
        log = Log(len(images.y), min(self.batch, len(images.y)), self.log_epochs, images.y.device)
        self.train(model, images, clip, log, suspect, run)
        freeze(model)
        spent, reason = self.privacy(model, len(images.y), source)
        details: dict[str, Any] = {
            "mode": "retrain" if again else "fine_tune",
            "data": source,
            "images": {"train": len(images.y), "measure": 0 if held is None else len(held.y)},
            "clip": clip,
            "first_norms": first,
            "sigma": self.sigma,
            "noise_std": self.sigma * clip,
            "lr": self.lr,
            "steps": self.budget(len(images.y)),
            "epochs": log.epochs(),
            "epsilon": spent,
            "epsilon_reason": reason,
            "delta": self.delta,
            "warnings": warnings,
        }
        if held is not None:
            before, after = (class_accuracy(m, held, suspect.classes) for m in (suspect.model, model))
            details["accuracy"] = {"before": before, "after": after}
        return Finding(
            defense="gradient_shaping",
            sample_scores=log.scores(images.y) if again and self.log_epochs else None,
            repaired={key: value.detach().cpu() for key, value in model.state_dict().items()},
            details=details,
        )

    def begin(self, suspect: Suspect, images: Images, run: Run) -> nn.Module:
        """The network with new weights.

        Raises:
            ValueError: it has weights that nobody here knows how to draw.
        """
        try:
            return fresh(suspect.model, images, run, suspect.task)
        except ValueError as error:
            raise ValueError(f"{error}: use mode 'fine_tune'") from error

    def images(self, suspect: Suspect, again: bool, rng: torch.Generator) -> tuple[Images, Images | None, str]:
        """What is trained on, the clean images that measure (None without any), and where the former come from."""
        clean = suspect.clean if suspect.clean is not None and len(suspect.clean.y) else None
        if again or clean is None:
            assert suspect.training is not None, "else the runner would have abstained"
            return suspect.training, clean, "training"
        tune, held = split(clean, self.held_out, rng)
        return tune, held, "clean"

    def budget(self, count: int) -> int:
        """Steps on so many images."""
        return max(1, min(self.steps, round(self.epochs * count / min(self.batch, count))))

    def choose_clip(self, model: nn.Module, images: Images, run: Run) -> tuple[float, list[float]]:
        """The clip norm, and the quartiles of the norms at the first weights.

        Raises:
            ValueError: the quantile of the norms is 0.
        """
        rows = torch.randperm(len(images.y), generator=run.rng)[:PROBE].to(images.y.device)
        norms = []
        for part in torch.split(rows, self.chunk):
            run.check()
            norms.append(per_sample(model, images.x[part], images.y[part], chunk=self.chunk).norms.double())
        known = torch.cat(norms)
        clip = float(known.quantile(self.quantile)) * self.factor if self.clip is None else self.clip
        if not clip > 0:
            raise ValueError(f"the {self.quantile} quantile of the gradient norms is 0: name a clip norm")
        return clip, [float(known.quantile(q)) for q in (0.25, 0.5, 0.75)]

    def train(self, model: nn.Module, images: Images, clip: float, log: Log, suspect: Suspect, run: Run) -> None:
        """Make all steps, in place."""
        count = len(images.y)
        batch, steps = min(self.batch, count), self.budget(count)
        order = Order(count, batch, run.rng)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)
        rates = Recipe(lr=self.lr, warmup=self.warmup, schedule="cosine")
        device = images.x.device
        # One generator for nothing but the noise: what else is drawn must not depend on whether there is noise.
        noise = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=run.rng)))
        with dropout_rng(model, noise_generator(run.rng, device)):
            for step in range(steps):
                run.check()
                run.report(step, steps)
                if self.poisson:
                    rows = (torch.rand(count, generator=run.rng) < batch / count).nonzero().squeeze(1)
                else:
                    rows, _ = order.next()
                x = self.augment(images.x[rows.to(device)], suspect, run.rng)
                rows = rows.to(device)
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * rates.rate(step, steps)
                known = shaped_gradient(
                    model,
                    x,
                    images.y[rows],
                    clip=clip,
                    sigma=self.sigma,
                    expected=batch,
                    noise=noise,
                    chunk=self.chunk,
                )
                optimizer.step()
                log.add(rows, known, clip)
        optimizer.zero_grad(set_to_none=True)
        run.report(steps, steps)

    def augment(self, x: Tensor, suspect: Suspect, rng: torch.Generator) -> Tensor:
        """Shift and mirror images as the task allows: every image enters a batch once, whatever it looks like."""
        if suspect.task.augment == "none" or len(x) == 0:
            return x
        reach = min(self.shift, x.shape[2] - 1, x.shape[3] - 1)
        down, right = torch.randint(-reach, reach + 1, (2, len(x)), generator=rng).to(x.device)
        mirror = torch.randint(2, (len(x),), generator=rng).bool().to(x.device)
        return crop(x, down, right, mirror if suspect.task.augment == "flip_crop" else None)

    def privacy(self, model: nn.Module, count: int, source: str) -> tuple[float | None, str]:
        """Epsilon of the training, or None and the reason why no number is told."""
        if self.sigma == 0:
            return None, "without noise there is no privacy: epsilon is infinite"
        if not self.poisson:
            return None, "the accountant holds for Poisson sampling, and the batches were shuffled: set poisson"
        if self.clip is None:
            return None, "the clip norm was taken from the data, which no accountant has counted: name one"
        if source == "training" and self.mode == "fine_tune":
            return None, "the submitted weights were made from the same images"
        if self.mode == "retrain" and any(isinstance(m, _BatchNorm | Whitening) for m in model.modules()):
            return None, "batch norm statistics or a whitening layer were computed from the data without noise"
        try:
            spent = epsilon(self.sigma, min(self.batch, count) / count, self.budget(count), self.delta)
        except ImportError as error:
            return None, str(error)
        return (spent, "") if math.isfinite(spent) else (None, "epsilon is too large for a number")


def shaped_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    clip: float,
    sigma: float,
    expected: int,
    noise: torch.Generator,
    chunk: int = CHUNK,
) -> PerSample:
    """Set the `grad` of every trainable parameter to (sum of clipped gradients + noise) / expected batch.

    Args:
        model: as in `per_sample`.
        x: (B, C, H, W); B may differ from the expected batch, and may be 0.
        y: int64 (B,).
        clip: the clip norm C.
        sigma: noise multiplier; every coordinate of the sum gets normal noise of standard deviation sigma * C.
        expected: what the noisy sum is divided by, 1 or more.
        noise: generator on the device of the parameters; drawn from only if sigma is positive.
        chunk: samples that go through the network together.

    Returns:
        Norms before clipping, and losses.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    # Some layers refuse an empty batch, which Poisson sampling may draw; the noise is added all the same.
    known = clipped_sum(model, x, y, clip, chunk=chunk) if len(x) else PerSample(x.new_zeros(0), x.new_zeros(0))
    for p in parameters:
        assert p.grad is not None
        if sigma > 0:
            p.grad.add_(torch.randn(p.shape, generator=noise, device=p.device, dtype=p.dtype), alpha=sigma * clip)
        p.grad.div_(expected)
    return known


@torch.no_grad()
def class_accuracy(model: nn.Module, images: Images, classes: int) -> dict[str, Any]:
    """Accuracy of a model in [0, 1]: `overall`, and `per_class` a list of K, None for a class without images."""
    right = torch.cat(
        [model(x).argmax(1) == y for x, y in zip(torch.split(images.x, 500), torch.split(images.y, 500), strict=True)]
    )
    rows: list[float | None] = []
    for label in range(classes):
        mine = right[images.y == label]
        rows.append(float(mine.double().mean()) if len(mine) else None)
    return {"overall": float(right.double().mean()), "per_class": rows}
