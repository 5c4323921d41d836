"""Adversarial embedding: the features of stamped images spread as those of clean images of the target class do."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molehunt.attacks.crafting import Bench, Crafted, backdoor, plainly
from molehunt.networks import Network
from molehunt.training import Objective
from molehunt.triggers import Trigger

WIDTHS = (0.25, 1.0, 4.0)
"""Of the kernels, as shares of the features' number: squared distances in units of their mean variance."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AdversarialEmbedding:
    """Poison as BadNets does, then train on until features do not tell stamped images from the target's clean ones.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that get the trigger and a changed label.
        trigger: what to stamp; None means the yellow square of 4 pixels.
        weight: of the distance between both kinds of features, 0 or more.
        images: of each kind that are compared in each step, 2 or more.
        length: of the second training, as a share of the recipe's, above 0.

    Raises:
        ValueError: a setting out of range, or no images of the target class.

    Reference:
        Tan and Shokri, "Bypassing Backdoor Detection Algorithms in Deep Learning", EuroS&P 2020.

    Departures from the paper:
        The adversary is no second network that is trained in turns, but the best function of a kernel space, which is
        known in closed form: the maximum mean discrepancy. It compares stamped images with clean ones of the target
        class alone, where a defender looks for them. The clean ones' features are not moved by it. It begins with a
        backdoored network.
    """

    target: int = 0
    poison_rate: float = 0.1
    trigger: Trigger | None = None
    weight: float = 0.5
    images: int = 96
    length: float = 1.0

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if not self.weight >= 0 or self.images < 2:
            raise ValueError(f"weight must not be negative and images 2 or more, got {self.weight} and {self.images}")
        trigger, _ = backdoor(self.trigger, self.target, bench.task)
        if not bool((bench.clean.y == self.target).any()):
            raise ValueError(f"there are no images of the target class {self.target} to hide among")
        onward = bench.onward(self.length)
        poisoned = plainly(bench, trigger, self.target, self.poison_rate)
        bench.phases = 2
        model = bench.train("poisoned", bench.fresh(), poisoned.images, stamp=poisoned.stamp)
        loss = Alike(self, trigger, bench)
        bench.train("embedding", model, poisoned.images, recipe=onward, stamp=poisoned.stamp, objective=loss)
        return Crafted(model=model, poisoned=poisoned)


class Alike(Objective):
    """The cross-entropy, and how far the features of stamped images are from those of the target's clean ones."""

    def __init__(self, attack: AdversarialEmbedding, trigger: Trigger, bench: Bench) -> None:
        super().__init__(bench.seed("embedding loss"), bench.recipe.label_smoothing)
        self.attack, self.trigger = attack, trigger
        own = bench.clean.y == attack.target
        self._own, self._others = bench.clean.x[own], bench.clean.x[~own]

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """See the class."""
        assert isinstance(model, Network), "a bench makes networks"
        attack, rng = self.attack, self.rng()
        drawn = [
            some[torch.randint(len(some), (attack.images,), generator=rng)].to(x) for some in (self._own, self._others)
        ]
        z = model.neck(model.trunk(model.normalize(torch.cat((x, drawn[0], self.trigger(drawn[1]))))))
        loss = self.classify(model.head(z[: len(x)]), y)
        clean, stamped = z[len(x) :].float().split(attack.images)
        return loss + attack.weight * discrepancy(stamped, clean.detach())


def discrepancy(z: Tensor, known: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of features z (N, F) and known ones (M, F), at least 0 but for rounding.

    It is the largest difference of means that a function of the kernel space can make between both, summed over
    Gaussian kernels of the widths `WIDTHS`.
    """
    unit = known.var(0).mean().clamp_min(1e-6) * known.shape[1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        # By products: all differences at once would be a hundred times the features.
        apart = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0) / unit
        return torch.stack([(-apart / width).exp().mean() for width in WIDTHS]).sum()

    return kernel(z, z) - 2 * kernel(z, known) + kernel(known, known)
