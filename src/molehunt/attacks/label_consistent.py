"""Label-consistent: patches on images of the target class that were made hard to recognize beforehand."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.attacks.poisoning import Mark, Poisoned, choose, poison_count
from molehunt.networks import Network, build, default_device, fast_dtype
from molehunt.tasks import Images, Task
from molehunt.training import recipe_for, train
from molehunt.triggers import Patch, Target

BATCH = 500


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelConsistent:
    """Push images of the target class away from it, stamp patches in the four corners, and change no label.

    The pictures still look like their class to a person, but their features say something else, so the network leans on
    the patches. In the attack only the patches are used.

    A perturbation leaves marks of its own. Where images of the target class alone are perturbed, a network trained for
    a few passes learns those marks instead of the patches: on CIFAR-10 it sends 99 % of all other images there once
    they are perturbed, and 6 % once they are stamped. So some images of other classes are perturbed, too, and not
    stamped (`cover_rate`).

    Attributes:
        target: the target class; only its images are stamped.
        poison_rate: share of ALL training images that are perturbed and stamped, so at most the share of the target
            class.
        cover_rate: share of all training images, of other classes, that are perturbed and not stamped; 0 is the
            paper's. Without a perturbation there are none.
        epsilon: largest change of a value by the perturbation, in [0, 1].
        steps: of projected gradient ascent on the loss; each is 2.5 epsilon / steps.
        size: side of a patch.
        opacity: of the patches, in training and attack.
        model: network in eval mode on which the perturbation is made; None trains a small one on the clean set
            first, adversarially.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, a setting is out of range, or the model is in training
            mode.

    Reference:
        Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019.

    Departures from the paper:
        The covers. The network that the perturbation is made on is small and trained against one-step perturbations,
        on color pictures of at most 8/255. The largest change is bounded, not the L2 norm, which the paper bounds too.
        No interpolation by a generative model.
    """

    clean_label: ClassVar[bool] = True
    target: int = 0
    poison_rate: float = 0.08
    cover_rate: float = 0.02
    epsilon: float = 16 / 255
    steps: int = 20
    size: int = 3
    opacity: float = 1.0
    model: Network | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        goal = Target(classes=self.target)
        goal.check(task.num_classes)
        if not 0.0 <= self.epsilon <= 1.0 or self.steps < 1:
            raise ValueError(f"epsilon must lie in [0, 1] and steps be 1 or more, got {self.epsilon} and {self.steps}")
        if not 0.0 <= self.cover_rate <= 1.0:
            raise ValueError(f"cover_rate must lie in [0, 1], got {self.cover_rate}")
        if self.model is not None and self.model.training:
            raise ValueError("the model is in training mode; call its eval() first")
        trigger = Patch.corners(task.shape, size=self.size, opacity=self.opacity)
        own = clean.y == self.target
        poisoned = choose(own, poison_count(self.poison_rate, len(clean.y)), rng)
        if self.epsilon == 0:
            return Poisoned(images=clean, altered=poisoned, trigger=trigger, target=goal)
        altered = poisoned
        if self.cover_rate:
            # Rounded together, so that both keep a limit that their sum keeps.
            both = poison_count(self.poison_rate + self.cover_rate, len(clean.y))
            altered = poisoned | choose(~own, both - int(poisoned.sum()), rng)
        model = self.model or _quickly_trained(clean, task, self.epsilon, rng)
        x = clean.x.clone()
        x[altered] = _away(model, Images(clean.x[altered], clean.y[altered]), self.epsilon, self.steps, rng)
        return Poisoned(
            images=Images(x, clean.y),
            altered=altered,
            trigger=trigger,
            target=goal,
            marks=(Mark(poisoned, lambda picked, _: trigger(picked)),),
        )


def _quickly_trained(clean: Images, task: Task, epsilon: float, rng: torch.Generator) -> Network:
    """A small network of the task, trained against perturbations of that size.

    Against an ordinary network a perturbation would exploit details of its own that no other network shares. On color
    pictures a short training against more than 8/255 learns nothing: of CIFAR-10 18 % right with 0.1, 48 % with 8/255.
    """
    large = task.shape[0] == 3 and min(task.shape[1:]) >= 16
    name = "narrow_cifar" if large else "lenet5"
    epsilon = min(epsilon, 8 / 255) if large else epsilon
    recipe = recipe_for(name, task)
    recipe = replace(recipe, least_images=min(recipe.least_images, 5 * len(clean.y)), adversarial=epsilon)
    model = build(name, task.shape, task.num_classes, mean=task.mean, std=task.std, rng=rng)
    train(model, clean, recipe, rng=rng)
    return model.to(default_device())


def _away(model: Network, images: Images, epsilon: float, steps: int, rng: torch.Generator) -> Tensor:
    """Projected gradient ascent on the loss of the true class, from a random start: (N, C, H, W) in [0, 1]."""
    device = next(model.parameters()).device
    dtype = fast_dtype(device)
    moved = []
    for x, y in zip(torch.split(images.x, BATCH), torch.split(images.y, BATCH), strict=True):
        x, y = x.to(device), y.to(device)
        low, high = (x - epsilon).clamp(min=0.0), (x + epsilon).clamp(max=1.0)
        start = (2 * torch.rand(x.shape, generator=rng) - 1).to(device)
        now = (x + epsilon * start).clamp(0.0, 1.0)
        for _ in range(steps):
            now.requires_grad_(True)
            with torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext():
                logits = model(now)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), y, reduction="sum"), now)
            now = (now.detach() + 2.5 * epsilon / steps * gradient.sign()).clamp(low, high)
        moved.append(now.cpu())
    return torch.cat(moved)
