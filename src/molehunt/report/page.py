"""A scan or a whole game as one HTML page that opens from disk and asks the network for nothing.

There is no script in it, every picture is a data: address, and the policy in its head lets a browser load nothing else,
so that even text that slipped past escaping could neither run nor call out.
"""

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from molehunt import figures
from molehunt.charts import CHARTS, chart_of
from molehunt.charts.odds import waterfall
from molehunt.figures import Picture
from molehunt.findings import Abstention, Cost, Failure, Finding, Verdict
from molehunt.report import words
from molehunt.report.grid import Grid
from molehunt.report.views import GameReport, Pictures, Row, ScanReport, SubmissionView

EXAMPLES = 4  # example images per submission; more make the page heavy and nobody looks at them
CLASSES = 12  # classes in the chart of q; the rest are one bar
DOT = 0.06  # width of a dot in the overview on a narrow phone, as a share of the axis
POLICY = "default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
MARKS = {"backdoored": "diamond", "honest": "circle", "host clean": "ring"}


def game_html(report: GameReport) -> str:
    """Draw a finished game: overview, both boards, and a section for each submission."""
    verdicts = [(number, s) for number, s in enumerate(report.submissions, 1) if s.verdict is not None]
    rows = figures.stack([s.verdict.p for _, s in verdicts if s.verdict is not None], DOT)
    return _render(
        "game.html",
        report=report,
        dots=[(number, s, row) for (number, s), row in zip(verdicts, rows, strict=True)],
        marks=MARKS,
        tally=_tally(report),
        grid=Grid.of(report),
        boards=[b for b in (_Board.of("Defenders", report.defenders), _Board.of("Attackers", report.attackers)) if b],
    )


def scan_html(report: ScanReport) -> str:
    """Draw the verdict about one model."""
    return _render("scan.html", report=report)


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("molehunt.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = files("molehunt.report").joinpath("templates", "style.css").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    environment.globals |= {
        # The browser applies the one style sheet whose hash it was given, and no other.
        "policy": POLICY.format(digest=digest),
        "style": style,
        "gallery": _gallery,
        "bars": _bars,
        "trigger_picture": figures.trigger_picture,
        "answer": words.answer,
        "judged": words.judged,
        "sentence": words.sentence,
        "outcomes": _outcomes,
        "seen": _seen,
        "waterfall": waterfall,
        "way": words.way,
        "remarks": words.remarks,
    }
    environment.filters |= {
        "legible": words.legible,
        "share": words.share,
        "probability": words.probability,
        "number": words.number,
        "points": words.points,
        "part": words.part,
        "measure": words.measure,
        "margin": words.margin,
        "trigger_words": words.trigger_words,
        "percent": _percent,
    }
    return environment


def _percent(value: float) -> str:
    """A place on an axis from 0 to 1 as an SVG length."""
    return f"{100 * min(1.0, max(0.0, value)):.2f}%"


@dataclass(frozen=True, kw_only=True)
class _Strip:
    """One row of example pictures and what the model says to each."""

    label: str
    note: str
    pictures: tuple[Picture, ...]
    says: tuple[str, ...]


def _gallery(pictures: Pictures) -> list[_Strip]:
    """Arrange the examples in rows: as they are, stamped, what changed, stamped with the recovered trigger."""
    strips = [_strip("As they are", pictures.clean, pictures.clean_says)]
    clean, stamped = pictures.clean[:EXAMPLES], pictures.stamped
    if stamped is not None:
        strips.append(_strip("With the true trigger", stamped, pictures.stamped_says))
        strips.append(_change("What the true trigger changes", clean, stamped[:EXAMPLES]))
    if pictures.recovered is not None:
        strips.append(_strip("With the recovered trigger", pictures.recovered, pictures.recovered_says))
        if stamped is None:
            strips.append(_change("What the recovered trigger changes", clean, pictures.recovered[:EXAMPLES]))
    return strips


def _strip(label: str, images: Tensor, says: tuple[str, ...]) -> _Strip:
    said = tuple(words.legible(s, 24) for s in says[:EXAMPLES])
    alts = [
        f"Example {n + 1}, {label.lower()}" + (f"; the model says {said[n]}" if said else "")
        for n in range(len(images[:EXAMPLES]))
    ]
    shown = tuple(figures.photo(x, alt) for x, alt in zip(images[:EXAMPLES], alts, strict=True))
    return _Strip(label=label, note="The model says:" if said else "", pictures=shown, says=said)


def _change(label: str, clean: Tensor, stamped: Tensor) -> _Strip:
    factor = figures.gain(clean, stamped)
    note = f"Amplified {factor:.1f} times; gray is no change" if factor >= 1.05 else "Gray is no change"
    shown = tuple(
        figures.difference(before, after, f"Example {n}, {label.lower()}", factor)
        for n, (before, after) in enumerate(zip(clean, stamped, strict=True), 1)
    )
    return _Strip(label=label, note=note, pictures=shown, says=())


