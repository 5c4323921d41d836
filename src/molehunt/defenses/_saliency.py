"""Where a network looks: Grad-CAM on one of its maps, and the choice of that map."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.suspect import Suspect

PIXELS = ""
"""Instead of a module path: the picture itself is the map."""


@torch.no_grad()
def finest_map(suspect: Suspect, side: int) -> tuple[str, tuple[int, int]]:
    """Find the deepest map that still has `side` rows and columns.

    Args:
        suspect: its frozen copy is run once.
        side: smallest number of rows and columns, 1 or more.

    Returns:
        The path of the last module to finish that puts out (1, C, h, w) with h, w >= `side` behind a convolution, and
        (h, w); `PIXELS` and the picture's own size where no module does.
    """
    finished: list[tuple[str, torch.Size]] = []
    convolved: list[bool] = []

    def watch(path: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(module, nn.Conv2d):
                convolved.append(True)
            if convolved and path and isinstance(output, Tensor) and output.dim() == 4 and len(output) == 1:
                finished.append((path, output.shape))

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in suspect.frozen.named_modules()]
    try:
        suspect.forward(torch.zeros(1, *suspect.task.shape, device=suspect.device))
    finally:
        for handle in handles:
            handle.remove()
    fit = [(path, shape) for path, shape in finished if min(shape[2:]) >= side]
    if not fit:
        return PIXELS, (suspect.task.shape[1], suspect.task.shape[2])
    path, shape = fit[-1]
    return path, (shape[2], shape[3])


def grad_cam(suspect: Suspect, path: str, x: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM of one batch, in one backward pass: in eval mode no picture sees another.

    The channels of the map are weighted by the mean gradient of the class's logit over positions, summed and
    rectified. On the picture itself (`PIXELS`) that mean would say nothing, as a network does not read one place as it
    reads another; there every value is weighted by its own gradient.

    Args:
        suspect: its frozen copy is used.
        path: module that puts out the map, of `finest_map`.
        x: (N, C, H, W) in [0, 1].
        classes: int64 (N,), whose logit is explained.

    Returns:
        (N, H, W) float32 from 0 to 1, the largest value of a picture being 1; zeros where nothing speaks for the class.
    """
    x = x.to(suspect.device)
    with torch.enable_grad(), _leaf(suspect.frozen, path) as leaves:
        picture = x.detach().clone().requires_grad_(path == PIXELS)
        logits = suspect.forward(picture)
        # The last time that the module ran counts.
        leaf = picture if path == PIXELS else leaves[-1]
        picked = logits.gather(1, classes.to(logits.device).unsqueeze(1)).sum()
        (gradient,) = torch.autograd.grad(picked, leaf)
    a, weight = leaf.detach().float(), gradient.float()
    if path != PIXELS:
        weight = weight.mean((2, 3), keepdim=True)
    cam = (weight * a).sum(1, keepdim=True).relu()
    cam = F.interpolate(cam, size=x.shape[2:], mode="bilinear", align_corners=False).squeeze(1)
    top = cam.flatten(1).amax(1).view(-1, 1, 1)
    return torch.where(top > 0, cam / top.clamp_min(torch.finfo(cam.dtype).tiny), 0.0)


@contextmanager
def _leaf(model: nn.Module, path: str) -> Iterator[list[Tensor]]:
    """Cut the graph at a module's output: gradients end there, whatever the frozen weights before it are."""
    leaves: list[Tensor] = []
    if path == PIXELS:
        yield leaves
        return

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        yield leaves
    finally:
        handle.remove()
