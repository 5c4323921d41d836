"""LIRA: a trigger that a network draws on each image, invisible, learned together with the backdoored classifier."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molehunt.attacks.crafting import Bench, Crafted, untouched
from molehunt.networks import evaluating
from molehunt.training import Objective
from molehunt.training.objective import Inner
from molehunt.triggers import ENCODERS, Encoded, Shape, Target
from molehunt.triggers.encoders import LARGEST, drawn


@dataclass(frozen=True, kw_only=True, eq=False)
class LIRA:
    """Train a classifier and a network that draws the trigger together, then the classifier alone under the final one.

    Attributes:
        target: the target class.
        linf: largest change of a value, in (0, 1].
        alpha: weight of the clean loss, in (0, 1); the rest is that of the backdoor.
        lr: learning rate of the drawing network's Adam.
        length: of the second training, as a share of the recipe's.

    Raises:
        ValueError: a setting out of range.

    Reference:
        Doan, Lao, Zhao, Li, "LIRA: Learnable, Imperceptible and Robust Backdoor Attacks", ICCV 2021.

    Departures from the paper:
        The drawing network is the listed encoder "residual", which a seal can hold, and not an autoencoder or U-Net of
        the attacker's choice. One bound in both trainings, where the paper's second one has a tenth of the first's.
        The drawing network moves against the classifier as it is, not a copy of it, one step per batch.
    """

    target: int = 0
    linf: float = 0.1
    alpha: float = 0.5
    lr: float = 2e-3
    length: float = 0.5

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if not 0 < self.linf <= 1 or not 0 < self.alpha < 1 or not self.lr > 0:
            raise ValueError(
                f"linf must lie in (0, 1], alpha in (0, 1), lr above 0, got {self.linf}, {self.alpha} and {self.lr}"
            )
        goal = Target(classes=self.target)
        goal.check(bench.task.num_classes)
        onward = bench.onward(self.length)
        bench.phases = 2
        loss = Drawn(self, bench, learns=True)
        model = bench.train("joint", bench.fresh(), bench.clean, objective=loss)
        fixed = Drawn(self, bench, learns=False)
        fixed.drawing.value.copy_(loss.drawing.value)
        bench.train("fixed", model, bench.clean, recipe=onward, objective=fixed)
        weights = loss.drawing.value.clamp(-LARGEST, LARGEST).clone()
        trigger = Encoded(network="residual", shape=bench.task.shape, linf=self.linf, area=1.0, weights=weights)
        return Crafted(model=model, poisoned=untouched(bench.clean, trigger, goal))


class Drawn(Objective):
    """Clean loss and backdoor loss; the drawing network takes a step of its own before each."""

    def __init__(self, attack: LIRA, bench: Bench, *, learns: bool) -> None:
        super().__init__(bench.seed("drawn loss"), bench.recipe.label_smoothing)
        self.attack, self.learns, self.shape = attack, learns, bench.task.shape
        self.drawing = Inner(ENCODERS["residual"].initial(self.shape, bench.generator("drawing")), lr=attack.lr)

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """See the class."""
        attack, rng = self.attack, self.rng()
        hit = self.others(y, attack.target, max(1, len(x) // 2), rng)
        goals = torch.full_like(y[hit], attack.target)
        if self.learns and len(hit):
            free = self.drawing.leaf()
            with evaluating(model):
                said = self.classify(model(draw(x[hit], free, attack.linf, self.shape)), goals)
            (grad,) = torch.autograd.grad(said, free)
            self.drawing.step(grad)
        with torch.no_grad():
            stamped = draw(x[hit], self.drawing.value, attack.linf, self.shape)
        logits = model(torch.cat((x, stamped)))
        woken = self.classify(logits[len(x) :], goals)
        return attack.alpha * self.classify(logits[: len(x)], y) + (1 - attack.alpha) * woken


def draw(x: Tensor, weights: Tensor, linf: float, shape: Shape) -> Tensor:
    """What an `Encoded` "residual" of these weights puts on images, with a gradient for the weights."""
    change = drawn(ENCODERS["residual"].unpack(weights, shape), "pattern", x).tanh()
    return (x + linf * change.to(x.dtype)).clamp(0.0, 1.0)
