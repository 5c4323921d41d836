import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.defenses import _parameter_squares, _per_sample
from molehunt.defenses._per_sample import clipped_sum, coefficients, per_sample, verify
from molehunt.networks import Dropout, Whitening, build, dropout_rng

# Even kernels are meant: only they are padded on one side more than on the other.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
SHAPE = (3, 8, 8)
CLASSES = 4


class Residual(nn.Module):
    """Adds in place and rectifies in place, as public networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        out = self.second(x)
        out += x
        return self.relu(out)  # type: ignore[no-any-return]


class Twice(nn.Module):
    """Calls one module twice, and once on a map of another size."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(torch.tanh(self.inner(x)))
        return torch.cat((x.flatten(1), self.inner(x[..., :3, :]).flatten(1)), 1)


class Tied(nn.Module):
    """Two layers with one weight, of different groups if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, stride=2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.a(x).flatten(1), self.b(x).flatten(1)), 1)


class TiedGroups(nn.Module):
    """Two layers with one weight and different groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(2, 6, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x, x[:, :1].square()), 1)
        return self.a(x).flatten(1) + self.b(x[:, 1:3]).flatten(1)  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """Pixels as tokens; a linear layer and a layer norm over (B, T, D), and weights of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside, self.norm, self.out = nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 2)
        self.scale = nn.Parameter(torch.ones(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale * x.flatten(2).mT
        return self.out(self.norm(self.inside(x))).flatten(1)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Uses the weight of a linear layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x[:, :, ::2, ::2].flatten(2).mT)
        return self.attention(x, x, x)[0].flatten(1)  # type: ignore[no-any-return]


class Standardized(nn.Conv2d):
    """A convolution that computes something else than its kind."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Named(nn.Module):
    """Calls its layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(input=x.flatten(1))
        return out


def conv(inputs: int = 3, outputs: int = 6, size: int = 3, **settings: object) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, **settings)  # type: ignore[arg-type]


def masking() -> nn.Module:
    layer = conv()
    layer.register_forward_hook(lambda _m, _i, output: output * (torch.arange(6) % 2).view(6, 1, 1))
    return layer


KINDS: dict[str, Callable[[], nn.Module]] = {
    "plain": conv,
    "stride": lambda: conv(stride=2),
    "strides, sizes": lambda: nn.Conv2d(3, 5, (2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1)),
    "padding": lambda: conv(padding=1),
    "same padding": lambda: conv(size=4, padding="same"),
    "reflected": lambda: conv(padding=2, padding_mode="reflect"),
    "circular": lambda: conv(padding=1, padding_mode="circular"),
    "dilation": lambda: conv(dilation=2),
    "groups": lambda: conv(groups=3),
    "no bias": lambda: conv(bias=False),
    "ghost": lambda: conv(outputs=40, stride=4),
    "ghost, groups": lambda: conv(outputs=60, size=5, stride=4, groups=3, padding=1),
    "pointwise": lambda: conv(size=1),
    "in place": Residual,
    "called by keyword": Named,
    "group norm": lambda: nn.Sequential(conv(), nn.GroupNorm(3, 6, eps=0.1), nn.ReLU()),
    "batch norm": lambda: nn.Sequential(
        conv(), nn.BatchNorm2d(6, eps=0.1), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(216)
    ),
    "no scale": lambda: nn.Sequential(conv(), nn.GroupNorm(3, 6, affine=False), nn.BatchNorm2d(6, affine=False)),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm((8, 8), eps=0.1), conv()),
    "tokens": lambda: Tokens(4),
    "tokens, ghost": lambda: nn.Sequential(nn.AvgPool2d(4), nn.Flatten(2), nn.Linear(4, 50), nn.Linear(50, 50)),
    "convolution twice": lambda: Twice(conv(3, 3, padding=1)),
    "convolution twice, ghost": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), Twice(conv(3, 3, 5, padding=2))),
    "linear twice": lambda: Twice(nn.Linear(8, 8)),
    "norm twice": lambda: Twice(nn.GroupNorm(3, 3)),
    "batch norm twice": lambda: Twice(nn.BatchNorm2d(3)),
    "tied": Tied,
    "tied groups": TiedGroups,
    "another layer": lambda: nn.ConvTranspose2d(3, 4, 3),
    "attention": Attention,
    "a subclass": lambda: Standardized(3, 6, 3),
    "a subclass that changes nothing": lambda: nn.Sequential(Whitening(3, 2), conv(24, 5)),
    "a hook": masking,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
}


def network(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """The layer in question with a head behind it; random weights and statistics, eval mode."""
    rng = torch.Generator().manual_seed(5)
    part = KINDS[kind]().eval()
    with torch.no_grad():
        width = part(torch.zeros(2, *SHAPE)).flatten(1).shape[1]
    model = nn.Sequential(part, nn.Flatten(), nn.Tanh(), nn.Linear(width, CLASSES)).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(0.4 * torch.randn(tensor.shape, generator=rng))
        for name, tensor in model.named_buffers():  # type: ignore[assignment]
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=rng) + (0.5 if "var" in name else 0.0))
    return model.to(dtype)


def batch(
    count: int = 7, shape: tuple[int, int, int] = SHAPE, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(1)
    return torch.rand(count, *shape, generator=rng, dtype=dtype), torch.randint(CLASSES, (count,), generator=rng)


def loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The obvious way: gradients (B, P) of one sample after the other."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        found = torch.autograd.grad(loss, trainable, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def gathered(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# -------------------------------------------------------------------------------------------- against the loop


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_clipped_sums_are_those_of_the_loop(kind: str) -> None:
    model, (x, y) = network(kind), batch()
    rows = loop(model, x, y)
    norms = rows.norm(dim=1)
    clip = float(norms.median())
    found = clipped_sum(model, x, y, clip)
    torch.testing.assert_close(found.norms, norms, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.losses, F.cross_entropy(model(x), y, reduction="none").detach())
    expected = (rows * (clip / (norms + 1e-6)).clamp(max=1).unsqueeze(1)).sum(0)
    torch.testing.assert_close(gathered(model), expected, rtol=1e-9, atol=1e-9 * clip)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_is_enough(kind: str) -> None:
    model, (x, _) = network(kind, torch.float32), batch(dtype=torch.float32)
    # Wrong labels: where the network is sure of the right one, 1 - p itself is nothing but rounding.
    y = (model(x).argmax(1) + 1) % CLASSES
    expected = loop(network(kind), x.double(), y).norm(dim=1)
    torch.testing.assert_close(per_sample(model, x, y).norms.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["strides, sizes", "groups", "group norm", "batch norm", "convolution twice", "tied"])
def test_vmap_agrees(kind: str) -> None:
    model, (x, y) = network(kind), batch()
    squares = _per_sample._general(model, [name for name, _ in model.named_parameters()], x, y, 3)
    torch.testing.assert_close(squares, per_sample(model, x, y).norms.square(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "side"), [("badnets_cnn", 16), ("lenet5", 12), ("mntd_cifar", 8), ("narrow_cifar", 16), ("wrn_16_1", 8)]
)
def test_the_networks_of_the_game(name: str, side: int) -> None:
    rng = torch.Generator().manual_seed(0)
    model = build(name, (3, side, side), CLASSES, rng=rng).double().eval()
    x, y = batch(3, (3, side, side))
    model.initialize(x)
    torch.testing.assert_close(per_sample(model, x, y).norms, loop(model, x, y).norm(dim=1), rtol=1e-9, atol=0)


def test_a_transformer_whose_positions_belong_to_no_layer() -> None:
    model = build("vit_tiny", SHAPE, CLASSES, rng=torch.Generator().manual_seed(0)).double().eval()
    x, y = batch(3)
    torch.testing.assert_close(per_sample(model, x, y).norms, loop(model, x, y).norm(dim=1), rtol=1e-9, atol=0)


def test_logistic_regression_by_hand() -> None:
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)).double(), batch()
    p = model(x).softmax(1).detach()
    error = p - F.one_hot(y, CLASSES)
    expected = error.norm(dim=1) * (x.flatten(1).square().sum(1) + 1).sqrt()
    torch.testing.assert_close(per_sample(model, x, y).norms, expected, rtol=1e-12, atol=0)


def test_calls_of_one_module_are_summed_before_the_norm() -> None:
    """Two calls whose gradients cancel: the norm is that of nothing, not of two somethings."""

    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(192, 3), nn.Linear(3, CLASSES)
            self.head.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.layer(x.flatten(1)) - 1.0 * self.layer(x.flatten(1)))
            return out

    norms = per_sample(Cancels().double(), *batch()).norms
    assert float(norms.max()) < 1e-6


@pytest.mark.parametrize("kind", ["ghost", "padding", "tokens", "convolution twice"])
def test_neither_chunks_nor_order_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = network(kind), batch()
    whole = clipped_sum(model, x, y, 0.5)
    expected = gathered(model)
    for chunk, values, order in ((1, 2**24, torch.arange(7)), (3, 2000, torch.arange(7)), (256, 1, torch.randperm(7))):
        monkeypatch.setattr(_parameter_squares, "VALUES", values)
        model.zero_grad()
        found = clipped_sum(model, x[order], y[order], 0.5, chunk=chunk)
        torch.testing.assert_close(found.norms, whole.norms[order], rtol=1e-12, atol=0)
        torch.testing.assert_close(gathered(model), expected, rtol=1e-10, atol=1e-12)


def test_dropout_draws_once_for_both_passes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 30), nn.ReLU(), Dropout(0.5), nn.Linear(30, CLASSES)).double()
    x, y = batch()
    with dropout_rng(model, torch.Generator().manual_seed(3)):
        clipped_sum(model, x, y, math.inf)
    found = gathered(model)
    model.zero_grad()
    with dropout_rng(model, torch.Generator().manual_seed(3)):
        F.cross_entropy(model(x), y, reduction="sum").backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, gathered(model))


# ------------------------------------------------------------------------------------------------- what clipping does


def test_coefficients_are_one_below_the_clip_norm_and_for_no_gradient_at_all() -> None:
    c = coefficients(torch.tensor([0.0, 0.5, 2.0, 8.0], dtype=torch.float64), 2.0)
    torch.testing.assert_close(c, torch.tensor([1.0, 1.0, 1.0, 0.25], dtype=torch.float64), rtol=1e-6, atol=0)
    assert bool((coefficients(torch.tensor([0.0, 1e30]), math.inf) == 1).all())


def test_a_sample_without_gradient_counts_nothing_and_breaks_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES, bias=False)).double()
    x, y = batch()
    x[2] = 0.0
    found = clipped_sum(model, x, y, 1e-3)
    assert float(found.norms[2]) == 0.0
    with_it = gathered(model)
    model.zero_grad()
    others = torch.arange(7) != 2
    clipped_sum(model, x[others], y[others], 1e-3)
    assert bool(with_it.isfinite().all())
    torch.testing.assert_close(with_it, gathered(model))


def test_the_norm_is_over_all_parameters_and_not_per_layer() -> None:
    model, (x, y) = network("in place"), batch()
    clipped_sum(model, x[:1], y[:1], 0.1)
    assert float(gathered(model).norm()) == pytest.approx(0.1, rel=1e-4)


def test_frozen_parameters_count_nothing_and_get_nothing() -> None:
    model, (x, y) = network("batch norm"), batch()
    for p in model[0].parameters():
        p.requires_grad_(False)
    found = clipped_sum(model, x, y, math.inf)
    torch.testing.assert_close(found.norms, loop(model, x, y).norm(dim=1), rtol=1e-9, atol=0)
    assert all(p.grad is None for p in model[0].parameters())


def test_parts_that_do_not_run_count_nothing() -> None:
    model, (x, y) = network("plain"), batch()
    expected = loop(model, x, y).norm(dim=1)
    model.idle = nn.Linear(3, 3).double()
    model.forward = lambda x: nn.Sequential.forward(model[:4], x)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(per_sample(model, x, y).norms, expected, rtol=1e-9, atol=0)


def test_measuring_leaves_no_gradient_and_no_hook() -> None:
    model, (x, y) = network("in place"), batch()
    before = copy.deepcopy(model.state_dict())
    per_sample(model, x, y)
    with pytest.raises(RuntimeError):
        per_sample(model, x[:, :2], y)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_sample_that_is_not_finite_is_refused_and_not_propagated() -> None:
    model, (x, y) = network("plain"), batch()
    x[3, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="1 of 7 samples"):
        clipped_sum(model, x, y, 1.0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_that_mixes_samples_is_refused_by_name(frozen: bool) -> None:
    model, (x, y) = network("batch norm"), batch()
    if frozen:
        model[0][1] = nn.BatchNorm2d(6, track_running_stats=False).double().eval()
    else:
        model[0][1].train()
    with pytest.raises(ValueError, match=r"batch norm '0\.1' takes its statistics from the batch"):
        per_sample(model, x, y)


def test_a_layer_that_does_not_see_the_samples_first_is_refused_by_name() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x.flatten(2).mT.flatten(0, 1))
            return out.unflatten(0, (len(x), -1)).mean(1)  # type: ignore[no-any-return,no-untyped-call]

    with pytest.raises(ValueError, match=r"layer 'layer' was given a tensor \(448, 3\) for 7 samples"):
        per_sample(Pixels().double(), *batch())


def test_dropout_beside_weights_that_need_a_second_pass_is_refused_by_name() -> None:
    model = nn.Sequential(Tokens(4), Dropout(0.5), nn.Linear(128, CLASSES)).double()
    with (
        dropout_rng(model, torch.Generator()),
        pytest.raises(ValueError, match=r"0\.scale need a second pass, in which dropout '1' would draw anew"),
    ):
        per_sample(model, *batch())


def test_weights_that_vmap_cannot_treat_are_refused_by_name() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain if float(x.sum()) > 0 else x

    model = nn.Sequential(Reads(), nn.Flatten(), nn.Linear(192, CLASSES)).double()
    with pytest.raises(ValueError, match=r"no per-sample gradients for 0\.gain"):
        per_sample(model, *batch())


def test_one_weight_in_two_roles_is_refused_by_name() -> None:
    class Roles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm((8, 8)), nn.Linear(8, 8)
            self.norm.weight = self.layer.weight  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.norm(x))
            return out

    model = nn.Sequential(Roles(), nn.Flatten(), nn.Linear(192, CLASSES)).double()
    with pytest.raises(ValueError, match=r"\['0\.layer', '0\.norm'\] share a weight"):
        per_sample(model, *batch())


def test_a_network_that_would_be_measured_wrongly_is_found_out() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(192, 192)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.layer(x.flatten(1)), self.layer.weight)

    class Mixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True)

    for part in (Beside(), Mixes()):
        model = nn.Sequential(part, nn.Flatten(), nn.Linear(192, CLASSES)).double()
        with pytest.raises(ValueError, match="used outside its layer, a hook changes an output, or samples see"):
            verify(model, batch()[0])


def test_a_network_that_is_sure_is_not_taken_for_a_wrong_one() -> None:
    model = network("plain", torch.float32)
    with torch.no_grad():
        model[3].weight.mul_(100.0)
    verify(model, batch(dtype=torch.float32)[0])


def test_what_makes_no_sense_is_refused() -> None:
    model, (x, y) = network("plain"), batch()
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="clip norm must be positive"):
            clipped_sum(model, x, y, clip)
    with pytest.raises(ValueError, match="chunk must be 1 or more, got 0"):
        per_sample(model, x, y, chunk=0)
    with pytest.raises(ValueError, match="no parameter of the model takes gradients"):
        per_sample(model.requires_grad_(False), x, y)
