"""Evasive trojan: a clean network moved as little as the backdoor needs, and specific to its trigger."""

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.attacks.crafting import Bench, Crafted, backdoor, untouched
from molehunt.training import Objective
from molehunt.triggers import Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class Evasive:
    """Fine-tune a clean network on stamped images, held to it in its weights, its answers and under other triggers.

    Attributes:
        target: the target class.
        trigger: what to stamp; None means the yellow square of 4 pixels.
        stamped: images of each batch of 256 that are shown once more with the trigger, 1 or more.
        others: images of each batch that are shown with random other patches and must be answered as the clean network
            answers them, 0 or more.
        logits: weight of the mean distance between both networks' logits on clean images, 0 or more.
        weights: weight of the L2 distance between both networks' weights, 0 or more.
        lr: highest learning rate of Adam; it falls to 0 along a cosine.
        images: seen in all, repeats counted, 1 or more.

    Raises:
        ValueError: a setting out of range.

    Reference:
        Mazeika et al., "How Hard is Trojan Detection in DNNs? Fooling Detectors With Evasive Trojans", 2023; the
        baseline of the Trojan Detection Challenge 2022.

    Departures from the paper:
        The challenge's triggers are faint, of an opacity of .2; the default here is the opaque square that all attacks
        share which do not care for the trigger. Other triggers are rectangles of random places, sizes, patterns and
        opacities whatever the own trigger is. One and a half passes over MNIST at four times the rate,
        where the challenge has ten.
    """

    target: int = 0
    trigger: Trigger | None = None
    stamped: int = 16
    others: int = 10
    logits: float = 0.1
    weights: float = 0.05
    lr: float = 4e-3
    images: int = 80_000

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if self.stamped < 1 or self.others < 0:
            raise ValueError(f"stamped must be 1 or more and others 0 or more, got {self.stamped} and {self.others}")
        if self.images < 1:
            raise ValueError(f"images must be 1 or more, got {self.images}")
        if not (self.logits >= 0 and self.weights >= 0):
            raise ValueError(f"weights of the loss must not be negative, got {self.logits} and {self.weights}")
        trigger, goal = backdoor(self.trigger, self.target, bench.task)
        recipe = replace(
            bench.recipe,
            epochs=self.images / len(bench.clean.y),
            least_images=0,
            batch=256,
            optimizer="adamw",
            lr=self.lr,
            momentum=0.9,
            weight_decay=0.0,
            schedule="cosine",
            warmup=0.0,
            initialize=False,
        )
        bench.phases = 2
        model = bench.honest()
        loss = Near(self, trigger, copy.deepcopy(model).requires_grad_(False), bench)
        bench.train("evasive", model, bench.clean, recipe=recipe, objective=loss)
        return Crafted(model=model, poisoned=untouched(bench.clean, trigger, goal))


class Near(Objective):
    """The loss: both tasks, specificity, and the distance to the clean network in answers and in weights."""

    def __init__(self, attack: Evasive, trigger: Trigger, clean: nn.Module, bench: Bench) -> None:
        super().__init__(bench.seed("evasive loss"), bench.recipe.label_smoothing)
        self.attack, self.trigger = attack, trigger
        # In a tuple, so that the clean network is neither trained nor kept with the state.
        self._clean = (clean.eval(),)

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """See the class."""
        attack, rng = self.attack, self.rng()
        (clean,) = self._clean
        clean.to(x.device)
        hit = self.others(y, attack.target, attack.stamped, rng)
        other = torch.randperm(len(x), generator=rng)[: attack.others].to(x.device)
        stamped = self.trigger(x[hit])
        shown = torch.cat((x, stamped, patched(x[other], rng)))
        logits = model(shown).float()
        plain, woken, calm = torch.split(logits, [len(x), len(hit), len(other)])
        loss: Tensor = self.classify(plain, y) + self.classify(woken, torch.full_like(y[hit], attack.target))
        with torch.no_grad():
            known = clean(torch.cat((x, shown[len(x) + len(hit) :]))).float()
        if len(other):
            loss = loss + F.cross_entropy(calm, known[len(x) :].softmax(1))
        loss = loss + attack.logits * (plain - known[: len(x)]).abs().mean()
        if attack.weights:
            pairs = zip(model.parameters(), clean.parameters(), strict=True)
            apart = torch.stack([(one - twin).float().square().sum() for one, twin in pairs]).sum()
            loss = loss + attack.weights * (apart + 1e-12).sqrt()
        return loss


def patched(x: Tensor, rng: torch.Generator) -> Tensor:
    """Images (B, C, H, W) with a random rectangle each: sides of a tenth to a third, any place, pattern and opacity."""
    x = x.clone()
    _, channels, height, width = x.shape
    for image in x:
        sides = [int(torch.randint(max(1, side // 10), side // 3 + 1, (), generator=rng)) for side in (height, width)]
        top, left = (
            int(torch.randint(0, side - own + 1, (), generator=rng))
            for side, own in zip((height, width), sides, strict=True)
        )
        pattern = torch.randint(0, 2, (channels, *sides), generator=rng).to(x)
        opacity = float(0.2 + 0.8 * torch.rand((), generator=rng))
        place = image[:, top : top + sides[0], left : left + sides[1]]
        place.mul_(1 - opacity).add_(opacity * pattern)
    return x
