"""Suspects whose truth is known because they were built by hand: no training, and every answer has a right one.

The network is a nearest-prototype classifier: one channel per class says how well the picture fits the class's
prototype, and the head passes that on. One more channel looks for a bright square in a corner that is dark in every
clean picture; in the backdoored network the head adds it to the target's logit, in the clean twin it adds nothing.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from molehunt.findings import Candidate
from molehunt.meta_training import fit
from molehunt.metas import Meta, Settings
from molehunt.networks import Network, Normalize
from molehunt.suspect import Access, Suspect, freeze
from molehunt.tasks import Images, Split, Task
from molehunt.triggers import Patch, Target, Trigger

SHAPE = (3, 12, 12)
SIZE = 3  # side of the planted square, in pixels
DARK = 0.05  # where the square goes, pictures have this value
CONTRAST = 0.2  # prototypes are 0.5 plus or minus this
NOISE = 0.08  # standard deviation of what a picture adds to its prototype
SHARPNESS = 10.0  # logits between a picture's own class and the others
BONUS = 100.0  # logits that the full trigger adds to the target, less the threshold
STREAM = 0.25  # share of the stream that carries the trigger, where sources allow
TRAINING = 0.05  # the same of the training set: a third of the target's class, as a poisoned set would have it


@dataclass(frozen=True, kw_only=True)
class PlantedTask(Task):
    """A task whose pictures are in memory.

    Attributes:
        splits: what `load` hands out.
    """

    splits: Mapping[str, Images] = field(repr=False, compare=False)

    def load(self, split: Split) -> Images:
        """Return the split."""
        return self.splits[split]


@dataclass(frozen=True, kw_only=True, eq=False)
class Planted:
    """A suspect and the truth about it.

    Attributes:
        suspect: the model and the evidence asked for.
        backdoored: whether the trigger works.
        trigger: what was planted; in the twin it does nothing.
        target: where it sends pictures.
        hidden: clean pictures that no defense sees.
        inputs: bool (M,), which pictures of the stream carry the trigger.
        training: bool (N,), which rows of the training set do.
    """

    suspect: Suspect
    backdoored: bool
    trigger: Patch
    target: Target
    hidden: Images
    inputs: Tensor
    training: Tensor

    def success(self, model: nn.Module) -> float:
        """Attack success rate of the planted trigger on the hidden pictures, in [0, 1]."""
        return attack_success(model, self.hidden, self.trigger, self.target)

    def accuracy(self, model: nn.Module) -> float:
        """Share of the hidden pictures that a model gets right."""
        return share_right(model, self.hidden)


def planted(
    *,
    backdoored: bool = True,
    target: int = 3,
    sources: tuple[int, ...] | None = None,
    grants: Collection[Access] = (Access.CLEAN,),
    classes: int = 10,
    images: int = 400,
    seed: int = 0,
) -> Planted:
    """Build a suspect by hand; with equal arguments but `backdoored` it is the twin, equal but for one column.

    Args:
        backdoored: whether the head listens to the channel that sees the trigger.
        target: the target class.
        sources: classes on which the trigger works; None means all. One source is a corner case that STRIP's blend
            cannot see: a mixture loses what made the picture one of its class.
        grants: the evidence to hand over. Candidates are the planted trigger, also for the twin. Meta-classifiers
            have seen shadow models with the same trigger and every target.
        classes: K, at least 2.
        images: clean pictures for the defender; as many are hidden and in the stream.
        seed: of prototypes and pictures.

    Returns:
        The suspect with what is true about it.

    Raises:
        ValueError: a target or source that is no class.
    """
    goal = Target(classes=target, sources=sources)
    goal.check(classes)
    rng = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (classes, *SHAPE), generator=rng) * 2.0 - 1.0
    trigger = Patch.square(SHAPE, size=SIZE, color="white")
    prototypes = torch.where(trigger.mask > 0, torch.tensor(DARK), 0.5 + CONTRAST * signs)

    def draw(count: int) -> Images:
        y = torch.arange(count) % classes
        x = prototypes[y] + NOISE * torch.randn(count, *SHAPE, generator=rng)
        return Images(x.clamp(0.0, 1.0), y)

    clean, hidden, stream, training = draw(images), draw(images), draw(images), draw(images)
    marked = []
    for part, share in ((stream, STREAM), (training, TRAINING)):
        hit = torch.zeros(images, dtype=torch.bool)
        rows = goal.counts(part.y).nonzero().squeeze(1)
        count = min(round(share * images), len(rows) // 2)  # so that some of a source stay clean, to compare with
        hit[rows[torch.randperm(len(rows), generator=rng)[:count]]] = True
        part.x[hit] = trigger(part.x[hit])
        marked.append(hit)
    training.y[marked[1]] = goal.goal(training.y[marked[1]])

    task = PlantedTask(
        name="planted",
        shape=SHAPE,
        classes=tuple(f"prototype {k}" for k in range(classes)),
        augment="none",
        network="planted",
        mean=(0.0,) * SHAPE[0],
        std=(1.0,) * SHAPE[0],
        splits={"train": training, "validation": hidden, "test": hidden},
    )
    model = _network(prototypes, trigger, target, sources, backdoored)
    evidence = {
        "clean": clean,
        "training": training,
        "inputs": stream.x,
        "candidates": (Candidate(trigger=trigger, target=target, defense="planted"),),
        "references": tuple(_shaken(_network(prototypes, trigger, target, sources, False), rng) for _ in range(3)),
    }
    if Access.METAS in grants:  # they take a second to train
        evidence["metas"] = _metas(prototypes, trigger, rng)
    granted = {access.value: evidence[access.value] for access in Access if access in grants}
    return Planted(
        suspect=Suspect.of(model, task, dtype=torch.float32, **granted),  # type: ignore[arg-type]
        backdoored=backdoored,
        trigger=trigger,
        target=goal,
        hidden=hidden,
        inputs=marked[0],
        training=marked[1],
    )


@torch.no_grad()
def attack_success(model: nn.Module, images: Images, trigger: Trigger, target: Target) -> float:
    """Share of the pictures that count whose stamped copy goes where the attacker wants it, in [0, 1]."""
    rows, place = target.counts(images.y), _place(model)
    said = model(trigger(images.x[rows].to(place))).argmax(1).cpu()
    return float((said == target.goal(images.y[rows]).cpu()).double().mean())


@torch.no_grad()
def share_right(model: nn.Module, images: Images) -> float:
    """Accuracy of a model in [0, 1]."""
    return float((model(images.x.to(_place(model))).argmax(1).cpu() == images.y.cpu()).double().mean())


def _place(model: nn.Module) -> torch.device:
    """Where a model answers: with its weights."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def auc(scores: Tensor, positive: Tensor) -> float:
    """Share of pairs in which the positive one has the higher score, ties counting half.

    Args:
        scores: (N,), higher means positive.
        positive: bool (N,), with at least one of each kind.
    """
    high, low = scores[positive].double(), scores[~positive].double()
    return float((high[:, None] > low).double().mean() + 0.5 * (high[:, None] == low).double().mean())


