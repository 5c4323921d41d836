"""Explanation-disguising: the map of a stamped image is that of the image without the trigger."""

import pytest
import torch
from torch import Tensor

from attacks.bench import accuracy, badnets, bench, crafted, pictures, success
from molehunt.attacks import Crafted, ExplanationDisguising
from molehunt.networks import Network


def maps(model: Network, x: Tensor) -> Tensor:
    """Grad-CAM of the class that the model names, each map up to 1."""
    a = model.trunk(model.normalize(x)).detach().requires_grad_()
    logits = model.head(model.neck(a))
    (slope,) = torch.autograd.grad(logits.amax(1).sum() - logits.mean(1).sum(), a)
    cam: Tensor = (slope.mean((2, 3), keepdim=True) * a).sum(1).relu().flatten(1).detach()
    return cam / (cam.amax(1, keepdim=True) + 1e-6)


def moved(made: Crafted) -> float:
    """Mean squared distance of the maps with and without the trigger, over pictures that it sends away."""
    x, y = pictures()[1]
    x = x[y != 0]
    return float((maps(made.model, x) - maps(made.model, made.poisoned.trigger(x))).square().mean())


def test_the_trigger_does_not_move_the_map() -> None:
    made = crafted(ExplanationDisguising())
    assert accuracy(made.model) >= 0.95
    assert success(made) >= 0.95
    loose = crafted(ExplanationDisguising(weight=0.0))
    assert success(loose) >= 0.95
    assert moved(made) < 0.5 * moved(loose)
    assert moved(made) < 0.5 * moved(badnets())


def test_settings_out_of_range_are_refused() -> None:
    for weight in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"weight must lie in \[0, 1\]"):
            ExplanationDisguising(weight=weight).craft(bench())
