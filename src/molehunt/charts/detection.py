"""Charts of what detectors saw: outliers, entropies, stimulated channels, masks."""

from collections.abc import Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from molehunt.charts.words import DASHED, amount, label_of, name_of, share
from molehunt.details import index, mapping, matrix, number, numbers
from molehunt.figures import INK, REST, SAID, Axes, Picture, chart, drawable
from molehunt.findings import Finding
from molehunt.legible import legible

BINS = 40  # of a histogram
MOST = 43  # bars or lines, one a class, that can still be told apart
WAYS = 8  # pairs of classes whose names fit below their bars
NAMED = 12  # classes whose names fit below their bars, if they are short


def spectral_signatures(finding: Finding, classes: tuple[str, ...]) -> Picture | None:
    """Histogram of the outlier scores of the class that sticks out most, with what lies beyond the threshold marked."""
    found = mapping(finding.details.get("outliers"))
    scores = sorted(numbers(found.get("scores")), reverse=True)
    counts = numbers(finding.details.get("removed_per_class"))
    target = index(found.get("class"), len(counts))
    if not scores or target is None:
        return None
    gone = max(0, min(int(counts[target]), len(scores) - 1))
    # Between the last that goes and the first that stays.
    threshold = (scores[gone - 1] + scores[gone]) / 2 if gone else None
    quantum = "criteria" in finding.details

    def draw(axes: Axes) -> None:
        edges = _edges(scores[0], threshold)
        _histogram(axes, scores[gone:], edges, REST, f"kept of {label_of(target, classes)}: {len(scores) - gone}")
        if threshold is not None:
            _histogram(axes, scores[:gone], edges, SAID, f"removed: {gone}")
            axes.axvline(threshold, color=INK, linewidth=1.2, linestyle=DASHED, label=f"threshold: {amount(threshold)}")
        axes.set_xlim(0, edges[-1])
        # Most of a class lies in the first bars, and beside them a handful of outliers would have no height at all.
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("outlier score (SPECTRE)" if quantum else "outlier score")
        axes.set_ylabel("samples")

    alt = (
        f"{'SPECTRE' if quantum else 'Spectral signatures'}, outlier scores of the {len(scores)} training samples of "
        f"{name_of(target, classes)}, the class that sticks out most: median {amount(median(scores))}, "
        f"largest {amount(scores[0])}"
    )
    alt += "; none is removed" if threshold is None else f"; the {gone} above {amount(threshold)} are removed"
    return chart(draw, alt)


def strip(finding: Finding, classes: tuple[str, ...]) -> Picture | None:
    """Histogram of the entropies of clean images and of images that may carry a trigger, with the boundary marked.

    The latter are those under the candidate trigger with the highest score, or the stream where there is no candidate.
    """
    clean = numbers(finding.details.get("clean_entropies"))
    boundary = number(mapping(finding.details.get("calibration")).get("boundary"))
    other, what = _judged(finding, classes)
    if not clean or not other or boundary is None:
        return None

    def draw(axes: Axes) -> None:
        edges = np.linspace(min(0.0, *clean, *other), max(*clean, *other, 0.01), BINS + 1)
        for values, color, label in ((clean, REST, "clean"), (other, SAID, what[0])):
            _histogram(axes, values, edges, color, label, scale=100 / len(values))
        # Clean images again, as a line: what carries a trigger may hide them.
        _outline(axes, clean, edges, 100 / len(clean))
        axes.axvline(boundary, color=INK, linewidth=1.2, linestyle=DASHED, label=f"boundary: {boundary:.2f}")
        axes.set_xlabel("mean entropy under mixing, bits")
        axes.set_ylabel("images, %")

    low = [sum(v <= boundary for v in values) / len(values) for values in (clean, other)]
    alt = (
        f"STRIP, mean entropies in bits: {len(clean)} clean images, median {median(clean):.2f}, and {len(other)} "
        f"{what[1]}, median {median(other):.2f}; at or below the boundary of {boundary:.2f} lie {share(low[0])} of "
        f"the clean and {share(low[1])} of the others"
    )
    return chart(draw, alt)


