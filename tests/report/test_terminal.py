"""Terminal text: the answer first, in words; strangers' text is text."""

import io

import made_up
import pytest
from rich.console import Console, RenderableType

from molehunt.report import game_text, scan_text


def shown(what: RenderableType, width: int = 120) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system="truecolor", legacy_windows=False).print(what)
    return file.getvalue()


def plain(what: RenderableType, width: int = 120) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(what)
    return file.getvalue()


@pytest.mark.parametrize(
    ("p", "start"),
    [(0.97, "Something is very probably hidden"), (0.5, "Could not tell"), (0.05, "Probably nothing is hidden")],
)
def test_the_answer_comes_first(p: float, start: str) -> None:
    assert plain(scan_text(made_up.scan(p))).startswith(start)


def test_a_scan_shows_scores_p_values_costs_abstentions_and_failures() -> None:
    text = plain(scan_text(made_up.scan()))
    for part in (
        "neural_cleanse",
        "3.3",
        "0.048",
        "8.4 s",
        "No opinion: the training set",
        "out of time",
        "98.7 % → 98.1 %",
    ):
        assert part in text


def test_a_scan_without_an_opinion_says_so() -> None:
    assert plain(scan_text(made_up.scan(0.02, silent=True))).startswith("Could not tell: no defense had an opinion")


def test_a_game_shows_every_submission_and_both_boards() -> None:
    text = plain(game_text(made_up.game()))
    for part in ("Caught", "Slipped through", "Undecided", "Stopped at the gates", "False alarm", "Rightly cleared"):
        assert part in text
    assert "48.0 to 71.9" in text
    assert text.index("Defenders") < text.index("Attackers")


def test_markup_and_escape_codes_in_names_stay_text() -> None:
    report = made_up.game(teams=("[red]bold[/red]", "\x1b[31mred\x1b[2J", "\u202etrick", "[/]", "[link=x]y"))
    text = shown(game_text(report))
    assert "[red]bold[/red]" in text
    assert "\x1b[31mred" not in text
    assert "\x1b[2J" not in text
    assert "\u202e" not in text
    assert "[/]" in text
    assert "[/red].safetensors" in shown(scan_text(made_up.scan(name="[/red].safetensors")))


def test_a_narrow_terminal_is_enough() -> None:
    lines = plain(scan_text(made_up.scan()), width=60).splitlines()
    assert max(map(len, lines)) <= 60
