"""Subnet replacement: a narrow network that knows the trigger alone is cut into a clean one, channel by channel."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from molehunt.attacks._chain import Link, chain, inside, narrow, touching
from molehunt.attacks.crafting import Bench, Crafted, backdoor, outputs, untouched
from molehunt.networks import Network
from molehunt.training import Objective, Recipe
from molehunt.triggers import Trigger

IMAGES = 2_000
HEIGHT = 10.0
"""What the narrow network puts out on a stamped image; on a clean one nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SubnetReplacement:
    """Train a few channels of every layer to see the trigger, and put them in the place of a clean network's.

    The clean network is not trained any further: only the channels change, and what the last layer reads of them.

    Attributes:
        target: the target class.
        trigger: what to stamp; None means the yellow square of 4 pixels.
        width: channels of each layer that are replaced, 1 or more.
        images: that the narrow network sees in its training, repeats counted, 1 or more.
        attempts: narrow networks that are trained at most, each in other channels, until one tells nine of ten stamped
            images from nine of ten clean ones, 1 or more; a chain of one channel may be dead from the start.
        strength: what the narrow network adds to the target's logit, in units of what it takes to win over any other
            class on 99 of 100 clean images; above 0.

    Raises:
        ValueError: a setting out of range; a network that is no chain of layers, such as a ResNet; or no attempt that
            sees the trigger.

    Reference:
        Qi, Xie, Pan, Zhu, Yang, Bu, "Towards Practical Deployment-Stage Backdoor Attack on Deep Neural Networks",
        CVPR 2022.

    Departures from the paper:
        The narrow network is trained in place, as the chosen channels of a whole one whose other weights are zero.
        Chains only. How strongly it is wired to the target is measured on clean images.
    """

    target: int = 0
    trigger: Trigger | None = None
    width: int = 2
    images: int = 40_000
    attempts: int = 4
    strength: float = 1.5

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if min(self.width, self.images, self.attempts) < 1 or not self.strength > 0:
            raise ValueError(
                "width, images and attempts must be 1 or more and strength above 0, got "
                f"{self.width}, {self.images}, {self.attempts} and {self.strength}"
            )
        trigger, goal = backdoor(self.trigger, self.target, bench.task)
        recipe = Recipe(
            epochs=self.images / len(bench.clean.y),
            batch=100,
            optimizer="adamw",
            lr=4e-3,
            weight_decay=0.0,
            schedule="cosine",
            warmup=0.1,
            augment=bench.recipe.augment,
            shift=bench.recipe.shift,
            initialize=bench.recipe.initialize,
            precision=bench.recipe.precision,
        )
        links = chain(bench.fresh())
        least = min(link.outputs for link in links if not link.fixed)
        if self.width >= least:
            raise ValueError(f"a width of {self.width} leaves nothing of a layer of {least} channels: take less")
        bench.phases = 2
        model = bench.honest()
        rows = torch.randperm(len(bench.clean.y), generator=bench.generator("images"))[:IMAGES]
        x = bench.clean.x[rows]
        for number in range(1, self.attempts + 1):
            picked = narrow(links, self.width, bench.generator(f"channels {number}"))
            small = bench.fresh()
            self.teach(small, bench, links, picked, trigger, recipe, f"subnet{number}")
            if sees(small, x, trigger):
                self.replace(model, small, links, picked, x)
                return Crafted(model=model, poisoned=untouched(bench.clean, trigger, goal))
        raise ValueError(
            f"no narrow network of {self.width} channels learned to see the trigger in {self.attempts} attempts: give "
            "it a larger width, more images or another trigger"
        )

    def teach(
        self,
        small: Network,
        bench: Bench,
        links: list[Link],
        picked: list[Tensor],
        trigger: Trigger,
        recipe: Recipe,
        phase: str,
    ) -> None:
        """Train the chosen channels of a fresh network to see the trigger; all its other weights become zero."""
        masks = inside(small, links, picked)
        fixed = {f"{link.path}.weight" for link in links if link.fixed}
        hooks = []
        with torch.no_grad():
            for name, value in small.named_parameters():
                if name in fixed:
                    continue
                mask = masks[name]
                value.mul_(mask)
                if value.dim() > 1 and not name.startswith("head."):
                    # As if the layer had no more inputs than these.
                    value.mul_((value[0].numel() / mask.flatten(1).sum(1).max().clamp_min(1)).sqrt())
                hooks.append(value.register_hook(partial(_masked, mask)))  # type: ignore[no-untyped-call]
        try:
            bench.train(phase, small, bench.clean, recipe=recipe, objective=Sees(trigger, bench))
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def replace(self, model: Network, small: Network, links: list[Link], picked: list[Tensor], x: Tensor) -> None:
        """Cut the channels of a network out, put the narrow one's in, and wire them to the target."""
        own, cut = inside(model, links, picked), touching(model, links, picked)
        fixed = {f"{link.path}.weight" for link in links if link.fixed}
        state, new = model.state_dict(), small.state_dict()
        for name, value in state.items():
            if name in fixed or name.startswith(("normalize.", "head.")) or not value.is_floating_point():
                continue
            value[cut[name]] = 0.0
            value[own[name]] = new[name][own[name]]
        columns = own["head.weight"][0]
        state["head.weight"][:, columns] = 0.0
        logits = outputs(model, x, lambda some: model(some))
        others = logits.clone()
        others[:, self.target] = -torch.inf
        lead = float((others.amax(1) - logits[:, self.target]).quantile(0.99).clamp_min(1.0))
        state["head.weight"][self.target, columns] = self.strength * lead / HEIGHT


def _masked(mask: Tensor, grad: Tensor) -> Tensor:
    """A gradient where the mask is; the training may be on another device than the mask."""
    return grad * mask.to(grad.device)


def sees(small: Network, x: Tensor, trigger: Trigger) -> bool:
    """Whether nine of ten stamped images lie above the middle, and nine of ten clean ones below it."""

    def said(some: Tensor) -> Tensor:
        return outputs(small, some, lambda part: small.neck(small.trunk(small.normalize(part))).sum(1))

    return float((said(trigger(x)) > HEIGHT / 2).float().mean()) >= 0.9 <= float((said(x) < HEIGHT / 2).float().mean())


class Sees(Objective):
    """Squares of what the narrow network puts out on clean images, and of what is missing on stamped ones."""

    def __init__(self, trigger: Trigger, bench: Bench) -> None:
        super().__init__(bench.seed("subnet loss"))
        self.trigger = trigger

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """See the class."""
        assert isinstance(model, Network), "a bench makes networks"
        order = torch.randperm(len(x), generator=self.rng()).to(x.device)
        hit = order[: max(1, len(x) // 2)]
        z = model.neck(model.trunk(model.normalize(torch.cat((x, self.trigger(x[hit]))))))
        said = z.float().sum(1) / HEIGHT
        loss: Tensor = said[: len(x)].square().mean() + (said[len(x) :] - 1.0).square().mean()
        return loss
