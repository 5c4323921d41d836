"""The state of a training on disk: one safetensors file, tensors plus JSON, replaced as a whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "molehunt training 2"
OLDER = ("molehunt training 1",)
"""Formats that named trainings by less: nobody can tell whether they fit, so such a training begins anew."""


def save(
    path: Path,
    fingerprint: str,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Write the state; a crash leaves either the old file or the new one.

    Args:
        path: the file.
        fingerprint: names the training, so that no other one goes on from it.
        model: its whole state dict is kept.
        optimizers: their tensors are kept; their settings come from the recipe.
        tensors: further tensors by name.
        numbers: further JSON values by name.
    """
    stored = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    stored |= {f"loop/{name}": tensor for name, tensor in tensors.items()}
    for which, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            stored |= {f"optimizer/{which}/{index}/{name}": value for name, value in values.items()}
    # safetensors refuses tensors that share memory, and stores no strides.
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in stored.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    metadata = {"format": FORMAT, "fingerprint": fingerprint, "numbers": json.dumps(dict(numbers))}
    save_file(stored, partial, metadata=metadata)
    partial.replace(path)


def load(
    path: Path, fingerprint: str, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a state into a model and its optimizers, if there is one.

    Returns:
        The further tensors and numbers; None when there is no file, or one of an older format.

    Raises:
        ValueError: the file is broken or belongs to another training.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no checkpoint of a training ({error}); delete it to start again") from error
    if metadata.get("format") in OLDER:
        return None
    if metadata.get("format") != FORMAT or metadata.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{path} belongs to another training (recipe, data or network differ); delete it to start again"
        )
    model.load_state_dict(_below(stored, "model/"))
    for which, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(stored, f"optimizer/{which}/").items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return _below(stored, "loop/"), json.loads(metadata["numbers"])


def _below(stored: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
