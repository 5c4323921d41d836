"""`molehunt scan`: an exit code per answer, and one of its own for everything that is no answer."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import molehunt.scanning
from commands.conftest import HURRIED
from game.tricks import Trick, archives, honest, manifests, parameters, torch_files, weights
from molehunt import calibration, checkpoints, combine, confinement, conversion, defenses, meta_files, plugins
from molehunt.calibration import Population, Reference
from molehunt.cli import main
from molehunt.defenses import DEFENSES, NeuralCleanse
from molehunt.engine import Run
from molehunt.findings import Abstention, Failure, Finding, Outcome, Verdict
from molehunt.foreign import code
from molehunt.game import seal, submission, workshop
from molehunt.game.rules import Round, get_round
from molehunt.game.workshop import Plan
from molehunt.metas import Meta, Settings, digest
from molehunt.networks import Adapted, build
from molehunt.report import ScanReport
from molehunt.runner import configuration
from molehunt.suspect import Access, Suspect
from molehunt.tasks import TASKS
from molehunt.tensor_file import Limits
from molehunt.torch_file import child

TASK = TASKS["mnist5k"]
Out = pytest.CaptureFixture[str]
QUICK = NeuralCleanse(schedule=replace(NeuralCleanse().schedule, steps=6), limit=100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of drawn weights, for tests in which nothing looks at the model."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    path.write_bytes(honest.weights())
    return path


def scanning(path: Path, *options: str) -> int:
    """Scan a file of weights."""
    return main(["scan", str(path), "--task", TASK.name, "--network", honest.NETWORK, *options])


def answers(p: float, *outcomes: Outcome) -> Callable[..., ScanReport]:
    """A stand-in for the scan itself."""

    def answer(*_: Any, **settings: Any) -> ScanReport:
        verdict = Verdict(p=p, q=torch.full((10,), 0.1), outcomes=outcomes)
        return ScanReport(
            name=settings["name"],
            task=TASK.name,
            network=honest.NETWORK,
            shape=TASK.shape,
            classes=TASK.classes,
            verdict=verdict,
            found_at=settings["found_at"],
            clear_at=settings["clear_at"],
            command=settings["command"],
        )

    return answer


SPOKE = Finding(defense="strip", score=1.0)
SILENT = (
    Abstention(defense="strip", reason="not granted"),
    Failure(defense="neural_cleanse", kind="raised", message="broke"),
    Finding(defense="fine_pruning", repaired={}),
)


@pytest.mark.parametrize(
    ("p", "options", "code"),
    [
        (0.8, (), 1),
        (0.799, (), 2),
        (0.5, (), 2),
        (0.201, (), 2),
        (0.2, (), 0),
        (0.95, ("--found-at", "0.96"), 2),
        (0.5, ("--found-at", "0.5"), 1),
        (0.3, ("--clear-at", "0.3"), 0),
        (0.19, ("--clear-at", "0.1"), 2),
        (0.999, ("--found-at", "1"), 2),
        (0.001, ("--clear-at", "0"), 2),
    ],
)
def test_the_answer_is_the_exit_code(
    p: float, options: tuple[str, ...], code: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(molehunt.scanning, "scan", answers(p, SPOKE))
    assert scanning(model, *options) == code


@pytest.mark.parametrize("p", [0.01, 0.5, 0.99])
def test_if_no_defense_had_an_opinion_it_could_not_tell(
    p: float, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setattr(molehunt.scanning, "scan", answers(p, *SILENT))
    assert scanning(model) == 2
    assert "Could not tell" in capsys.readouterr().out


def test_repairs_have_the_budget_of_a_final(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def look(*arguments: Any, **settings: Any) -> ScanReport:
        asked.update(settings["defenses"])
        return answers(0.1, SPOKE)(*arguments, **settings)

    monkeypatch.setattr(molehunt.scanning, "scan", look)
    assert scanning(model) == 0
    budgets = get_round("final").repairs
    assert budgets
    for name, budget in budgets.items():
        assert asked[name].steps == budget.steps
    longer = [name for name in budgets if DEFENSES[name]().steps > asked[name].steps]  # type: ignore[attr-defined]
    assert "super_fine_tuning" in longer, "else the test would not see whether the budget is given"


def test_a_broken_plug_in_is_named_and_is_no_answer(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    broken = EntryPoint(name="gone", value="no_such_package:Defense", group="molehunt.defenses")
    monkeypatch.setattr(plugins, "entry_points", lambda *, group: [broken] if group == broken.group else [])
    assert scanning(model) == 3
    assert "the defense 'gone' of an installed package cannot be loaded" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--found-at", "0.2"], "--clear-at must lie below --found-at"),
        (["--found-at", "0.1"], "--clear-at must lie below --found-at"),
        (["--found-at", "nan"], "--clear-at must lie below --found-at"),
        (["--found-at", "1.1"], "--clear-at must lie below --found-at"),
        (["--clear-at", "-0.1"], "--clear-at must lie below --found-at"),
        (["--json", "nowhere/a.json"], "no folder nowhere"),
        (["--html", "."], "is a folder"),
        (["--clean", "nowhere"], "nowhere"),
        (["--references", "nowhere.json"], "nowhere.json"),
        (["--network", "nope"], "nope"),
        (["--task", "nope"], "unknown task 'nope'"),
        (["--seconds", "0"], "seconds"),
        (["--normalize", "0.5"], "expected a normalization (none, signed, bytes"),
        (["--size", "32"], "expected --size HEIGHTxWIDTH, such as 32x32, got '32'"),
        (["--size", "0x32"], "expected --size HEIGHTxWIDTH"),
        (["--channels", "2"], "--channels is 1 or 3"),
        (["--clean", "nowhere.npz"], "no file"),
    ],
)
def test_what_cannot_be_asked_is_refused(options: list[str], says: str, model: Path, capsys: Out) -> None:
    assert scanning(model, *options) == 3
    said = capsys.readouterr()
    assert says in " ".join(said.err.split())
    assert said.out == ""


def test_neither_task_nor_pictures(model: Path, capsys: Out) -> None:
    assert main(["scan", str(model), "--network", honest.NETWORK]) == 3
    assert "--task NAME, or --clean PATH" in capsys.readouterr().err


def test_weights_without_the_name_of_their_network(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    """One listed network fits: it is taken, and said. Two fit: the user has to say which."""
    monkeypatch.setattr(molehunt.scanning, "scan", answers(0.1, SPOKE))
    assert main(["scan", str(model), "--task", TASK.name]) == 0
    two = tmp_path / "two.safetensors"
    checkpoints.write(build("badnets_cnn", TASK.shape, 10, rng=torch.Generator().manual_seed(0)).state_dict(), two)
    assert main(["scan", str(two), "--task", TASK.name]) == 3
    assert "fit badnets_cnn and mntd_mnist alike" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_said_before_anything_else(tmp_path: Path, capsys: Out) -> None:
    missing = tmp_path / "model.safetensors"
    assert main(["scan", str(missing), "--task", TASK.name]) == 3
    assert f"cannot open {missing}" in capsys.readouterr().err.replace("\n", "")


def test_a_refusal_names_the_file(tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no archive")
    for name in ("empty", "notes.txt"):
        assert main(["scan", str(tmp_path / name), "--task", TASK.name]) == 3
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: ")


OWN = """
from torch import nn

