"""The suspect's network with new weights, for training anew with gradients of single samples."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from molehunt.engine import Run
from molehunt.networks import NETWORKS, Network, Whitening, build
from molehunt.networks.architectures import draw_weights
from molehunt.networks.blocks import Patches
from molehunt.tasks import Images

BATCH = 256
SAMPLES = 2048  # images that settle the statistics of batch norm


def fresh(model: nn.Module, images: Images, run: Run) -> nn.Module:
    """Make the same network with weights of its own: none of the submitted weights is used.

    Layers that are computed from data, and the statistics of batch norm, are set from the images.

    Args:
        model: the submitted one, left as it is.
        images: what it will be trained on.
        run: for its generator and its clock.

    Raises:
        ValueError: it has weights that nobody here knows how to draw.
    """
    known = isinstance(model, Network) and (model.name in NETWORKS or model.name.startswith("timm:"))
    if isinstance(model, Network) and known:
        mean, std = model.normalize.mean, model.normalize.std
        made: nn.Module = build(model.name, model.shape, model.classes, mean=mean.cpu(), std=std.cpu(), rng=run.rng)
    else:
        made = copy.deepcopy(model).cpu()
        for path, layer in made.named_modules():
            drawn = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, Patches)
            if next(layer.parameters(recurse=False), None) is not None and not isinstance(layer, drawn):
                raise ValueError(f"cannot draw new weights for {path!r} ({type(layer).__name__}): use mode 'fine_tune'")
            if isinstance(layer, nn.GroupNorm):
                layer.reset_parameters()
        draw_weights(made, run.rng)
    made.to(images.x.device).eval()
    if isinstance(made, Network):
        made.initialize(images.x)
    norms = [layer for layer in made.modules() if isinstance(layer, _BatchNorm)]
    if norms:
        momenta = [layer.momentum for layer in norms]
        for layer in norms:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
            layer.train()
        for x in torch.split(images.x[:SAMPLES], BATCH):
            run.check()
            if len(x) > 1:
                with torch.no_grad():
                    made(x)
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
        made.eval()
    return made


def trainable(model: nn.Module) -> None:
    """Let all weights take gradients but those of whitening layers, which no recipe trains."""
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(not isinstance(layer, Whitening))
