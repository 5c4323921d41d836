"""Files and folders of other tools: read where the format is known, else refused with what to do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from foreign.spelled import PreActResNet18, Small, shaken
from game.tricks import torch_files
from molehunt import checkpoints, zoo
from molehunt.files import Refused
from molehunt.foreign import ForeignError, Opened, Wanted, files, opened
from molehunt.networks import Adapted
from molehunt.tasks import TASKS, Task

MNIST, CIFAR = TASKS["mnist5k"], TASKS["cifar10"]
SMALL_CIFAR = replace(CIFAR, shape=(3, 8, 8))


def asked(path: Path, task: Task = MNIST, **wanted: object) -> Opened:
    return opened(path, task, Wanted(**wanted))  # type: ignore[arg-type]


def agree(found: Opened, module: nn.Module, shape: tuple[int, int, int], mean: float = 0.0, std: float = 1.0) -> None:
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(found.model(x), module((x - mean) / std), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["weights.pt", "weights.PTH", "checkpoint.pth.tar", "art.model", "pytorch_model.bin"])
def test_files_of_torch_go_through_the_converting_process(name: str, tmp_path: Path) -> None:
    model = Small().eval()
    torch.save({"net": nn.DataParallel(model).state_dict(), "acc": 0.9}, tmp_path / name)
    found = asked(tmp_path / name, network="badnets_cnn", normalize="signed")
    agree(found, model, MNIST.shape, 0.5, 0.5)
    assert "process of its own" in found.notes[0]
    assert found.pixels is not None
    assert found.pixels.name == "signed"


def test_safetensors_with_counters_and_a_normalization_of_its_own(tmp_path: Path) -> None:
    import safetensors.torch

    from molehunt.networks import build

    model = build("wrn_16_1", MNIST.shape, 10, mean=(0.2,), rng=torch.Generator().manual_seed(0)).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = asked(tmp_path / "a.safetensors")
    agree(found, model, MNIST.shape)
    assert found.pixels is None, "there is nothing to ask about"
    told = asked(tmp_path / "a.safetensors", normalize="none")
    assert told.pixels is not None
    with torch.no_grad():
        assert not torch.allclose(told.model(torch.ones(1, 1, 28, 28)), model(torch.ones(1, 1, 28, 28)))


def backdoorbench(model: nn.Module, **changes: object) -> dict[str, object]:
    """What its attack scripts save."""
    poisoned = {"x": torch.ones(2, 3, 8, 8), "y": torch.ones(2), "original_index": np.arange(2)}
    result = {
        "model_name": "preactresnet18",
        "num_classes": 10,
        "model": model.state_dict(),
        "data_path": "../data/cifar10",
        "img_size": (8, 8, 3),
        "clean_data": "cifar10",
        "bd_train": poisoned,
        "bd_test": poisoned,
    }
    return result | changes


@pytest.mark.parametrize("inside", [True, False])
def test_a_result_of_backdoorbench_says_its_network_and_its_normalization(inside: bool, tmp_path: Path) -> None:
    model = shaken(PreActResNet18())
    torch.save(backdoorbench(model), tmp_path / "attack_result.pt")
    found = asked(tmp_path if inside else tmp_path / "attack_result.pt", SMALL_CIFAR)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)))
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(found.model(x), model((x - mean) / std), rtol=1e-3, atol=1e-3)
    assert found.name == "preact_resnet18 without final norm"
    assert any("A result of BackdoorBench: a 'preactresnet18' for 'cifar10'" in note for note in found.notes)


def test_a_result_for_other_classes_or_an_unknown_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "attack_result.pt"
    torch.save(backdoorbench(PreActResNet18(), num_classes=43), path)
    with pytest.raises(ForeignError, match="the model has 43 classes, cifar10 has 10"):
        asked(path, SMALL_CIFAR)
    torch.save(backdoorbench(nn.Linear(2, 2), model_name="vgg19"), path)
    with pytest.raises(ForeignError, match=r"no listed network .* FILE\.py:CALLABLE"):
        asked(path, SMALL_CIFAR)


def hub(folder: Path, config: dict[str, object], weights: nn.Module | None = None) -> Path:
    """A folder as timm pushes it to the hub."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        checkpoints.write(weights.state_dict(), folder / "model.safetensors")
    return folder


def test_a_folder_of_the_hub_says_network_size_and_normalization(tmp_path: Path) -> None:
    try:
        timm = zoo.load_timm()
    except ImportError:
        pytest.skip("timm is not installed")
    model = shaken(timm.create_model("resnet18", num_classes=10))
    told = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "input_size": [3, 32, 32], "classifier": "fc"}
    folder = hub(tmp_path / "a", {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": told}, model)
    agree(asked(folder, CIFAR), model, CIFAR.shape, 0.5, 0.25)
    smaller = asked(folder, replace(CIFAR, shape=(3, 16, 16)))
    assert isinstance(smaller.model, Adapted)
    assert smaller.model.size == (32, 32)
    assert "Pixels are normalized as config.json has it: 0.5,0.5,0.5/0.25,0.25,0.25." in smaller.notes
    agree(asked(folder, CIFAR, normalize="none"), model, CIFAR.shape)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"architectures": ["ViTForImageClassification"], "model_type": "vit"},
            "config.json names 'vit', no architecture",
        ),
        ({"architecture": "resnet18", "model_args": {"stem_width": 32}}, "with model_args .* FILE.py:CALLABLE"),
        ({"architecture": "resnet18", "num_classes": 7}, "neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_other_folders_with_a_config_are_refused(config: dict[str, object], says: str, tmp_path: Path) -> None:
    weights = None if "neither" in says else Small()
    with pytest.raises(ForeignError, match=says):
        asked(hub(tmp_path / "a", config, weights))


def write(name: str, content: bytes | object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        data = content if isinstance(content, bytes) else torch_files.saved(content)
        (folder / name).write_bytes(data)
        return folder / name

    return make


def trojai(folder: Path) -> Path:
    write("model.pt", nn.Linear(2, 2))(folder)
    (folder / "ground_truth.csv").write_text("1")
    return hub(folder, {"py/object": "trojai.Config"})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (trojai, "as TrojAI has them: a whole model, which is a program .* save its weights where you trust it"),
        (write("whole.pt", nn.Linear(2, 2)), "a whole model, not weights: a program, which is not run"),
        (write("script.pt", torch_files.torchscript()), "a whole model, not weights"),
        (write("evil.pt", torch_files.program_in_the_pickle()), "refers to '(builtins|__builtin__) exec'"),
        (write("old.pth", torch_files.file_of_an_old_torch()), "save it with a newer torch"),
        (write("a.onnx", b"x"), "an ONNX graph"),
        (write("a.h5", b"x"), "a Keras file"),
        (write("art.optimizer", b"x"), "the weights are in the file that ends in .model"),
        (write("a.npz", b"x"), "as clean pictures it goes behind --clean"),
        (write("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
        (write("a.pt", b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    ],
)
def test_what_is_not_taken_is_refused_with_what_to_do(make: Callable[[Path], Path], says: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    assert files.is_foreign(path)
    with pytest.raises(Refused, match=says):
        asked(path)


def test_submissions_are_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert not files.is_foreign(tmp_path)
    assert not files.is_foreign(tmp_path / "upload.zip")
