"""Reports: a verdict, or a whole game, as terminal text, as JSON, and as one HTML page that needs nothing else.

A report is made from plain records of its own (`ScanReport`, `GameReport`); it knows nothing of how a game is run.
"""

from molehunt.report.document import scan_json
from molehunt.report.page import game_html, scan_html
from molehunt.report.sarif import scan_sarif
from molehunt.report.terminal import game_text, scan_text
from molehunt.report.views import (
    Change,
    GameReport,
    GateView,
    Kind,
    Pictures,
    RemovalView,
    Row,
    ScanReport,
    SubmissionView,
)
from molehunt.report.words import CLEAR_AT, FOUND_AT, Answer, answer, legible

__all__ = [
    "CLEAR_AT",
    "FOUND_AT",
    "Answer",
    "Change",
    "GameReport",
    "GateView",
    "Kind",
    "Pictures",
    "RemovalView",
    "Row",
    "ScanReport",
    "SubmissionView",
    "answer",
    "game_html",
    "game_text",
    "legible",
    "scan_html",
    "scan_json",
    "scan_sarif",
    "scan_text",
]
