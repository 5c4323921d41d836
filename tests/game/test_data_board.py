"""A game on the data board: sets are handed over, the host trains, and defenses see the merged, shuffled set."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from molehunt import runner
from molehunt.defenses import Defense
from molehunt.engine import Local, Run
from molehunt.findings import Abstention, Finding, Outcome
from molehunt.game import entries, publication
from molehunt.game.entries import Settings
from molehunt.game.examiners import Watch
from molehunt.game.host import Host, Played
from molehunt.game.seal import Sealed
from molehunt.game.submission import open_stored_set, pack, write_training_set
from molehunt.game.training_set import TrainingSet
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images, get_task
from molehunt.training import Recipe

SETTINGS = Settings(task="mnist5k", network="badnets_cnn", board="data", seed=3, teams=2, clean=0)
CLEAN = get_task("mnist5k").load("train")


@dataclass(frozen=True, kw_only=True)
class Bookkeeper:
    """Looks at the training set alone, as the defenses that play on the data board alone do.

    Score: mean of the largest pixel value of the lower right corner. Reference: none. Departures: none.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.TRAINING}),)
    seen: ClassVar[list[Images]] = []

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        assert suspect.training is not None
        self.seen.append(suspect.training)
        score = float(suspect.training.x[:, :, -4:, -4:].amax((1, 2, 3)).mean())
        return Finding(defense="rab", score=score)


@dataclass
class Listener:
    lines: list[str]

    def stage(self, title: str, total: int) -> None:
        self.lines.append(title)

    def done(self, title: str, text: str) -> None:
        self.lines.append(f"{title}: {text}")


class Silent:
    def stage(self, title: str, total: int) -> None:
        pass

    def done(self, title: str, text: str) -> None:
        pass


def inspect(name: str, defense: Defense, suspect: Suspect) -> Outcome:
    return runner.inspect(defense, suspect, name=name, seed=0)


def host(folder: Path, settings: Settings = SETTINGS, watch: Watch | None = None) -> Host:
    defenses = {"rab": Bookkeeper()}
    return Host(settings, folder, defenses=defenses, inspectors=[inspect], engine=Local(), watch=watch or Silent())


EXAMINING = "The defenses examine every submission that was not refused"


def played(
    folder: Path, settings: Settings, epochs: float = 3.0, watch: Watch | None = None
) -> tuple[Played, list[Images]]:
    """Play with a short recipe. Three passes are enough for the gates, a quarter of a pass is not."""
    Bookkeeper.seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        short = Recipe(epochs=epochs, batch=50, optimizer="adamw", lr=4e-3, augment="crop", shift=1)
        patch.setattr(entries, "recipe_for", lambda *_: short)
        done = host(folder, settings, watch).play()
    return done, list(Bookkeeper.seen)


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> tuple[Played, list[Images]]:
    return played(tmp_path_factory.mktemp("game"), SETTINGS)


def test_a_defense_sees_each_set_merged_and_shuffled(game: tuple[Played, list[Images]]) -> None:
    done, seen = game
    assert len(seen) == 5 + 2, "the references, and then the submissions"
    for one, images in zip(done.judged, seen[5:], strict=True):
        assert one.submission.training is not None
        handed = open_stored_set(done.folder / "sets", one.submission.training, done.task)
        inside = handed.delivered(CLEAN, torch.Generator().manual_seed(0))
        assert torch.equal(_sorted(images), _sorted(inside)), "the same images"
        assert not torch.equal(images.y, inside.y)
        assert not torch.equal(images.y, CLEAN.y), "in another order than the public one"
        changed = int((_sorted(images) != _sorted(CLEAN)).any(1).sum())
        assert (changed > 0) == one.sealed.backdoored
    orders = [tuple(images.y[:50].tolist()) for images in seen]
    assert len(set(orders)) == len(orders), "every one in an order of its own"


def _sorted(images: Images) -> torch.Tensor:
    """Rows that stand for images and labels, in an order that depends on them alone."""
    rows = torch.stack((images.x.double().flatten(1) @ torch.arange(784.0).double(), images.y.double()), 1)
    return rows[(rows[:, 0] * 10 + rows[:, 1]).argsort()]


def test_nothing_of_the_sets_lies_where_defenses_look(game: tuple[Played, list[Images]]) -> None:
    done, _ = game
    assert len(list((done.folder / "weights").iterdir())) == 2
    assert (done.folder / "sets").stat().st_mode & 0o077 == 0
    sizes = {p.stat().st_size - len(p.stem) for p in (done.folder / "teams").glob("*.zip")}
    assert len(sizes) == 1, "honest and backdoored teams hand over files of one size"
    books = json.loads((done.folder / "books.json").read_text())
    assert {book["weights"] for book in books} == {p.stem for p in (done.folder / "weights").iterdir()}


def test_the_answers_of_such_defenses_count(game: tuple[Played, list[Images]]) -> None:
    done, _ = game
    for one in done.judged:
        assert "rab" in one.verdict.p_values
    kinds = {one.team: one.kind for one in done.judged}
    assert kinds == {"Yellow Square": "backdoored", "Honest Abe": "honest"}


