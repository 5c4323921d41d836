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


def digests(x: Tensor, salt: bytes) -> list[bytes]:
    """SHA-256 of each picture (N, C, H, W) with a salt, by its pixels at eight bits."""
    levels = (255.0 * x.cpu()).round().to(torch.uint8).contiguous()
    return [hashlib.sha256(salt + picture.numpy().tobytes()).digest() for picture in levels]


def parts(images: Images, count: int, salt: bytes) -> list[Tensor]:
    """Rows of each of `count` parts of a set, by a salted hash of the pixels alone.

    No label, no place and no other picture has a say in which part a picture is in; and within a part the order is that
    of the hashes, then of the labels. So a part is the same, to the bit, whatever happens to the others. Whoever does
    not know the salt cannot choose the part of a picture.
    """
    known = digests(images.x, salt)
    rows: list[list[int]] = [[] for _ in range(count)]
    for row in sorted(range(len(known)), key=lambda i: (known[i], int(images.y[i]))):
        rows[int.from_bytes(known[row][:8], "big") % count].append(row)
    return [torch.tensor(one, dtype=torch.int64) for one in rows]


def seed_of(state: Mapping[str, Tensor]) -> int:
    """A number that a network's weights determine, whatever file, order or device they come from."""
    sha = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(sha.digest()[:7], "big")


def member(
    suspect: Suspect, images: Images, steps: int, batch: int, run: Run, rng: torch.Generator | None = None
) -> nn.Module:
    """Train a fresh network of the suspect's architecture on some images, which may leave [0, 1]; frozen.

    It has the recipe that the package trains such a network with, but for its length. `rng` draws its weights and the
    order of its images; by default the run's.

    Raises:
        ValueError: the network has layers whose weights cannot be drawn afresh, or there are no images.
        FloatingPointError: its loss is not finite.
    """
    rng = rng or run.rng
    model = redraw(suspect.model, rng, suspect.task).to(suspect.device)
    trainable(model)
    size = min(batch, len(images.y))
    recipe = replace(
        recipe_of_fresh(suspect.model, suspect.task), epochs=1 / 2**20, least_images=steps * size, batch=size
    )
    if suspect.dtype == torch.float32:
        recipe = replace(recipe, precision="float32")
    train(model, images, recipe, rng=rng, check=run.check, device=suspect.device)
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
