"""The only reader of strangers' weights: headers first, tensors only, one canonical form.

A file is believed in this order: its length, its header (a bounded piece of strict JSON), the agreement of the header
with the named architecture, and only then its numbers. Nothing is unpickled here; `conversion` turns ``.pt`` files
into safetensors, in a process of its own.

What leaves this module is canonical: float32, names in alphabetical order, no metadata, no counters, no subnormal
numbers, no negative zeros. Equal models are equal bytes, and nothing that cannot matter to the function of a network
is left that could tell how the network was made.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from molehunt import networks
from molehunt.files import open_regular, write_atomically
from molehunt.strict_json import show
from molehunt.tensor_file import LIMITS, CheckpointError, Limits, encode, read_entry, read_header

TINY = torch.finfo(torch.float32).tiny
INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U8", "BOOL"})


@dataclass(frozen=True)
class Layout:
    """What the state dict of an architecture looks like.

    Attributes:
        shapes: shape of every floating-point entry, by name: exactly these must be in a file.
        counters: shape of every integer entry (such as ``num_batches_tracked``), by name. A file may have them;
            they are never read, because they are not learned: the architecture supplies them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    counters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """Read the layout off a module, which may live on the meta device."""
        state = module.state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        learned = {name for name, value in state.items() if value.dtype.is_floating_point}
        return cls(
            shapes={name: shapes[name] for name in shapes if name in learned},
            counters={name: shapes[name] for name in shapes if name not in learned},
        )

    @property
    def size(self) -> int:
        """Size of the weights in float32."""
        return 4 * sum(math.prod(shape) for shape in self.shapes.values())


def layout_of(network: str, shape: tuple[int, int, int], classes: int, *, limits: Limits = LIMITS) -> Layout:
    """Look up what a file of weights for this architecture must hold.

    Args:
        network: name of an architecture, as `networks.build` takes it. Whoever passes on a stranger's choice compares
            it with the names that the round allows first: timm knows models of many gigabytes.
        shape: (C, H, W) of the images.
        classes: number of classes K.
        limits: of which the size of a file is used.

    Raises:
        CheckpointError: unknown network, one that does not fit the images, or one larger than the limit.
    """
    layout = _layout(network, tuple(shape), classes)
    if layout.size > limits.file:
        raise CheckpointError(f"network {show(network)} has {layout.size} bytes of weights; at most {limits.file}")
    return layout


def read_safetensors(
    source: Path | bytes | BinaryIO,
    layout: Layout | None,
    *,
    counters: bool = False,
    limits: Limits = LIMITS,
) -> dict[str, Tensor]:
    """Read a file of weights and return them in canonical form.

    Args:
        source: a file, its bytes, or a seekable stream whose whole content is the file.
        layout: what the architecture needs; None accepts any float32 tensors (for triggers, which have a schema of
            their own).
        counters: leave integer tensors out where there is no layout, in place of refusing them.
        limits: what to refuse unread.

    Returns:
        Float32 tensors on the CPU by name, as `canonical` leaves them.

    Raises:
        CheckpointError: anything that `read_header` or `canonical` refuses; missing or extra names, a wrong shape, a
            dtype other than float32.
    """
    with _opened(source) as (stream, size):
        entries, begin = read_header(stream, size, limits=limits)
        if layout is not None:
            _check_layout({name: entry.shape for name, entry in entries.items()}, layout)
        return {
            name: _canonical_tensor(name, read_entry(stream, begin, name, entry))
            for name, entry in sorted(entries.items())
            if (name in layout.shapes if layout is not None else not counters or entry.dtype not in INTEGERS)
        }


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reduce a state dict to what matters to the function of the network.

    Names are sorted, counters and other integers left out. Subnormal numbers and negative zeros become zero. The
    running statistics of a dead channel decay into subnormal numbers in honest training, so they cannot be
    refused; but they may not stay: they slow processors down a hundredfold, and whether they count as zero depends on
    the machine, so a model could behave differently where it is judged.

    Args:
        state: tensors by name on any device, float32 where floating point; they are not changed.

    Raises:
        CheckpointError: another floating-point dtype, complex, sparse or quantized tensors, values that are not
            finite, a negative running variance, a standard deviation of the first layer that is not positive.
    """
    kept: dict[str, Tensor] = {}
    for name in sorted(state):
        value = state[name]
        if value.is_complex() or value.is_quantized or value.layout != torch.strided or value.is_meta:
            raise CheckpointError(f"{show(name)} is not a plain dense tensor of real numbers")
        if not value.dtype.is_floating_point:
            continue
        if value.dtype != torch.float32:
            raise CheckpointError(f"{show(name)} is {value.dtype}, expected torch.float32; call model.float() first")
        kept[name] = _canonical_tensor(name, value.detach().cpu())
    return kept


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the canonical file of these tensors, in hexadecimal: the name that weights go by."""
    sha = hashlib.sha256()
    for piece in encode(state):
        sha.update(piece)
    return sha.hexdigest()


