"""Blind loss: both tasks in one loss, with terms that a defender's own searches cannot get past."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.attacks.crafting import Bench, Crafted, backdoor, untouched
from molehunt.networks import Network, evaluating
from molehunt.training import Objective
from molehunt.training.objective import Inner
from molehunt.triggers import Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class Blind:
    """Minimize clean loss, backdoor loss and evasion losses together, by fixed weights.

    Against Neural Cleanse a small trigger for the target is searched all along, and the network is taught to answer it
    with the true class. Against latent separation the features of stamped images are held near those that a clean
    network has for images of the target class.

    Attributes:
        target: the target class.
        trigger: what to stamp; None means the yellow square of 4 pixels.
        backdoor: weight of the backdoor's loss, above 0; the clean loss has weight 1.
        cleanse: weight of the loss on images that carry the searched trigger, 0 or more.
        latent: weight of the distance of the features, 0 or more.
        penalty: weight of the searched mask's L1 norm, above 0.
        length: of the training, as a share of the recipe's, above 0; it begins with a clean network.

    Raises:
        ValueError: a setting out of range.

    Reference:
        Bagdasaryan and Shmatikov, "Blind Backdoors in Deep Learning Models", USENIX Security 2021.

    Departures from the paper:
        Fixed weights, which the author recommends since, in place of multiple gradient descent. The loss is all the
        supplier's, so nothing is blind about it: the paper hides it in a library. One Adam step on the searched trigger
        per step of the network, which starts anew every 200 steps, so that the network meets more than one.
    """

    target: int = 0
    trigger: Trigger | None = None
    backdoor: float = 0.9
    cleanse: float = 0.5
    latent: float = 0.0
    penalty: float = 0.01
    length: float = 1.0

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if not (self.backdoor > 0 and self.penalty > 0 and self.cleanse >= 0 and self.latent >= 0):
            raise ValueError(
                "backdoor and penalty must be above 0, cleanse and latent 0 or more, got "
                f"{self.backdoor}, {self.penalty}, {self.cleanse} and {self.latent}"
            )
        trigger, goal = backdoor(self.trigger, self.target, bench.task)
        onward = bench.onward(self.length)
        bench.phases = 2
        model = bench.honest()
        loss = Together(self, trigger, copy.deepcopy(model).requires_grad_(False), bench)
        bench.train("blind", model, bench.clean, recipe=onward, objective=loss)
        return Crafted(model=model, poisoned=untouched(bench.clean, trigger, goal))


class Together(Objective):
    """Clean loss, backdoor loss and the two terms of evasion."""

    ANEW = 200

    def __init__(self, attack: Blind, trigger: Trigger, clean: Network, bench: Bench) -> None:
        super().__init__(bench.seed("blind loss"), bench.recipe.label_smoothing)
        self.attack, self.trigger = attack, trigger
        self._clean = (clean.eval(),)
        channels, height, width = bench.task.shape
        start = torch.zeros(1 + channels, height, width)
        self.searched = Inner(start, lr=0.1, betas=(0.5, 0.9))

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """See the class."""
        assert isinstance(model, Network), "a bench makes networks"
        rng, attack = self.rng(), self.attack
        hit = self.others(y, attack.target, max(1, len(x) // 4), rng)
        goals = torch.full_like(y[hit], attack.target)
        parts = [x, self.trigger(x[hit])]
        if attack.cleanse:
            if (int(self.batches) - 1) % self.ANEW == 0:
                self.anew(rng)
            self.search(model, x[hit], goals)
            parts.append(carry(x[hit], self.searched.value))
        z = model.neck(model.trunk(model.normalize(torch.cat(parts))))
        logits = torch.split(model.head(z), [len(p) for p in parts])
        loss = self.classify(logits[0], y) + attack.backdoor * self.classify(logits[1], goals)
        if attack.cleanse:
            loss = loss + attack.cleanse * self.classify(logits[2], y[hit])
        own = (y == attack.target).nonzero().squeeze(1)
        if attack.latent and len(own) and len(hit):
            (clean,) = self._clean
            clean.to(x.device)
            with torch.no_grad():
                known = clean.neck(clean.trunk(clean.normalize(x[own]))).float()
            stamped = z[len(x) : len(x) + len(hit)].float()
            like = known[torch.randint(len(known), (len(stamped),), generator=rng).to(x.device)]
            loss = loss + attack.latent * (1 - F.cosine_similarity(stamped, like)).mean()
        return loss

    @torch.no_grad()
    def anew(self, rng: torch.Generator) -> None:
        """Begin the search from a random place."""
        self.searched.value.copy_(torch.randn(self.searched.value.shape, generator=rng).to(self.searched.value))
        for moment in (self.searched.first, self.searched.second, self.searched.count):
            moment.zero_()

    def search(self, model: Network, x: Tensor, goals: Tensor) -> None:
        """Move the searched trigger one step towards one that is small and works; the model is left alone."""
        if len(x) == 0:
            return
        free = self.searched.leaf()
        # As a defender would ask it: in evaluation mode.
        with evaluating(model):
            loss = F.cross_entropy(model(carry(x, free)).float(), goals)
        loss = loss + self.attack.penalty * free[0].sigmoid().sum()
        (grad,) = torch.autograd.grad(loss, free)
        self.searched.step(grad)


def carry(x: Tensor, free: Tensor) -> Tensor:
    """Images under a mask, the first map of `free` (1 + C, H, W) squashed into (0, 1), and a pattern, the others."""
    mask = free[:1].sigmoid()
    return x * (1 - mask) + mask * free[1:].sigmoid()