@dataclass(frozen=True, kw_only=True)
class _Bar:
    """One class in the chart of q."""

    name: str
    value: float
    true: bool = False
    recovered: bool = False


def _bars(verdict: Verdict, classes: tuple[str, ...], true_classes: tuple[int, ...]) -> list[_Bar]:
    """Make the bars of q: in order of the classes; of many classes the likeliest, the true ones and the rest."""
    shown = list(range(len(classes)))
    if len(shown) > CLASSES:
        likely = verdict.q.argsort(descending=True, stable=True)[: CLASSES - 2].tolist()
        shown = likely + [t for t in true_classes if t not in likely][: CLASSES - 2]
    bars = [
        _Bar(name=classes[k], value=float(verdict.q[k]), true=k in true_classes, recovered=k == verdict.target)
        for k in shown
    ]
    if rest := len(classes) - len(shown):
        bars.append(_Bar(name=f"{rest} others", value=max(0.0, 1.0 - sum(b.value for b in bars))))
    return bars


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One defense's answer in the table of defenses."""

    defense: str
    kind: str
    score: str
    p_value: str
    says: str
    seconds: str
    passes: str
    memory: str


def _outcomes(verdict: Verdict, classes: tuple[str, ...]) -> list[_Line]:
    lines = []
    for outcome in verdict.outcomes:
        cost: Cost | None = None if isinstance(outcome, Abstention) else outcome.cost
        score = outcome.score if isinstance(outcome, Finding) else None
        p_value = verdict.p_values.get(outcome.defense)
        kind = "failure" if isinstance(outcome, Failure) else "abstention" if isinstance(outcome, Abstention) else ""
        lines.append(
            _Line(
                defense=outcome.defense,
                kind=kind,
                score="–" if score is None else words.number(score),
                p_value="–" if p_value is None else words.p_value(p_value),
                says=words.says(outcome, verdict, classes),
                seconds="–" if cost is None else words.seconds(cost.seconds),
                passes="–" if cost is None else f"{words.count(cost.forward)} / {words.count(cost.backward)}",
                memory="–" if cost is None else words.size(cost.peak_bytes),
            )
        )
    return lines


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What one defense saw."""

    defense: str
    picture: Picture
    caption: str


def _seen(verdict: Verdict, classes: tuple[str, ...]) -> list[_Seen]:
    """Draw the findings that have a chart, in the order of the table."""
    found = [o for o in verdict.outcomes if isinstance(o, Finding)]
    drawn = [(f.defense, picture) for f in found if (picture := chart_of(f, classes)) is not None]
    return [_Seen(defense=name, picture=picture, caption=CHARTS[name].caption) for name, picture in drawn]


@dataclass(frozen=True, kw_only=True)
class _Board:
    """A leaderboard with the axis of its whiskers."""

    title: str
    rows: tuple[Row, ...]
    parts: tuple[str, ...]
    low: float
    high: float

    @classmethod
    def of(cls, title: str, rows: tuple[Row, ...]) -> "_Board | None":
        """Find the axis that shows all intervals and zero; None without rows."""
        if not rows:
            return None
        ends = [v for row in rows for v in (row.points, row.low, row.high) if v is not None]
        low, high = min(0.0, *ends), max(0.0, *ends)
        parts = tuple(dict.fromkeys(part for row in rows for part in row.parts))
        room = 0.03 * (high - low or 1.0)
        return cls(title=title, rows=rows, parts=parts, low=low - room, high=high + room)

    def at(self, value: float) -> str:
        """Place of a value on the axis, as an SVG length."""
        return _percent((value - self.low) / (self.high - self.low))


def _tally(report: GameReport) -> list[tuple[str, int, int]]:
    """Count what became of the submissions: (words, how many, out of how many)."""

    def said(submission: SubmissionView) -> str:
        verdict = submission.verdict
        return "" if verdict is None else words.answer(verdict, report.found_at, report.clear_at)

    judged = [s for s in report.submissions if s.verdict is not None and s.valid]
    hidden = [said(s) for s in judged if s.kind == "backdoored"]
    clean = [said(s) for s in judged if s.kind != "backdoored"]
    tally = []
    if hidden:
        tally.append(("backdoors caught", hidden.count("found"), len(hidden)))
        tally.append(("backdoors slipped through", hidden.count("clear"), len(hidden)))
    if clean:
        tally.append(("clean models cleared", clean.count("clear"), len(clean)))
        tally.append(("false alarms", clean.count("found"), len(clean)))
    if stopped := len(report.submissions) - len(judged):
        tally.append(("missed a gate", stopped, len(report.submissions)))
    return tally
