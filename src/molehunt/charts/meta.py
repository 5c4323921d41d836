"""Charts of what networks about networks say: logits of meta-classifiers, and what a vote certifies."""

from molehunt.charts.detection import MOST, bars, name_bars
from molehunt.charts.words import DASHED, amount, label_of, name_of, share
from molehunt.details import mapping, number, numbers
from molehunt.figures import INK, REST, SAID, Axes, Picture, chart
from molehunt.findings import Finding


def mntd(finding: Finding, classes: tuple[str, ...]) -> Picture | None:
    """Bars of the meta-classifiers' mean logit for each class being the target, with that of the model marked.

    There is none where the meta-classifiers have one logit for all classes.
    """
    logits, queries = numbers(finding.details.get("logits")), number(finding.details.get("queries"))
    scores = numbers(finding.class_scores)
    if not logits or queries is None or not scores:
        return None
    shown = sorted(sorted(range(len(scores)), key=lambda k: -scores[k])[:MOST])
    best, mean = max(shown, key=lambda k: scores[k]), sum(logits) / len(logits)

    def draw(axes: Axes) -> None:
        bars(axes, [scores[k] for k in shown], shown.index(best), f"likeliest: {label_of(best, classes)}")
        axes.axhline(mean, color=INK, linewidth=1.2, linestyle=DASHED, label=f"score: {amount(mean)}")
        name_bars(axes, shown, classes)
        axes.set_ylabel("mean logit of “target”")

    alt = (
        f"MNTD, mean logit of {len(logits)} meta-classifiers, which asked {queries:.0f} pictures, for each of "
        f"{len(scores)} classes being the target: largest {amount(scores[best])} for {name_of(best, classes)}; the "
        f"score, the mean of each one's largest, is {amount(mean)}"
    )
    if len(shown) < len(scores):
        alt += f"; the {len(shown)} largest are shown"
    return chart(draw, alt)


def rab(finding: Finding, classes: tuple[str, ...]) -> Picture | None:
    """Certified rate and accuracy by how much the training set may have been changed."""
    table = mapping(finding.details.get("certificate")).get("table")
    rows = [mapping(row) for row in table] if isinstance(table, list | tuple) else []
    unit = "flips" if rows and "flips" in rows[0] else "radius"
    told = [[number(row.get(name)) for name in (unit, "rate", "accuracy")] for row in rows]
    points = [
        (at, rate, right) for at, rate, right in told if at is not None and rate is not None and right is not None
    ]
    if not points or len(points) < len(rows):
        return None
    amounts, rates, accuracies = (list(column) for column in zip(*points, strict=True))
    ends = next((at for at, rate, _ in points if rate == 0.0), None)
    # A curve that ends is shown to where it ends.
    last = ends if ends is not None and ends > 0 else max(amounts[-1], 1e-9)

    def draw(axes: Axes) -> None:
        axes.plot(amounts, rates, "o-", color=REST, linewidth=3.0, markersize=11, label="certified")
        axes.plot(amounts, accuracies, "o-", color=SAID, linewidth=3.0, markersize=8, label="and right")
        axes.set_xlim(-0.03 * last, 1.03 * last)
        axes.set_ylim(-0.02, 1.05)
        words = "samples added, removed or relabeled" if unit == "flips" else "total l2 norm of the change, labels kept"
        axes.set_xlabel(words)
        axes.set_ylabel("share of images")

    what = "changed samples" if unit == "flips" else "total l2 norm of a change of the training pictures"
    alt = (
        f"RAB, share of images whose vote is certified, by {what}: {share(rates[0])} at {amounts[0]:g}, of which "
        f"{share(accuracies[0])} of all are right"
    )
    alt += f"; none from {ends:g} on" if ends is not None else f"; {share(rates[-1])} at {amounts[-1]:g}"
    return chart(draw, alt)