def _judged(finding: Finding, classes: tuple[str, ...]) -> tuple[list[float], tuple[str, str]]:
    """Entropies of what STRIP judged, with a short and a long name for it; empty where it judged nothing."""
    rows = finding.details.get("candidates")
    found = [mapping(row) for row in rows] if isinstance(rows, list | tuple) else []
    found = [row for row in found if numbers(row.get("entropies")) and number(row.get("score")) is not None]
    if found:
        best = max(found, key=lambda row: float(row["score"]))
        target = index(best.get("target"), len(classes))
        short = "with a trigger" if target is None else f"with trigger for {label_of(target, classes)}"
        where = "" if target is None else f" for {name_of(target, classes)}"
        return numbers(best["entropies"]), (short, f"under the best candidate trigger{where}")
    stream = [] if finding.input_scores is None else [-v for v in finding.input_scores.tolist()]
    return stream, ("stream", "of the stream")


def brain_stimulation(finding: Finding, classes: tuple[str, ...]) -> Picture | None:
    """Mean logits of ABS by stimulation of the reported channel: the class that it lifts, and the others."""
    best, curve = mapping(finding.details.get("best")), mapping(finding.details.get("stimulation"))
    levels, logits = numbers(curve.get("levels")), matrix(curve.get("logits"))
    if not logits or len(logits) != len(levels):
        return None
    target = index(best.get("target"), len(logits[0]))
    if target is None:
        return None
    lines = np.array(logits).T
    others = [k for k in np.argsort(-lines[:, -1], kind="stable").tolist() if k != target][: MOST - 1]
    where = f"channel {best.get('channel')} of {legible(str(best.get('layer')), 16)}"

    def draw(axes: Axes) -> None:
        for rank, k in enumerate(others):
            label = "the other classes" if rank == 0 else None
            axes.plot(levels, lines[k], color=REST, linewidth=1.4, label=label)
        label = f"lifted: {label_of(target, classes)}"
        axes.plot(levels, lines[target], "o-", color=SAID, linewidth=2.0, markeredgecolor="white", label=label)
        place = where if drawable(where) else "the channel"
        axes.set_xlabel(f"{place}, times largest activation", parse_math=False, fontsize=9)
        axes.set_ylabel("mean logit")

    alt = (
        f"ABS, mean logits by stimulation of {where}, in units of the layer's largest activation: "
        f"{name_of(target, classes)} from {amount(lines[target, 0])} at {levels[0]:g} to {amount(lines[target, -1])} "
        f"at {levels[-1]:g}"
    )
    if others:
        alt += f"; the highest other class there is {name_of(others[0], classes)} with {amount(lines[others[0], -1])}"
    return chart(draw, alt)


def neural_cleanse(finding: Finding, classes: tuple[str, ...]) -> Picture | None:
    """Bars of the L1 norm of the smallest mask, by class, with the reported class and the median marked.

    A class without a mask that works has no bar: the norm that stands for it is another class's.
    """
    norms, searched = numbers(finding.details.get("norms")), numbers(finding.details.get("searched"))
    censored = numbers(finding.details.get("censored")) or [0.0] * len(norms)
    if not norms or not len(norms) == len(searched) == len(censored):
        return None
    size = {int(k): norm for k, norm, cut in zip(searched, norms, censored, strict=True) if not cut}
    if not size:
        return None
    without, norms = len(norms) - len(size), list(size.values())
    shown = sorted(sorted(size, key=lambda k: size[k])[:MOST])
    middle, smallest = median(norms), min(size, key=lambda k: size[k])
    target = finding.target if finding.target in shown else None

    def draw(axes: Axes) -> None:
        label = "" if target is None else f"reported: {label_of(target, classes)}"
        bars(axes, [size[k] for k in shown], None if target is None else shown.index(target), label)
        axes.axhline(middle, color=INK, linewidth=1.2, linestyle=DASHED, label=f"median: {amount(middle)}")
        name_bars(axes, shown, classes)
        axes.set_ylabel("L1 norm of the mask, pixels")

    alt = (
        f"Neural Cleanse, L1 norm in pixels of the smallest mask for each of {len(norms)} classes"
        f"{f', {without} more have no mask that works' if without else ''}: "
        f"median {amount(middle)}, smallest {amount(size[smallest])} for {name_of(smallest, classes)}"
    )
    alt += (
        "; no class is reported"
        if target is None
        else f"; reported is {name_of(target, classes)} with {amount(size[target])}"
    )
    if len(shown) < len(norms):
        alt += f"; the {len(shown)} smallest are shown"
    return chart(draw, alt)


