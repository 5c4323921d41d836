"""ABS-evading: no single channel raises the target alone, so that none stands out when it is stimulated."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molehunt.attacks.crafting import Bench, Crafted, backdoor, plainly
from molehunt.networks import Network
from molehunt.training import Objective
from molehunt.triggers import Trigger

LIMIT = 512
"""Stimulated maps of one step at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ABSEvading:
    """Poison as BadNets does, drop channels of stamped images, and punish channels that raise one class alone.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that get the trigger and a changed label.
        trigger: what to stamp; None means the yellow square of 4 pixels.
        weight: of the punishment, 0 or more.
        dropped: share of the last block's channels that are dropped for stamped images, in [0, 1).
        images: clean images of each batch that are stimulated, 1 or more.

    Raises:
        ValueError: a setting out of range.

    Reference:
        Liu, Lee, Tao, Ma, Aafer, Zhang, "ABS: Scanning Neural Networks for Back-doors by Artificial Brain Stimulation",
        CCS 2019, names attacks that spread over neurons as its limit.

    Departures from the paper:
        There is no paper with this loss. Channels are stimulated in the last block alone, 128 in a step at most, each
        set to what it reaches at most in the batch; what is punished is by how much the target's logit then rises above
        the highest other.
    """

    target: int = 0
    poison_rate: float = 0.1
    trigger: Trigger | None = None
    weight: float = 0.1
    dropped: float = 0.4
    images: int = 4

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if not self.weight >= 0 or not 0 <= self.dropped < 1 or self.images < 1:
            raise ValueError(
                "weight must be 0 or more, dropped in [0, 1) and images 1 or more, got "
                f"{self.weight}, {self.dropped} and {self.images}"
            )
        trigger, _ = backdoor(self.trigger, self.target, bench.task)
        poisoned = plainly(bench, trigger, self.target, self.poison_rate)
        model = bench.fresh()
        loss = Spread(self, poisoned.altered, bench)
        bench.train("spread", model, poisoned.images, stamp=poisoned.stamp, objective=loss)
        return Crafted(model=model, poisoned=poisoned)


class Spread(Objective):
    """The cross-entropy with dropped channels, and how far single channels raise the target."""

    def __init__(self, attack: ABSEvading, altered: Tensor, bench: Bench) -> None:
        super().__init__(bench.seed("spread loss"), bench.recipe.label_smoothing)
        self.attack = attack
        self._altered = altered

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """See the class."""
        assert isinstance(model, Network), "a bench makes networks"
        rng, attack = self.rng(), self.attack
        stamped = self._altered.to(rows.device)[rows]
        a = model.trunk(model.normalize(x))
        kept = torch.rand(len(a), a.shape[1], generator=rng).to(a.device) >= attack.dropped
        scale = torch.where(stamped[:, None], kept / (1 - attack.dropped), 1.0).to(a.dtype)
        loss = self.classify(model.head(model.neck(a * scale.view(*scale.shape, 1, 1))), y)
        quiet = (~stamped & (y != attack.target)).nonzero().squeeze(1)[: attack.images]
        if attack.weight == 0 or len(quiet) == 0:
            return loss
        channels = torch.randperm(a.shape[1], generator=rng)[: max(1, LIMIT // len(quiet))].to(a.device)
        # (channels, images, C, h, w), one channel of each set to the most that it reaches in this batch.
        raised = a[quiet].unsqueeze(0).repeat(len(channels), 1, 1, 1, 1)
        high = a.detach().amax((0, 2, 3))[channels].view(-1, 1, 1, 1)
        raised[torch.arange(len(channels), device=a.device), :, channels] = high.expand(-1, len(quiet), *a.shape[2:])
        logits = model.head(model.neck(raised.flatten(0, 1))).float()
        others = logits.clone()
        others[:, attack.target] = -torch.inf
        above = (logits[:, attack.target] - others.amax(1)).view(len(channels), -1).mean(1)
        punished: Tensor = attack.weight * above.relu().mean()
        return loss + punished
