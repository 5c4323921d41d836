"""`molehunt play`: what is asked of the host, and how a game that did not end is told from one that did."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.text import Text

from molehunt import meta_files, report
from molehunt.cli import main
from molehunt.commands import play
from molehunt.confinement import Unavailable
from molehunt.defenses import DEFENSES
from molehunt.engine import Local, Processes
from molehunt.findings import Finding
from molehunt.game import host, publication
from molehunt.game.rules import ROUNDS
from molehunt.isolation import Sandbox
from molehunt.metas import Meta, Settings, digest
from molehunt.tasks import get_task
from molehunt.testing import planted

Out = pytest.CaptureFixture[str]


class FakeHost:
    """Writes down what it was asked, and plays nothing."""

    asked: dict[str, Any]
    told: list[Any]
    play: Callable[[], Any] = staticmethod(lambda: None)

    def __init__(self, settings: Any, folder: Path, **others: Any) -> None:
        type(self).asked = {"settings": settings, "folder": folder, **others}


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeHost]:
    """A host that plays nothing, and a publication of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FakeHost, "play", staticmethod(lambda: None))
    monkeypatch.setattr(host, "Host", FakeHost)
    FakeHost.told = []

    def publish(_: Any, document: Any) -> Path:
        FakeHost.told.append(document)
        return tmp_path / "a report.html"

    def summary(_: Any, command: str) -> str:
        FakeHost.told.append("summary")
        return command

    monkeypatch.setattr(publication, "summary", summary)
    monkeypatch.setattr(publication, "publish", publish)
    monkeypatch.setattr(report, "game_text", lambda summary: Text(f"played {summary}"))
    return FakeHost


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_game_is_played_and_the_report_can_be_clicked(fake: type[FakeHost], tmp_path: Path, capsys: Out) -> None:
    command = ["play", "--not-isolated", "--seed", "7", "--teams", "3", "--clean", "2", "--references", "6"]
    assert main([*command, "--jobs", "2"]) == 0
    asked = fake.asked
    settings = asked["settings"]
    assert (settings.task, settings.network, settings.round) == ("mnist5k", "badnets_cnn", "final")
    assert (settings.seed, settings.teams, settings.clean, settings.references) == (7, 3, 2, 6)
    assert asked["folder"] == Path("runs/play-mnist5k-7")
    assert set(asked["defenses"]) == {
        "abs",
        "neural_cleanse",
        "pair_inversion",
        "pruning_detection",
        "mntd",
        "strip",
        "sentinet",
        "fine_tuning",
        "super_fine_tuning",
        "fine_pruning",
        "unlearning",
        "neuron_pruning",
    }
    assert asked["defenses"] == ROUNDS["final"].make("weights", DEFENSES), "with what the round gives them"
    assert isinstance(asked["engine"], Processes)
    assert (asked["engine"].count, asked["engine"].threads) == (2, 1)
    said = capsys.readouterr().out.splitlines()
    again = (
        "molehunt play --task mnist5k --network badnets_cnn --round final --board weights "
        "--seed 7 --teams 3 --clean 2 --references 6"
    )
    assert " ".join(" ".join(said[:-1]).split()) == f"played {again}"
    assert fake.told == ["summary", again], "summed up once, and shown and written alike"
    assert said[-1] == f"report: {(tmp_path / 'a report.html').as_uri()}"


def test_one_job_needs_no_other_process(fake: type[FakeHost]) -> None:
    assert main(["play", "--not-isolated", "--jobs", "1", "--out", "here", "--round", "II"]) == 0
    assert isinstance(fake.asked["engine"], Local)
    assert fake.asked["folder"] == Path("here")
    assert list(fake.asked["defenses"]) == ["abs", "strip"]


@pytest.mark.parametrize(
    "arguments",
    [
        "--task nope",
        "--network nope",
        "--round VI",
        "--board chess",
        "--task folder:nowhere",
        "--references 4",
        "--teams 0",
        "--clean -1",
        "--jobs 0",
    ],
)
def test_what_cannot_be_played_is_refused(arguments: str) -> None:
    assert main(["play", "--not-isolated", *arguments.split()]) == 3


def test_another_game_in_the_folder_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("here holds another game")

    monkeypatch.setattr(host, "Host", refuse)
    assert main(["play", "--not-isolated"]) == 3
    assert "another game" in capsys.readouterr().err


