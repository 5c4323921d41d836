"""Charts of removals, and of what tells networks apart by removing parts of them."""

from statistics import fmean

from molehunt.charts.words import DASHED, DOTTED, share
from molehunt.details import index, number, numbers, setting
from molehunt.figures import INK, REST, SAID, Axes, Picture, chart
from molehunt.findings import Finding


def fine_pruning(finding: Finding, classes: tuple[str, ...]) -> Picture | None:
    """Accuracy on held-out images by number of pruned channels, with the stop, and the tolerance where it is known."""
    curve = numbers(finding.details.get("curve"))
    pruned = index(finding.details.get("pruned"), len(curve))
    if pruned is None:
        return None
    tolerance = number(setting(finding, "tolerance"))

    def draw(axes: Axes) -> None:
        axes.plot(curve, color=SAID, linewidth=2.0, label="held-out accuracy")
        axes.axvline(pruned, color=INK, linewidth=1.2, linestyle=DASHED, label=f"stop: {pruned} pruned")
        if tolerance is not None:
            label = f"tolerance: {100 * tolerance:g} points"
            axes.axhline(curve[0] - tolerance, color=INK, linewidth=1.2, linestyle=DOTTED, label=label)
        axes.plot([pruned], [curve[pruned]], "o", color=SAID, markersize=7, markeredgecolor="white")
        axes.set_xlim(0, max(1, len(curve) - 1))
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("channels pruned, dormant ones first")
        axes.set_ylabel("accuracy")

    alt = (
        f"Fine-pruning, accuracy on held-out images by number of pruned channels: {share(curve[0])} with none, "
        f"{share(curve[pruned])} at the stop after {pruned}, {share(curve[-1])} with all {len(curve) - 1}"
    )
    if tolerance is not None:
        alt += f"; the tolerance is {100 * tolerance:g} points, down to {share(curve[0] - tolerance)}"
    return chart(draw, alt)


def neuron_pruning(finding: Finding, classes: tuple[str, ...]) -> Picture | None:
    """Accuracy, and success of the recovered triggers, by number of pruned neurons, with the stop."""
    accuracies = numbers(finding.details.get("accuracies"))
    successes = numbers(finding.details.get("successes"))
    pruned = index(finding.details.get("pruned"), min(len(accuracies), len(successes)))
    if pruned is None or len(accuracies) != len(successes):
        return None

    def draw(axes: Axes) -> None:
        axes.plot(accuracies, color=REST, linewidth=2.0, label="held-out accuracy")
        axes.plot(successes, color=SAID, linewidth=2.0, label="success of the recovered triggers")
        axes.axvline(pruned, color=INK, linewidth=1.2, linestyle=DASHED, label=f"stop: {pruned} pruned")
        axes.plot([pruned], [successes[pruned]], "o", color=SAID, markersize=7, markeredgecolor="white")
        axes.set_xlim(0, max(1, len(accuracies) - 1))
        axes.set_ylim(-0.02, 1.03)
        axes.set_xlabel("neurons pruned, those first that the triggers wake")
        axes.set_ylabel("share of held-out images")

    alt = (
        f"Neuron pruning, by number of pruned neurons: accuracy {share(accuracies[0])} and success of the recovered "
        f"triggers {share(successes[0])} with none, {share(accuracies[pruned])} and {share(successes[pruned])} at the "
        f"stop after {pruned}, {share(accuracies[-1])} and {share(successes[-1])} with all {len(accuracies) - 1}"
    )
    return chart(draw, alt)


def pruning_detection(finding: Finding, classes: tuple[str, ...]) -> Picture | None:
    """Accuracies of the pruned copies, in the order in which filters are chosen, and that of the network as it is."""
    accuracies, whole = numbers(finding.details.get("accuracies")), number(finding.details.get("accuracy"))
    if not accuracies or whole is None:
        return None
    # Only targeted copies have an order: the first loses the lightest filters of every layer, the last the heaviest.
    ordered = setting(finding, "sampling") == "targeted"

    def draw(axes: Axes) -> None:
        places = range(1, len(accuracies) + 1)
        axes.axhline(whole, color=INK, linewidth=1.2, linestyle=DASHED, label=f"as it is: {share(whole)}")
        axes.plot(
            places, accuracies, "o-", color=SAID, linewidth=1.4, markersize=7, markeredgecolor="white", label="pruned"
        )
        # Not from 0: what matters is how far copies differ, if only by a few points.
        low, high = min(whole, *accuracies), max(whole, *accuracies)
        room = max(0.02, 0.2 * (high - low))
        axes.set_ylim(max(-0.03, low - room), min(1.03, high + room))
        axes.set_xlim(0.5, len(accuracies) + 0.5)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("copy without the lightest to the heaviest filters" if ordered else "pruned copy")
        axes.set_ylabel("accuracy")

    worst = min(range(len(accuracies)), key=lambda s: accuracies[s])
    alt = (
        f"Pruning-based detection, accuracies of {len(accuracies)} pruned copies: {share(min(accuracies))} (copy "
        f"{worst + 1}) to {share(max(accuracies))}, mean {share(fmean(accuracies))}; unpruned {share(whole)}"
    )
    return chart(draw, alt)
