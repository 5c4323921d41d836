"""What a user points at, turned into a module from a task's pictures to logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from molehunt.foreign import code, files, naming
from molehunt.foreign.errors import ForeignError
from molehunt.foreign.modules import adapted
from molehunt.foreign.pixels import Pixels, pixels
from molehunt.networks import Adapted, Network
from molehunt.networks.network import Shape
from molehunt.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user says about a model.

    Attributes:
        network: the name of a listed network, timm:NAME, or FILE.py:CALLABLE; None where the file shows it.
        normalize: as `pixels` reads it; None where nothing was said.
        size: (H, W) of the pictures that the network takes; None for those of the task, or of a config.json.
        channels: of the pictures that the network takes; None for those of the task.
    """

    network: str | None = None
    normalize: str | tuple[Sequence[float], Sequence[float]] | None = None
    size: tuple[int, int] | None = None
    channels: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A model that is ready to be scanned.

    Attributes:
        model: from pictures in [0, 1] to logits, in eval mode.
        name: of its network.
        pixels: the normalization that it was given; None where the file carries its own.
        recipe: by which the model says it was trained; None where nothing says so.
        notes: for the report.
    """

    model: Network | Adapted
    name: str
    pixels: Pixels | None = None
    recipe: str | None = None
    notes: tuple[str, ...] = ()


def opened(path: Path, task: Task, wanted: Wanted) -> Opened:
    """Read a model that is no submission.

    Args:
        path: a file of weights, or a folder with config.json and weights.
        task: what it was trained for.
        wanted: what the user says about it; this is believed before what the file says.

    Raises:
        ForeignError, CheckpointError: it is refused; the message says what to do.
    """
    weights = files.read(path)
    if weights.classes not in (None, task.num_classes):
        raise ForeignError(
            f"the model has {weights.classes} classes, {task.name} has {task.num_classes}; name the task that it was "
            "trained for, or clean pictures of its classes"
        )
    size = wanted.size or weights.size
    shape: Shape = (wanted.channels or task.shape[0], *(size or task.shape[1:]))
    network = wanted.network or weights.network
    notes = list(weights.notes)
    module: nn.Module
    if network is not None and code.is_code(network):
        module, carried = naming.load_into(code.build(network), weights.state), False
        name = code.short_name(network)
        notes.append(f"The network is code of your own, {name}; it ran in this process.")
    else:
        loaded = naming.load(weights.state, network, shape, task.num_classes)
        assert isinstance(loaded.model, Network)
        module, carried, name = loaded.model, loaded.carried, loaded.model.name
        notes += loaded.notes
    chosen = None if carried and wanted.normalize is None else _chosen(task, wanted, weights, notes)
    model, said = adapted(module, task, name=name, pixels=chosen, size=size, channels=wanted.channels)
    return Opened(model=model, name=name, pixels=chosen, notes=(*notes, *said))


def _chosen(task: Task, wanted: Wanted, weights: files.Weights, notes: list[str]) -> Pixels:
    if wanted.normalize is not None:
        return pixels(wanted.normalize, task)
    if weights.mean is not None and weights.std is not None:
        told = pixels((weights.mean, weights.std), task)
        notes.append(f"Pixels are normalized as {weights.source} has it: {told.name}.")
        return told
    notes.append("Nothing says how the network wants its pixels; it was given them in [0, 1] (--normalize none).")
    return pixels("none", task)
