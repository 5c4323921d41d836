"""Files and folders in which models come, read without running anything of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from molehunt import checkpoints, conversion, strict_json
from molehunt.files import exactly, open_regular
from molehunt.foreign.errors import ForeignError
from molehunt.strict_json import show
from molehunt.tensor_file import CheckpointError

TORCH = frozenset({".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".model", ".th", ".tar"})
"""Endings of files that torch writes; `.model` is ART's."""
REFUSED = {
    ".onnx": "an ONNX graph, which is not read; scan the PyTorch module that it was exported from",
    ".h5": "a Keras file; write the network as a torch.nn.Module and scan it from Python",
    ".keras": "a Keras file; write the network as a torch.nn.Module and scan it from Python",
    ".pb": "a TensorFlow graph; write the network as a torch.nn.Module and scan it from Python",
    ".tflite": "a TensorFlow Lite graph; write the network as a torch.nn.Module and scan it from Python",
    ".optimizer": "the state of ART's optimizer; the weights are in the file that ends in .model",
    ".npz": "a file of arrays; as clean pictures it goes behind --clean",
    ".gguf": "a language model; only classifiers of pictures are scanned",
}
# How BackdoorBench normalizes the data sets that it trains on.
BACKDOORBENCH = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.5,), (0.5,)),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "gtsrb": ((0.0,), (1.0,)),
    "celeba": ((0.0,), (1.0,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
WHOLE = (
    "save its weights where you trust it, with torch.save(model.state_dict(), 'weights.pt'), and name its network with "
    "--network"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """Tensors, and what the file or folder says of them.

    Attributes:
        state: tensors by name, float32.
        network: the network that is named beside them; None where nothing is.
        mean, std: the normalization named beside them, in units of [0, 1]; None where nothing is.
        size: (H, W) of the pictures that the network was trained on; None where nothing says so.
        classes: number of classes named beside them; None where nothing is.
        source: what says so, for the report.
        notes: for the report.
    """

    state: Mapping[str, Tensor]
    network: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    classes: int | None = None
    source: str = "the file"
    notes: tuple[str, ...] = field(default_factory=tuple)


def is_foreign(path: Path) -> bool:
    """Whether this module reads, or has an opinion about, a file or folder; the rest may be submissions."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("config.json", "model.pt", "attack_result.pt"))
    return path.suffix.lower() in TORCH | REFUSED.keys() | {".safetensors"}


def read(path: Path) -> Weights:
    """Read the weights of a file or folder.

    Raises:
        ForeignError: it is something else; the message says what, and what to do.
        CheckpointError: the weights are refused.
    """
    if path.is_dir():
        return _folder(path)
    suffix = path.suffix.lower()
    if suffix in REFUSED:
        raise ForeignError(f"this is {REFUSED[suffix]}")
    if suffix == ".safetensors":
        _refuse_pointer(path)
        return Weights(state=checkpoints.read_safetensors(path, None, counters=True))
    return _torch(path)


def _torch(path: Path) -> Weights:
    _refuse_pointer(path)
    try:
        state, done = conversion.tensors(path)
    except CheckpointError as error:
        if "'torch.nn.modules" in str(error) or "TorchScript" in str(error) or "'__main__" in str(error):
            raise ForeignError(f"this is a whole model, not weights: a program, which is not run; {WHOLE}") from None
        raise
    note = "The .pt file was taken apart in a process of its own; nothing in it was run."
    if {"model_name", "num_classes"} <= done.beside.keys() and done.unwrapped == ("model",):
        return _backdoorbench(state, done.beside, note)
    return Weights(state=state, notes=(note,))


def _backdoorbench(state: Mapping[str, Tensor], beside: Mapping[str, Any], note: str) -> Weights:
    """`attack_result.pt` of BackdoorBench: weights under ``model``, and the names of network and data beside them."""
    name, classes = beside["model_name"], beside["num_classes"]
    data = str(beside.get("clean_data", "unnamed data"))
    told = (
        f"A result of BackdoorBench: a {show(name, 40)} for {show(data, 40)}. Its poisoned pictures were not looked at."
    )
    known = {"preactresnet18": "preact_resnet18"}
    mean, std = BACKDOORBENCH.get(data, (None, None))
    return Weights(
        state=state,
        network=known.get(str(name)),
        mean=mean,
        std=std,
        classes=classes if isinstance(classes, int) else None,
        size=_size(beside.get("img_size")),
        source="BackdoorBench for these data",
        notes=(note, told),
    )


def _size(value: object) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) >= 2 and all(isinstance(side, int) and side > 0 for side in value[:2]):
        return value[0], value[1]
    return None


def _folder(path: Path) -> Weights:
    if (path / "attack_result.pt").is_file():
        return _torch(path / "attack_result.pt")
    if not (path / "config.json").is_file() or (path / "ground_truth.csv").is_file():
        raise ForeignError(
            "this is a folder with model.pt, as TrojAI has them: a whole model, which is a program and is not run; "
            + WHOLE
            + "; its example pictures go behind --clean, one folder per class"
        )
    config = _json(path / "config.json")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            read_ = read(path / name)
            return _described(config, read_)
    raise ForeignError("there is a config.json, but neither model.safetensors nor pytorch_model.bin")


def _described(config: Mapping[str, Any], weights: Weights) -> Weights:
    """Read the config.json that timm writes for the hub."""
    name = config.get("architecture")
    if not isinstance(name, str):
        kind = config.get("model_type") or config.get("architectures") or "no architecture"
        raise ForeignError(
            f"config.json names {show(kind, 80)}, no architecture of timm; networks of the transformers library are "
            "scanned with their class: --network FILE.py:CALLABLE, on the file of weights"
        )
    if config.get("model_args"):
        raise ForeignError(
            f"config.json builds {show(name, 40)} with model_args {show(config['model_args'], 80)}, which are not "
            "known here; give its class with --network FILE.py:CALLABLE, on the file of weights"
        )
    # Newer folders have them in a part of their own.
    told = {**config, **(inner if isinstance(inner := config.get("pretrained_cfg"), dict) else {})}
    size = told.get("input_size")
    count = config.get("num_classes", told.get("num_classes"))
    return Weights(
        state=weights.state,
        network=f"timm:{name}",
        mean=_numbers(told.get("mean")),
        std=_numbers(told.get("std")),
        size=_size(size[1:]) if isinstance(size, list) else None,
        classes=count if isinstance(count, int) else None,
        source="config.json",
        notes=weights.notes,
    )


def _numbers(value: object) -> tuple[float, ...] | None:
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        return tuple(float(v) for v in value)
    return None


def _json(path: Path) -> Mapping[str, Any]:
    with open_regular(path, ForeignError) as (stream, size):
        if size > 2**20:
            raise ForeignError(f"config.json has {size} bytes; at most {2**20} are read")
        try:
            document = strict_json.loads(bytes(exactly(stream, size, ForeignError)))
        except strict_json.JSONError as error:
            raise ForeignError(f"config.json: {error}") from None
    if not isinstance(document, dict):
        raise ForeignError("config.json does not hold an object")
    return document


def _refuse_pointer(path: Path) -> None:
    with open_regular(path, ForeignError) as (stream, size):
        if stream.read(min(size, 40)).startswith(b"version https://git-lfs"):
            raise ForeignError(f"{path.name} is a pointer of Git LFS, not the file; fetch it with: git lfs pull")
