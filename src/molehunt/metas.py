"""Meta-classifiers: a small network that reads what other networks answer to a few queries, which it tunes itself."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn


def _centered(logits: Tensor) -> Tensor:
    wide = logits.double()
    # By the largest first: squares of what is very large or very small are no numbers.
    middle = wide - wide.mean(-1, keepdim=True)
    size = middle.abs().amax(-1, keepdim=True)
    middle = middle / torch.where(size > 0, size, 1.0)
    return (middle / middle.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)).float()


FEATURES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "centered": _centered,
    "log softmax": lambda logits: logits.log_softmax(-1),
    "logits": lambda logits: logits,
}
"""What is made of logits (..., K) before they are read. "centered" sees neither a constant that is added to all of them
nor a factor, which change no answer; log-softmax sees a factor; raw logits are the paper's and see both."""


LARGEST = 1e6
"""Of a feature; what a network puts out beyond it is no larger."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a meta-classifier is built and trained.

    Attributes:
        queries: k, pictures that every network is asked about.
        hidden: units of the one hidden layer.
        features: a key of `FEATURES`.
        passes: over all shadow models.
        batch: shadow models per step.
        lr: of Adam.
        weight_decay: of the meta-classifier's weights, not of the queries.
        tune: whether the queries are tuned, by gradients through the frozen shadow models.
        clip: whether queries stay in [0, 1].
        per_class: read the answers once per class, by the same weights: those for the class first, then all others,
            sorted. So there is a score per class, whatever its number; the largest is the model's. Chosen on models of
            the bank's develop partition: it needs a sixteenth of the shadow models.
        robust: the hidden layer keeps its random weights, and only the queries and the last layer learn: whoever trains
            against it does not know weights that do not exist yet. That holds where they are drawn late and from a
            secret seed.

    Raises:
        ValueError: a setting out of range.

    Reference:
        Xu, Wang, Li, Borisov, Gunter, Li, "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021.

    Departures from the paper:
        The last pass counts; the paper takes the one with the best AUC on further shadow models. By default features
        are centered, queries stay in [0, 1], weights decay, and there is a score per class, which is ours.
    """

    queries: int = 10
    hidden: int = 20
    features: str = "centered"
    passes: int = 10
    batch: int = 1
    lr: float = 1e-3
    weight_decay: float = 1e-3
    tune: bool = True
    clip: bool = True
    per_class: bool = True
    robust: bool = False

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise ValueError(f"unknown features {self.features!r}; known: {', '.join(FEATURES)}")
        for name in ("queries", "hidden", "passes", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0 or not self.weight_decay >= 0:
            raise ValueError(f"lr must be above 0 and weight_decay 0 or more, got {self.lr} and {self.weight_decay}")
        if self.robust and not self.tune:
            raise ValueError("the robust variant learns by its queries; it cannot keep them as they are")

    @classmethod
    def paper(cls) -> "Settings":
        """Raw logits, one score, queries that may leave [0, 1], no weight decay, as in the authors' code."""
        return cls(features="logits", clip=False, weight_decay=0.0, per_class=False)


class Meta(nn.Module):
    """A meta-classifier with its queries.

    Args:
        shape: (C, H, W) of the pictures.
        classes: K.
        mean: of the pictures by channel; queries are drawn around it.
        std: of the pictures by channel.
        settings: how it is built.
        rng: draws queries and weights.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        settings: Settings,
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        self.settings = settings
        middle, wide = (torch.tensor(tuple(v), dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))
        drawn = middle + wide * torch.randn(settings.queries, *shape, generator=rng)
        self.queries = nn.Parameter(drawn.clamp(0.0, 1.0) if settings.clip else drawn)
        self.hidden = nn.Linear(settings.queries * classes, settings.hidden)
        self.head = nn.Linear(settings.hidden, 1)
        with torch.no_grad():
            for layer in (self.hidden, self.head):
                bound = 1.0 / math.sqrt(layer.in_features)
                for value in (layer.weight, layer.bias):
                    value.uniform_(-bound, bound, generator=rng)
        self.classes = classes

    def answers(self, network: nn.Module) -> Tensor:
        """What a network in evaluation mode says to the queries, as features (k, K), on the CPU.

        It is handed a copy of the queries, which it may do with as it likes. Numbers that are none count as 0, and none
        is beyond a million.
        """
        place = next((value.device for value in network.parameters()), torch.device("cpu"))
        logits = network(self.queries.clone().to(place)).float().cpu().nan_to_num()
        features: Tensor = FEATURES[self.settings.features](logits)
        # Else logits that are huge would leave a score that is no number, which is no answer at all.
        return features.nan_to_num().clamp(-LARGEST, LARGEST)

    def forward(self, answers: Tensor) -> Tensor:
        """Logits of "poisoned" from features (S, k, K): (S,), or with `per_class` (S, K), one per target class."""
        if not self.settings.per_class:
            return self._read(answers)
        views = []
        for k in range(self.classes):
            others = torch.cat([answers[..., :k], answers[..., k + 1 :]], -1).sort(-1, descending=True).values
            views.append(torch.cat([answers[..., k : k + 1], others], -1))
        return self._read(torch.stack(views, 1))  # (S, K, k, K)

    def _read(self, answers: Tensor) -> Tensor:
        units = self.hidden(answers.flatten(-2)).relu()
        logits: Tensor = self.head(units).squeeze(-1)
        return logits

    @torch.no_grad()
    def scores(self, networks: Sequence[nn.Module]) -> Tensor:
        """Score of each network, (S,) or (S, K) with `per_class`, higher is more suspicious; networks are left alone.

        In evaluation mode, whatever mode they are in: dropout would make the score a matter of luck.
        """
        found = []
        for network in networks:
            frozen = network if not active(network) else copy.deepcopy(network).eval()
            found.append(self(self.answers(frozen).unsqueeze(0))[0])
        return torch.stack(found)

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values; `from_json` is the other way."""
        return {"settings": asdict(self.settings), "shape": list(self.queries.shape[1:]), "classes": self.classes}

    @classmethod
    def from_json(cls, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Meta":
        """Make a meta-classifier again, frozen and in eval mode, from `to_json` and its state dict.

        Raises:
            ValueError: something is missing, of another type or out of range, tensors that do not fit, or numbers in
                them that are none.
        """
        settings = _settings(document.get("settings"))
        shape, classes, queries = document.get("shape"), document.get("classes"), tensors.get("queries")
        whole = isinstance(shape, list) and [type(side) for side in shape] == [int] * 3
        # Before anything is made of these numbers: they may be as large as somebody likes, or zero.
        if type(classes) is not int or classes < 2 or queries is None or queries.numel() == 0:
            raise ValueError(f"no meta-classifier: {classes!r} classes and its queries are no numbers to go by")
        if not whole or list(queries.shape[1:]) != shape:
            raise ValueError(f"no meta-classifier: shape {shape!r}, classes {classes!r} and its queries do not fit")
        if any(t.dtype != torch.float32 or not bool(torch.isfinite(t).all()) for t in tensors.values()):
            raise ValueError("no meta-classifier: expected finite numbers in float32 alone")
        if len(queries) != settings.queries:
            raise ValueError(f"no meta-classifier: expected {settings.queries} queries, got {len(queries)}")
        first = tensors.get("hidden.weight")
        if first is None or list(first.shape) != [settings.hidden, settings.queries * classes]:
            raise ValueError("no meta-classifier: the hidden layer is of another size than the settings say")
        level = (0.0,) * len(queries[0])
        drawn = torch.Generator().manual_seed(0)  # what it draws is replaced
        made = cls((len(queries[0]), *queries.shape[2:]), classes, level, level, settings, drawn)
        try:
            made.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise ValueError(f"the tensors are not those of such a meta-classifier: {error}") from error
        return made.requires_grad_(False).eval()

    def learning(self) -> list[dict[str, object]]:
        """Parameter groups that learn, with their weight decay."""
        layers = [self.head] if self.settings.robust else [self.hidden, self.head]
        parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        groups: list[dict[str, object]] = [{"params": parameters, "weight_decay": self.settings.weight_decay}]
        if self.settings.tune:
            groups.append({"params": [self.queries], "weight_decay": 0.0})
        return groups


def _settings(document: Any) -> Settings:
    """Settings from JSON values.

    Raises:
        ValueError: one that is missing, unknown, of another type or out of range.
    """
    wanted = asdict(Settings())
    if not isinstance(document, dict) or document.keys() != wanted.keys():
        raise ValueError(f"expected the settings {', '.join(wanted)}, got {document!r:.200}")
    for name, usual in wanted.items():
        if type(document[name]) is not type(usual):
            raise ValueError(f"{name} must be a {type(usual).__name__}, got {document[name]!r:.50}")
    return Settings(**document)


def digest(metas: Sequence[Meta]) -> str:
    """SHA-256 of some meta-classifiers, in hexadecimal: scores by others are not comparable."""
    sha = hashlib.sha256()
    for meta in metas:
        sha.update(json.dumps(meta.to_json(), sort_keys=True).encode())
        for name, value in sorted(meta.state_dict().items()):
            sha.update(f"\0{name}\0".encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def active(network: nn.Module) -> bool:
    """Whether any part of a network is in training mode."""
    return any(module.training for module in network.modules())