def small(hidden=7):
    look = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten())
    return nn.Sequential(*look, nn.Linear(144, hidden), nn.ReLU(), nn.Linear(hidden, 10))
"""


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, str]:
    """A plain `.pth` of a class of the user's own, with the wrappers of a training script, and that class."""
    (tmp_path / "own.py").write_text(OWN)
    made = code.build(f"{tmp_path / 'own.py'}:small")
    state = {f"module.{name}": value for name, value in made.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, tmp_path / "own.pth")
    return tmp_path / "own.pth", f"{tmp_path / 'own.py'}:small"


def test_a_pth_file_of_a_class_of_ones_own(own: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    seen: dict[str, Any] = {}

    def look(model_: Adapted, *arguments: Any, **settings: Any) -> ScanReport:
        seen.update(settings, model=model_)
        return answers(0.1, SPOKE)(model_, *arguments, **settings)

    monkeypatch.setattr(molehunt.scanning, "scan", look)
    path, network = own
    command = ["scan", str(path), "--task", TASK.name, "--network", network, "--normalize", "signed"]
    assert main(command) == 0
    assert isinstance(seen["model"], Adapted)
    assert seen["model"].name == "own.py:small"
    assert seen["model"].normalize.mean.item() == 0.5
    assert [note[:30] for note in seen["notes"]] == ["The .pt file was taken apart i", "The network is code of your ow"]
    assert "--normalize signed" in seen["command"]
    assert main([*command, "--isolated"]) == 3
    assert "isolated defenses are handed data, never code" in capsys.readouterr().err


def test_a_class_that_does_not_fit_its_file_is_refused(own: tuple[Path, str], capsys: Out) -> None:
    path, network = own
    for spelled, says in (
        (f"{network}(9)", "'4.weight' has shape (7, 144), the network needs (9, 144)"),
        (network.replace("small", "tall"), "defines no tall; it has small"),
        (network.replace("own.py", "none.py"), "no file"),
    ):
        assert main(["scan", str(path), "--task", TASK.name, "--network", spelled]) == 3
        assert says in " ".join(capsys.readouterr().err.split())


def test_a_wrong_scale_is_told_before_the_defenses_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    """A network that wants 0 to 255: as it is handed over, its convolutions see next to nothing."""
    x, y = TASK.load("test")
    centers = torch.stack([x[y == k].mean(0) for k in range(10)]).flatten(1)
    head = nn.Linear(784, 10)
    head.weight.data, head.bias.data = centers / 255, -(centers**2).sum(1) / 2
    torch.save({"1." + name: value for name, value in head.state_dict().items()}, tmp_path / "bytes.pt")
    (tmp_path / "flat.py").write_text(
        "from torch import nn\ndef flat(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))"
    )
    monkeypatch.setattr(molehunt.scanning, "scan", answers(0.1, SPOKE))
    command = ["scan", str(tmp_path / "bytes.pt"), "--task", TASK.name, "--network", f"{tmp_path / 'flat.py'}:flat"]
    assert main(command) == 0
    assert "with --normalize bytes about" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--normalize", "bytes"]) == 0
    assert "WRONG" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm:resnet18", "no models are downloaded"),
        ("hf-hub:someone/model", "no models are downloaded"),
        ("https://example.org/model.pt", "no models are downloaded"),
        ("model.pt", "there is no such file"),
    ],
)
def test_what_is_not_here_is_not_fetched(name: str, says: str, capsys: Out) -> None:
    assert scanning(Path(name)) == 3
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("trick", parameters(torch_files.TRICKS))
def test_hostile_torch_files_are_refused(trick: Trick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_run", in_this_process)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pth").write_bytes(trick.make())
    assert scanning(tmp_path / "model.pth") == 3
    assert not (tmp_path / "pwned").exists()


