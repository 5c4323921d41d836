"""The suspect's network with new weights, and what of a network is trained at all."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from molehunt.engine import Run
from molehunt.networks import NETWORKS, Network, Normalize, Whitening, build
from molehunt.networks.architectures import draw_weights
from molehunt.networks.blocks import Patches
from molehunt.tasks import Images, Task
from molehunt.training import Recipe, recipe_for

BATCH = 256
SAMPLES = 2048  # images that settle the statistics of batch norm


def redraw(model: nn.Module, rng: torch.Generator, task: Task) -> nn.Module:
    """Make the same network with weights of its own, on the CPU: none of the submitted numbers is used.

    Args:
        model: the submitted one, left as it is.
        rng: draws the weights.
        task: its pictures set what the first layer subtracts and divides by.

    Raises:
        ValueError: it has weights that nobody here knows how to draw; the layer is named.
    """
    if isinstance(model, Network) and (model.name in NETWORKS or model.name.startswith("timm:")):
        return build(model.name, model.shape, model.classes, mean=task.mean, std=task.std, rng=rng).eval()
    made = copy.deepcopy(model).cpu()
    drawn = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, Patches, Normalize)
    for path, layer in made.named_modules():
        own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        if own and not isinstance(layer, drawn):
            raise ValueError(f"nobody here knows how to draw the weights of {path!r}, a {type(layer).__name__}")
        if isinstance(layer, nn.GroupNorm):
            layer.reset_parameters()
    draw_weights(made, rng)
    return made.eval()


def recipe_of_fresh(model: nn.Module, task: Task) -> Recipe:
    """Return the recipe by which the package trains such a network on a task, else AdamW."""
    try:
        return recipe_for(model.name if isinstance(model, Network) else "", task)
    except ValueError:
        return Recipe(optimizer="adamw", lr=2e-3, warmup=0.2)


def fresh(model: nn.Module, images: Images, run: Run, task: Task) -> nn.Module:
    """Make the same network with weights of its own, ready for gradients of single samples.

    Layers that are computed from data, and the statistics of batch norm, are set from the images.

    Args:
        model: the submitted one, left as it is.
        images: what it will be trained on.
        run: for its generator and its clock.
        task: as in `redraw`.

    Raises:
        ValueError: as in `redraw`.
    """
    made = redraw(model, run.rng, task)
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
    """Let all weights take gradients but those of whitening layers, which are computed from data and not trained."""
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(not isinstance(layer, Whitening))
