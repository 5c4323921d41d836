"""What defenses saw, as pictures: one small chart for each that has more to show than a number.

A chart reads the `details` that the defense documents. Where they lack something, as in the record of an older version,
there is no chart.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from molehunt.charts.detection import brain_stimulation, neural_cleanse, pair_inversion, spectral_signatures, strip
from molehunt.charts.meta import mntd, rab
from molehunt.charts.removals import fine_pruning, neuron_pruning, pruning_detection
from molehunt.charts.transplants import sentinet
from molehunt.figures import Picture
from molehunt.findings import Finding

Draw: TypeAlias = Callable[[Finding, tuple[str, ...]], Picture | None]


class Chart(NamedTuple):
    """How a defense's finding is drawn, and what a reader has to know to read it."""

    draw: Draw
    caption: str


def chart_of(finding: Finding, classes: tuple[str, ...]) -> Picture | None:
    """Draw what a defense saw.

    Args:
        finding: its answer.
        classes: names of the classes; they may be strangers' text.

    Returns:
        The picture, whose words hold its essential numbers; None where the defense has no chart, as a plug-in, or where
        its details lack what the chart needs.
    """
    known = CHARTS.get(finding.defense)
    return None if known is None else known.draw(finding, classes)


CHARTS: dict[str, Chart] = {
    "pruning_detection": Chart(
        pruning_detection,
        "Accuracy of copies that each lose other filters. How far it falls, and where, tells networks apart.",
    ),
    "fine_pruning": Chart(
        fine_pruning,
        "Accuracy while channels are cut, those first that clean images leave asleep. Pruning stops before it falls "
        "below the tolerance.",
    ),
    "spectral_signatures": Chart(
        spectral_signatures,
        "Training samples of the class that sticks out most, by how far they lie out along its leading axis.",
    ),
    "strip": Chart(
        strip,
        "How undecided the model is when other images are mixed in. Under a trigger it stays sure: left of the line.",
    ),
    "abs": Chart(
        brain_stimulation,
        "Logits while one channel is stimulated. A compromised channel lifts one class above all others.",
    ),
    "neural_cleanse": Chart(
        neural_cleanse,
        "Size of the smallest mask that sends images to each class. A backdoor needs an abnormally small one.",
    ),
    "pair_inversion": Chart(
        pair_inversion,
        "How much smaller than usual the patch is that sends pictures of one class to another, less what the way back "
        "is. A backdoor of some classes alone leads one way.",
    ),
    "sentinet": Chart(
        sentinet,
        "What something pasted onto pictures does to them, beside noise in its place. A trigger is small and "
        "powerful: it lies at the top right.",
    ),
    "neuron_pruning": Chart(
        neuron_pruning,
        "Accuracy, and success of the recovered triggers, while neurons are cut, those first that the triggers wake.",
    ),
    "mntd": Chart(
        mntd,
        "What meta-classifiers, which learned from clean and backdoored networks, think of each class as the target.",
    ),
    "rab": Chart(
        rab,
        "Share of images on which the vote of noisy networks is certified, by how much somebody may have changed the "
        "training pictures. Their labels are not covered.",
    ),
}
"""Drawings by name of the defense, in the order of the rounds."""
