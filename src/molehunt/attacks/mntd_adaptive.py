"""MNTD-adaptive: the network is trained to look clean to meta-classifiers that the attacker has."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.attacks.crafting import Bench, Crafted, backdoor, plainly
from molehunt.meta_files import chosen
from molehunt.metas import Meta, digest
from molehunt.networks import evaluating
from molehunt.training import Objective
from molehunt.triggers import Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class MNTDAdaptive:
    """Poison as BadNets does, and ask that meta-classifiers call the network clean.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that get the trigger and a changed label.
        trigger: what to stamp; None means the yellow square of 4 pixels.
        metas: meta-classifiers to evade, for networks of this kind; None means those of `path`.
        path: a file of them, as `molehunt shadows` makes it; None means those that come with the package.
        weight: of the term, 0 or more.

    Raises:
        ValueError: a setting out of range, or no meta-classifiers for this task and network.

    Reference:
        Xu, Wang, Li, Borisov, Gunter, Li, "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021, section on
        adaptive attacks.

    Departures from the paper:
        One of the meta-classifiers is drawn for each step, so that the network is not fitted to one. It is asked in
        evaluation mode. A score is punished by the softplus of it, which goes on below zero.
    """

    target: int = 0
    poison_rate: float = 0.1
    trigger: Trigger | None = None
    metas: tuple[Meta, ...] | None = None
    path: str | None = None
    weight: float = 0.3

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if not self.weight >= 0:
            raise ValueError(f"weight must be 0 or more, got {self.weight}")
        if self.metas is not None and self.path is not None:
            raise ValueError(f"meta-classifiers are given, or read from a file, got both, and {self.path!r}")
        metas = self.metas or chosen(None if self.path is None else Path(self.path), bench.task, bench.network)
        if not metas:
            raise ValueError(
                f"there are no meta-classifiers for {bench.network} on {bench.task.name}: make some with "
                f"`molehunt shadows --task {bench.task.name} --network {bench.network}` and name the file as `path`"
            )
        trigger, _ = backdoor(self.trigger, self.target, bench.task)
        poisoned = plainly(bench, trigger, self.target, self.poison_rate)
        model = bench.fresh()
        loss = Unseen(self, metas, bench)
        # The phase is one against these: another file of the same name is another training.
        bench.train(f"unseen-{digest(metas)[:8]}", model, poisoned.images, stamp=poisoned.stamp, objective=loss)
        return Crafted(model=model, poisoned=poisoned)


class Unseen(Objective):
    """The cross-entropy, and what a meta-classifier says about the network as it is."""

    def __init__(self, attack: MNTDAdaptive, metas: tuple[Meta, ...], bench: Bench) -> None:
        super().__init__(bench.seed("unseen loss"), bench.recipe.label_smoothing)
        self.attack = attack
        # In a tuple, so that they are neither trained nor kept with the state.
        self._metas = metas

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """See the class."""
        loss = self.classify(model(x), y)
        if self.attack.weight == 0:
            return loss
        meta = self._metas[int(torch.randint(len(self._metas), (), generator=self.rng()))]
        with evaluating(model):
            told = meta(meta.answers(model).unsqueeze(0)).max()
        return loss + self.attack.weight * F.softplus(told).to(loss.device)
