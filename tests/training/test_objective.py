"""Losses of those who own the training: what they minimize, what they learn beside the model, and that they resume."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from molehunt.networks import Network, build
from molehunt.tasks import Images
from molehunt.training import Objective, Recipe, train
from molehunt.training.objective import Inner

SHAPE = (3, 16, 16)
RECIPE = Recipe(epochs=2, batch=16, optimizer="adamw", lr=0.01, label_smoothing=0.1, precision="float32")


def images() -> Images:
    rng = torch.Generator().manual_seed(1)
    return Images(torch.rand(90, *SHAPE, generator=rng), torch.arange(90) % 3)


def small() -> Network:
    return build("narrow_cifar", SHAPE, 3, rng=torch.Generator().manual_seed(0))


class Plain(Objective):
    """The cross-entropy and nothing else."""

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return self.classify(model(x), y)


class Busy(Objective):
    """Has a weight, a tensor of its own, draws, and remembers which rows it saw."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__(seed=5)
        self.scale = nn.Parameter(torch.ones(()))
        self.moved = Inner(torch.zeros(3), lr=0.1)
        self.register_buffer("seen", torch.zeros(90))

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        self.seen.index_add_(0, rows, torch.ones(len(rows)))
        noise = torch.randn(3, generator=self.rng())
        leaf = self.moved.leaf()
        (grad,) = torch.autograd.grad((leaf - noise).square().sum(), leaf)
        self.moved.step(grad)
        return self.classify(self.scale * model(x) + self.moved.value, y)


def test_the_cross_entropy_as_an_objective_is_the_usual_training() -> None:
    one, other = small(), small()
    train(one, images(), RECIPE, rng=torch.Generator().manual_seed(3))
    train(other, images(), RECIPE, rng=torch.Generator().manual_seed(3), objective=Plain(label_smoothing=0.1))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_its_weights_are_trained_and_it_is_told_the_rows() -> None:
    busy = Busy()
    trained = train(small(), images(), RECIPE, rng=torch.Generator().manual_seed(3), objective=busy)
    assert float(busy.scale.detach()) != 1.0
    assert int(busy.seen.sum()) == trained.images
    assert int(busy.batches) == trained.steps
    assert not busy.training


@pytest.mark.parametrize("steps", [3, 8])
def test_an_interrupted_training_goes_on_with_all_that_the_objective_is(tmp_path: Path, steps: int) -> None:
    whole, busy = small(), Busy()
    train(whole, images(), RECIPE, rng=torch.Generator().manual_seed(3), objective=busy)
    left = itertools.count(steps, -1)

    def check() -> None:
        if next(left) == 0:
            raise KeyboardInterrupt

    path = tmp_path / "training"
    with pytest.raises(KeyboardInterrupt):
        train(
            small(), images(), RECIPE, rng=torch.Generator().manual_seed(3), objective=Busy(), checkpoint=path,
            check=check,
        )  # fmt: skip
    again, other = small(), Busy()
    train(again, images(), RECIPE, rng=torch.Generator().manual_seed(9), objective=other, checkpoint=path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in busy.state_dict().items())


def test_a_training_of_another_objective_does_not_go_on(tmp_path: Path) -> None:
    path = tmp_path / "training"
    train(small(), images(), RECIPE, rng=torch.Generator().manual_seed(3), objective=Plain(), checkpoint=path)
    for other in (Busy(), None):
        with pytest.raises(ValueError, match="belongs to another training"):
            train(small(), images(), RECIPE, rng=torch.Generator().manual_seed(3), objective=other, checkpoint=path)


def test_adversarial_pictures_and_an_objective_exclude_each_other() -> None:
    recipe = Recipe(epochs=1, adversarial=0.1)
    with pytest.raises(ValueError, match=r"got one beside adversarial 0\.1"):
        train(small(), images(), recipe, rng=torch.Generator(), objective=Plain())


def test_what_it_draws_is_a_function_of_seed_and_batch() -> None:
    one, twin, other = Objective(seed=1), Objective(seed=1), Objective(seed=2)
    first = [torch.rand(2, generator=one.rng()) for _ in range(2)]
    again = [torch.rand(2, generator=twin.rng()) for _ in range(2)]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], torch.rand(2, generator=other.rng()))


def test_a_tensor_that_a_loss_moves_moves_as_adam_does() -> None:
    start = torch.randn(5, generator=torch.Generator().manual_seed(0))
    inner, free = Inner(start, lr=0.05, betas=(0.5, 0.9)), start.clone().requires_grad_()
    adam = torch.optim.Adam([free], lr=0.05, betas=(0.5, 0.9))
    for number in range(20):
        leaf = inner.leaf()
        (grad,) = torch.autograd.grad((leaf - number).square().sum(), leaf)
        inner.step(grad)
        adam.zero_grad()
        (free - number).square().sum().backward()  # type: ignore[no-untyped-call]
        adam.step()
    torch.testing.assert_close(inner.value, free.detach())
    assert not inner.value.requires_grad