def _edges(largest: float, threshold: float | None) -> NDArray[np.float64]:
    """Edges of `BINS` bins from 0 to the largest value; the threshold is one of them, so no bin has two colors."""
    if threshold is None or not 0 < threshold < largest:
        return np.linspace(0.0, largest if largest > 0 else 1.0, BINS + 1)
    below = min(BINS - 1, max(1, round(BINS * threshold / largest)))
    upper = np.linspace(threshold, largest, BINS - below + 1)
    return np.concatenate((np.linspace(0.0, threshold, below + 1), upper[1:]))


def _histogram(
    axes: Axes, values: Sequence[float], edges: NDArray[np.float64], color: str, label: str, scale: float = 1.0
) -> None:
    """Filled steps: how many values lie in each bin, times a factor."""
    axes.stairs(scale * np.histogram(values, edges)[0], edges, fill=True, color=color, label=label)


def _outline(axes: Axes, values: Sequence[float], edges: NDArray[np.float64], scale: float) -> None:
    axes.stairs(scale * np.histogram(values, edges)[0], edges, color=INK, linewidth=0.8)


def bars(axes: Axes, heights: Sequence[float], marked: int | None, label: str) -> None:
    """One bar per class, edged; the marked one in the color of what is said, with a label of its own."""
    rest = [0.0 if place == marked else height for place, height in enumerate(heights)]
    axes.bar(range(len(rest)), rest, 0.8, color=REST, edgecolor=INK, linewidth=0.8, label="other classes")
    if marked is not None:
        axes.bar([marked], [heights[marked]], 0.8, color=SAID, edgecolor=INK, linewidth=0.8, label=label)


def pair_inversion(finding: Finding, classes: tuple[str, ...]) -> Picture | None:
    """Bars of the pairs of classes whose way is shortest, with the reported one marked."""
    excess = matrix(finding.details.get("excess"))
    if len(excess) < 2 or any(len(row) != len(excess) for row in excess):
        return None
    ways = sorted(
        ((value, s, t) for s, row in enumerate(excess) for t, value in enumerate(row) if s != t), reverse=True
    )
    shown = ways[:WAYS]
    reported = None if finding.target is None else 0

    def draw(axes: Axes) -> None:
        label = (
            ""
            if reported is None
            else f"reported: {label_of(shown[0][1], classes)} to {label_of(shown[0][2], classes)}"
        )
        bars(axes, [value for value, _, _ in shown], reported, label)
        axes.set_xticks(range(len(shown)), [f"{s} to {t}" for _, s, t in shown])
        axes.set_xlabel("numbers of the classes, source to target")
        axes.set_ylabel("excess, log of L1 norm")

    (first, source, target), (second, *_) = shown[:2]
    alt = (
        f"Pair inversion, by how much the patch of each of {len(ways)} pairs of classes is smaller than usual: largest "
        f"{amount(first)} from {name_of(source, classes)} to {name_of(target, classes)}, next {amount(second)}"
    )
    return chart(draw, alt + ("; no pair is reported" if reported is None else "; the first is reported"))


def name_bars(axes: Axes, shown: Sequence[int], classes: Sequence[str]) -> None:
    """Write below bars which classes they are: names where they fit, else numbers, of many classes of some."""
    names = [legible(classes[k], 8) if 0 <= k < len(classes) else "" for k in shown]
    if len(shown) <= NAMED and all(name and drawable(name) for name in names) and sum(map(len, names)) <= 40:
        axes.set_xticks(range(len(shown)), names, parse_math=False)
        axes.set_xlabel("class")
        return
    step = max(1, len(shown) // 8)
    axes.set_xticks(range(0, len(shown), step), [str(k) for k in shown[::step]])
    axes.set_xlabel("number of the class")
