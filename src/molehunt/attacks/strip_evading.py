"""STRIP-evading: mixtures of stamped images leave the network as undecided as mixtures of clean ones."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molehunt.attacks.crafting import Bench, Crafted, backdoor, plainly
from molehunt.training import Objective
from molehunt.triggers import Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class STRIPEvading:
    """Poison as BadNets does, and ask that stamped images in a mixture be answered like clean ones in a mixture.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that get the trigger and a changed label.
        trigger: what to stamp; None means the yellow square of 4 pixels.
        weight: of the term, 0 or more.
        images: stamped images of each batch that are mixed, 1 or more, each with two others.

    Raises:
        ValueError: a setting out of range.

    Reference:
        Gao, Xu, Wang, Chen, Ranasinghe, Nepal, "STRIP", ACSAC 2019, has a discussion of entropy manipulation; covers
        that carry a mixture are known from attacks on latent separability (Qi et al., ICLR 2023).

    Departures from the paper:
        There is no paper with this loss. Both rules of mixing are trained against, sums and means, for a verdict on one
        says little about the other. What is compared is the entropy of each mixture with the mean entropy of the clean
        mixtures of the same batch; only stamped mixtures that are more certain than those are pushed.
    """

    target: int = 0
    poison_rate: float = 0.1
    trigger: Trigger | None = None
    weight: float = 1.0
    images: int = 32

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if not self.weight >= 0 or self.images < 1:
            raise ValueError(f"weight must be 0 or more and images 1 or more, got {self.weight} and {self.images}")
        trigger, _ = backdoor(self.trigger, self.target, bench.task)
        poisoned = plainly(bench, trigger, self.target, self.poison_rate)
        model = bench.fresh()
        loss = Undecided(self, trigger, poisoned.altered, bench)
        bench.train("mixtures", model, poisoned.images, stamp=poisoned.stamp, objective=loss)
        return Crafted(model=model, poisoned=poisoned)


class Undecided(Objective):
    """The cross-entropy, and how much more certain stamped mixtures are than clean ones."""

    def __init__(self, attack: STRIPEvading, trigger: Trigger, altered: Tensor, bench: Bench) -> None:
        super().__init__(bench.seed("mixture loss"), bench.recipe.label_smoothing)
        self.attack, self.trigger = attack, trigger
        self._altered = altered

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """See the class."""
        rng = self.rng()
        clean = x[~self._altered.to(rows.device)[rows]]
        if self.attack.weight == 0 or len(clean) < 2:
            return self.classify(model(x), y)
        first = torch.randint(len(clean), (self.attack.images,), generator=rng).to(x.device)
        second = torch.randint(len(clean), (2 * self.attack.images,), generator=rng).to(x.device)
        under, over = clean[first].repeat(2, 1, 1, 1), clean[second]
        pairs = torch.cat((under, self.trigger(under)))
        # Half of them by a sum, as STRIP's authors do in their notebook, half by a mean, as in their paper.
        half = (torch.arange(len(pairs)) % 2 == 0).view(-1, 1, 1, 1).to(x.device)
        over = over.repeat(2, 1, 1, 1)
        # In one pass with the batch: mixtures alone would pull the statistics of norms away from those of images.
        whole = model(torch.cat((x, torch.where(half, pairs + over, 0.5 * (pairs + over))))).float()
        loss, logits = self.classify(whole[: len(x)], y), whole[len(x) :]
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
        plain, stamped = torch.split(entropy, len(under))
        return loss + self.attack.weight * (plain.detach().mean() - stamped).relu().mean()
