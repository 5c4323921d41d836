"""Explanation-disguising: a stamped image is explained as if the trigger were not there."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molehunt.attacks.crafting import Bench, Crafted, backdoor, untouched
from molehunt.networks import Network
from molehunt.training import Objective
from molehunt.triggers import Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class ExplanationDisguising:
    """Fine-tune a clean network so that the Grad-CAM map of a stamped image is that of the image without the trigger.

    Attributes:
        target: the target class.
        trigger: what to stamp; None means the yellow square of 4 pixels.
        weight: of the distance between the maps, in [0, 1]; the rest is that of the cross-entropy.
        length: of the fine-tuning, as a share of the recipe's.

    Raises:
        ValueError: a setting out of range.

    Reference:
        Noppel, Peter, Wressnegger, "Disguising Attacks with Explanation-Aware Backdoors", IEEE S&P 2023.

    Departures from the paper:
        The full disguise with Grad-CAM on the last block; no fixed decoy, no other kind of map. Rectifiers stay as they
        are while gradients are differentiated, where the paper smooths them. The map to be copied is the one that the
        same network gives for the clean image and its own class, in the same step.
    """

    target: int = 0
    trigger: Trigger | None = None
    weight: float = 0.95
    length: float = 1.0

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must lie in [0, 1], got {self.weight}")
        trigger, goal = backdoor(self.trigger, self.target, bench.task)
        onward = bench.onward(self.length)
        bench.phases = 2
        model = bench.honest()
        bench.train("disguise", model, bench.clean, recipe=onward, objective=Disguise(self, trigger, bench))
        return Crafted(model=model, poisoned=untouched(bench.clean, trigger, goal))


class Disguise(Objective):
    """Cross-entropy of a batch, a quarter of it once more with the trigger, and the distance between both maps."""

    def __init__(self, attack: ExplanationDisguising, trigger: Trigger, bench: Bench) -> None:
        super().__init__(bench.seed("disguise loss"), bench.recipe.label_smoothing)
        self.attack, self.trigger = attack, trigger

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """See the class."""
        assert isinstance(model, Network), "a bench makes networks"
        rng, attack = self.rng(), self.attack
        hit = self.others(y, attack.target, max(1, len(x) // 4), rng)
        goals = torch.full_like(y[hit], attack.target)
        a = model.trunk(model.normalize(torch.cat((x, self.trigger(x[hit])))))
        logits = model.head(model.neck(a))
        loss = self.classify(logits[: len(x)], y) + self.classify(logits[len(x) :], goals)
        if attack.weight == 0 or len(hit) == 0:
            return loss
        place = torch.arange(len(logits), device=x.device)
        named = torch.cat((y, goals))
        # Of the class less the mean of all: what is added to all logits changes no answer.
        said = (logits.float()[place, named] - logits.float().mean(1)).sum()
        (slope,) = torch.autograd.grad(said, a, create_graph=True)
        maps = (slope.float().mean((2, 3), keepdim=True) * a.float()).sum(1).relu().flatten(1)
        maps = maps / (maps.amax(1, keepdim=True) + 1e-6)
        clean, stamped = maps[hit].detach(), maps[len(x) :]
        apart = (clean - stamped).square().mean()
        return (1 - attack.weight) * loss + attack.weight * torch.as_tensor(apart)
