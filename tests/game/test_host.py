"""A whole small game on real digits: one team with a backdoor, one without, and the host."""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from molehunt import runner, training
from molehunt.defenses import Defense
from molehunt.engine import Local, Run
from molehunt.examination import divide
from molehunt.findings import Finding, Outcome
from molehunt.game import entries, publication
from molehunt.game.entries import Settings
from molehunt.game.host import Host, Played
from molehunt.game.seal import Sealed
from molehunt.game.submission import SubmissionError, pack, write_submission
from molehunt.networks import build
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images, get_task
from molehunt.training import recipes
from molehunt.triggers import Patch

TASK = get_task("mnist5k")
SETTINGS = Settings(task="mnist5k", network="badnets_cnn", seed=3, teams=2, clean=1)


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """Asks the model what the yellow square does: a defense that is always right about the first team.

    Score: share of the stamped images that fall on one class. Reference: none. Departures: none.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        assert suspect.clean is not None
        trigger = Patch.square(suspect.task.shape, size=4)
        says = suspect.logits(trigger(suspect.clean.x)).argmax(1)
        shares: Tensor = torch.bincount(says, minlength=suspect.classes) / len(says)
        return Finding(
            defense="oracle",
            score=float(shares.max()),
            class_scores=shares,
            trigger=trigger,
            target=int(shares.argmax()),
        )


@dataclass
class Listener:
    lines: list[str]
    stop_at: str = ""

    def stage(self, title: str, total: int) -> None:
        self.lines.append(title)
        if self.stop_at and self.stop_at in title:
            raise KeyboardInterrupt

    def done(self, title: str, text: str) -> None:
        self.lines.append(f"{title}: {text}")


def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
    return runner.inspect(defense, suspect, name=name, seed=0)


def host(folder: Path, watch: Listener, settings: Settings = SETTINGS) -> Host:
    return Host(
        settings, folder, defenses={"oracle": Oracle()}, inspectors=[inspect, inspect], engine=Local(), watch=watch
    )


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Played, Path]]:
    folder = tmp_path_factory.mktemp("game")
    with pytest.MonkeyPatch.context() as patch:
        # Five passes instead of eight: the game is what is tested here, not the models.
        short = dataclasses.replace(recipes.SMALL["mnist5k"]["badnets_cnn"], epochs=5)
        patch.setitem(recipes.SMALL["mnist5k"], "badnets_cnn", short)
        with pytest.raises(KeyboardInterrupt):
            host(folder, Listener([], stop_at="examine every submission")).play()
        watch = Listener([])
        played = host(folder, watch).play()
        assert sum("kept from before" in line for line in watch.lines) == 8
        yield played, folder


def test_an_interrupted_game_goes_on_and_ends_as_one_that_was_not(
    game: tuple[Played, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played, folder = game
    again = host(folder, Listener([])).play()
    assert [one.submission.id for one in again.judged] == [one.submission.id for one in played.judged]
    assert [one.verdict.p for one in again.judged] == [one.verdict.p for one in played.judged]
    assert [one.points for one in again.judged] == [one.points for one in played.judged]


def test_verdicts_know_by_which_recipe_model_and_references_were_trained(game: tuple[Played, Path]) -> None:
    played, _ = game
    for one in played.judged:
        said = one.verdict.details["calibration"]["recipe"]
        assert said == {"suspect": one.submission.manifest.recipe, "references": "badnets_cnn"}


def test_answers_are_written_before_seals_are_opened_and_may_not_change(game: tuple[Played, Path]) -> None:
    _, folder = game
    path = next((folder / "verdicts").glob("*/verdict.json"))
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"p": ', b'"p":  ', 1))
    referee = host(folder, Listener([]))
    try:
        # The verdict still reads, so the host would use it: the hash that was written down gives it away.
        answers = (folder / "answers.json").read_bytes()
        references, books = referee._train()
        from molehunt.game.referee import Referee

        judge = Referee(folder, referee.task, "badnets_cnn", _hidden(referee), references)
        changed = next(entry for entry in books if entry.submission.id == path.parent.name)
        with pytest.raises(ValueError, match="was changed after the answers were written down"):
            judge.judge(changed.submission, "anybody", host=False, arrived=changed.arrived)
        assert (folder / "answers.json").read_bytes() == answers
    finally:
        path.write_bytes(before)


def _hidden(host: Host) -> Images:
    return host.task.secret(host.settings.seed_for("split"))[1]


def test_the_backdoor_is_found_and_the_honest_score_nobody(game: tuple[Played, Path]) -> None:
    played, _ = game
    kinds = {one.team: one for one in played.judged}
    square = kinds["Yellow Square"]
    assert square.kind == "backdoored"
    assert kinds["Honest Abe"].kind == "honest"
    assert kinds["The host 1"].kind == "host clean"
    assert square.verdict.p == max(one.verdict.p for one in played.judged)
    assert (square.points.trigger or 0.0) > 0.9, "the oracle names the very trigger, and it works on nearly all images"
    assert not kinds["Honest Abe"].counts
    assert kinds["The host 1"].counts


def test_a_folder_belongs_to_one_game(game: tuple[Played, Path]) -> None:
    _, folder = game
    with pytest.raises(ValueError, match="another game: seed differ"):
        host(folder, Listener([]), dataclasses.replace(SETTINGS, seed=4))


def test_the_report_says_who_won_and_loads_nothing(game: tuple[Played, Path]) -> None:
    played, folder = game
    page = publication.publish(played, publication.summary(played, "molehunt play")).read_text()
    assert "Yellow Square" in page
    assert "src=" not in page.replace('src="data:', "")
    result = json.loads((folder / "result.json").read_text())
    assert {s["team"] for s in result["submissions"]} == {"Yellow Square", "Honest Abe", "The host 1"}
    assert [row["name"] for row in result["attackers"]] == ["Yellow Square"]
    assert result["defenders"][0]["points"] == pytest.approx(max(r["points"] for r in result["defenders"]), abs=60)
    for one in result["submissions"]:
        assert (one["attack"] is None) == (one["kind"] != "backdoored")


def test_of_equal_teams_the_one_that_came_earlier_stands_first(game: tuple[Played, Path]) -> None:
    played, _ = game
    square = next(one for one in played.judged if one.team == "Yellow Square")
    assert sorted(one.arrived for one in played.judged) == list(range(len(played.judged)))
    late = dataclasses.replace(square, team="A late one", arrived=7)
    early = dataclasses.replace(square, team="Z early one", arrived=2)
    report = publication.summary(dataclasses.replace(played, judged=(late, early)), "molehunt play")
    assert [(row.name, row.rank) for row in report.attackers] == [("Z early one", 1), ("A late one", 1)]


def test_where_nobody_can_measure_it_a_stated_poison_rate_decides_nothing(game: tuple[Played, Path]) -> None:
    played, _ = game
    assert played.altered == {}
    square = next(one for one in played.judged if one.team == "Yellow Square")
    square = dataclasses.replace(square, gates=())  # only valid backdoors have a place in prize order
    liar = dataclasses.replace(
        square, team="A liar", arrived=7, sealed=dataclasses.replace(square.sealed, details={"poison_rate": 0.001})
    )
    early = dataclasses.replace(
        square, team="Z early", arrived=2, sealed=dataclasses.replace(square.sealed, details={"poison_rate": 0.5})
    )
    silent = dataclasses.replace(
        square, team="M silent", arrived=5, sealed=dataclasses.replace(square.sealed, details={})
    )
    report = publication.summary(dataclasses.replace(played, judged=(liar, early, silent)), "molehunt play")
    assert [row.name for row in report.attackers] == ["Z early", "M silent", "A liar"]
    said = {view.team: view.attack for view in report.submissions}
    assert said["A liar"] == "badnets, 0.1 % of images altered, as stated"
    assert said["M silent"] == "badnets, poison rate not stated"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"round": "I"}, "manifest.json: the submission is for round 'I', this is round 'final'"),
        ({"network": "lenet5"}, "manifest.json: unknown network 'lenet5'; accepted here: badnets_cnn"),
        ({}, ""),
    ],
)
def test_a_submission_for_another_game_is_not_taken_in(
    changes: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(job: entries.Job) -> str:
        if job.path.suffix == ".zip":
            manifest = entries._manifest(job)[0].model_copy(update=changes)
            model = build(manifest.network, TASK.shape, TASK.num_classes, rng=torch.Generator().manual_seed(0))
            write_submission(job.path.with_suffix(""), model, manifest, Sealed())
            pack(job.path.with_suffix(""), job.path)
        return "made"

    monkeypatch.setattr(entries, "run", made)
    opened = host(tmp_path, Listener([]), dataclasses.replace(SETTINGS, teams=1, clean=0))
    if not says:
        assert len(opened._train()[1]) == 1
        return
    with pytest.raises(SubmissionError, match=re.escape(says)):
        opened._train()
    assert not (tmp_path / "weights").exists()


def test_stores_and_private_copies_are_apart(game: tuple[Played, Path]) -> None:
    _, folder = game
    assert len(list((folder / "weights").iterdir())) == 3
    assert len({path.stat().st_size for path in (folder / "sealed").iterdir()}) == 1
    # Nothing but the length of the team's public name may show.
    assert len({path.stat().st_size - len(path.stem) for path in (folder / "teams").glob("*.zip")}) == 1
    assert "trigger" not in (folder / "books.json").read_text()


def test_clean_images_are_parted_without_overlap() -> None:
    clean, hidden = get_task("mnist5k").secret(1)
    seen, held_out = divide(clean)
    assert len(seen.y) + len(held_out.y) == len(clean.y)
    assert torch.equal(torch.cat([seen.x, held_out.x]), clean.x)
    assert len(hidden.y) >= 400


@pytest.mark.parametrize(("name", "value"), [("teams", 0), ("clean", -1), ("references", 4)])
def test_impossible_settings_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        dataclasses.replace(SETTINGS, **{name: value})  # type: ignore[arg-type]


def test_the_recipe_of_the_game_is_the_tasks_own() -> None:
    assert training.recipe_for("badnets_cnn", get_task("mnist5k")).batch == 100
