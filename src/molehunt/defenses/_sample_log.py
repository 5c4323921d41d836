"""What single samples' gradients were like while a network trained, and which samples stand out."""

import torch
from torch import Tensor

from molehunt.defenses._per_sample import PerSample
from molehunt.defenses._statistics import median, spread


class Log:
    """What the samples' gradients were like, collected while training.

    Args:
        count: samples N.
        batch: samples per step.
        epochs: epochs over which the samples are compared.
        device: of the norms.
    """

    def __init__(self, count: int, batch: int, epochs: int, device: torch.device) -> None:
        self.per_epoch = max(1, round(count / batch))
        self.until = epochs * self.per_epoch
        self.sums, self.times = (torch.zeros(count, dtype=torch.float64, device=device) for _ in range(2))
        self.steps: list[Tensor] = []

    def add(self, rows: Tensor, known: PerSample, clip: float) -> None:
        """Take note of one step: rows (B,) of the data, their norms and losses, and the clip norm."""
        if len(rows) == 0:
            return
        norms = known.norms.double()
        middle = norms.quantile(0.5)
        if len(self.steps) < self.until:
            # Against the batch, for all norms fall from step to step, and who comes early would look suspicious.
            self.sums[rows] += norms / norms.mean().clamp(min=1e-12)
            self.times[rows] += 1
        self.steps.append(torch.stack((middle, (norms > clip).double().mean(), known.losses.double().mean())))

    def epochs(self) -> list[dict[str, float]]:
        """Mean over the steps of an epoch: the median norm, the share that was clipped and the loss."""
        names = ("norm", "clipped", "loss")
        return [
            dict(zip(names, torch.stack(self.steps[i : i + self.per_epoch]).mean(0).tolist(), strict=True))
            for i in range(0, len(self.steps), self.per_epoch)
        ]

    def scores(self, y: Tensor) -> Tensor:
        """Robust z-scores (N,) within the class; 0 for a sample that was never drawn, float64."""
        seen = self.times > 0
        mean = self.sums / self.times.clamp(min=1)
        scores = torch.zeros_like(mean)
        for label in sorted(set(y.tolist())):
            mine = seen & (y == label)
            if not bool(mine.any()):
                continue
            scale = spread(mean[mine])
            if float(scale) > 0:
                scores[mine] = (mean[mine] - median(mean[mine])) / scale
        return scores
