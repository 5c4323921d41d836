"""Networks that are one chain of layers, and which weights lead from some of their channels to some others."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molehunt.networks import Dropout, Network, Whitening

PASSIVE = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Flatten, nn.Identity, Dropout)


@dataclass(frozen=True, kw_only=True, eq=False)
class Link:
    """One layer with weights.

    Attributes:
        path: of the convolution or linear layer.
        norm: path of the batch norm behind it; None where there is none.
        outputs: channels, or units, that it puts out.
        fixed: whether it is never trained, as a whitening is: a detector of all that follows, not of a class.
    """

    path: str
    norm: str | None
    outputs: int
    fixed: bool


def chain(model: Network) -> list[Link]:
    """The layers of trunk and neck in the order in which they run.

    Raises:
        ValueError: the network is no chain: it has branches, or layers that are not known here.
    """
    links: list[Link] = []
    for path, layer in layers(model):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fixed = isinstance(layer, Whitening) or not layer.weight.requires_grad
            links.append(Link(path=path, norm=None, outputs=len(layer.weight), fixed=fixed))
        elif isinstance(layer, nn.BatchNorm2d) and links:
            links[-1] = Link(path=links[-1].path, norm=path, outputs=links[-1].outputs, fixed=links[-1].fixed)
        elif not isinstance(layer, PASSIVE) and next(layer.parameters(), None) is not None:
            raise ValueError(f"{model.name} is no chain of layers: {path} is a {type(layer).__name__}")
    return links


def layers(model: Network) -> list[tuple[str, nn.Module]]:
    """All layers of trunk and neck in the order in which they run, those without weights too, by path.

    Raises:
        ValueError: trunk or neck is no sequence of layers.
    """
    found: list[tuple[str, nn.Module]] = []
    for part in ("trunk", "neck"):
        whole = model.get_submodule(part)
        if not isinstance(whole, nn.Sequential) and list(whole.children()):
            raise ValueError(f"{model.name} is no chain of layers: its {part} is a {type(whole).__name__}")
        found += [(f"{part}.{name}", layer) for name, layer in whole.named_children()] or [(part, whole)]
    return found


def narrow(links: list[Link], width: int, rng: torch.Generator) -> list[Tensor]:
    """Draw so many channels of every layer, bool (C,) each; all of a fixed one."""
    drawn = []
    for link in links:
        picked = torch.zeros(link.outputs, dtype=torch.bool)
        picked[torch.randperm(link.outputs, generator=rng)[: link.outputs if link.fixed else width]] = True
        drawn.append(picked)
    return drawn


def inside(model: Network, links: list[Link], picked: list[Tensor]) -> dict[str, Tensor]:
    """By name, bool like each weight: those that lead from picked channels to picked channels, norms and biases too.

    The head's are those of its picked inputs, for every class; its bias has none.
    """
    state = model.state_dict()
    masks = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in state.items()}
    before = torch.ones(model.shape[0], dtype=torch.bool)
    for link, out in zip(links, picked, strict=True):
        weight = state[f"{link.path}.weight"]
        columns = before.repeat_interleave(weight.shape[1] // len(before))
        both = out.view(-1, 1) & columns.view(1, -1)
        masks[f"{link.path}.weight"] = both.view(*both.shape, *[1] * (weight.dim() - 2)).expand_as(weight).clone()
        for owner in (link.path, link.norm):
            for name in ("bias", "weight", "running_mean", "running_var"):
                key = f"{owner}.{name}"
                if key in masks and state[key].dim() == 1:
                    masks[key] = out.clone()
        before = out
    columns = before.repeat_interleave(model.head.in_features // len(before))
    masks["head.weight"] = columns.expand_as(state["head.weight"]).clone()
    return masks


def touching(model: Network, links: list[Link], picked: list[Tensor]) -> dict[str, Tensor]:
    """By name, bool like each weight: those that lead to a picked channel, or from one, whatever is at the other end.

    A fixed layer is read by all, so nothing is cut behind it.
    """
    masks = inside(model, links, picked)
    before, shared = torch.ones(model.shape[0], dtype=torch.bool), True
    for link, out in zip(links, picked, strict=True):
        mask = masks[f"{link.path}.weight"]
        if not link.fixed:
            mask |= out.view(-1, *[1] * (mask.dim() - 1))
            if not shared:
                columns = before.repeat_interleave(mask.shape[1] // len(before))
                mask |= columns.view(1, -1, *[1] * (mask.dim() - 2))
        before, shared = out, link.fixed
    return masks