def test_meta_classifiers_are_those_of_the_package_or_of_a_file(fake: type[FakeHost], tmp_path: Path) -> None:
    task = get_task("mnist5k")
    made = Meta(task.shape, 10, task.mean, task.std, Settings(), torch.Generator().manual_seed(5))
    meta_files.save([made], tmp_path / "mine", {"task": "mnist5k", "network": "badnets_cnn"})
    command = ["play", "--not-isolated", "--round", "IV"]
    assert main(command) == 0
    public = meta_files.shipped("mnist5k", "badnets_cnn")
    assert public is not None
    assert digest(fake.asked["metas"]) == digest(public)
    assert main([*command, "--metas", str(tmp_path / "mine")]) == 0
    assert digest(fake.asked["metas"]) == digest([made])
    assert fake.told[-1].endswith(f"--metas {tmp_path / 'mine'}")
    assert main([*command, "--metas", str(tmp_path / "mine"), "--network", "lenet5"]) == 3


def test_a_round_that_nobody_could_answer_in_is_refused(fake: type[FakeHost], capsys: Out) -> None:
    command = ["play", "--not-isolated", "--round", "IV", "--network", "lenet5"]
    assert main(command) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "molehunt shadows --task mnist5k --network lenet5, and name the file with --metas" in said
    # On the data board RAB needs none.
    assert main([*command, "--board", "data"]) == 0
    assert fake.asked["metas"] is None


def test_a_round_of_which_nothing_is_there_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setattr("molehunt.defenses.DEFENSES", {"strip": DEFENSES["strip"]})
    assert main(["play", "--not-isolated", "--round", "IV"]) == 3
    assert "no defense of round IV is there yet: it needs mntd" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ValueError("a mistake"), 70)])
def test_a_game_that_did_not_end(
    error: BaseException, code: int, fake: type[FakeHost], monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    def stop() -> None:
        raise error

    monkeypatch.setattr(fake, "play", staticmethod(stop))
    assert main(["play", "--not-isolated"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert ("the same command goes on where it stopped" in said.err) == (code == 130)


def test_the_inspectors_run_defenses(fake: type[FakeHost]) -> None:
    assert main(["play", "--not-isolated", "--jobs", "3"]) == 0
    (inspect,) = fake.asked["inspectors"]  # in one process costs are counted for one model at a time
    outcome = inspect("fine_pruning", fake.asked["defenses"]["fine_pruning"], planted(images=100).suspect)
    assert isinstance(outcome, Finding)
    assert outcome.record["seed"] == fake.asked["settings"].seed_for("defenses")
    assert outcome.record["seconds"] == 600


def test_a_stopped_defense_is_no_failure_on_record(fake: type[FakeHost], monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []
    # A shell's background job starts with Ctrl-C ignored, and then the program rightly ignores it too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def go() -> None:
        (inspect,) = fake.asked["inspectors"]
        signal.raise_signal(signal.SIGINT)  # to this thread: os.kill may take a moment
        stopped.append(inspect)

    monkeypatch.setattr(fake, "play", staticmethod(go))
    try:
        assert main(["play", "--not-isolated"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    (inspect,) = fake.asked["inspectors"]
    with pytest.raises(KeyboardInterrupt):
        inspect("fine_pruning", fake.asked["defenses"]["fine_pruning"], planted(images=100).suspect)
    assert not stopped


def unavailable(*_: Any, **__: Any) -> Any:
    raise Unavailable("no walls here")


def test_without_isolation_it_says_so_and_plays(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setattr(Sandbox, "_start", unavailable)
    assert main(["play"]) == 0
    assert "not isolated: no walls here" in capsys.readouterr().err


def test_isolation_that_was_asked_for_is_not_left_out(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setattr(Sandbox, "_start", unavailable)
    assert main(["play", "--isolated"]) == 3
    assert "cannot isolate defenses: no walls here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["play", "--isolated"]) == 3
    assert "run on the CPU" in capsys.readouterr().err


def test_a_machine_with_a_gpu_trains_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert play._at_once(1) >= 1
    assert play._at_once(10**6) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert play._at_once(1) == 1


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("mnist5k", "mnist5k"),
        ("folder:/a/b/signs", "signs"),
        ("folder:/a/signs/?size=8x8", "signs"),
        ("folder:/", "folder"),
    ],
)
def test_a_task_that_is_a_path_names_a_folder(task: str, name: str) -> None:
    assert play._slug(task) == name


def test_a_game_on_the_data_board_has_a_folder_of_its_own(fake: type[FakeHost]) -> None:
    assert main(["play", "--not-isolated", "--board", "data"]) == 0
    assert fake.asked["settings"].board == "data"
    assert fake.asked["folder"] == Path("runs/play-mnist5k-0-data")