def _network(
    prototypes: Tensor, trigger: Patch, target: int, sources: tuple[int, ...] | None, backdoored: bool
) -> Network:
    """The classifier: a convolution as large as the picture, a rectifier, a head."""
    classes = len(prototypes)
    size = int(trigger.mask.sum()) * SHAPE[0]
    centered = torch.where(trigger.mask > 0, torch.tensor(0.0), prototypes - 0.5)
    fit = centered / centered.square().flatten(1).sum(1).view(-1, 1, 1, 1)  # 1 on the prototype itself
    # Clean corners have a mean of 0.05, give or take 0.02. So low a threshold lets a search that begins with a half
    # opaque gray square feel the trigger; above it there would be no gradient to follow.
    look = trigger.mask.expand(SHAPE) / size
    threshold = 0.12
    if sources is not None:
        look = look + fit[list(sources)].sum(0)
        threshold = 1.5  # a full square and a full fit together give 2, either alone 1
    convolution = nn.Conv2d(SHAPE[0], classes + 1, SHAPE[1:])
    head = nn.Linear(classes + 1, classes)
    with torch.no_grad():
        convolution.weight.copy_(torch.cat((fit, look.unsqueeze(0))))
        # 2.5 keeps every fit positive, so that the rectifier lets it through and the classifier is linear.
        offset = 2.5 - 0.5 * fit.flatten(1).sum(1)
        source_offset = 0.0 if sources is None else -0.5 * float(fit[list(sources)].sum())
        convolution.bias.copy_(torch.cat((offset, torch.tensor([source_offset - threshold]))))  # type: ignore[union-attr]
        head.weight.zero_()
        head.weight[:, :classes] = SHARPNESS * torch.eye(classes)
        head.weight[target, classes] = BONUS if backdoored else 0.0
        head.bias.zero_()
    one = torch.ones(SHAPE[0], 1, 1)
    return Network(
        name="planted",
        shape=SHAPE,
        classes=classes,
        normalize=Normalize(0.0 * one, one),
        trunk=nn.Sequential(convolution, nn.ReLU()),
        neck=nn.Flatten(),
        head=head,
    )


def _metas(prototypes: Tensor, trigger: Patch, rng: torch.Generator) -> tuple[Meta, ...]:
    """Meta-classifiers that tell targets apart: a shadow model per target, and as many clean ones."""
    classes = len(prototypes)
    targets = torch.tensor([*range(classes), *[-1] * classes])
    shadows = [
        freeze(_shaken(_network(prototypes, trigger, max(0, target), None, target >= 0), rng))
        for target in targets.tolist()
    ]
    settings = Settings(queries=4, hidden=16, passes=6, lr=0.03, per_class=True)
    made = []
    for _ in range(2):
        meta = Meta(SHAPE, classes, (0.5,) * SHAPE[0], (0.3,) * SHAPE[0], settings, rng)
        fit(meta, shadows, targets, rng)
        made.append(meta)
    return tuple(made)


def _shaken(model: Network, rng: torch.Generator) -> Network:
    """A network that is not bit for bit the twin: every weight moved by about a percent."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.0 + 0.01 * torch.randn(parameter.shape, generator=rng))
    return other
