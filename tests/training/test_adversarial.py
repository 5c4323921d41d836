"""One signed gradient step: it stays in bounds and makes the loss larger."""

import pytest
import torch
from torch import Tensor, nn

from molehunt.networks import build
from molehunt.tasks import Images
from molehunt.training import Recipe, train
from molehunt.training.adversarial import random_start, worsen


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [0.01, 0.3, 1.0])
def test_within_bounds(size: float) -> None:
    x = torch.rand(6, 3, 8, 8, generator=generator())
    start = random_start(x, size, generator(1))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    moved = worsen(lambda z: model(z).logsumexp(1).sum(), start, x, size)
    for images in (start, moved):
        assert float((images - x).abs().max()) <= size + 1e-6
        assert float(images.min()) >= 0
        assert float(images.max()) <= 1
    assert not moved.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_step_goes_up() -> None:
    weight = torch.randn(3, 8, 8, generator=generator())
    x = torch.full((4, 3, 8, 8), 0.5)
    moved = worsen(lambda z: (z * weight).sum(), x, x, 0.1)
    torch.testing.assert_close(moved, x + 0.1 * weight.sign())


def test_a_network_trained_so_is_harder_to_fool() -> None:
    """A strong sign that is right nine times in ten, and many weak ones that a small step turns around."""
    rng = generator(3)
    y = torch.arange(200) % 2
    side = (2.0 * y - 1).view(-1, 1, 1, 1)
    wrong = (torch.arange(200) % 20 < 2).view(-1, 1, 1, 1)
    x = 0.5 + 0.02 * side + 0.05 * torch.randn(200, 1, 16, 16, generator=rng)
    x[:, :, :4] = (0.5 + 0.3 * torch.where(wrong, -side, side)).expand(-1, -1, 4, 16)
    images = Images(x.clamp(0, 1), y)
    x = images.x
    losses = {}
    for size in (0.0, 0.05):
        model = build("lenet5", (1, 16, 16), 2, rng=generator(0))
        recipe = Recipe(epochs=8, batch=20, optimizer="adamw", lr=2e-3, adversarial=size, precision="float32")
        train(model, images, recipe, rng=generator(1))

        def loss(z: Tensor, model: nn.Module = model) -> Tensor:
            return nn.functional.cross_entropy(model(z), y)

        losses[size] = float(loss(worsen(loss, x, x, 0.05)).detach())
    assert losses[0.05] < 0.7 * losses[0.0]


def test_a_size_outside_the_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adversarial is out of range: 1\.5"):
        Recipe(adversarial=1.5)
