"""What a training minimizes when it is not the cross-entropy of its labels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Objective(nn.Module):
    """A loss over one batch, with weights and counters of its own where it needs some.

    Subclasses write `forward`. Parameters are trained beside the model's, by the same optimizers; parameters, buffers
    and the number of batches seen are kept with the state of the training, so that a resumed one goes on as it was.

    Args:
        seed: of all that the loss draws; see `rng`.
        label_smoothing: of `classify`, in [0, 1).

    Attributes:
        batches: int64, how many batches have been seen.
    """

    batches: Tensor

    def __init__(self, seed: int = 0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.seed = seed
        self.label_smoothing = label_smoothing
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """Return the loss, a scalar with a gradient.

        Args:
            model: what is trained, in training mode; number formats are those of the training.
            x: images (B, C, H, W), augmented and stamped.
            y: labels int64 (B,).
            rows: int64 (B,), which rows of the training set they are.
        """
        raise NotImplementedError

    def rng(self) -> torch.Generator:
        """A generator on the CPU for this batch, and the count of one batch more: the same one after a resumption."""
        seen = int(self.batches)
        self.batches += 1
        return torch.Generator().manual_seed((self.seed + 0x9E3779B97F4A7C15 * (seen + 1)) % 2**63)

    def classify(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of logits (B, K) and labels (B,), in nats, in float32; 0 where B is."""
        if len(y) == 0:
            return logits.float().sum()
        return F.cross_entropy(logits.float(), y, label_smoothing=self.label_smoothing)

    def others(self, y: Tensor, target: int, most: int, rng: torch.Generator) -> Tensor:
        """Rows, in a drawn order, of at most so many images of a batch that are not of the target class yet."""
        order = torch.randperm(len(y), generator=rng).to(y.device)
        return order[y[order] != target][:most]


class Inner(nn.Module):
    """A tensor that a loss moves by itself, by Adam, against or beside the training; kept with its state.

    Args:
        value: where it starts.
        lr: learning rate.
        betas: Adam's two decay rates.

    Attributes:
        value: as it is now, without a gradient.
    """

    value: Tensor
    first: Tensor
    second: Tensor
    count: Tensor

    def __init__(self, value: Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__()
        self.lr, self.betas = lr, betas
        for name, start in (("value", value.clone()), ("first", value * 0), ("second", value * 0)):
            self.register_buffer(name, start)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def leaf(self) -> Tensor:
        """The value with a gradient of its own, for one step."""
        return self.value.clone().requires_grad_()

    @torch.no_grad()
    def step(self, grad: Tensor) -> None:
        """Move against a gradient of the value's shape."""
        self.count += 1
        early, late = self.betas
        self.first.mul_(early).add_(grad, alpha=1 - early)
        self.second.mul_(late).addcmul_(grad, grad, value=1 - late)
        number = int(self.count)
        scale = self.second.div(1 - late**number).sqrt_().add_(1e-8)
        self.value -= self.lr * (self.first / (1 - early**number)) / scale
