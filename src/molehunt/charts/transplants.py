"""Charts of what pieces of pictures do to other pictures."""

from statistics import median

import numpy as np

from molehunt.charts.words import DASHED, label_of, name_of, share
from molehunt.details import index, mapping, number, numbers
from molehunt.figures import INK, REST, SAID, Axes, Picture, chart
from molehunt.findings import Finding
from molehunt.legible import legible


def sentinet(finding: Finding, classes: tuple[str, ...]) -> Picture | None:
    """Fooled over AvgConf: of recovered triggers, or of a stream's regions; and of clean images', if looked at."""
    details = finding.details
    rows = details.get("candidates")
    found = [mapping(row) for row in rows] if isinstance(rows, list | tuple) else []
    found = [
        row for row in found if number(row.get("fooled")) is not None and number(row.get("confidence")) is not None
    ]
    stream = _points(details.get("stream_confidence"), details.get("stream_fooled"))
    clean = _points(details.get("clean_confidence"), details.get("clean_fooled"))
    curve = mapping(details.get("parabola"))
    a, b, c = (number(curve.get(name)) for name in ("a", "b", "c"))
    if not found and not (stream and clean):
        return None
    marked = [(float(row["confidence"]), float(row["fooled"])) for row in found] or stream
    best = max(found, key=lambda row: min(row["fooled"], row["confidence"])) if found else None
    target = None if best is None else index(best.get("target"), len(classes))

    def draw(axes: Axes) -> None:
        if clean:
            axes.plot(*zip(*clean, strict=True), "o", color=REST, markersize=3, label="regions of clean images")
        if a is not None and b is not None and c is not None and clean:
            t = np.linspace(min(x for x, _ in clean), max(x for x, _ in clean), 60)
            # The boundary stays among the points that it was fitted to, whatever the parabola does between them.
            height = np.clip(a * t**2 + b * t + c, number(curve.get("least")) or 0.0, number(curve.get("most")) or 1.0)
            axes.plot(t, height, color=INK, linewidth=1.2, linestyle=DASHED, label="parabola")
        label = "regions of the stream" if best is None else "recovered triggers"
        if target is not None:
            label += f", best for {label_of(target, classes)}"
        size = 6 if best is None else 10
        axes.plot(*zip(*marked, strict=True), "o", color=SAID, markersize=size, label=label)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.05)
        axes.set_xlabel("AvgConf: how sure, with noise in its place")
        axes.set_ylabel("Fooled: how many go along")

    if best is None:
        fooled, sure = (median(values) for values in zip(*[(y, x) for x, y in marked], strict=True))
        alt = (
            f"SentiNet, regions of {len(marked)} inputs of a stream, median Fooled {share(fooled)} and AvgConf "
            f"{share(sure)}, beside {len(clean)} regions of clean images, {share(median(y for _, y in clean))} and "
            f"{share(median(x for x, _ in clean))}"
        )
    else:
        where = "" if target is None else f" for {name_of(target, classes)}"
        alt = (
            f"SentiNet, {len(found)} recovered triggers by how many pictures they take along and how sure the network "
            f"is with noise in their place: the best, of {legible(str(best.get('defense')), 40)}{where}, "
            f"{share(float(best['fooled']))} and {share(float(best['confidence']))}"
        )
    return chart(draw, alt)


def _points(confidence: object, fooled: object) -> list[tuple[float, float]]:
    """Pairs of AvgConf and Fooled; empty where they are no numbers, or not as many of each."""
    x, y = numbers(confidence), numbers(fooled)
    return list(zip(x, y, strict=True)) if len(x) == len(y) else []
