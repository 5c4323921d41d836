"""Gradients of single samples: their exact norms and their clipped sum, without holding one gradient per sample.

A batch costs one forward pass and two backward passes. The first brings the gradients b of what every layer puts out;
with what the layer was given, a, they determine the norm of every sample's gradient. The second takes the gradient of
the losses weighted by the clipping coefficients, which is the clipped sum.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from molehunt.defenses._parameter_squares import LAYERS, NORMS, Call, Use, square
from molehunt.networks import Dropout

CHUNK = 256  # samples that go through the network together
TINY = 1e-6  # added to a norm that is divided by, as everybody does


class PerSample(NamedTuple):
    """What is known about each sample of a batch.

    Attributes:
        norms: (B,), the Euclidean norm of the gradient of its loss over all trainable parameters together.
        losses: (B,), its cross-entropy in nats.
    """

    norms: Tensor
    losses: Tensor


def per_sample(model: nn.Module, x: Tensor, y: Tensor, *, chunk: int = CHUNK) -> PerSample:
    """Norm of the gradient and loss of every sample; no gradient is left on the model.

    Args:
        model: (B, C, H, W) to logits (B, K); no batch norm in training mode.
        x: (B, C, H, W).
        y: int64 (B,).
        chunk: samples that go through the network together; the answer does not depend on it.

    Raises:
        ValueError: a layer has no gradient per sample; the message names it.
        FloatingPointError: a loss or a norm is not finite.
    """
    parts = [_measured(model, *part, chunk)[0] for part in _parts(x, y, chunk)]
    return PerSample(torch.cat([p.norms for p in parts]), torch.cat([p.losses for p in parts]))


def clipped_sum(model: nn.Module, x: Tensor, y: Tensor, clip: float, *, chunk: int = CHUNK) -> PerSample:
    """Add the sum of the clipped gradients to the `grad` of every trainable parameter.

    The gradient g of a sample counts c g with c = min(1, clip / (norm + 1e-6)), its norm taken over all parameters
    together. The coefficients are constants: nothing flows back through them.

    Args:
        model: as in `per_sample`.
        x: (B, C, H, W).
        y: int64 (B,).
        clip: largest norm C of one sample's gradient, positive; infinity clips nothing.
        chunk: as in `per_sample`.

    Returns:
        Norms before clipping, and losses.

    Raises:
        ValueError: as in `per_sample`, or the clip norm is not positive.
        FloatingPointError: as in `per_sample`; the gradients of the chunks before are then already added.
    """
    if not clip > 0:
        raise ValueError(f"the clip norm must be positive, got {clip}")
    parts = []
    for part in _parts(x, y, chunk):
        measured, losses = _measured(model, *part, chunk)
        c = coefficients(measured.norms, clip)
        (c * losses).sum().backward()  # type: ignore[no-untyped-call]
        parts.append(measured)
    return PerSample(torch.cat([p.norms for p in parts]), torch.cat([p.losses for p in parts]))


def coefficients(norms: Tensor, clip: float) -> Tensor:
    """Clipping coefficients (B,) in (0, 1] for norms (B,); 1 where the norm is 0."""
    return (clip / (norms.detach() + TINY)).clamp(max=1.0)


def verify(model: nn.Module, x: Tensor) -> None:
    """Compare norms with those of gradients taken one sample at a time, so that no odd network goes unnoticed.

    A weight that is used beside its layer (`F.linear(x, layer.weight)`), a hook that changes an output or a layer that
    lets samples see each other would otherwise give wrong norms silently. Dropout must be off.

    Args:
        model: as in `per_sample`.
        x: (B, C, H, W), two samples or more.

    Raises:
        ValueError: they differ, or a layer has no gradient per sample.
    """
    with torch.no_grad():
        logits = model(x)
        # A wrong label: where a network is sure of the right one, the gradient is rounding error and says nothing.
        y = (logits.argmax(1) + 1) % logits.shape[1]
    found = per_sample(model, x, y).norms.double()
    trainable = [p for p in model.parameters() if p.requires_grad]
    for row in range(len(x)):
        loss = F.cross_entropy(model(x[row : row + 1]), y[row : row + 1])
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
        expected = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
        if abs(float(found[row]) - expected) > 1e-3 * expected + 1e-6:
            raise ValueError(
                f"the gradient norm of a single sample is {expected:.6g} alone and {float(found[row]):.6g} in a batch: "
                "a weight is used outside its layer, a hook changes an output, or samples see each other"
            )


# ----------------------------------------------------------------------------------------------------- two passes


def _parts(x: Tensor, y: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of a batch."""
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}")
    yield from zip(torch.split(x, chunk), torch.split(y, chunk), strict=True)


