"""What a defense may see: a model and the evidence that the round grants. There is no field for the truth."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor, nn

from molehunt.findings import Candidate
from molehunt.metas import Meta
from molehunt.networks import Anatomy, anatomy, capture, default_device, fast_dtype, features, fold_batch_norm
from molehunt.tasks import Images, Task

BATCH = 500  # larger batches fall out of the cache and are slower (docs/reference/networks.md)


class Access(StrEnum):
    """Evidence beyond the weights, which every defense sees."""

    CLEAN = "clean"
    TRAINING = "training"
    INPUTS = "inputs"
    CANDIDATES = "candidates"
    REFERENCES = "references"
    METAS = "metas"


def freeze(model: nn.Module) -> nn.Module:
    """Put a module into eval mode without gradients on its weights, in place, and hand it back."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return model


def prepare(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Make the fast copy of a frozen model: folded batch norm, channels-last, matrix weights in `dtype`.

    Only weights of convolutions and linear layers change their dtype; norms and statistics stay float32. The copy is
    meant to run under `autocast(dtype)`.
    """
    fast: nn.Module = freeze(fold_batch_norm(freeze(copy.deepcopy(model)))).to(device)
    fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from the stubs
    for module in fast.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)
        # Who looks at what a layer puts out must not find it overwritten by the activation that follows.
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # a plain attribute of activations
    return fast


@dataclass(frozen=True, kw_only=True, eq=False)
class Suspect:
    """A model under suspicion and the evidence granted; what is not granted is None.

    Make one with `Suspect.of`.

    Attributes:
        model: the network as submitted: float32, eval mode, frozen; (N, C, H, W) in [0, 1] to logits (N, K).
        frozen: its fast copy, used by `logits`, `forward` and `features`.
        task: what it was trained for.
        clean: clean labeled images.
        training: the submitted training set, merged and shuffled.
        inputs: (M, C, H, W) a stream of unlabeled inputs, some of them possibly stamped.
        candidates: recovered triggers from other defenses; empty when they found none.
        references: clean networks that the defender has trained, frozen like `model`.
        metas: meta-classifiers that were trained on a population of clean and backdoored networks of the suspect's
            architecture, frozen, on the CPU.
        device: where `frozen` and the evidence are.
        dtype: number format of the matrix work in `frozen`.
    """

    model: nn.Module
    frozen: nn.Module
    task: Task
    clean: Images | None
    training: Images | None
    inputs: Tensor | None
    candidates: tuple[Candidate, ...] | None
    references: tuple[nn.Module, ...] | None
    metas: tuple[Meta, ...] | None
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        model: nn.Module,
        task: Task,
        *,
        clean: Images | None = None,
        training: Images | None = None,
        inputs: Tensor | None = None,
        candidates: tuple[Candidate, ...] | None = None,
        references: tuple[nn.Module, ...] | None = None,
        metas: tuple[Meta, ...] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Suspect":
        """Freeze a model, make its fast copy and bring the evidence to the device.

        Args:
            model: any module from images in [0, 1] to logits; it is copied, never changed.
            task: what it was trained for.
            clean: clean labeled images, if granted.
            training: the submitted training set, if granted.
            inputs: unlabeled inputs, if granted.
            candidates: recovered triggers, if granted.
            references: clean networks, if granted; they are copied too.
            metas: trained meta-classifiers, if granted; they are copied too.
            device: where to work; a GPU when there is one, else the CPU.
            dtype: number format of the matrix work; the fastest that the device has, else float32.

        Raises:
            ValueError: images of another shape than the task's, or outside [0, 1].
        """
        place = torch.device(device or default_device())
        kind = dtype or fast_dtype(place)
        for name, x in (
            ("clean", clean and clean.x),
            ("training", training and training.x),
            ("inputs", inputs),
        ):
            if x is None:
                continue
            if tuple(x.shape[1:]) != task.shape:
                raise ValueError(f"{name}: expected images (N, {task.shape}), got {tuple(x.shape)}")
            if len(x) and not (float(x.min()) >= 0.0 and float(x.max()) <= 1.0):
                raise ValueError(f"{name}: pixels must lie in [0, 1], got [{float(x.min())}, {float(x.max())}]")
        return cls(
            model=freeze(copy.deepcopy(model)).to(place),
            frozen=prepare(model, place, kind),
            task=task,
            clean=clean and Images(clean.x.to(place), clean.y.to(place)),
            training=training and Images(training.x.to(place), training.y.to(place)),
            inputs=None if inputs is None else inputs.to(place),
            candidates=candidates,
            # Else a defense that runs one in training mode would change its statistics for all that come after.
            references=None if references is None else tuple(freeze(copy.deepcopy(m)).to(place) for m in references),
            metas=None if metas is None else tuple(_frozen(meta) for meta in metas),
            device=place,
            dtype=kind,
        )

    @property
    def grants(self) -> frozenset[Access]:
        """The evidence that is there."""
        return frozenset(access for access in Access if getattr(self, access.value) is not None)

    @property
    def classes(self) -> int:
        """K, the number of classes."""
        return self.task.num_classes

    @cached_property
    def anatomy(self) -> Anatomy:
        """Layers, last convolutional block and head of `frozen`, by name (equal in `model` where nothing folds)."""
        example = torch.zeros(1, *self.task.shape, device=self.device)
        with torch.no_grad(), self.autocast():
            return anatomy(self.frozen, example)

    def autocast(self) -> AbstractContextManager[object]:
        """The number format of the matrix work, as a context."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) in float32 of images (N, C, H, W), differentiable with respect to the images; one batch."""
        with self.autocast():
            logits: Tensor = self.frozen(x.contiguous(memory_format=torch.channels_last))
        return logits.float()

    @torch.no_grad()
    def logits(self, x: Tensor, batch: int = BATCH) -> Tensor:
        """Logits (N, K) in float32 of images (N, C, H, W), without gradients, in batches."""
        if len(x) == 0:
            return x.new_zeros(0, self.classes)
        return torch.cat([self.forward(part) for part in _batches(x, batch, self.device)])

    @torch.no_grad()
    def features(self, x: Tensor, batch: int = BATCH) -> Tensor:
        """Penultimate features (N, D) in float32: what enters the last linear layer."""
        rows = []
        for part in _batches(x, batch, self.device):
            with self.autocast():
                rows.append(features(self.frozen, self.anatomy.head, part)[1].float())
        return torch.cat(rows)

    @torch.no_grad()
    def block(self, x: Tensor, batch: int = BATCH) -> Iterator[Tensor]:
        """Output (B, C, h, w) in float32 of the last convolutional block, batch by batch: too large to keep."""
        for part in _batches(x, batch, self.device):
            with self.autocast():
                yield capture(self.frozen, self.anatomy.block, part).float()


def _frozen(meta: Meta) -> Meta:
    copied = copy.deepcopy(meta)
    freeze(copied)
    return copied


def _batches(x: Tensor, size: int, device: torch.device) -> Iterator[Tensor]:
    """Slices of the images, on the device, channels-last."""
    for start in range(0, len(x), size):
        yield x[start : start + size].to(device).contiguous(memory_format=torch.channels_last)
