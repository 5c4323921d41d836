"""A suspect as files and back: what another process, or another machine, needs to ask a defense about it.

Tensors are safetensors files named by the SHA-256 of their bytes, so that what many evaluations share is written once;
everything else is one JSON document. There is no pickle on either side.
"""

import dataclasses
import hashlib
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from molehunt import triggers
from molehunt.findings import Candidate
from molehunt.metas import Meta
from molehunt.networks import NETWORKS, Adapted, Network, Normalize, build
from molehunt.suspect import Suspect
from molehunt.tasks import Images, Task

Json = dict[str, Any]


class Store:
    """A folder of tensors by content.

    Args:
        folder: is made when the first tensors come.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Hashing a training set takes half a second, so a tensor that is known and was not written to is not read
        # again. Weak, because the store must not keep the evidence of a finished round in memory.
        self._known: dict[tuple[tuple[str, int, int], ...], tuple[str, list[weakref.ref[Tensor]]]] = {}

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Keep some tensors as one file and return its name, the SHA-256 of its bytes in hexadecimal."""
        key = tuple((name, id(tensor), tensor._version) for name, tensor in tensors.items())
        if key in self._known:
            digest, references = self._known[key]
            if all(reference() is tensor for reference, tensor in zip(references, tensors.values(), strict=True)):
                return digest
        self._known = {k: v for k, v in self._known.items() if all(r() is not None for r in v[1])}
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            partial = Path(place) / "tensors"
            safetensors.torch.save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, partial)
            with partial.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            partial.replace(self.path(digest))
        self._known[key] = digest, [weakref.ref(tensor) for tensor in tensors.values()]
        return digest

    def get(self, digest: str) -> dict[str, Tensor]:
        """Map a file into memory; what is written to its tensors stays in this process."""
        tensors: dict[str, Tensor] = safetensors.torch.load_file(self.path(digest))
        return tensors

    def path(self, digest: str) -> Path:
        """Where a file is.

        Raises:
            ValueError: that is no SHA-256.
        """
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise ValueError(f"expected a SHA-256 in hexadecimal, got {digest!r}")
        return self.folder / f"{digest}.safetensors"


def describe(suspect: Suspect, store: Store) -> Json:
    """Write a suspect's tensors to the store and everything else into a JSON document.

    Raises:
        ValueError: the model, or a reference model, is none of `NETWORKS`, so that its code would have to travel too.
    """

    def images(of: Images | None) -> str | None:
        return None if of is None else store.put({"x": of.x, "y": of.y})

    return {
        # The fields of `Task` only: a kind of task that carries its pictures along must not hand those on.
        "task": {field.name: getattr(suspect.task, field.name) for field in dataclasses.fields(Task)},
        "model": _describe_model(suspect.model, store),
        "clean": images(suspect.clean),
        "training": images(suspect.training),
        "inputs": None if suspect.inputs is None else store.put({"x": suspect.inputs}),
        "candidates": None if suspect.candidates is None else [_describe(c, store) for c in suspect.candidates],
        "references": None if suspect.references is None else [_describe_model(m, store) for m in suspect.references],
        "metas": None
        if suspect.metas is None
        else [{"meta": m.to_json(), "tensors": store.put(m.state_dict(keep_vars=True))} for m in suspect.metas],
        "device": str(suspect.device),
        "dtype": str(suspect.dtype).removeprefix("torch."),
    }


def assemble(document: Json, store: Store) -> Suspect:
    """Make the suspect again from what `describe` gave.

    Raises:
        ValueError: a tensor is missing or does not fit.
    """

    def images(digest: str | None) -> Images | None:
        return None if digest is None else Images(**store.get(digest))

    fields: Json = {k: tuple(v) if isinstance(v, list) else v for k, v in document["task"].items()}
    candidates, references, metas = (document[name] for name in ("candidates", "references", "metas"))
    return Suspect.of(
        _assemble_model(document["model"], store),
        Task(**fields),
        clean=images(document["clean"]),
        training=images(document["training"]),
        inputs=None if document["inputs"] is None else store.get(document["inputs"])["x"],
        candidates=None if candidates is None else tuple(_assemble(c, store) for c in candidates),
        references=None if references is None else tuple(_assemble_model(m, store) for m in references),
        metas=None if metas is None else tuple(Meta.from_json(m["meta"], store.get(m["tensors"])) for m in metas),
        device=document["device"],
        dtype=getattr(torch, document["dtype"]),
    )


def digests(document: Any) -> Iterator[str]:
    """Names of all files that a description points to."""
    if isinstance(document, str) and len(document) == 64:
        yield document
    elif isinstance(document, dict):
        for key, value in document.items():
            if key != "task":  # its class names are free text
                yield from digests(value)
    elif isinstance(document, list):
        for value in document:
            yield from digests(value)


def _describe(candidate: Candidate, store: Store) -> Json:
    tensors = candidate.trigger.tensors()
    return {
        "trigger": candidate.trigger.to_json(),
        "tensors": store.put(tensors) if tensors else None,
        "target": candidate.target,
        "defense": candidate.defense,
    }


def _assemble(document: Json, store: Store) -> Candidate:
    tensors = {} if document["tensors"] is None else store.get(document["tensors"])
    trigger = triggers.from_json(document["trigger"], tensors)
    return Candidate(trigger=trigger, target=document["target"], defense=document["defense"])


def unportable(model: nn.Module) -> str | None:
    """Say why a model cannot be handed on as data; None if it can."""
    inner = model.model if isinstance(model, Adapted) else model
    name = inner.name if isinstance(inner, Network) else type(inner).__name__
    if isinstance(inner, Network) and (name in NETWORKS or name.startswith("timm:")):
        return None
    return f"only what `build` makes can be handed on as data, got a network {name!r}"


def _describe_model(model: nn.Module, store: Store) -> Json:
    if (reason := unportable(model)) is not None:
        raise ValueError(reason)
    inner = model.model if isinstance(model, Adapted) else model
    assert isinstance(inner, Network)
    weights = store.put(model.state_dict(keep_vars=True))
    document = {"network": inner.name, "shape": list(inner.shape), "classes": inner.classes, "weights": weights}
    if isinstance(model, Adapted):
        document["adapted"] = {
            "name": model.name,
            "shape": list(model.shape),
            "size": None if model.size is None else list(model.size),
            "channels": model.channels,
            "probabilities": model.probabilities,
        }
    return document


def _assemble_model(document: Json, store: Store) -> nn.Module:
    model: nn.Module = build(document["network"], tuple(document["shape"]), document["classes"])
    if (given := document.get("adapted")) is not None:
        unit = torch.ones(given["channels"], 1, 1)
        model = Adapted(
            model,
            name=given["name"],
            shape=tuple(given["shape"]),
            classes=document["classes"],
            normalize=Normalize(torch.zeros_like(unit), unit),
            size=None if given["size"] is None else tuple(given["size"]),
            channels=given["channels"],
            probabilities=given["probabilities"],
        )
    model.load_state_dict(store.get(document["weights"]))
    return model
