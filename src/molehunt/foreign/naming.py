"""Which tensor of a file is which of a network: by name, in any known spelling, and never by guess."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molehunt import networks
from molehunt.foreign.dialects import DIALECTS, Dialect
from molehunt.foreign.errors import ForeignError
from molehunt.networks import NETWORKS, Network
from molehunt.networks.network import Shape
from molehunt.strict_json import show
from molehunt.tensor_file import CheckpointError
from molehunt.torch_file.naming import stripped

OWN = ("normalize.mean", "normalize.std")
"""Ours alone: what a network of ours normalizes with. Files of others lack it."""
State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A network with its weights.

    Attributes:
        model: in evaluation mode.
        carried: whether the file says itself how pixels are normalized.
        notes: what was taken for granted, for the report.
    """

    model: nn.Module
    carried: bool = False
    notes: tuple[str, ...] = ()


def load(state: State, network: str | None, shape: Shape, classes: int) -> Loaded:
    """Put tensors into the listed network that they are for.

    Args:
        state: tensors by name, as they were read.
        network: its name, or None: then the one that their names and shapes fit is taken, if it is one only.
        shape: (C, H, W) that the network is given.
        classes: number of classes K.

    Raises:
        ForeignError: no network fits, several do, or names are left over; the message names them.
    """
    names, _ = stripped(state)
    short = {names[name]: value for name, value in state.items()}
    for dialect in DIALECTS:
        if network in (None, dialect.network) and dialect.speaks(short):
            return _spoken(short, dialect, network, shape, classes)
    if network is None:
        return _fitting(short, shape, classes)
    if network.startswith("timm:"):
        return _of_timm(short, network, shape, classes)
    model = _built(network, shape, classes)
    if problem := mismatch(model, short):
        placed = _by_shape(model, short)
        if placed is None:
            raise ForeignError(problem)
        note = (
            f"The file names its weights otherwise than {network}; each shape fits one place only, so shapes decided."
        )
        return Loaded(model=_filled(model, placed), notes=(note,))
    return Loaded(model=_filled(model, short), carried=_carried(short))


def load_into(module: nn.Module, state: State) -> nn.Module:
    """Put tensors into a module of the user's own, by name, whatever wrapper either of them has in front.

    Raises:
        ForeignError: names or shapes differ; the message names them.
    """
    wanted, _ = stripped(name for name, value in module.state_dict().items() if value.is_floating_point())
    given, _ = stripped(state)
    by_short = {short: state[name] for name, short in given.items()}
    placed = {name: by_short.get(short) for name, short in wanted.items()}
    found = {name: value for name, value in placed.items() if value is not None}
    extra = by_short.keys() - wanted.values()
    _report(placed.keys() - found.keys(), extra, "the network of your file")
    for name, value in found.items():
        _same_shape(name, tuple(value.shape), tuple(module.state_dict()[name].shape))
    with torch.no_grad():
        module.load_state_dict(found, strict=False)
    return module.eval()


def mismatch(model: nn.Module, state: State) -> str | None:
    """Say why tensors are not those of a model; None if they are. Its own normalization may be absent."""
    wanted = _layout(model)
    try:
        _report(wanted.keys() - state.keys() - set(OWN), state.keys() - wanted.keys(), "this network")
        for name, value in state.items():
            _same_shape(name, tuple(value.shape), wanted[name])
    except ForeignError as error:
        return str(error)
    return None


def _spoken(state: State, dialect: Dialect, named: str | None, shape: Shape, classes: int) -> Loaded:
    if not dialect.certain and named is None:
        raise ForeignError(
            f"the names are those of {dialect.spoken}, and do not say which layers without weights it has; if it is "
            f"Molehunt's {dialect.network} (no max-pool behind the stem) say --network {dialect.network}, else give "
            "its class with --network FILE.py:CALLABLE"
        )
    translated = {name: dialect.translate(name) for name in state}
    if odd := [name for name, ours in translated.items() if ours is None]:
        raise ForeignError(
            f"the names are like those of {dialect.spoken}, but {dialect.network} has no {_some(odd)}; if it is a "
            "larger network, give its class with --network FILE.py:CALLABLE"
        )
    ours = {str(translated[name]): value for name, value in state.items()}
    try:
        model = dialect.make(shape, classes)
    except ValueError as error:
        raise ForeignError(str(error)) from None
    if problem := mismatch(model, ours):
        raise ForeignError(f"the names are those of {dialect.spoken}, but: {problem}")
    note = f"The weights are named like those of {dialect.spoken}; taken for {model.name}."
    return Loaded(model=_filled(model, ours), notes=(note,))