def test_what_is_printed_of_a_game_in_progress_does_not_say_whose_set_is_whose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(job: entries.Job) -> str:
        if job.path.suffix == ".zip":
            manifest, nonce = entries._manifest(job)
            training = TrainingSet.of(None, CLEAN, torch.Generator().manual_seed(0))
            write_training_set(job.path.with_suffix(""), training, manifest, Sealed(), nonce=nonce)
            pack(job.path.with_suffix(""), job.path)
        return "made"

    monkeypatch.setattr(entries, "run", made)
    monkeypatch.setattr(entries, "train_handed", lambda handed: handed.id)
    watch = Listener([])
    _, books = host(tmp_path, dataclasses.replace(SETTINGS, teams=5, clean=1), watch)._train()
    assert [entry.arrived for entry in books] != list(range(6)), "a seed whose draw changes the order"
    assert watch.lines[-6:] == [f"{entry.submission.id[:8]}: trained" for entry in books]
    assert all(entry.submission.weights == entry.submission.id for entry in books), "everybody has his own model"


def test_the_board_and_the_report_go_by_what_the_host_measured(game: tuple[Played, list[Images]]) -> None:
    done, _ = game
    square = next(one for one in done.judged if one.team == "Yellow Square")
    square = dataclasses.replace(square, gates=())  # only valid backdoors have a place in prize order
    honest = next(one for one in done.judged if one.team == "Honest Abe")
    measured = done.altered[square.submission.id]
    assert 0.09 < measured <= 0.1
    assert done.altered[honest.submission.id] == 0.0
    # A team that says that it altered a thousandth, and one that says half, stand where their sets put them.
    liar = dataclasses.replace(
        square,
        team="A liar",
        sealed=dataclasses.replace(square.sealed, details={"poison_rate": 0.001}),
    )
    modest = dataclasses.replace(
        square,
        team="B modest",
        submission=dataclasses.replace(square.submission, id="modest"),
        sealed=dataclasses.replace(square.sealed, details={"poison_rate": 0.5}),
        arrived=square.arrived + 1,
    )
    changed = dataclasses.replace(
        done,
        judged=(liar, modest),
        altered={**done.altered, "modest": measured / 2},
        relabeled={**done.relabeled, square.submission.id: 0.05, "modest": 0.04},
    )
    report = publication.summary(changed, "molehunt play")
    assert [row.name for row in report.attackers] == ["B modest", "A liar"]
    said = {view.team: view.attack for view in report.submissions}
    assert said["A liar"] == f"badnets, {100 * measured:.1f} % of images altered, 5.0 % relabeled, as measured"
    result = publication.result(changed, report)
    assert [one["altered"] for one in result["submissions"]] == [measured, measured / 2]
    assert [one["relabeled"] for one in result["submissions"]] == [0.05, 0.04]
    assert done.relabeled[honest.submission.id] == 0.0 < 0.08 < done.relabeled[square.submission.id] <= measured


def test_a_finished_game_is_not_trained_again(game: tuple[Played, list[Images]]) -> None:
    done, _ = game
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "train_model", lambda *_, **__: pytest.fail("something was trained again"))
        again = host(done.folder).play()
    assert [one.submission for one in again.judged] == [one.submission for one in done.judged]


def test_on_the_weights_board_such_a_defense_abstains(tmp_path: Path) -> None:
    done, seen = played(tmp_path, dataclasses.replace(SETTINGS, board="weights", teams=1))
    assert not seen
    (one,) = done.judged
    assert all(isinstance(outcome, Abstention) for outcome in one.verdict.outcomes)
    assert not (tmp_path / "sets").exists()


def test_a_set_whose_trigger_misses_the_gate_on_the_hosts_model_is_refused(tmp_path: Path) -> None:
    watch = Listener([])
    done, seen = played(tmp_path, SETTINGS, epochs=0.25, watch=watch)
    (refused,) = done.refused
    assert "Yellow Square: backdoored, refused: missed a gate" in watch.lines
    before = watch.lines[: watch.lines.index("Seals are opened, points are counted")]
    assert not any("Yellow" in line or "Honest" in line for line in before[before.index(EXAMINING) :])
    (honest,) = done.judged
    assert (refused.team, refused.kind, honest.team) == ("Yellow Square", "backdoored", "Honest Abe")
    assert "attack success" in {gate.name for gate in refused.gates if not gate.passed}
    assert len(seen) == 5 + 1, "no defense saw it"
    assert not (tmp_path / "verdicts" / refused.submission.id).exists()
    assert refused.submission.id not in json.loads((tmp_path / "answers.json").read_text())
    document = publication.summary(done, "molehunt play")
    shown = {view.team: view for view in document.submissions}["Yellow Square"]
    assert shown.verdict is None
    assert not shown.points
    assert any("refused this set" in note for note in shown.notes)
    assert [(row.name, row.points) for row in document.attackers] == [("Yellow Square", 0.0)]
    told = {one["team"]: one for one in publication.result(done, document)["submissions"]}
    assert not told["Yellow Square"]["examined"]
    assert "p" not in told["Yellow Square"]
    assert told["Honest Abe"]["examined"]
    publication.publish(done, document)
    assert "refused this set" in (tmp_path / "report.html").read_text()


def test_a_model_that_misses_a_gate_is_examined_all_the_same(tmp_path: Path) -> None:
    done, _ = played(tmp_path, dataclasses.replace(SETTINGS, board="weights", teams=1), epochs=0.25)
    (one,) = done.judged
    assert not one.valid
    assert not done.refused


def test_an_unknown_board_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown board 'chess'"):
        dataclasses.replace(SETTINGS, board="chess")  # type: ignore[arg-type]
