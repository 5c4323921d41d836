"""A promise that is checked: a defense leaves its suspect as it found it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from molehunt.suspect import Suspect

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Untouched:
    """Remembers a suspect when it is made, and puts it back on `restore`.

    The weights of the suspect are compared with a copy, exactly. Of the evidence and the reference models only the
    version counters are kept, because a copy of a training set would double the memory of a scan: a write through
    `.data` is not noticed there, and what was written cannot be taken back.

    Args:
        suspect: as it is to stay.
    """

    def __init__(self, suspect: Suspect) -> None:
        self.models: dict[str, nn.Module] = {"model": suspect.model, "frozen": suspect.frozen}
        self.weights = {
            label: {name: (tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in _tensors(model)}
            for label, model in self.models.items()
        }
        self.modes = [(module, module.training) for model in self.models.values() for module in model.modules()]
        self.hooks = [
            (hooks, set(hooks))
            for model in self.models.values()
            for module in model.modules()
            for hooks in (getattr(module, kind) for kind in _HOOKS)
        ]
        evidence: list[tuple[str, Tensor]] = []
        for label in ("clean", "training"):
            if (images := getattr(suspect, label)) is not None:
                evidence += [(f"suspect.{label}.x", images.x), (f"suspect.{label}.y", images.y)]
        if suspect.inputs is not None:
            evidence.append(("suspect.inputs", suspect.inputs))
        for i, reference in enumerate(suspect.references or ()):
            evidence += [(f"suspect.references[{i}].{name}", tensor) for name, tensor in _tensors(reference)]
        for i, meta in enumerate(suspect.metas or ()):
            evidence += [(f"suspect.metas[{i}].{name}", tensor) for name, tensor in _tensors(meta)]
        # Tensors made under inference mode have no counter, but cannot be written to outside of it either.
        self.versions = [(label, t, t._version) for label, t in evidence if not t.is_inference()]

    def restore(self) -> str | None:
        """Put weights, modes and hooks back and say what was changed ("changed ..."), or None if nothing was."""
        damage: list[str] = []
        with torch.no_grad():
            for label, model in self.models.items():
                damage += self._restore_weights(label, model)
        for module, training in self.modes:
            if module.training != training:
                module.training = training
                damage.append("switched a module of the suspect between training and eval mode")
        for hooks, before in self.hooks:
            for key in set(hooks) - before:
                del hooks[key]
                damage.append("left a hook on the suspect")
        damage += [f"wrote to {label}" for label, tensor, version in self.versions if tensor._version != version]
        return damage[0] if damage else None

    def _restore_weights(self, label: str, model: nn.Module) -> Iterator[str]:
        now = dict(_tensors(model))
        before = self.weights[label]
        if now.keys() != before.keys():
            yield f"changed the layers of suspect.{label}"
            return
        for name, (tensor, kept, requires_grad) in before.items():
            if now[name] is not tensor:
                path, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(path), leaf, tensor)
                yield f"replaced {name} of suspect.{label}"
            if tensor.dtype != kept.dtype or tensor.shape != kept.shape or not _equal(tensor, kept):
                tensor.data = kept
                yield f"changed {name} of suspect.{label}"
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
                yield f"asked for gradients of {name} of suspect.{label}"
            if tensor.grad is not None:
                tensor.grad = None
                yield f"left a gradient on {name} of suspect.{label}"


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, those that are not saved too."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal in every value, a NaN to a NaN."""
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
