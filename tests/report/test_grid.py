"""The table of a round: a cell per submission and defense, in words."""

from dataclasses import replace

import made_up

from molehunt.asking import NOT_ASKED
from molehunt.findings import Abstention
from molehunt.report import Change, RemovalView, game_html
from molehunt.report.grid import Grid

REMOVAL = RemovalView(
    defense="fine_pruning", accuracy=Change(before=0.987, after=0.95), asr=Change(before=1.0, after=0.02), taken=True
)


def test_every_judged_submission_has_a_cell_for_every_defense() -> None:
    report = made_up.game()
    grid = Grid.of(report)
    assert {row.number for row in grid.rows} == {n for n, s in enumerate(report.submissions, 1) if s.verdict}
    assert len(grid.rows) < len(report.submissions), "a submission that a gate stopped was never judged"
    assert all(len(row.cells) == len(grid.defenses) for row in grid.rows)
    assert len(set(grid.defenses)) == len(grid.defenses) >= 4


def test_cells_say_score_p_value_and_target_or_why_not() -> None:
    report = made_up.game()
    grid = Grid.of(report)
    row = grid.rows[0]
    told = dict(zip(grid.defenses, row.cells, strict=True))
    submission = report.submissions[row.number - 1]
    assert submission.verdict is not None
    assert told["neural_cleanse"][0].startswith("score ")
    assert any(line.startswith("p-value ") for line in told["neural_cleanse"])
    assert told["spectral_signatures"] == ("no opinion",)
    assert told["sentinet"] == ("failed (time)",)


def test_a_repair_that_was_not_asked_is_told_apart_from_one_without_an_opinion() -> None:
    report = made_up.game()
    first = report.submissions[0]
    assert first.verdict is not None
    silent = tuple(
        Abstention(defense="fine_pruning", reason=f"{NOT_ASKED}: p is 0.1") if o.defense == "fine_pruning" else o
        for o in first.verdict.outcomes
    )
    grid = Grid.of(replace(report, submissions=(replace(first, verdict=replace(first.verdict, outcomes=silent)),)))
    assert grid.rows[0].cells[grid.defenses.index("fine_pruning")] == ("not asked",)


def test_removals_stand_with_their_defense() -> None:
    report = made_up.game()
    first = replace(report.submissions[0], removals=(REMOVAL,))
    grid = Grid.of(replace(report, submissions=(first,)))
    cell = grid.rows[0].cells[grid.defenses.index("fine_pruning")]
    assert cell == ("accuracy 98.7 % → 95.0 %", "success 100.0 % → 2.0 %")
    page = game_html(replace(report, submissions=(first,)))
    assert "handed back" in page
    assert "Removals: what each of the 1 left" in page
    clean = replace(REMOVAL, asr=None, taken=False)
    grid = Grid.of(replace(report, submissions=(replace(first, removals=(clean,)),)))
    assert grid.rows[0].cells[grid.defenses.index("fine_pruning")] == ("accuracy 98.7 % → 95.0 %",)


def test_a_game_without_defenses_has_no_table() -> None:
    report = made_up.game()
    stopped = tuple(replace(s, verdict=None) for s in report.submissions)
    assert Grid.of(replace(report, submissions=stopped)).defenses == ()
    assert 'id="results"' not in game_html(replace(report, submissions=stopped))
