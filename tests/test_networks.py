"""Every network is built, used and taken apart by name, and batch norm folds away without a trace."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from molehunt.networks import (
    NETWORKS,
    Dropout,
    Network,
    Normalize,
    Whitening,
    anatomy,
    build,
    capture,
    dropout_rng,
    fast_dtype,
    features,
    fold_batch_norm,
    tail,
)
from molehunt.networks.blocks import GlobalMaxPool

COLOR, GRAY = (3, 32, 32), (1, 28, 28)
CASES = [(name, shape) for name in NETWORKS for shape in (COLOR, GRAY)]
SMALL = (3, 16, 16)  # the least that all networks take; ten-million-weight networks are slow on more


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(shape: tuple[int, int, int], count: int = 4, seed: int = 1) -> Tensor:
    return torch.rand(count, *shape, generator=generator(seed))


def lively(name: str, shape: tuple[int, int, int] = SMALL) -> Network:
    """A network whose norms have seen data and whose scales differ, so that nothing is an identity by luck."""
    model = build(name, shape, 10, rng=generator())
    model.initialize(pictures(shape, 50))
    rng = generator(2)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.1, generator=rng)
            layer.running_var.uniform_(0.5, 2, generator=rng)
            layer.weight.data.uniform_(0.5, 2, generator=rng)
            layer.bias.data.normal_(0, 0.1, generator=rng)
    return model.eval()


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_maps_pictures_to_logits_and_says_what_it_is(name: str, shape: tuple[int, int, int]) -> None:
    model = build(name, shape, 7, rng=generator()).eval()
    assert model(pictures(shape)).shape == (4, 7)
    assert (model.name, model.shape, model.classes) == (name, shape, 7)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_is_taken_apart_without_knowing_the_architecture(name: str, shape: tuple[int, int, int]) -> None:
    model = lively(name, shape)
    x = pictures(shape)
    parts = anatomy(model, x)
    logits, penultimate = features(model, parts.head, x)
    block = capture(model, parts.block, x)
    assert torch.equal(logits, model(x))
    assert penultimate.shape == (4, model.head.in_features)
    assert block.dim() == 4
    torch.testing.assert_close(model.head(penultimate), logits)
    torch.testing.assert_close(tail(model, parts.block, block, x), logits)
    assert list(parts.layers)[-1] == parts.head
    wanted = {path for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert set(parts.layers) == wanted
    assert all(parts.layers[path] is model.get_submodule(path) for path in wanted)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "vit_tiny"])
def test_the_block_is_taken_after_its_activation(name: str) -> None:
    assert capture(lively(name), "trunk", pictures(SMALL)).min() >= 0


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_keeps_the_logits_and_the_original(name: str) -> None:
    model = lively(name)
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model)
    x = pictures(SMALL)
    logits = model(x)
    torch.testing.assert_close(folded(x), logits, rtol=1e-5, atol=1e-5 * float(logits.detach().abs().max()))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert anatomy(folded, x).layers.keys() == anatomy(model, x).layers.keys()


@pytest.mark.parametrize(
    ("name", "left"), [("fast_cifar", 0), ("resnet18", 0), ("vgg11_bn", 0), ("preact_resnet18", 9), ("wrn_16_1", 7)]
)
def test_folds_every_norm_that_follows_a_convolution(name: str, left: int) -> None:
    def count(model: nn.Module) -> int:
        return sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())

    model = lively(name)
    assert count(fold_batch_norm(model)) == left < count(model)


def convolution_and_norm(*between: nn.Module) -> nn.Sequential:
    rng = generator()
    norm = nn.BatchNorm2d(4)
    norm.weight.data = torch.tensor([1.0, 2.0, 0.5, 3.0])
    norm.bias.data.normal_(generator=rng)
    assert norm.running_mean is not None
    norm.running_mean.normal_(generator=rng)
    convolution = nn.Conv2d(3, 4, 3)
    convolution.weight.data.normal_(generator=rng)
    return nn.Sequential(convolution, *between, norm, nn.ReLU()).eval()


def negative_scale_behind_a_pool() -> nn.Sequential:
    model = convolution_and_norm(nn.MaxPool2d(2))
    model[2].get_parameter("weight").data[1] = -1.0
    return model


def watched() -> nn.Sequential:
    model = convolution_and_norm()
    model[0].register_forward_hook(lambda _m, _i, output: output * 2)
    return model


def shared() -> nn.Sequential:
    model = convolution_and_norm()
    other = nn.BatchNorm2d(4)
    return nn.Sequential(model, nn.Sequential(nn.Conv2d(4, 3, 1), model[0], other)).eval()


@pytest.mark.parametrize("make", [negative_scale_behind_a_pool, watched, shared])
def test_does_not_fold_where_that_would_change_the_function(make: Callable[[], nn.Module]) -> None:
    model = make()
    folded = fold_batch_norm(model)
    x = pictures((3, 16, 16))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    kinds = [type(layer) for layer in model.modules()]
    assert [type(layer) for layer in folded.modules()] == kinds


def test_folds_through_a_max_pool_when_all_scales_are_positive() -> None:
    model = convolution_and_norm(nn.MaxPool2d(2))
    folded = fold_batch_norm(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    x = pictures((3, 16, 16))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_come_from_the_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    first, second, other = (build(name, SMALL, 10, rng=generator(seed)).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_generator_a_state_dict_can_be_loaded(name: str) -> None:
    model = lively(name)
    blank = build(name, SMALL, 10)
    assert not blank.head.weight.any()
    blank.load_state_dict(model.state_dict())
    x = pictures(SMALL)
    assert torch.equal(blank.eval()(x), model(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_per_sample_gradients_work(name: str) -> None:
    """No in-place residual adds: vmap over grad is what DP-SGD does, with the norms in eval mode."""
    model = lively(name)
    weights = {key: value.detach() for key, value in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, weights, (image.unsqueeze(0),))
        return logits.logsumexp(1).sum()

    x = pictures(SMALL, 2)
    single = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    model(x).logsumexp(1).sum().backward()
    torch.testing.assert_close(single["head.weight"].sum(0), model.head.weight.grad, rtol=1e-4, atol=1e-5)


def test_fast_networks_have_the_sizes_they_are_named_for() -> None:
    fast, narrow = (
        sum(p.numel() for p in build(name, COLOR, 10).parameters()) for name in ("fast_cifar", "narrow_cifar")
    )
    assert 1.5e6 < fast < 2.5e6
    assert 0.2 < narrow / fast < 0.3


def test_normalization_is_first_and_part_of_the_state() -> None:
    model = build("lenet5", COLOR, 10, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0), rng=generator())
    assert isinstance(next(iter(model.children())), Normalize)
    state = model.state_dict()
    assert state["normalize.mean"].flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert state["normalize.std"].shape == (3, 1, 1)
    x = torch.full((1, 3, 2, 2), 0.5)
    assert model.normalize(x)[0, :, 0, 0].tolist() == pytest.approx([0.4, 0.15, 0.05])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("alexnet", COLOR, 10), "unknown network 'alexnet'; known are badnets_cnn, lenet5"),
        (lambda: build("lenet5", COLOR, 1), "at least 2 classes, got 1"),
        (lambda: build("lenet5", (0, 28, 28), 10), "positive sizes, got (0, 28, 28)"),
        (lambda: build("badnets_cnn", (1, 12, 28), 10), "at least 16 x 16 pixels, got 12 x 28"),
        (lambda: build("vit_tiny", (3, 30, 32), 10), "30 x 32 is no multiple"),
        (lambda: build("lenet5", COLOR, 10, mean=(0.5,)), "expected 3 finite values as mean"),
        (lambda: build("lenet5", COLOR, 10, std=(1.0, 0.0, 1.0)), "positive standard deviation, got [1.0, 0.0, 1.0]"),
        (lambda: Dropout(1.0), "dropout share in [0, 1), got 1.0"),
    ],
)
def test_refuses_what_cannot_be_built(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_smallest_shape_that_is_accepted_works(name: str) -> None:
    sides = range(4, 33, 4)
    for side in sides:
        try:
            model = build(name, (3, side, side), 10, rng=generator())
        except ValueError:
            continue
        assert model.eval()(pictures((3, side, side))).shape == (4, 10)
        return
    pytest.fail(f"{name} takes no square of up to 32 pixels")


def test_whitened_patches_are_uncorrelated_with_equal_spread() -> None:
    rng = generator(5)
    mixed = torch.randn(200, 3, 16, 16, generator=rng)
    # Neighbors and channels made alike, as in photographs.
    mixed = nn.functional.avg_pool2d(mixed, 3, 1, 1) + mixed.mean(1, keepdim=True)
    layer = Whitening(3, 2)
    layer.initialize(mixed, floor=0.0)
    out = layer(mixed).transpose(0, 1).flatten(1)
    half = len(out) // 2
    torch.testing.assert_close(out[:half], -out[half:])
    torch.testing.assert_close(torch.cov(out[:half]), torch.eye(half), atol=1e-3, rtol=0)


def test_whitening_is_not_trained_and_is_an_ordinary_weight_in_the_state() -> None:
    model = build("narrow_cifar", COLOR, 10, rng=generator())
    fixed = [key for key, value in model.named_parameters() if not value.requires_grad]
    assert fixed == ["trunk.0.weight"]
    before = model.state_dict()["trunk.0.weight"].clone()
    model.initialize(pictures(COLOR, 20))
    assert not torch.equal(before, model.state_dict()["trunk.0.weight"])


def test_global_max_gives_the_gradient_to_one_position() -> None:
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    GlobalMaxPool()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.sum(dim=(2, 3)).tolist() == [[1.0, 1.0]]
    assert x.grad.count_nonzero() == 2


def test_dropout_draws_from_the_generator_it_is_lent() -> None:
    layer = Dropout(0.25)
    x = torch.ones(100, 100)
    with pytest.raises(RuntimeError, match="dropout_rng"):
        layer(x)
    before = torch.get_rng_state()
    with dropout_rng(layer, generator(3)):
        first = layer(x)
    with dropout_rng(layer, generator(3)):
        second = layer(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert float((first == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(first.max()) == pytest.approx(1 / 0.75)
    assert torch.equal(layer.eval()(x), x)
    copy.deepcopy(layer)


class Foreign(nn.Module):
    """A model as a stranger writes it: nothing named as ours, a norm and an activation behind the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.skip = nn.Identity()
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        block = self.relu(self.skip(self.norm(self.last(self.stem(x)))))
        out: Tensor = self.classifier(self.pool(block).flatten(1))
        return out