def _measured(model: nn.Module, x: Tensor, y: Tensor, chunk: int) -> tuple[PerSample, Tensor]:
    """The forward pass and the first backward pass: what is known about the samples, and losses with their graph."""
    _refuse_mixing(model)
    with _recorded(model, len(x)) as calls:
        logits = model(x)
    losses = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, y, reduction="none")
    named = {p: name for name, p in model.named_parameters() if p.requires_grad}
    calls = [call for call in calls if any(p.requires_grad for p in call.layer.parameters(recurse=False))]
    seen = {p for call in calls for p in call.layer.parameters(recurse=False)}
    others = [p for p in named if p not in seen]
    if not named:
        raise ValueError("no parameter of the model takes gradients; call model.requires_grad_(True) first")
    wanted: list[Any] = [*(call.edge for call in calls), *others]
    # Only gradients of outputs are asked for, so no weight gradient is computed in this pass.
    answers = torch.autograd.grad(losses.sum(), wanted, retain_graph=True, allow_unused=True)
    uses: dict[Tensor, list[Use]] = {}
    for call, b in zip(calls, answers, strict=False):
        for name, parameter in call.layer.named_parameters(recurse=False):
            if b is not None and parameter.requires_grad:
                uses.setdefault(parameter, []).append(Use(call, name, b))
    with torch.no_grad():
        squares = losses.new_zeros(len(x))
        for same in uses.values():
            squares += square(same)
    # What no layer above owns; a parameter without a gradient here did not run.
    left = [named[p] for p, b in zip(others, answers[len(calls) :], strict=True) if b is not None]
    if left:
        squares = squares + _general(model, left, x, y, chunk)
    norms = squares.clamp(min=0).sqrt()
    bad = ~(norms.isfinite() & losses.detach().isfinite())
    if bool(bad.any()):
        raise FloatingPointError(
            f"{int(bad.sum())} of {len(x)} samples have a loss or gradient that is not finite; "
            "lower the learning rate, or look at the pictures"
        )
    return PerSample(norms, losses.detach()), losses


def _refuse_mixing(model: nn.Module) -> None:
    for path, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            raise ValueError(
                f"batch norm {path!r} takes its statistics from the batch, so a sample has no gradient of its own: "
                "put it into eval mode with running statistics"
            )


def _owned(layer: nn.Module) -> bool:
    """Whether a layer does what its kind does; a subclass may compute something else."""
    for kind in (*LAYERS, *NORMS):
        if isinstance(layer, kind):
            same = all(getattr(type(layer), f, None) is getattr(kind, f, None) for f in ("forward", "_conv_forward"))
            return same and {"weight", "bias"} >= layer._parameters.keys() and "weight" in layer._parameters
    return False


@contextmanager
def _recorded(model: nn.Module, batch: int) -> Iterator[list[Call]]:
    """Collect the calls of all layers whose gradients are put together here, while the context is open."""
    calls: list[Call] = []

    def watch(path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            x = inputs[0] if inputs else named["input"]
            least = 4 if isinstance(layer, nn.Conv2d) else 2
            if x.dim() < least or len(x) != batch:
                raise ValueError(
                    f"layer {path!r} was given a tensor {tuple(x.shape)} for {batch} samples; "
                    "the first of its dimensions must be the samples"
                )
            if output.requires_grad:
                # The edge, not the tensor: a rectifier in place turns the tensor into its own output.
                calls.append(Call(path, layer, x.detach(), get_gradient_edge(output)))

        return hook

    # First of all hooks, for another one may replace the output.
    handles = [
        layer.register_forward_hook(watch(path), prepend=True, with_kwargs=True)
        for path, layer in model.named_modules()
        if _owned(layer)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _general(model: nn.Module, names: Sequence[str], x: Tensor, y: Tensor, chunk: int) -> Tensor:
    """Squared norms (B,) of the gradients of any parameters, by running the network once more sample by sample."""
    for path, layer in model.named_modules():
        if isinstance(layer, Dropout | _DropoutNd) and layer.training and layer.p > 0:
            raise ValueError(
                f"{', '.join(names)} need a second pass, in which dropout {path!r} would draw anew: turn it off"
            )
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    chosen = {name: parameters.pop(name) for name in names}
    fixed = {**parameters, **dict(model.named_buffers())}

    def loss(some: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, {**fixed, **some}, (image.unsqueeze(0),))
        return F.cross_entropy(logits, label.unsqueeze(0))

    def squared(image: Tensor, label: Tensor) -> Tensor:
        gradients = grad(loss)(chosen, image, label)
        return torch.stack([g.square().sum() for g in gradients.values()]).sum()

    try:
        found: Tensor = vmap(squared, chunk_size=min(chunk, 64))(x, y)
    except RuntimeError as error:
        raise ValueError(f"no per-sample gradients for {', '.join(names)}: {error}") from error
    return found.detach()
