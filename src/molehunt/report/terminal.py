"""A scan and a finished game as text for the terminal.

Everything is built from `rich.text.Text`, never from markup: a team called "[red]" is just a name.
"""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from molehunt.findings import Abstention, Failure, Finding
from molehunt.report import words
from molehunt.report.views import Change, GameReport, Row, ScanReport

BAR = 30  # cells of the bar that shows p
TONES = {"found": "bold red", "clear": "bold green", "unsure": "bold yellow"}
OUTCOMES = {"good": "green", "bad": "red", "open": "yellow"}


def scan_text(report: ScanReport) -> RenderableType:
    """Lay out a scan for `rich.console.Console.print`.

    The first line is the answer; it says in words what color only repeats.
    """
    verdict = report.verdict
    said = words.answer(verdict, report.found_at, report.clear_at)
    lines: list[RenderableType] = [
        Text(words.sentence(verdict, report.classes, report.found_at, report.clear_at), style=TONES[said]),
        Text(" · ".join(words.legible(s) for s in (report.name, report.task, report.network)), style="dim"),
        Text(),
        _gauge(verdict.p),
    ]
    likely = verdict.q.argsort(descending=True, stable=True)[:3].tolist()
    names = [f"“{words.legible(report.classes[k], 30)}” {words.share(float(verdict.q[k]))}" for k in likely]
    lines.append(Text("if so, the target is  " + ", ".join(names)))
    if verdict.trigger is not None:
        lines.append(
            Text(f"recovered trigger     {words.trigger_words(verdict.trigger)}, {words.way(verdict, report.classes)}")
        )
    for label, change in (("clean accuracy", report.accuracy), ("trigger success", report.asr)):
        if change is not None:
            lines.append(Text(f"{label:<22}{_change(change)}"))
    lines += [Text(), _defenses(report)]
    if report.power is not None:
        lines.append(Text(f"· {words.legible(report.power.words(), 600)}", style="dim"))
    notes = words.remarks(verdict) + [words.legible(note, 400) for note in report.notes]
    lines += [Text(f"· {note}", style="dim") for note in notes]
    return Group(*lines)


def game_text(report: GameReport) -> RenderableType:
    """Lay out a finished game: what became of each submission, then both boards."""
    table = _table("Submissions")
    for name, justify in (("#", "right"), ("team", "left"), ("truth", "left"), ("p", "right"), ("outcome", "left")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    for index, submission in enumerate(report.submissions, 1):
        if submission.verdict is None:
            p, tone, outcome = "–", "open", "Stopped at the gates"
        else:
            p = words.probability(submission.verdict.p)
            said = words.answer(submission.verdict, report.found_at, report.clear_at)
            tone, outcome = words.judged(submission.kind, said) if submission.valid else ("open", "Missed a gate")
        truth = words.legible(submission.attack, 60) if submission.attack else submission.kind
        team = Text(words.legible(submission.team, 40))
        table.add_row(str(index), team, Text(truth), p, Text(outcome, style=OUTCOMES[tone]))
    boards = [
        _board(title, rows)
        for title, rows in (("Defenders", report.defenders), ("Attackers", report.attackers))
        if rows
    ]
    return Group(table, *(part for board in boards for part in (Text(), board)))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _gauge(p: float) -> Text:
    """Draw p as a bar, with the number behind it."""
    filled = round(BAR * p)
    text = Text("something is hidden   ")
    text.append("━" * filled, style="bold")
    text.append("─" * (BAR - filled), style="dim")
    return text.append(f"  {words.probability(p)}")


def _change(change: Change) -> str:
    if change.after is None:
        return words.share(change.before)
    return f"{words.share(change.before)} → {words.share(change.after)} after the repair"


def _defenses(report: ScanReport) -> Table:
    table = _table("Defenses")
    table.add_column("defense")
    table.add_column("score", justify="right")
    table.add_column("p-value", justify="right")
    table.add_column("time", justify="right")
    table.add_column("what it says", overflow="fold")
    for outcome in report.verdict.outcomes:
        score = p_value = time = "–"
        if isinstance(outcome, Finding) and outcome.score is not None:
            score = words.number(outcome.score)
        if outcome.defense in report.verdict.p_values:
            p_value = words.p_value(report.verdict.p_values[outcome.defense])
        if not isinstance(outcome, Abstention) and outcome.cost is not None:
            time = words.seconds(outcome.cost.seconds)
        style = "red" if isinstance(outcome, Failure) else "dim" if isinstance(outcome, Abstention) else ""
        told = Text(words.says(outcome, report.verdict, report.classes), style=style)
        table.add_row(Text(words.legible(outcome.defense, 30)), score, p_value, time, told)
    return table


def _board(title: str, rows: tuple[Row, ...]) -> Table:
    table = _table(title)
    table.add_column("rank", justify="right")
    table.add_column("name")
    table.add_column("points", justify="right")
    table.add_column("95 % interval", justify="right")
    for row in rows:
        interval = "–"
        if row.low is not None and row.high is not None:
            interval = f"{words.points(row.low)} to {words.points(row.high)}"
        name = Text(words.legible(row.name, 40), style="dim" if row.baseline else "")
        table.add_row("–" if row.baseline else str(row.rank), name, words.points(row.points), interval)
    return table