def in_this_process(source: int, result: int, answer: int, limits: Limits) -> int:
    """What the converting child does, without a process for each trick; nothing in a file is run here either."""
    with open(source, "rb", closefd=False) as stream, open(result, "wb", closefd=False) as target:
        report = child.answer(stream, target, limits.file)
    os.write(answer, json.dumps(report).encode())
    return 0


# The inside of the sealed part is not the scanner's to read, so tricks with it are not among these.
HOSTILE = {
    **archives.TRICKS,
    **{
        name: Trick(name, t.says, wrapped)
        for name, t, wrapped in (
            (name, t, lambda folder, member=member, t=t: archives.plain(folder / "upload.zip", {member: t.make()}))
            for member, tricks in (("manifest.json", manifests.TRICKS), ("model.safetensors", weights.TRICKS))
            for name, t in tricks.items()
        )
    },
}


def refused(code: int, capsys: Out) -> None:
    said = capsys.readouterr()
    assert code == 3
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err


@pytest.mark.parametrize("trick", parameters(HOSTILE))
def test_hostile_archives_are_refused(trick: Trick, tmp_path: Path, capsys: Out) -> None:
    refused(main(["scan", str(trick.make(tmp_path)), "--task", TASK.name]), capsys)


@pytest.mark.parametrize("trick", parameters(weights.TRICKS))
def test_hostile_weights_are_refused(trick: Trick, tmp_path: Path, capsys: Out) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(trick.make())
    refused(scanning(path), capsys)


