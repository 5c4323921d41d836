"""What a report shows, as plain records: filled in by the scanner and by the host, drawn by everything else here.

All text in them may come from strangers. It is made legible and escaped where it is drawn, so fill in what you have.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from molehunt.findings import Verdict
from molehunt.power import Power
from molehunt.report.words import CLEAR_AT, FOUND_AT
from molehunt.triggers import Trigger

Kind = Literal["backdoored", "honest", "host clean"]
"""The truth about a submission: a team's backdoor, a team's clean model, or a clean model that the host trained."""


@dataclass(frozen=True, kw_only=True)
class GateView:
    """One gate and how a submission fared at it.

    Attributes:
        name: what is measured, such as "clean accuracy".
        passed: whether the submission passed.
        measured: the measured value; None where nothing is measured.
        limit: the value that it had to reach, or not to exceed.
        at_least: true if the value has to be at least the limit, false if at most.
        share: true if the values are shares in [0, 1], shown in percent.
        text: what else there is to say, for people.
    """

    name: str
    passed: bool
    measured: float | None = None
    limit: float | None = None
    at_least: bool = True
    share: bool = True
    text: str = ""

    @property
    def margin(self) -> float | None:
        """Room to spare, in the unit of the value; negative if the gate was missed."""
        if self.measured is None or self.limit is None:
            return None
        return self.measured - self.limit if self.at_least else self.limit - self.measured


@dataclass(frozen=True, kw_only=True)
class Change:
    """A share in [0, 1] before and after the repair; `after` is None where nothing was repaired."""

    before: float
    after: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """A few example images and what the model says to each.

    Attributes:
        clean: (N, C, H, W) in [0, 1], the first four are shown.
        stamped: the same images under the true trigger; None if there is none.
        recovered: the same images under the recovered trigger; None if nothing was recovered.
        clean_says: the model's class name for each image; empty if not known.
        stamped_says: the same under the true trigger.
        recovered_says: the same under the recovered trigger.

    Raises:
        ValueError: shapes or lengths differ.
    """

    clean: Tensor
    stamped: Tensor | None = None
    recovered: Tensor | None = None
    clean_says: tuple[str, ...] = ()
    stamped_says: tuple[str, ...] = ()
    recovered_says: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.clean.ndim != 4:
            raise ValueError(f"expected images (N, C, H, W), got {tuple(self.clean.shape)}")
        for name in ("stamped", "recovered"):
            other = getattr(self, name)
            if other is not None and other.shape != self.clean.shape:
                raise ValueError(f"{name}: expected {tuple(self.clean.shape)}, got {tuple(other.shape)}")
        for name in ("clean_says", "stamped_says", "recovered_says"):
            said = getattr(self, name)
            if said and len(said) != len(self.clean):
                raise ValueError(f"{name}: expected {len(self.clean)} names, got {len(said)}")


@dataclass(frozen=True, kw_only=True)
class RemovalView:
    """What one defense's repair does to a submission.

    Attributes:
        defense: its name.
        accuracy: clean accuracy before and after.
        asr: attack success rate of the true trigger before and after; None on a clean model.
        taken: whether the verdict hands this one back.
    """

    defense: str
    accuracy: Change
    asr: Change | None = None
    taken: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class SubmissionView:
    """One submission of a game, after publication.

    Attributes:
        id: name of the submission; its first 16 characters are shown.
        team: who sent it.
        kind: the truth.
        attack: the attack in words; empty for an honest model.
        gates: gates in the order in which they were tried.
        verdict: what the defenders answered; None if a gate stopped the submission before.
        true_trigger: the unsealed trigger; None for an honest model.
        true_target: the unsealed target in words.
        true_classes: the target classes, marked in the chart of q.
        pictures: example images; None if there are none.
        accuracy: clean accuracy before and after the repair.
        asr: attack success rate of the true trigger before and after the repair.
        removals: every repair that was offered, the one that was taken among them.
        points: points by name, in the order in which they are shown.
        notes: anything else to say.
    """

    id: str
    team: str
    kind: Kind
    attack: str = ""
    gates: tuple[GateView, ...] = ()
    verdict: Verdict | None = None
    true_trigger: Trigger | None = None
    true_target: str = ""
    true_classes: tuple[int, ...] = ()
    pictures: Pictures | None = None
    accuracy: Change | None = None
    asr: Change | None = None
    removals: tuple[RemovalView, ...] = ()
    points: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether every gate was passed; a submission that missed one counts for nothing."""
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a leaderboard.

    Attributes:
        rank: place; equal for those who cannot be told apart.
        name: a team, or a way to defend.
        points: more is better; all rows of a board are in one unit.
        low: lower end of the interval; None if there is none.
        high: upper end.
        parts: points by part, such as detection; None where a part has no value.
        baseline: true for a row that is there for comparison only, and shown without its rank.
        note: anything else to say.
    """

    rank: int
    name: str
    points: float
    low: float | None = None
    high: float | None = None
    parts: Mapping[str, float | None] = field(default_factory=dict)
    baseline: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class GameReport:
    """A whole game, after publication.

    Attributes:
        title: what was played.
        task: name of the task.
        network: name of the network.
        shape: (C, H, W) of the images.
        classes: names of the classes.
        seed: the game's seed.
        when: when it was played, as text.
        submissions: in the order in which they are shown.
        defenders: the defenders' board, best first.
        attackers: the attackers' board, best first.
        parts: what the points are made of: name of the part to (weight, explanation).
        points: how the points are counted and in which unit, in a sentence.
        notes: anything else to say.
        command: the command that plays it again.
        versions: name of a program to its version.
        model_sha256: of the canonical weights that were scanned; empty where they have no canonical form.
        references_sha256: of the reference models' scores that p rests on; empty without any.
        found_at: p from which a model is called backdoored.
        clear_at: p up to which a model is called clean.

    Raises:
        ValueError: a verdict or a target speaks of other classes.
    """

    title: str
    task: str
    network: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    seed: int
    when: str
    submissions: tuple[SubmissionView, ...]
    defenders: tuple[Row, ...] = ()
    attackers: tuple[Row, ...] = ()
    parts: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    points: str = ""
    notes: tuple[str, ...] = ()
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    found_at: float = FOUND_AT
    clear_at: float = CLEAR_AT

    def __post_init__(self) -> None:
        for submission in self.submissions:
            if submission.verdict is not None:
                _check_classes(submission.id, submission.verdict, self.classes)
            if any(not 0 <= t < len(self.classes) for t in submission.true_classes):
                raise ValueError(
                    f"{submission.id}: there are {len(self.classes)} classes, got {submission.true_classes}"
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanReport:
    """One model that somebody scanned; the truth is not known.

    Attributes:
        name: the file or model, in words.
        task: name of the task.
        network: name of the network.
        shape: (C, H, W) of the images.
        classes: names of the classes.
        verdict: the answer.
        when: when it was scanned, as text.
        pictures: example images, where a trigger was recovered; `stamped` stays None.
        accuracy: accuracy on the clean images before and after the repair.
        asr: success rate of the recovered trigger before and after the repair.
        power: what the defenses that counted catch among known backdoors; None where that is not known.
        notes: anything else to say.
        command: the command that scans it again.
        versions: name of a program to its version.
        found_at: p from which a model is called backdoored.
        clear_at: p up to which a model is called clean.

    Raises:
        ValueError: the verdict speaks of other classes.
    """

    name: str
    task: str
    network: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    verdict: Verdict
    when: str = ""
    pictures: Pictures | None = None
    accuracy: Change | None = None
    asr: Change | None = None
    power: Power | None = None
    notes: tuple[str, ...] = ()
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    model_sha256: str = ""
    references_sha256: str = ""
    found_at: float = FOUND_AT
    clear_at: float = CLEAR_AT

    def __post_init__(self) -> None:
        _check_classes(self.name, self.verdict, self.classes)


def _check_classes(name: str, verdict: Verdict, classes: tuple[str, ...]) -> None:
    """Refuse a verdict whose q or target does not fit the classes."""
    if len(verdict.q) != len(classes):
        raise ValueError(f"{name}: q has {len(verdict.q)} entries, but there are {len(classes)} classes")
    if verdict.target is not None and not 0 <= verdict.target < len(classes):
        raise ValueError(f"{name}: there are {len(classes)} classes, got target {verdict.target}")
