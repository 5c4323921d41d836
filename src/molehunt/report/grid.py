"""A whole round in one table: what every defense said about every submission."""

from dataclasses import dataclass

from molehunt.asking import NOT_ASKED
from molehunt.findings import Abstention, Failure, Finding, Outcome
from molehunt.report import words
from molehunt.report.views import GameReport, SubmissionView


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """One submission.

    Attributes:
        number: its number in the report, from 1.
        team: who sent it.
        kind: the truth.
        cells: per defense of the grid the lines that stand in its cell.
    """

    number: int
    team: str
    kind: str
    cells: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Defenses by submissions.

    Attributes:
        defenses: names, in the order in which they ran.
        rows: submissions that were judged.
    """

    defenses: tuple[str, ...]
    rows: tuple[GridRow, ...]

    @classmethod
    def of(cls, report: GameReport) -> "Grid":
        """Collect the outcomes of a game; submissions that no defense looked at are left out."""
        judged = [(n, s) for n, s in enumerate(report.submissions, 1) if s.verdict is not None]
        defenses = tuple(dict.fromkeys(o.defense for _, s in judged if s.verdict for o in s.verdict.outcomes))
        return cls(
            defenses=defenses,
            rows=tuple(
                GridRow(number=n, team=s.team, kind=s.kind, cells=tuple(_cell(s, d, report.classes) for d in defenses))
                for n, s in judged
            ),
        )


def _cell(submission: SubmissionView, defense: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    assert submission.verdict is not None
    outcome = next((o for o in submission.verdict.outcomes if o.defense == defense), None)
    lines = [] if outcome is None else _said(outcome, submission, classes)
    for removal in submission.removals:
        if removal.defense == defense:
            lines += [f"accuracy {words.share(removal.accuracy.before)} → {_after(removal.accuracy.after)}"]
            if removal.asr is not None:
                lines += [f"success {words.share(removal.asr.before)} → {_after(removal.asr.after)}"]
    return tuple(lines) or ("–",)


def _said(outcome: Outcome, submission: SubmissionView, classes: tuple[str, ...]) -> list[str]:
    match outcome:
        case Abstention():
            return ["not asked" if outcome.reason.startswith(NOT_ASKED) else "no opinion"]
        case Failure():
            return [f"failed ({words.legible(outcome.kind, 20)})"]
        case Finding():
            lines = [] if outcome.score is None else [f"score {words.number(outcome.score)}"]
            assert submission.verdict is not None
            if (p_value := submission.verdict.p_values.get(outcome.defense)) is not None:
                lines += [f"p-value {words.p_value(p_value)}"]
            if outcome.target is not None and 0 <= outcome.target < len(classes):
                lines += [f"target “{words.legible(classes[outcome.target], 24)}”"]
            return lines
    return []


def _after(value: float | None) -> str:
    return "–" if value is None else words.share(value)
