"""Which filters a pruned copy loses, and the copies: shared mathematics of pruning-based detection."""

import copy
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
import torch_pruning
from torch import Tensor, nn

Mode: TypeAlias = Literal["reset", "remove", "trim"]
Sampling: TypeAlias = Literal["targeted", "uniform", "random"]
Ranking: TypeAlias = Literal["l1", "l2", "linf", "std"]

RANKINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda w: w.abs().sum(1),
    "l2": lambda w: w.square().sum(1),
    "linf": lambda w: w.abs().amax(1),
    "std": lambda w: w.std(1, correction=0),
}
"""What a filter weighs: (C, n) weights to (C,) values."""
TRIM = 0.5
"""Standard deviations from the mean that `trim` leaves."""


def filters(model: nn.Module) -> dict[str, str | None]:
    """Return the convolutions whose filters are pruned, by path, each with the batch norm that it feeds, or None.

    A norm belongs to a convolution where both follow each other in one `nn.Sequential`, also with a max-pool between.
    Layers that occur in several places are left out: a filter of theirs is not a filter of one place.

    Args:
        model: any module; module paths are those of `named_modules`.
    """
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    found: dict[str, str | None] = {
        path: None for path, module in model.named_modules() if isinstance(module, nn.Conv2d) and uses[id(module)] == 1
    }
    for place, sequence in model.named_modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        names = list(sequence._modules)
        for here, after in pairwise(names):
            path, following = f"{place}.{here}".lstrip("."), after
            if isinstance(sequence._modules[after], nn.MaxPool2d) and after != names[-1]:
                following = names[names.index(after) + 1]
            norm = sequence._modules[following]
            if path in found and isinstance(norm, nn.BatchNorm2d) and uses[id(norm)] == 1:
                found[path] = f"{place}.{following}".lstrip(".")
    return found


def chosen(
    weight: Tensor, copies: int, share: float, ranking: Ranking, sampling: Sampling, rng: torch.Generator
) -> Tensor:
    """Return which filters each copy loses: bool (S, C), in every copy max(1, int(C share)) of them, and never all.

    *targeted* takes neighbors in the order of weight, from the lightest in the first copy to the heaviest in the last;
    *uniform* takes every (C / m)-th filter of that order, each copy a little further; *random* draws m without
    replacement.

    Args:
        weight: (C, ...) weights of a layer, one filter per row.
        copies: S.
        share: of the filters, in [0, 1]; 0 takes none.
        ranking: what a filter weighs.
        sampling: as above.
        rng: for *random*.
    """
    count = len(weight)
    lost = torch.zeros(copies, count, dtype=torch.bool)
    if share <= 0:
        return lost
    m = min(count - 1, max(1, int(count * share)))
    order = torch.argsort(RANKINGS[ranking](weight.detach().double().flatten(1)), stable=True).cpu()
    for s in range(copies):
        if sampling == "random":
            rows = torch.randperm(count, generator=rng)[:m]
        elif sampling == "targeted":
            # From end to end, however few filters there are: a fixed step would be 0 where C < S - 1.
            start = round(s * (count - m) / max(1, copies - 1))
            rows = order[start : start + m]
        else:
            rows = order[((torch.arange(m) + s / copies) * count / m).long()]
        lost[s, rows] = True
    return lost


def trimmed(values: Tensor, rows: Tensor) -> Tensor:
    """Clamp chosen filters to their own mean, give or take `TRIM` of their own standard deviations.

    Args:
        values: (C, ...) weights; a norm's (C,) are one filter.
        rows: bool (C,), which are clamped.
    """
    flat = values.flatten(1) if values.dim() > 1 else values.unsqueeze(0)
    middle, spread = flat.mean(1, keepdim=True), TRIM * flat.std(1, correction=0, keepdim=True)
    clamped = torch.minimum(torch.maximum(flat, middle - spread), middle + spread).reshape(values.shape)
    return torch.where(rows.view(-1, *(1,) * (values.dim() - 1)), clamped, values)


@torch.no_grad()
def pruned(model: nn.Module, lost: dict[str, Tensor], mode: Mode, example: Tensor) -> nn.Module:
    """Return a copy of a model without, or with trimmed, filters.

    *reset* sets the chosen filters and their bias to 0, and the norm that they feed as well, so that nothing of them
    is left. *remove* cuts them out, with all that reads them and all that is added to them: where paths meet in a
    sum, the filters chosen for the first convolution are cut from all. *trim* clamps them (`trimmed`), and the scale
    of the norm.

    Args:
        model: any module in eval mode; not changed.
        lost: bool (C,) by path of the convolution.
        mode: as above.
        example: (1, C, H, W) image to trace the model with.
    """
    made = copy.deepcopy(model)
    if mode == "remove":
        _remove(made, lost, example)
        return made
    norms = filters(model)
    for path, rows in lost.items():
        layers = [made.get_submodule(path)]
        if (norm := norms[path]) is not None:
            layers.append(made.get_submodule(norm))
        for layer in layers:
            assert isinstance(layer, nn.Conv2d | nn.BatchNorm2d)
            # A norm without a scale of its own has nothing to lose, and a zero stays a constant behind it.
            if layer.weight is None:
                continue
            here = rows.to(layer.weight.device)
            if mode == "trim":
                layer.weight.copy_(trimmed(layer.weight, here))
                continue
            layer.weight[here] = 0.0
            if layer.bias is not None:
                layer.bias[here] = 0.0
    return made


def _remove(model: nn.Module, lost: dict[str, Tensor], example: Tensor) -> None:
    """Cut filters out in place, group by group; a filter that a sum ties to one already cut is gone with it."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # the dependencies are read off the graph of gradients
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    done: set[int] = set()
    for path, rows in lost.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Conv2d)
        # Who feeds a grouped convolution cuts its filters; they cannot be chosen one by one.
        if id(layer) in done or layer.groups > 1 or not bool(rows.any()):
            continue
        group = graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, rows.nonzero().flatten().tolist())
        done |= {id(dep.target.module) for dep, _ in group if dep.handler == torch_pruning.prune_conv_out_channels}
        group.prune()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
