"""Progress: bars where somebody looks, lines where somebody reads later, and no markup from strangers in either."""

import io
import threading
import time

import pytest
from rich.console import Console

from molehunt.commands.watch import Bars, Lines, Watch, watching


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    told = io.StringIO()
    made = Console(file=told, force_terminal=terminal, width=100, markup=False, highlight=False, _environ={})
    return made, told


def play(shown: Watch) -> None:
    shown.stage("Training", 2)
    for title in ("first", "[red]\x1b[31msecond"):
        shown.progress(title, 1, 4)
        shown.progress(title, 4, 4)
        shown.done(title, "98 %")
    shown.stage("Nothing to do", 0)


@pytest.mark.parametrize("terminal", [True, False])
def test_every_stage_and_piece_leaves_a_line(terminal: bool) -> None:
    where, told = console(terminal=terminal)
    with watching(where) as shown:
        assert isinstance(shown, Bars if terminal else Lines)
        play(shown)
    said = told.getvalue()
    assert "Training" in said
    assert "1/2 first" in said
    assert "2/2 [red]<U+001B>[31msecond" in said
    assert "98 %" in said
    if not terminal:
        assert "\x1b" not in said
        assert len(said.splitlines()) == 4


def test_a_terminal_that_cannot_move_its_cursor_gets_lines() -> None:
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with watching(dumb) as shown:
        assert isinstance(shown, Lines)


def test_long_pieces_are_heard_of_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    where, told = console(terminal=False)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = Lines(where)
    lines.stage("Training", 1)
    for second in range(100):
        now[0] = float(second)
        lines.progress("piece", second, 100)
    lines.done("piece", "")
    assert [line.split("  ")[1] for line in told.getvalue().splitlines()[1:]] == [
        "piece: 30%",
        "piece: 60%",
        "piece: 90%",
        "1/1 piece",
    ]
    assert told.getvalue().splitlines()[-1].endswith("(1 min 39 s)")


def test_the_time_left_is_guessed_from_all_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    where, told = console(terminal=True)
    now = [0.0]
    with watching(where) as shown:
        assert isinstance(shown, Bars)
        monkeypatch.setattr(shown._bars, "get_time", lambda: now[0])
        shown.stage("Training", 6)
        now[0] = 20.0
        shown.done("first", "")
        shown.done("second", "")
        shown._bars.refresh()
    assert "about 40.0 s left" in told.getvalue()


@pytest.mark.parametrize(("done", "total"), [(0, 0), (5, 0), (-1, 4), (9, 4)])
def test_odd_counts_do_no_harm(done: int, total: int) -> None:
    for terminal in (True, False):
        with watching(console(terminal=terminal)[0]) as shown:
            shown.progress("before any stage", done, total)
            shown.stage("Training", 1)
            shown.progress("piece", done, total)


def test_pieces_under_way_at_once_do_not_disturb_each_other() -> None:
    errors = []

    def work(shown: Watch, slot: int) -> None:
        try:
            for i in range(30):
                shown.progress(f"defense {i // 10}", i, 30, slot)
        except Exception as error:
            errors.append(error)

    with watching(console(terminal=True)[0]) as shown:
        shown.stage("Examining", 4)
        threads = [threading.Thread(target=work, args=(shown, slot)) for slot in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            shown.stage("Examining", 4)
        for thread in threads:
            thread.join()
    assert not errors
