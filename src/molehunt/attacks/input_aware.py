"""Input-aware dynamic: a network draws a trigger that works on the picture it was drawn for, and on no other."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.attacks.poisoning import Mark, Poisoned, choose, poison_count
from molehunt.attacks.surrogate import batches, small_network
from molehunt.tasks import Images, Task
from molehunt.triggers import ENCODERS, Encoded, Shape, Target, Trigger
from molehunt.triggers.encoders import LARGEST, Encoder, drawn, strongest


@dataclass(frozen=True, kw_only=True, eq=False)
class InputAware:
    """Put on each of a share of the images a trigger of its own and relabel them.

    Two small networks, those of the listed encoder "masked", draw a pattern and say where it goes. A further share,
    the cross images, gets the trigger of *another* image and keeps its labels: without them the network learns that any
    such pattern is the trigger, and then there is one trigger after all.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that get their own trigger and a changed label.
        cross_ratio: cross images per poisoned image, 0 or more.
        area: share of the pixels that a trigger may change, in (0, 1].
        diversity: weight of the term that asks for different triggers on different images.
        steps: of the optimizer, at most; a small set gets fewer.
        trigger: networks made elsewhere, as an `Encoded`; None makes them.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, or a setting is out of range.

    Reference:
        Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020.

    Departures from the paper:
        The paper trains the networks together with the victim. A training set is poisoned before its victim exists, so
        here they are trained together with a small classifier of the attacker's own, and then frozen. The mask has
        exactly the stated area by construction, where the paper asks for it in the loss, and is not trained beforehand.
        More cross images than the paper's one per poisoned image.
    """

    target: int = 0
    poison_rate: float = 0.1
    cross_ratio: float = 2.0
    area: float = 0.032
    diversity: float = 1.0
    steps: int = 500
    trigger: Trigger | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        if self.trigger is not None and not isinstance(self.trigger, Encoded):
            raise ValueError(f"the trigger of this attack is an Encoded, got {type(self.trigger).__name__}")
        if not self.cross_ratio >= 0:
            raise ValueError(f"cross_ratio must be 0 or more, got {self.cross_ratio}")
        goal = Target(classes=self.target)
        goal.check(task.num_classes)
        altered = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        images = Images(clean.x, torch.where(altered, goal.goal(clean.y), clean.y))
        crossed = torch.zeros_like(altered)
        if self.cross_ratio:
            crossed = choose(~altered, poison_count(self.poison_rate * self.cross_ratio, len(clean.y)), rng)
        other = torch.randint(len(clean.y), (len(clean.y),), generator=rng)
        trigger = self.trigger or self.networks(clean, task, rng)

        def foreign(x: Tensor, rows: Tensor) -> Tensor:
            source = clean.x[other[rows.to(other.device)].to(clean.x.device)]
            return trigger.transplant(x, source.to(x))

        marks = (Mark(altered, lambda picked, _: trigger(picked)), Mark(crossed, foreign))
        return Poisoned(images=images, altered=altered | crossed, trigger=trigger, target=goal, marks=marks)

    def networks(self, images: Images, task: Task, rng: torch.Generator) -> Encoded:
        """Train pattern and mask networks together with a small classifier.

        Args:
            images: what to train on.
            task: says the shape and the number of classes.
            rng: draws weights and the order of the images.
        """
        network, shape = ENCODERS["masked"], task.shape
        start = Encoded(network="masked", shape=shape, linf=1.0, area=self.area, weights=network.initial(shape, rng))
        flat = start.weights.clone().requires_grad_()
        classifier = small_network(shape[0], task.num_classes, shape[1:], rng)
        optimizer = torch.optim.Adam([flat, *classifier.parameters()], lr=2e-3)
        for rows in batches(images, self.steps, 64, rng):
            x, y = images.x[rows], images.y[rows]
            other = x.roll(1, 0)
            mask, pattern = _parts(network, flat, shape, x, start.pixels)
            own = x + mask * (pattern - x)
            cross = other + mask * (pattern - other)
            seen = torch.cat((x, own, cross))
            goals = torch.cat((y, torch.full_like(y, self.target), y.roll(1, 0)))
            trigger = mask * pattern
            apart = (x - other).flatten(1).norm(dim=1) / ((trigger - trigger.roll(1, 0)).flatten(1).norm(dim=1) + 1e-3)
            loss = F.cross_entropy(classifier(seen), goals) + self.diversity * apart.mean() / 10
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        weights = flat.detach().clamp(-LARGEST, LARGEST)
        return Encoded(network="masked", shape=shape, linf=1.0, area=self.area, weights=weights)


def _parts(network: Encoder, flat: Tensor, shape: Shape, x: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Draw mask (N, 1, H, W) and pattern (N, C, H, W); the mask is the final, hard one, with a soft one's gradient."""
    weights = network.unpack(flat, shape)
    scores = drawn(weights, "mask", x)
    hard = strongest(scores.detach(), pixels)
    soft = scores.flatten(1).softmax(1).view_as(scores) * pixels
    return hard + soft - soft.detach(), 0.5 * (1.0 + drawn(weights, "pattern", x).tanh())