def test_takes_a_foreign_model_apart() -> None:
    model = Foreign().eval()
    model.norm.train()
    x = pictures(COLOR)
    before = copy.deepcopy(model.state_dict())
    parts = anatomy(model, x)
    assert (list(parts.layers), parts.block, parts.head) == (["stem", "last", "classifier"], "relu", "classifier")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), "a statistic moved"
    assert model.norm.training, "a mode was not put back"
    assert not model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_tail_is_differentiable_and_hooks_are_removed_even_after_an_error() -> None:
    model = Foreign().eval()
    a = torch.rand(6, 8, 32, 32, requires_grad=True)
    tail(model, "relu", a, pictures(COLOR, 1)).sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert a.grad.any()
    with pytest.raises(RuntimeError):
        capture(model, "relu", torch.rand(1, 5, 32, 32))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: capture(m, "layer9", x), "no module 'layer9' in Foreign"),
        (lambda m, x: capture(m, "unused", x), "module 'unused' put out no tensor"),
        (lambda m, x: features(m, "unused", x), "head 'unused' to be given (B, D), got nothing"),
        (lambda m, x: features(m, "stem", x), "to be given (B, D), got (4, 3, 32, 32)"),
        (lambda m, x: tail(m, "unused", x, x), "module 'unused' did not run"),
        (lambda _m, x: anatomy(nn.Flatten(), x), "runs no nn.Linear"),
        (lambda _m, x: anatomy(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), x), "runs no nn.Conv2d"),
    ],
)
def test_says_what_is_wrong_with_a_path(call: Callable[[nn.Module, Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(Foreign().eval(), pictures(COLOR))


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.integers(1, 4), outputs=st.integers(1, 6), size=st.sampled_from([1, 3]), bias=st.booleans(),
    affine=st.booleans(), pool=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_folding_is_exact_for_any_pair(
    inputs: int, outputs: int, size: int, bias: bool, affine: bool, pool: bool, seed: int
) -> None:
    rng = generator(seed)
    norm = nn.BatchNorm2d(outputs, affine=affine)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_(generator=rng)
    norm.running_var.uniform_(0.1, 3, generator=rng)
    if affine:
        norm.weight.data.normal_(generator=rng)
        norm.bias.data.normal_(generator=rng)
    between = [nn.MaxPool2d(2)] if pool else []
    model = nn.Sequential(nn.Conv2d(inputs, outputs, size, bias=bias), *between, norm).double().eval()
    x = torch.randn(2, inputs, 8, 8, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(fold_batch_norm(model)(x), model(x))


def test_the_fast_number_format_is_a_function_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert fast_dtype(cpu) == torch.bfloat16
    for name, expected in (("Intel(R) Xeon(R) Processor", torch.float32), ("AMD EPYC", torch.bfloat16)):
        abilities = {"avx512_bf16": True, "amx_bf16": False, "cpu_name": name}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda a=abilities: a)
        assert fast_dtype(cpu) == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "cpu_name": "AMD EPYC"})
    assert fast_dtype(cpu) == torch.float32
    assert fast_dtype(torch.device("meta")) == torch.float32
