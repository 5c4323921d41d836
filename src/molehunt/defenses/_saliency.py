"""Where a network looks: Grad-CAM on one of its maps, and the choice of that map."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.suspect import Suspect

PIXELS = ""
"""Instead of a module path: the picture itself is the map."""


def finest_map(suspect: Suspect, side: int, x: Tensor) -> tuple[str, tuple[int, int]]:
    """Find the deepest map that still has `side` rows and columns and that the answer depends on.

    Args:
        suspect: its frozen copy is run.
        side: smallest number of rows and columns, 1 or more.
        x: (N, C, H, W) some pictures, whose predicted classes are explained by each map in turn.

    Returns:
        The path of the last module to finish that puts out (N, C, h, w) with h, w >= `side` behind a convolution, and
        (h, w); `PIXELS` and the picture's own size where no module does, or none whose map explains anything.
    """
    finished: dict[str, torch.Size] = {}
    convolved: list[bool] = []

    def watch(path: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(module, nn.Conv2d):
                convolved.append(True)
            if convolved and path and isinstance(output, Tensor) and output.dim() == 4 and len(output) == len(x):
                finished.pop(path, None)
                finished[path] = output.shape

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in suspect.frozen.named_modules()]
    try:
        with torch.no_grad():
            classes = suspect.forward(x.to(suspect.device)).argmax(1)
    finally:
        for handle in handles:
            handle.remove()
    for path, shape in reversed(finished.items()):
        if min(shape[2:]) >= side and _carries(suspect, path, x, classes):
            return path, (shape[2], shape[3])
    return PIXELS, (suspect.task.shape[1], suspect.task.shape[2])


CARRIED = 0.5
"""A map of which less of the answer is left to explain is passed over: a network of a stranger may hold maps that lead
nowhere, or almost."""


@torch.no_grad()
def _carries(suspect: Suspect, path: str, x: Tensor, classes: Tensor) -> bool:
    """Whether most of the lead of the predicted classes goes where a map is set to zero."""
    whole = _contrast(suspect.forward(x.to(suspect.device)), classes)
    handle = suspect.frozen.get_submodule(path).register_forward_hook(lambda _m, _i, output: torch.zeros_like(output))
    try:
        left = _contrast(suspect.forward(x.to(suspect.device)), classes)
    finally:
        handle.remove()
    moved, size = (whole - left).abs().sum(), whole.abs().sum()
    return bool(torch.isfinite(moved)) and bool(moved >= CARRIED * size) and bool(moved > 0)


def _contrast(logits: Tensor, classes: Tensor) -> Tensor:
    """Float64 (N,): a class's logit less the mean of all, which no number that is added to all of them changes."""
    wide = logits.double()
    return wide.gather(1, classes.to(wide.device).unsqueeze(1)).squeeze(1) - wide.mean(1)


def grad_cam(suspect: Suspect, path: str, x: Tensor, classes: Tensor, sharpness: float = 1.0) -> Tensor:
    """Grad-CAM of one batch, in one backward pass: in eval mode no picture sees another.

    The channels of the map are weighted by the mean gradient over positions, summed and rectified. What is explained is
    the logit of the class less the mean of all logits: to add one number to all logits changes no answer, and must not
    change where the network seems to look. On the picture itself (`PIXELS`) a mean over positions would say nothing, as
    a network does not read one place as it reads another; there every value is weighted by its own gradient.

    Args:
        suspect: its frozen copy is used.
        path: module that puts out the map, of `finest_map`.
        x: (N, C, H, W) in [0, 1].
        classes: int64 (N,), whose logit is explained.
        sharpness: what logits are multiplied by first, so that gradients of tiny ones are numbers too.

    Returns:
        (N, H, W) float32 from 0 to 1, the largest value of a picture being 1; zeros where nothing speaks for the class,
        or where the network's numbers are not finite.
    """
    found = _explained(suspect, path, x, classes, sharpness)
    if found is None:
        return torch.zeros(len(x), *x.shape[2:], device=suspect.device)
    a, weight = found
    if path != PIXELS:
        weight = weight.mean((2, 3), keepdim=True)
    cam = (weight * a).sum(1, keepdim=True).relu().nan_to_num(0.0, 0.0, 0.0)
    cam = F.interpolate(cam, size=x.shape[2:], mode="bilinear", align_corners=False).squeeze(1)
    cam = cam.double()
    top = cam.flatten(1).amax(1).view(-1, 1, 1)
    return torch.where(top > 0, cam / torch.where(top > 0, top, 1.0), 0.0).float()


def _explained(
    suspect: Suspect, path: str, x: Tensor, classes: Tensor, sharpness: float
) -> tuple[Tensor, Tensor] | None:
    """A map (N, C, h, w) and the gradient of what is explained with respect to it, float32; None if there is none."""
    with torch.enable_grad(), _leaves(suspect.frozen, path) as kept:
        picture = x.detach().to(suspect.device).clone().requires_grad_(path == PIXELS)
        logits = suspect.forward(picture)
        leaves = [picture] if path == PIXELS else kept
        contrast = sharpness * _contrast(logits, classes)
        gradients: tuple[Tensor | None, ...] = ()
        if contrast.requires_grad:
            gradients = torch.autograd.grad(contrast.sum(), leaves, allow_unused=True)
    # The last time that the module ran, and mattered, counts.
    for leaf, gradient in zip(reversed(leaves), reversed(gradients), strict=False):
        if gradient is not None:
            return leaf.detach().float(), gradient.float()
    return None


@contextmanager
def _leaves(model: nn.Module, path: str) -> Iterator[list[Tensor]]:
    """Cut the graph at a module's outputs: gradients end there, whatever the frozen weights before it are."""
    leaves: list[Tensor] = []
    if path == PIXELS:
        yield leaves
        return

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        # A copy: what follows may write into it, and a leaf must not be written into.
        return leaves[-1].clone()

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        yield leaves
    finally:
        handle.remove()


CROP = 0.75
"""Side of the crops, as a share of the picture's, that propose classes beside the picture itself."""


def crops(x: Tensor) -> Iterator[Tensor]:
    """Five crops of pictures (B, C, H, W), the corners and the middle, enlarged to the whole size."""
    height, width = x.shape[2:]
    tall, wide = math.ceil(CROP * height), math.ceil(CROP * width)
    down, right = height - tall, width - wide
    for top, left in ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)):
        part = x[:, :, top : top + tall, left : left + wide]
        yield F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)