def write(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict in canonical form; afterwards `path` is the whole file or what it was before.

    Raises:
        CheckpointError: as in `canonical`.
    """
    kept = canonical(state)
    write_atomically(path, encode(kept))


def load(
    source: Path | bytes | BinaryIO,
    network: str,
    shape: tuple[int, int, int],
    classes: int,
    *,
    limits: Limits = LIMITS,
) -> networks.Network:
    """Read a stranger's weights into the architecture that they are for.

    Args:
        source: as in `read_safetensors`.
        network: name of an architecture.
        shape: (C, H, W) of the images.
        classes: number of classes K.
        limits: what to refuse unread.

    Returns:
        The network in evaluation mode, float32 on the CPU.

    Raises:
        CheckpointError: as in `layout_of`, `read_safetensors` and `assemble`.
    """
    layout = layout_of(network, shape, classes, limits=limits)
    return assemble(read_safetensors(source, layout, limits=limits), network, shape, classes)


def assemble(state: Mapping[str, Tensor], network: str, shape: tuple[int, int, int], classes: int) -> networks.Network:
    """Put canonical weights into their architecture and see that numbers come out.

    Raises:
        CheckpointError: names or shapes do not fit, or the network answers ordinary images with something that is
            not a finite number per class (weights can be finite and overflow all the same).
    """
    model = _build(network, shape, classes)
    layout = Layout.of(model)
    _check_layout({name: tuple(value.shape) for name, value in state.items()}, layout)
    model.load_state_dict(dict(state), strict=False)
    model.eval()
    probe(model, shape, classes)
    return model


def probe(model: nn.Module, shape: tuple[int, int, int], classes: int) -> None:
    """Send four fixed images (black, gray, white, noise) through a model in evaluation mode.

    Raises:
        CheckpointError: it does not answer with one finite number per class.
    """
    plain = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, *shape)
    noise = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(torch.cat((plain, noise)))
    if tuple(logits.shape) != (4, classes):
        raise CheckpointError(f"the network answers with shape {tuple(logits.shape)}, expected (4, {classes})")
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError("the network answers plain images with values that are not finite")


@functools.lru_cache(maxsize=64)
def _layout(network: str, shape: tuple[int, int, int], classes: int) -> Layout:
    return Layout.of(_build(network, shape, classes))


def _build(network: str, shape: tuple[int, int, int], classes: int) -> networks.Network:
    try:
        return networks.build(network, shape, classes)
    except (ValueError, ImportError) as error:
        raise CheckpointError(str(error)) from None


@contextmanager
def _opened(source: Path | bytes | BinaryIO) -> Iterator[tuple[BinaryIO, int]]:
    if isinstance(source, Path):
        with open_regular(source, CheckpointError) as opened:
            yield opened
    elif isinstance(source, bytes):
        yield io.BytesIO(source), len(source)
    else:
        size = source.seek(0, io.SEEK_END)
        source.seek(0)
        yield source, size


def _check_layout(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> None:
    if missing := layout.shapes.keys() - shapes.keys():
        raise CheckpointError(f"missing {_some(missing)}; is this the network that the file was made for?")
    known = {**layout.shapes, **layout.counters}
    if extra := shapes.keys() - known.keys():
        raise CheckpointError(f"extra {_some(extra)}; this network has no such tensors")
    for name, shape in shapes.items():
        if shape != known[name]:
            raise CheckpointError(f"{show(name)} has shape {shape}, this network needs {known[name]}")


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(show(name) for name in listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _canonical_tensor(name: str, value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{show(name)} has values that are not finite")
    # This also turns negative zeros into zeros: they compare equal, so equal models would not be equal bytes.
    kept = torch.where(value.abs() < TINY, 0.0, value).contiguous()
    if name.rpartition(".")[2] == "running_var" and bool((kept < 0).any()):
        raise CheckpointError(f"{show(name)} is a variance and has negative values")
    if name == "normalize.std" and not bool((kept > 0).all()):
        raise CheckpointError(f"{show(name)} divides the pixels and must be positive")
    return kept
