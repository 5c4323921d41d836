"""Any module becomes one from pictures in [0, 1] to logits, or is refused in words."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from molehunt.foreign import ForeignError, adapted, pixels
from molehunt.networks import Adapted, Network, anatomy, build, tail
from molehunt.tasks import Task

TASK = Task(
    name="toy", shape=(1, 8, 8), classes=("a", "b", "c"), augment="none", network="lenet5", mean=(0.5,), std=(0.25,)
)
COLOR = replace(TASK, shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)


class Calling(nn.Module):
    """A module whose forward is a test's."""

    def __init__(self, forward: Callable[[nn.Linear, Tensor], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)
        self.call = forward

    def forward(self, x: Tensor) -> object:
        return self.call(self.layer, x)


def small(channels: int = 1, classes: int = 3, side: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * side * side, classes)
    )


def x(task: Task = TASK) -> Tensor:
    return torch.rand(5, *task.shape, generator=torch.Generator().manual_seed(3))


def test_the_module_sees_what_it_wants_and_is_left_alone() -> None:
    module = small().double().train()
    before = copy.deepcopy(module.state_dict())
    whole, notes = adapted(module, TASK, name="mine", pixels=pixels("signed", TASK))
    assert (whole.name, notes, whole.training) == ("mine", (), False)
    with torch.no_grad():
        assert torch.allclose(whole(x()), copy.deepcopy(module).float()(2 * x() - 1), atol=1e-5)
    assert module.training
    assert all(torch.equal(before[k], v) and v.dtype == torch.float64 for k, v in module.state_dict().items())


def test_size_and_channels_are_made_to_fit() -> None:
    module = small(channels=3, side=16)
    whole, notes = adapted(module, TASK, name="mine", size=(16, 16), channels=3)
    large = nn.functional.interpolate(x().expand(-1, 3, -1, -1), (16, 16), mode="bilinear")
    with torch.no_grad():
        assert torch.allclose(whole(x()), module(large), atol=1e-5)
    assert notes == (
        "Pictures of 8 x 8 are resized to 16 x 16 for the network.",
        "Gray pictures are repeated in three channels.",
    )
    gray, said = adapted(small(), COLOR, name="mine", channels=1)
    white, red = torch.ones(1, 3, 8, 8), torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(gray(red), gray(white * 0.299), atol=1e-5)
    assert said == ("Pictures are turned to gray.",)
    with pytest.raises(ValueError, match="cannot be turned into 2"):
        adapted(small(channels=2), COLOR, name="mine", channels=2)


def test_probabilities_become_logits() -> None:
    module = small()
    whole, notes = adapted(nn.Sequential(module, nn.Softmax(1)), TASK, name="mine")
    with torch.no_grad():
        assert torch.allclose(whole(x()), module(x()).log_softmax(1), atol=1e-4)
    assert "probabilities" in notes[0]
    assert adapted(nn.Sequential(module, nn.LogSoftmax(1)), TASK, name="mine")[1] == ()


def test_a_network_of_ours_stays_one_and_takes_the_normalization() -> None:
    network = build("lenet5", (1, 12, 12), 3, mean=(0.3,), rng=torch.Generator().manual_seed(0))
    task = replace(TASK, shape=(1, 12, 12))
    kept, _ = adapted(network, task, name="mine")
    assert isinstance(kept, Network)
    assert kept.normalize.mean.item() == pytest.approx(0.3)
    changed, _ = adapted(network, task, name="mine", pixels=pixels("bytes", task))
    assert isinstance(changed, Network)
    with torch.no_grad():
        assert torch.equal(changed.normalize(x(task)), x(task) / changed.normalize.std)
    assert changed.normalize.std.item() == pytest.approx(1 / 255)


def test_a_network_of_ours_behind_other_layers_still_says_where_its_parts_are() -> None:
    network = build("vit_tiny", (3, 16, 16), 3, rng=torch.Generator().manual_seed(0))
    whole, _ = adapted(network, TASK, name="mine", pixels=pixels("signed", TASK), size=(16, 16), channels=3)
    assert isinstance(whole, Adapted)
    parts = anatomy(whole, x())
    assert (parts.block, parts.head) == ("model.trunk", "model.head")
    with torch.no_grad():
        block = whole.model.trunk(2 * whole_input(whole) - 1)  # type: ignore[operator]
        assert torch.allclose(tail(whole, parts.block, block, x()), whole(x()), atol=1e-4)


def whole_input(whole: Adapted) -> Tensor:
    large: Tensor = nn.functional.interpolate(x().expand(-1, 3, -1, -1), whole.size, mode="bilinear")
    return large


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda layer, x: (layer(x.flatten(1)), None), "answers with a tuple, expected a tensor of logits"),
        (lambda layer, x: {"logits": layer(x.flatten(1))}, "answers with a dict"),
        (lambda layer, x: layer(x.flatten(1))[:, :2], r"shape \(4, 2\), expected \(4, 3\)"),
        (lambda layer, x: layer(x), r"does not take pictures of shape \(1, 8, 8\): RuntimeError: mat1.*--size"),
        (lambda layer, x: layer(x.flatten(1)) / 0, "not finite"),
        (lambda layer, x: layer(x.detach().flatten(1)), "no gradient comes back"),
        (lambda layer, x: layer(torch.dropout(x.flatten(1), 0.5, train=True)), "differently each time"),
    ],
)
def test_what_no_defense_could_work_with_is_refused(forward: Callable[[nn.Linear, Tensor], object], says: str) -> None:
    with pytest.raises(ForeignError, match=says):
        adapted(Calling(forward), TASK, name="mine")


def test_what_torch_wraps_around_a_module_is_taken_off() -> None:
    module = small()
    whole, _ = adapted(nn.DataParallel(module), TASK, name="mine")
    assert isinstance(whole, Adapted)
    assert set(whole.model.state_dict()) == set(module.state_dict())


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    module = small()
    module.lock = (i for i in range(3))  # type: ignore[assignment]  # generators cannot be copied
    with pytest.raises(ForeignError, match="cannot be copied"):
        adapted(module, TASK, name="mine")
