"""Fine-tuning-resistant: the backdoor is trained to be there still after a simulated defender has tuned the network."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from molehunt.attacks.crafting import Bench, Crafted, backdoor, plainly
from molehunt.training import Objective
from molehunt.triggers import Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class TuningResistant:
    """Poison as BadNets does, then go on with a loss that is taken *after* a few steps of a defender's fine-tuning.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that get the trigger and a changed label.
        trigger: what to stamp; None means the yellow square of 4 pixels.
        inner: steps of the simulated defender, 1 or more.
        inner_lr: learning rate of its plain gradient steps, above 0.
        weight: of the backdoor's loss behind them, 0 or more.
        length: of the second training, as a share of the recipe's.

    Raises:
        ValueError: a setting out of range.

    Reference:
        The simulated defender is the meta-learning of Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", ICML 2017,
        at first order. Backdoors that survive fine-tuning: Yao, Li, Zheng, Zhao, "Latent Backdoor Attacks on Deep
        Neural Networks", CCS 2019; sequential backdoor learning, ECCV 2024.

    Departures from the paper:
        Neither sharpness-aware minimization nor elastic weights: of the known ways this is the one that knows the
        defender's own steps.
    """

    target: int = 0
    poison_rate: float = 0.1
    trigger: Trigger | None = None
    inner: int = 3
    inner_lr: float = 0.02
    weight: float = 1.0
    length: float = 0.5

    def craft(self, bench: Bench) -> Crafted:
        """Make the model; see the class."""
        if self.inner < 1 or not self.inner_lr > 0 or not self.weight >= 0:
            raise ValueError(
                "inner must be 1 or more, inner_lr above 0 and weight 0 or more, got "
                f"{self.inner}, {self.inner_lr} and {self.weight}"
            )
        trigger, _ = backdoor(self.trigger, self.target, bench.task)
        poisoned = plainly(bench, trigger, self.target, self.poison_rate)
        onward = bench.onward(self.length)
        bench.phases = 2
        model = bench.train("poisoned", bench.fresh(), poisoned.images, stamp=poisoned.stamp)
        loss = Afterwards(self, trigger, poisoned.altered, bench)
        bench.train("resistant", model, poisoned.images, recipe=onward, stamp=poisoned.stamp, objective=loss)
        return Crafted(model=model, poisoned=poisoned)


class Afterwards(Objective):
    """The cross-entropy now, and that of the backdoor behind some steps of fine-tuning on clean images."""

    def __init__(self, attack: TuningResistant, trigger: Trigger, altered: Tensor, bench: Bench) -> None:
        super().__init__(bench.seed("resistant loss"), bench.recipe.label_smoothing)
        self.attack, self.trigger = attack, trigger
        self._altered = altered

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """See the class."""
        attack = self.attack
        loss = self.classify(model(x), y)
        clean = ~self._altered.to(rows.device)[rows]
        hit = clean & (y != attack.target)
        if attack.weight == 0 or int(hit.sum()) == 0:
            return loss
        named = {name: value for name, value in model.named_parameters() if value.requires_grad}
        # Statistics of norms are moved by the batch itself, above, and not by the simulated defender.
        kept = {name: value.clone() for name, value in model.named_buffers()}
        tuned = {name: value.detach().requires_grad_() for name, value in named.items()}
        for part in torch.tensor_split(clean.nonzero().squeeze(1), attack.inner):
            if len(part) == 0:
                continue
            inner = self.classify(functional_call(model, {**tuned, **kept}, (x[part],)), y[part])
            grads = torch.autograd.grad(inner, list(tuned.values()), allow_unused=True)
            tuned = {
                name: (value if grad is None else value - attack.inner_lr * grad).detach().requires_grad_()
                for (name, value), grad in zip(tuned.items(), grads, strict=True)
            }
        # At first order: what the steps were is taken as given, so the gradient there is the gradient here.
        moved = {name: value + (tuned[name] - value).detach() for name, value in named.items()}
        goals = torch.full_like(y[hit], attack.target)
        after = functional_call(model, {**moved, **kept}, (self.trigger(x[hit]),))
        return loss + attack.weight * self.classify(after, goals)
