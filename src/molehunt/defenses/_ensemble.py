"""Networks that were trained on noisy copies, or on parts, of one training set, and their votes."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from molehunt.defenses._fresh import recipe_of_fresh, redraw, trainable
from molehunt.engine import Run
from molehunt.suspect import BATCH, Suspect, freeze, prepare
from molehunt.tasks import Images
from molehunt.training import train


def noise(shape: tuple[int, ...], kind: str, size: float, rng: torch.Generator) -> Tensor:
    """Noise on the CPU: normal with the standard deviation `size`, or uniform in [-size, size]."""
    if kind == "gaussian":
        return size * torch.randn(shape, generator=rng)
    return size * (2.0 * torch.rand(shape, generator=rng) - 1.0)


def parts(x: Tensor, count: int) -> Tensor:
    """Which of `count` parts each picture (N, C, H, W) belongs to, int64 (N,), by a hash of its pixels alone.

    No label, no row and no other picture has a say: so a picture that is added, removed or relabeled changes one part.
    """
    levels = (255.0 * x.cpu()).round().to(torch.uint8).contiguous()
    digests = [hashlib.sha256(picture.numpy().tobytes()).digest() for picture in levels]
    return torch.tensor([int.from_bytes(digest[:8], "big") % count for digest in digests])


def seed_of(state: Mapping[str, Tensor]) -> int:
    """A number that a network's weights determine, whatever file, order or device they come from."""
    sha = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(sha.digest()[:7], "big")


def member(suspect: Suspect, images: Images, steps: int, batch: int, run: Run) -> nn.Module:
    """Train a fresh network of the suspect's architecture on some images, which may leave [0, 1]; frozen.

    It has the recipe that the package trains such a network with, but for its length.

    Raises:
        ValueError: the network has layers whose weights cannot be drawn afresh, or there are no images.
        FloatingPointError: its loss is not finite.
    """
    model = redraw(suspect.model, run.rng, suspect.task).to(suspect.device)
    trainable(model)
    size = min(batch, len(images.y))
    recipe = replace(
        recipe_of_fresh(suspect.model, suspect.task), epochs=1 / 2**20, least_images=steps * size, batch=size
    )
    if suspect.dtype == torch.float32:
        recipe = replace(recipe, precision="float32")
    train(model, images, recipe, rng=run.rng, check=run.check, device=suspect.device)
    return freeze(model)


@torch.no_grad()
def answers(model: nn.Module, suspect: Suspect, x: Tensor, shift: Tensor | None) -> Tensor:
    """Predicted classes int64 (N,), on the CPU, of pictures to which one and the same noise (C, H, W) is added."""
    fast = prepare(model, suspect.device, suspect.dtype)
    said = []
    for part in torch.split(x, BATCH):
        part = part.to(suspect.device)
        with suspect.autocast():
            logits = fast(part if shift is None else part + shift.to(part))
        said.append(logits.argmax(1).cpu())
    return torch.cat(said) if said else torch.zeros(0, dtype=torch.int64)
