"""The timm extra: its guard, its networks, and that the core does without it."""

import copy
import importlib
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from molehunt import zoo
from molehunt.networks import anatomy, build, capture, features, fold_batch_norm, tail

SHAPE = (3, 32, 32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def needs_timm() -> None:
    # A package that is missing, not one that cannot be imported: then the guard is broken, and a test has to say so.
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")


def test_the_core_imports_neither_timm_nor_torchvision() -> None:
    code = (
        "import sys, molehunt, molehunt.networks, molehunt.zoo, molehunt.training, molehunt.suspect;"
        "molehunt.networks.build('lenet5', (1, 28, 28), 10);"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'timm', 'torchvision'}))"
    )
    assert in_a_fresh_process(code) == "[]"


class Import:
    """Stands in for the import system: torchvision fails a few times, timm comes."""

    def __init__(self, error: Exception, failures: int) -> None:
        self.error, self.failures, self.asked = error, failures, list[str]()

    def __call__(self, name: str) -> SimpleNamespace:
        self.asked.append(name)
        if name == "torchvision" and self.failures:
            self.failures -= 1
            sys.modules["torchvision.half_imported"] = sys
            raise self.error
        return SimpleNamespace(name=name)


MISSING_OPERATOR = RuntimeError("operator torchvision::nms does not exist")


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record which operators the guard declares, and forget them afterwards."""
    calls: list[str] = []
    library = SimpleNamespace(define=lambda schema: calls.append(schema.partition("(")[0]))
    monkeypatch.setattr(torch.library, "Library", lambda *_: library)
    monkeypatch.setattr(zoo, "_DECLARED", [])
    # What the guard deletes must come back, and what the stand-in plants must go.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return calls


def test_the_guard_repairs_an_import_whose_operators_are_missing(
    monkeypatch: pytest.MonkeyPatch, declared: list[str]
) -> None:
    importing = Import(MISSING_OPERATOR, failures=1)
    monkeypatch.setattr(importlib, "import_module", importing)
    assert zoo.load_timm().name == "timm"
    assert importing.asked == ["torchvision", "torchvision", "timm"]
    assert declared == ["nms", "qnms"]
    assert "torchvision.half_imported" not in sys.modules


def test_the_guard_does_nothing_where_torchvision_imports(monkeypatch: pytest.MonkeyPatch, declared: list[str]) -> None:
    importing = Import(MISSING_OPERATOR, failures=0)
    monkeypatch.setattr(importlib, "import_module", importing)
    zoo.load_timm()
    assert importing.asked == ["torchvision", "timm"]
    assert declared == []


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'torchvision'"), RuntimeError("a wholly different defect"), MISSING_OPERATOR],
)
def test_a_broken_extra_is_a_clear_message(
    monkeypatch: pytest.MonkeyPatch, declared: list[str], error: Exception
) -> None:
    monkeypatch.setattr(importlib, "import_module", Import(error, failures=9))
    with pytest.raises(ImportError, match=r"pip install 'molehunt\[zoo\]'"):
        build("timm:resnet18", SHAPE, 10)
    monkeypatch.delitem(sys.modules, "torchvision.half_imported", raising=False)


@pytest.mark.usefixtures("needs_timm")
@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",
        "convnext_atto",
        "mobilenetv3_small_050",
        "vit_tiny_patch16_224",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("vgg11_bn", "densenet121", "efficientnet_b0", "regnety_002", "wide_resnet50_2")
        ),
    ],
)
def test_a_timm_network_is_a_network_like_any_other(name: str) -> None:
    model = build(f"timm:{name}", SHAPE, 7, rng=generator()).eval()
    x = torch.rand(2, *SHAPE, generator=generator(1))
    parts = anatomy(model, x)
    logits, penultimate = features(model, parts.head, x)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(model.head(penultimate), logits)
    torch.testing.assert_close(tail(model, parts.block, capture(model, parts.block, x), x), logits)
    torch.testing.assert_close(fold_batch_norm(model)(x), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("needs_timm")
def test_timm_weights_come_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = (build("timm:resnet10t", SHAPE, 10, rng=generator(seed)).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.usefixtures("needs_timm")
def test_a_copy_of_a_timm_network_shares_no_weight_with_it() -> None:
    model = build("timm:mobilenetv3_small_050", SHAPE, 10, rng=generator()).eval()
    twin = copy.deepcopy(model)
    x = torch.rand(2, *SHAPE, generator=generator(1))
    logits = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(x), logits)


@pytest.mark.usefixtures("needs_timm")
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet18_of_nobody", SHAPE, "timm knows no model 'resnet18_of_nobody'"),
        ("vit_tiny_patch16_224", (3, 8, 8), "cannot be built for images of shape"),
    ],
)
def test_refuses_names_and_shapes_with_a_reason(name: str, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(f"timm:{name}", shape, 10)