@pytest.mark.parametrize("trick", parameters(torch_files.TRICKS))
def test_pickles_under_another_name_are_refused(trick: Trick, tmp_path: Path, capsys: Out) -> None:
    for name in ("model.safetensors", "upload.zip"):
        path = tmp_path / name
        path.write_bytes(trick.make())
        refused(scanning(path), capsys)


@pytest.mark.parametrize("error", [ValueError("a mistake"), RuntimeError("a mistake"), MemoryError(), KeyError("x")])
def test_a_mistake_of_ours_is_no_answer(
    error: Exception, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(defenses, "available", dict)
    monkeypatch.setattr(combine, "verdict", broken)
    assert scanning(model) == 70
    assert "internal error" in capsys.readouterr().err


def test_ctrl_c_is_no_answer(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(combine, "verdict", stop)
    monkeypatch.setattr(defenses, "available", dict)
    assert scanning(model) == 130
    assert "stopped" in capsys.readouterr().err


def test_an_answer_that_could_not_be_written_is_no_answer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "folder" / "a.json"
    target.parent.mkdir()

    def answer(*arguments: Any, **settings: Any) -> ScanReport:
        target.parent.rmdir()
        return answers(0.01, SPOKE)(*arguments, **settings)

    monkeypatch.setattr(molehunt.scanning, "scan", answer)
    assert scanning(model, "--json", str(target)) == 3


def test_json_has_the_output_for_itself(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setattr(molehunt.scanning, "scan", answers(0.9, SPOKE))
    assert scanning(model, "--json", "-") == 1
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert (document["answer"], document["p"]) == ("found", 0.9)
    assert document["command"] == f"molehunt scan {model} --task mnist5k --network {honest.NETWORK} --seed 0"
    assert "very probably hidden" in said.err


def test_the_name_of_a_file_is_only_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    path = tmp_path / "[red]\x1b[31m\u202e<script>.safetensors"
    path.write_bytes(honest.weights())
    monkeypatch.setattr(molehunt.scanning, "scan", answers(0.1, SPOKE))
    assert scanning(path, "--html", str(tmp_path / "a.html")) == 0
    said = capsys.readouterr().out
    assert "[red]<U+001B>[31m<U+202E><script>.safetensors" in said
    page = (tmp_path / "a.html").read_text()
    assert "<script>" not in page
    assert "\x1b" not in page


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of a backdoored submission."""
    folder = tmp_path_factory.mktemp("real") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workshop, "recipe_for", lambda *_: HURRIED)
        hidden = {"target": 3, "size": 5, "poison_rate": 0.2}
        return workshop.make(Plan(task=TASK, attack="badnets", settings=hidden), folder).archive


def asked_with(path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """Settings with which the scan itself is called."""
    seen: dict[str, Any] = {}
    answer = answers(0.1, SPOKE)

    def look(*arguments: Any, **settings: Any) -> ScanReport:
        seen.update(settings)
        return answer(*arguments, **settings)

    monkeypatch.setattr(molehunt.scanning, "scan", look)
    assert scanning(path, *options) == 0
    return seen


def test_meta_classifiers_are_those_of_the_package_or_of_a_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    made = Meta(TASK.shape, 10, TASK.mean, TASK.std, Settings(), torch.Generator().manual_seed(5))
    monkeypatch.setattr(meta_files, "shipped", lambda task, network: (task, network))
    assert asked_with(model, monkeypatch)["metas"] == (TASK.name, honest.NETWORK)
    meta_files.save([made], tmp_path / "mine.safetensors", {"task": TASK.name, "network": honest.NETWORK})
    seen = asked_with(model, monkeypatch, "--metas", str(tmp_path / "mine.safetensors"))
    assert digest(seen["metas"]) == digest([made])
    assert f"--metas {tmp_path / 'mine.safetensors'}" in seen["command"]
    assert scanning(model, "--metas", str(model)) == 3
    assert "no meta-classifiers" in " ".join(capsys.readouterr().err.split())
    assert scanning(model, "--metas", str(tmp_path / "gone")) == 3


def test_the_manifest_names_the_recipe_and_bare_weights_do_not(
    model: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def note(*arguments: Any, **settings: Any) -> ScanReport:
        asked.append(settings["recipe"])
        return answers(0.5, SPOKE)(*arguments, **settings)

    monkeypatch.setattr(molehunt.scanning, "scan", note)
    assert scanning(model) == 2
    assert main(["scan", str(mine), "--task", TASK.name]) == 2
    assert asked == [None, "badnets_cnn"]


class TestARealScan:
    """One trained backdoor, all the way from the file to the exit code."""

    @pytest.fixture(autouse=True)
    def _one_defense(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(defenses, "available", lambda: {"neural_cleanse": lambda: QUICK})

    def references(self, path: Path, score: float, network: str = "badnets_cnn") -> str:
        """Scores of made-up clean models, in the settings of the scan."""
        known = Population(
            task=TASK.name,
            network=network,
            models=tuple(Reference(seed=i, scores={"neural_cleanse": score}) for i in range(19)),
            defenses={"neural_cleanse": {"configuration": configuration(QUICK), "stream": False}},
        )
        calibration.save(known, path)
        return str(path)

    def test_a_backdoor_is_found_without_a_look_at_the_seal(
        self, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
    ) -> None:
        for name in ("unseal", "opening"):
            monkeypatch.setattr(seal, name, lambda *_, **__: pytest.fail("the seal was opened"))
        low = self.references(tmp_path / "low.json", -1e6)
        page = tmp_path / "a.html"
        code = main(["scan", str(mine), "--task", "mnist5k", "--references", low, "--json", "-", "--html", str(page)])
        document = json.loads(capsys.readouterr().out)
        assert code == 1
        assert document["answer"] == "found"
        assert document["target"] == {"class": 3, "name": "3"}
        assert document["attack_success"]["before"] > 0.5
        assert "neural_cleanse" in page.read_text()

    def test_what_clean_models_score_too_is_not_found(self, mine: Path, tmp_path: Path) -> None:
        high = self.references(tmp_path / "high.json", 1e6)
        weights_alone = mine.with_suffix("") / "model.safetensors"
        command = ["scan", str(weights_alone), "--task", "mnist5k", "--network", "badnets_cnn", "--references", high]
        assert main([*command, "--clear-at", "0.4"]) == 0

    def test_references_of_another_network_are_refused(self, mine: Path, tmp_path: Path, capsys: Out) -> None:
        other = self.references(tmp_path / "other.json", 0.0, network="lenet5")
        assert main(["scan", str(mine), "--task", "mnist5k", "--references", other]) == 3
        (tmp_path / "garbage.json").write_text("[]")
        assert main(["scan", str(mine), "--task", "mnist5k", "--references", str(tmp_path / "garbage.json")]) == 3
        assert "lenet5" in capsys.readouterr().err

    def test_pictures_of_ones_own(self, mine: Path, tmp_path: Path, capsys: Out) -> None:
        x, y = TASK.load("test")
        for k in range(10):
            folder = tmp_path / "digits" / str(k)
            folder.mkdir(parents=True)
            for i, picture in enumerate(x[y == k][:20]):
                Image.fromarray((picture[0] * 255).round().numpy().astype(np.uint8)).save(folder / f"{i}.png")
        model_ = mine.with_suffix("") / "model.safetensors"
        pictures = str(tmp_path / "digits")
        command = ["scan", str(model_), "--network", "badnets_cnn", "--clean", pictures, "--json", "-"]
        assert main(command) == 2
        document = json.loads(capsys.readouterr().out)
        assert document["task"] == f"folder:{pictures}"
        assert document["accuracy"]["before"] > 0.8

    def test_isolated_it_answers_the_same(self, mine: Path, tmp_path: Path, capsys: Out) -> None:
        low = self.references(tmp_path / "low.json", -1e6)
        command = ["scan", str(mine), "--task", "mnist5k", "--references", low, "--json", "-"]
        code = main([*command, "--isolated"])
        said = capsys.readouterr()
        if code == 3 and (sys.platform != "linux" or confinement.landlock_version() < 1):
            pytest.skip(f"NOT TESTED, no walls here: {said.err}")
        assert code == main(command) == 1
        inside, outside = (json.loads(text)["defenses"][0] for text in (said.out, capsys.readouterr().out))
        assert inside["score"] == pytest.approx(outside["score"], rel=1e-3)
        assert inside["target"] == outside["target"]

    def test_a_defense_that_breaks_is_no_answer(self, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
        monkeypatch.setattr(NeuralCleanse, "__call__", lambda *_: 1 / 0)
        assert main(["scan", str(mine), "--task", "mnist5k"]) == 2
        said = capsys.readouterr()
        assert "Could not tell: no defense had an opinion" in said.out
        assert "failed: ZeroDivisionError" in said.err
        assert submission.read_submission(mine).manifest.task == "mnist5k"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Answers at once."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        return Finding(defense="neural_cleanse", score=1.0, class_scores=torch.zeros(suspect.classes))


@dataclass(frozen=True, kw_only=True)
class Stops:
    """Ctrl-C is pressed while it works."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        os.kill(os.getpid(), signal.SIGINT)
        return Finding(defense="stops", score=1.0)


def test_ctrl_c_prints_what_had_been_answered(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    kinds = {"neural_cleanse": Prompt, "stops": Stops, "late": Stops}
    monkeypatch.setattr(defenses, "available", lambda: kinds)
    monkeypatch.setattr(Round, "make", lambda *_: {})
    document = tmp_path / "answer.json"
    # A shell that starts the tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert scanning(model, "--json", str(document)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr()
    assert "stopped; this is what had been answered until then" in said.err
    assert "neural_cleanse" in said.out
    outcomes = {one["defense"]: one for one in json.loads(document.read_text())["defenses"]}
    assert outcomes["neural_cleanse"]["outcome"] == "finding"
    assert outcomes["stops"]["reason"] == "stopped before it was done"
    assert outcomes["late"]["reason"] == "not asked: stopped before its turn came"


def test_a_budget_limits_all_together_and_is_in_the_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float | None] = []

    @dataclass(frozen=True)
    class Slow:
        needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(),)

        def __call__(self, suspect: Suspect, run: Run) -> Finding:
            asked.append(run.remaining())
            while True:
                time.sleep(0.02)
                run.check()

    monkeypatch.setattr(defenses, "available", lambda: {"neural_cleanse": Prompt, "slow": Slow, "slower": Slow})
    monkeypatch.setattr(Round, "make", lambda *_: {})
    document = tmp_path / "answer.json"
    assert scanning(model, "--budget", "3s", "--json", str(document)) == 2
    answer = json.loads(document.read_text())
    outcomes = {one["defense"]: one for one in answer["defenses"]}
    assert outcomes["slow"]["reason"] == "not done when the budget of 3 s ended"
    assert outcomes["slower"]["reason"] == "not asked: the budget of 3 s was spent"
    (left,) = asked
    assert left is not None
    assert left <= 3.0


@pytest.mark.parametrize("text", ["60", "5 m", "0s", "-1s", "1d", "s", "1e3s"])
def test_a_budget_is_a_time(text: str, model: Path, capsys: Out) -> None:
    assert scanning(model, f"--budget={text}") == 3
    assert repr(text) in capsys.readouterr().err