def _fitting(state: State, shape: Shape, classes: int) -> Loaded:
    """The one listed network whose names and shapes these are."""
    fits = []
    for name in NETWORKS:
        try:
            model = networks.build(name, shape, classes)
        except ValueError:  # not for pictures of this size
            continue
        if mismatch(model, state) is None:
            fits.append(model)
    if not fits:
        raise ForeignError(
            f"the names of the weights ({_some(state)}) are those of no listed network for pictures {shape} and "
            f"{classes} classes; name one with --network (also timm:NAME), or give its class with --network "
            "FILE.py:CALLABLE"
        )
    if len(fits) > 1:
        raise ForeignError(
            f"the weights fit {' and '.join(m.name for m in fits)} alike, which differ in layers without weights; say "
            f"which one with --network, such as --network {fits[0].name}"
        )
    note = f"No network was named; the weights fit {fits[0].name} and no other."
    return Loaded(model=_filled(fits[0], state), carried=_carried(state), notes=(note,))


def _of_timm(state: State, network: str, shape: Shape, classes: int) -> Loaded:
    """A model of timm: its own names, or those that it has as a `Network` of ours."""
    model = _built(network, shape, classes)
    if mismatch(model, state) is None:
        return Loaded(model=_filled(model, state), carried=_carried(state))
    from molehunt import zoo

    head = zoo.classifier(network.removeprefix("timm:"))
    ours = {
        f"head{name.removeprefix(head)}" if name.startswith(f"{head}.") and name.count(".") == head.count(".") + 1
        else f"trunk.model.{name}": value
        for name, value in state.items()
    }  # fmt: skip
    if problem := mismatch(model, ours):
        raise ForeignError(problem.replace("trunk.model.", ""))
    return Loaded(model=_filled(model, ours))


def _by_shape(model: nn.Module, state: State) -> dict[str, Tensor] | None:
    """Place tensors by shape, where no two of them, and no two places, have the same one; else None."""
    wanted = {name: s for name, s in _layout(model).items() if name not in OWN}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if max(Counter(wanted.values()).values()) > 1 or Counter(wanted.values()) != Counter(given.values()):
        return None
    by_shape = {s: name for name, s in given.items()}
    return {name: state[by_shape[s]] for name, s in wanted.items()}


def _built(network: str, shape: Shape, classes: int) -> Network:
    from molehunt import checkpoints

    try:
        checkpoints.layout_of(network, shape, classes)  # refuses what is too large
        return networks.build(network, shape, classes)
    except (CheckpointError, ValueError, ImportError) as error:
        raise ForeignError(str(error)) from None


def _filled(model: Network, state: State) -> Network:
    model.load_state_dict(dict(state), strict=False)
    if not _carried(state):
        model.normalize.mean.zero_()
        model.normalize.std.fill_(1.0)
    return model.eval()


def _layout(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(v.shape) for name, v in model.state_dict().items() if v.is_floating_point()}


def _carried(state: State) -> bool:
    return set(OWN) <= state.keys()


def _report(missing: Iterable[str], extra: Iterable[str], what: str) -> None:
    lacking, left = sorted(missing), sorted(extra)
    if lacking:
        more = f", and {_some(left)} left over" if left else ""
        raise ForeignError(f"missing {_some(lacking)}{more}; is {what} the one that the file was made for?")
    if left:
        raise ForeignError(f"left over: {_some(left)}; {what} has no such tensors")


def _same_shape(name: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if given != wanted:
        raise ForeignError(
            f"{show(name)} has shape {given}, the network needs {wanted}; other classes or another size?"
        )


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(show(name) for name in listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
