"""Spectra of features, class by class: means, leading axes of the scatter, and what is read off along them.

Classes are one axis everywhere. Rows of a class are padded to a rectangle block by block, so that memory does not
depend on how uneven the classes are; sums are taken in float64, in an order that does not change between two runs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**22
"""Numbers in one block of rows (32 MB in float64)."""
SCATTER = 2**27
"""Numbers in the scatter matrices that are held at once (1 GiB in float64): more classes are taken in groups."""


def silent() -> None:
    """Never stop."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouped:
    """The rows of a data set, class after class.

    Attributes:
        order: int64 (N,), row numbers, sorted by class.
        sizes: int64 (K,), rows of each class.
        starts: int64 (K,), where each class begins in `order`.
    """

    order: Tensor
    sizes: Tensor
    starts: Tensor

    @classmethod
    def of(cls, labels: Tensor, classes: int, scores: Tensor | None = None) -> "Grouped":
        """Group rows by label (N,); within a class by falling score (N,) where there are scores, ties by index.

        Raises:
            ValueError: a label that is no class, or another number of scores than labels.
        """
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
            raise ValueError(f"labels must be 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
        if scores is None:
            order = torch.sort(labels, stable=True).indices
        else:
            if scores.shape != labels.shape:
                raise ValueError(f"expected a score per label, got {tuple(scores.shape)} and {tuple(labels.shape)}")
            order = torch.sort(scores, descending=True, stable=True).indices
            order = order[torch.sort(labels[order], stable=True).indices]
        sizes = torch.bincount(labels, minlength=classes)
        return cls(order=order, sizes=sizes, starts=sizes.cumsum(0) - sizes)

    def places(self) -> Tensor:
        """Place (N,) of every row within its class, from 0, in the order of the rows of the data set."""
        counted = torch.arange(len(self.order), device=self.order.device)
        within = counted - torch.repeat_interleave(self.starts, self.sizes)
        return torch.empty_like(within).index_copy_(0, self.order, within)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Row numbers (K, n), n the size of the largest class, and bool (K, n), which of them are there.

        What is not there has the number of some other row.
        """
        place = torch.arange(int(self.sizes.max()), device=self.order.device)
        present = place < self.sizes[:, None]
        rows = self.order[(self.starts[:, None] + place).clamp(max=len(self.order) - 1)]
        return rows, present

    def blocks(self, group: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Go through the rows of some classes: which of them (L,) have rows left, row numbers (L, B), bool (L, B).

        Args:
            group: int64 (G,), classes; the first answer is places in it.
            width: numbers per row.
        """
        sizes, starts = self.sizes[group], self.starts[group]
        longest = int(sizes.max())
        step = max(1, min(longest, BLOCK // max(1, len(group) * width)))
        for first in range(0, longest, step):
            live = (sizes > first).nonzero().squeeze(1)
            place = first + torch.arange(step, device=sizes.device)
            present = place < sizes[live][:, None]
            rows = self.order[(starts[live][:, None] + place).clamp(max=len(self.order) - 1)]
            yield live, rows, present


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectra:
    """Per class the mean and the leading axes of its features.

    Attributes:
        sizes: int64 (K,), samples n_k.
        means: float64 (K, d).
        values: float64 (K, m), falling: squares of the largest singular values of the centered features (n_k, d).
        axes: float64 (K, d, m), the right singular vectors that belong to them; their signs mean nothing.
        total: float64 (K,), the sum of all squared singular values, also of those that are not listed.
    """

    sizes: Tensor
    means: Tensor
    values: Tensor
    axes: Tensor
    total: Tensor

    def share(self) -> Tensor:
        """Share (K,) of a class's variance that lies along its leading axis, in [0, 1]; 0 where nothing varies."""
        return torch.where(self.total > 0, self.values[:, 0] / self.total.clamp(min=1e-300), 0.0)

    def excess(self) -> Tensor:
        """Log (K,) of the leading squared singular value over the mean of the others, those that n_k - 1 and d allow.

        0 where all directions vary alike, and where fewer than two could vary; at most 27.7, as the others count as no
        less than 1e-12 of the leading one.
        """
        others = torch.minimum(self.sizes - 1, torch.tensor(self.means.shape[1], device=self.sizes.device)) - 1
        first = self.values[:, 0]
        rest = torch.maximum((self.total - first) / others.clamp(min=1), 1e-12 * first)
        usable = (others >= 1) & (first > 0)
        return torch.where(usable, torch.log(first.clamp(min=1e-300) / rest.clamp(min=1e-300)), 0.0).clamp(min=0.0)


def class_spectra(
    features: Tensor, labels: Tensor, classes: int, *, axes: int = 1, check: Callable[[], None] = silent
) -> Spectra:
    """Find the leading axes of every class.

    The scatter matrices (K, d, d) of centered features are summed in float64 and decomposed together; where all of
    them would take more than 1 GiB (K d^2 above 2^27) classes are taken in groups. Centering comes before
    squaring, so an offset common to all features costs no digits.

    Args:
        features: (N, d), any floating dtype.
        labels: int64 (N,), classes from 0 to K - 1; a class may be empty.
        classes: K.
        axes: m, how many axes to keep; at most d are.
        check: called often; raises to stop.

    Raises:
        ValueError: features that are not (N, d) or not finite, or labels that do not fit.
    """
    if features.ndim != 2 or len(features) != len(labels) or not features.numel():
        raise ValueError(f"expected features (N, d) and N labels, got {tuple(features.shape)} and {len(labels)}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("the features must be finite; the network puts out infinities or NaN before its head")
    width = features.shape[1]
    grouped = Grouped.of(labels, classes)
    keep = min(axes, width)
    wide = {"device": features.device, "dtype": torch.float64}
    means = torch.zeros(classes, width, **wide)  # type: ignore[call-overload]  # torch's stub knows no such dict
    found = []
    every = torch.arange(classes, device=features.device)
    for group in torch.split(every, max(1, SCATTER // width**2)):
        for live, rows, present in grouped.blocks(group, width):
            check()
            means[group[live]] += _without(features[rows].double(), present).sum(1)
        means[group] /= grouped.sizes[group, None].clamp(min=1)
        scatter = torch.zeros(len(group), width, width, **wide)  # type: ignore[call-overload]  # as above
        for live, rows, present in grouped.blocks(group, width):
            check()
            centered = _without(features[rows].double().sub_(means[group[live], None]), present)
            scatter[live] += centered.mT @ centered
        total = scatter.diagonal(dim1=1, dim2=2).sum(1)
        check()
        values, vectors = torch.linalg.eigh(scatter)
        # Rounding may leave a zero a little below.
        found.append((values.flip(1)[:, :keep].clamp(min=0.0), vectors.flip(2)[:, :, :keep], total))
    values, vectors, total = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Spectra(sizes=grouped.sizes, means=means, values=values, axes=vectors, total=total)


def coordinates(features: Tensor, labels: Tensor, spectra: Spectra, *, check: Callable[[], None] = silent) -> Tensor:
    """Where every sample lies along the axes of its class: float64 (N, m), centered within the class."""
    grouped = Grouped.of(labels, len(spectra.sizes))
    found = torch.zeros(len(features), spectra.axes.shape[2], device=features.device, dtype=torch.float64)
    every = torch.arange(len(spectra.sizes), device=features.device)
    for live, rows, present in grouped.blocks(every, features.shape[1]):
        check()
        along = features[rows].double().sub_(spectra.means[live, None]) @ spectra.axes[live]
        found[rows[present]] = along[present]
    return found


def _without(x: Tensor, present: Tensor) -> Tensor:
    """Zero the rows (L, B, d) that are not there, in place; all but the last rows of a class are."""
    return x if bool(present.all()) else x.mul_(present[..., None])


def halves(along: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Part every class in two along an axis, where that explains most of its variance.

    Args:
        along: (N,) coordinates.
        labels: int64 (N,).
        classes: K.

    Returns:
        The share (K,) of the smaller part, in [0, 1/2], and the share (K,) of the variance that lies between the two
        parts, in [0, 1]: 0.64 for a normal distribution, 0.75 for a uniform one, 1 for two points. Both are 0 where a
        class has fewer than two samples or does not vary.
    """
    rows, present = Grouped.of(labels, classes, along).padded()
    values = along[rows].double()
    sizes = present.sum(1, keepdim=True)
    centered = (values - (values * present).sum(1, keepdim=True) / sizes.clamp(min=1)) * present
    total = centered.square().sum(1)
    count = torch.arange(1, rows.shape[1] + 1, device=along.device)
    left = (sizes - count).clamp(min=1)
    between = centered.cumsum(1).square() * sizes / (count * left)
    between = torch.where(count < sizes, between, 0.0)
    best = between.argmax(1)
    smaller = torch.minimum(best + 1, sizes[:, 0] - best - 1).clamp(min=0).double() / sizes[:, 0].clamp(min=1)
    explained = between.gather(1, best[:, None])[:, 0] / total.clamp(min=1e-300)
    usable = (sizes[:, 0] >= 2) & (total > 0)
    return torch.where(usable, smaller, 0.0), torch.where(usable, explained, 0.0).clamp(max=1.0)


def largest_gaps(scores: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many samples (K,) of each class lie above the largest gap between neighbors in its sorted scores (N,).

    At most half of a class; 0 where all scores are equal or there are fewer than two. Of equal gaps the highest counts.
    """
    grouped = Grouped.of(labels, classes, scores)
    rows, present = grouped.padded()
    values = scores[rows].double()
    gaps = torch.zeros_like(values)
    gaps[:, :-1] = torch.where(present[:, 1:], values[:, :-1] - values[:, 1:], 0.0)
    count = torch.arange(1, rows.shape[1] + 1, device=scores.device)
    gaps = torch.where(count <= grouped.sizes[:, None] // 2, gaps, 0.0)
    best = gaps.argmax(1)
    return torch.where(gaps.gather(1, best[:, None])[:, 0] > 0, best + 1, 0)
