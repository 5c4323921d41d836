"""The starter kit and the tutorial: written, run from top to bottom, and never over a student's work."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch

from commands.conftest import HURRIED
from commands.pictures import two_kinds
from molehunt import training
from molehunt.cli import main
from molehunt.game import check as home
from molehunt.game.budget import budget_rules
from molehunt.game.rules import ROUNDS, Limits
from molehunt.game.submission import read_submission
from molehunt.starter import FILES, write
from molehunt.tasks import TASKS, get_task

TUTORIAL = Path(__file__).parents[2] / "docs" / "play" / "tutorial.md"
TASK = TASKS["mnist5k"]


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit for mnist5k, in which we are."""
    write(TASK, tmp_path / "kit")
    monkeypatch.chdir(tmp_path / "kit")
    return tmp_path / "kit"


@pytest.fixture
def references(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of a second, and five clean models that are there: equal ones do."""
    monkeypatch.setattr(training, "recipe_for", lambda *_: HURRIED)
    kept = home.References(task=TASK, network=TASK.network)
    kept.get(0)
    for number in range(1, 5):
        shutil.copy(kept.folder / "0.safetensors", kept.folder / f"{number}.safetensors")


def test_a_kit_for_cifar10_is_right_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["starter", "--task", "cifar10", "--out", str(tmp_path / "kit")]) == 0
    assert "next: cd" in capsys.readouterr().out
    files = {name: (tmp_path / "kit" / name).read_text() for name in FILES}
    assert all("{%" not in text and "{{" not in text for text in files.values())
    assert 'get_task("cifar10")' in files["attack.py"]
    assert len(files["attack.py"].splitlines()) < 100
    for name in ("attack.py", "my_attack/my_attack.py", "my_attack/test_my_attack.py"):
        compile(files[name], name, "exec")
    notebook = nbformat.reads(files["attack.ipynb"], as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, "cell", "exec")
    assert "--task cifar10" in files["README.md"]
    assert len(files["README.md"].splitlines()) < 60, "one page"


def test_a_kit_for_a_folder_of_two_classes_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_kinds(tmp_path / "two kinds")
    task, folder = get_task(f"folder:{tmp_path / 'two kinds'}"), tmp_path / "my kit"
    assert main(["starter", "--task", task.name, "--out", str(folder)]) == 0
    assert f"next: cd '{folder}'" in capsys.readouterr().out

    text = (folder / "README.md").read_text()
    told = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("molehunt ")]
    assert [words[1] for words in told] == ["check", "check", "train", "check"]
    assert all(words[words.index("--task") + 1] == task.name for words in told), "a manifest opens no paths"
    assert "pip install pytest" in text

    attack = runpy.run_path(str(folder / "attack.py"))["ATTACK"]
    assert bool(attack(task.load("train"), task, torch.Generator().manual_seed(0)).altered.any())
    assert "BadNets(target=1," in (folder / "attack.ipynb").read_text()

    monkeypatch.chdir(folder / "my_attack")
    monkeypatch.delitem(sys.modules, "my_attack", raising=False)
    assert main(told[2][1:]) == 3
    assert "MyAttack raised NotImplementedError at my_attack.py:" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "my_attack", raising=False)


def test_the_rules_are_the_programs_own(tmp_path: Path) -> None:
    write(TASK, tmp_path)
    text = (tmp_path / "RULES.md").read_text()
    for round_ in ROUNDS.values():
        weights = " | ".join(str(w) for w in asdict(round_.weights).values())
        assert f"| {round_.name} | {weights} |" in text
        (line,) = [row for row in text.splitlines() if row.startswith(f"| {round_.name} | {round_.title} |")]
        for name in round_.defenses:
            assert name in line
    assert f"at least {100 * Limits().asr:.0f} %" in text
    assert f"at most {100 * Limits().altered:.0f} %; none added" in text
    for kind, rule in budget_rules().items():
        assert f"\n| {kind} | {rule} |\n" in text
    assert "other triggers" not in text, "additive ones may change a tenth of the pixels without limit"
    assert "Only the sealed trigger is judged" in text


def test_a_students_work_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "kit" / "my_attack" / "my_attack.py"
    mine.parent.mkdir(parents=True)
    mine.write_text("a week of work")
    assert main(["starter", "--out", str(tmp_path / "kit")]) == 3
    assert "is there already; name another folder" in capsys.readouterr().err
    assert mine.read_text() == "a week of work"
    assert not (tmp_path / "kit" / "README.md").exists()
    assert main(["starter", "--task", "nope", "--out", str(tmp_path / "other")]) == 3
    (tmp_path / "file").write_text("")
    assert main(["starter", "--out", str(tmp_path / "file" / "kit")]) == 3


@pytest.mark.filterwarnings("ignore")  # of the packages around the kernel; those of ours are seen elsewhere
@pytest.mark.usefixtures("references")
def test_the_notebook_runs_from_top_to_bottom(kit: Path) -> None:
    notebook = nbformat.read(kit / "attack.ipynb", as_version=4)
    recipe = json.dumps(HURRIED.to_json())
    hurry = (
        "import json\nimport molehunt.training as t\nimport molehunt.game.check as c\n"
        f"recipe = t.Recipe.from_json(json.loads({recipe!r}))\n"
        "t.recipe_for = c.recipe_for = lambda *_: recipe"
    )
    notebook.cells.insert(0, nbformat.v4.new_code_cell(hurry))
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(kit))
    shown = str([cell.get("outputs") for cell in notebook.cells])
    assert "image/png" in shown, "the stamped pictures"
    assert "attack success" in shown
    assert read_submission(kit / "notebook_submission.zip").open_seal().attack == "badnets"


def follow(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, exact: bool) -> list[str]:
    """Do what a page says, and return the commands; inexact, the gates may be missed, which is a matter of training."""
    commands: list[str] = []
    here = tmp_path
    monkeypatch.chdir(here)
    monkeypatch.delitem(sys.modules, "my_attack", raising=False)
    for kind, body in re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL):
        if kind == "python":
            name = body.splitlines()[0].removeprefix("# ")
            assert (here / name).exists(), "the page replaces a file that is there"
            (here / name).write_text(body)
            continue
        for line in body.splitlines():
            command, _, wanted = line.partition("# exit code ")
            commands.append(command.strip())
            words = shlex.split(command)
            wanted, _, shown = wanted.partition(": ")
            expected = int(wanted) if wanted else 0
            code = 0
            if words[0] == "cd":
                here = here / words[1]
                monkeypatch.chdir(here)
            elif words[0] == "molehunt":
                code = main(words[1:])
            elif words[:3] == ["python", "-m", "pytest"]:
                plain = ["-c", "/dev/null", "--rootdir=.", "-p", "no:cacheprovider", "-q"]
                done = subprocess.run(
                    [sys.executable, *words[1:], *plain], cwd=here, check=False, capture_output=True, text=True
                )
                assert shown, "without pytest the exit code is the same: the page has to say what else is seen"
                assert shown in done.stdout
                code = done.returncode
            elif words[:2] == ["pip", "install"]:
                assert words[2:] == ["pytest"], "it is here"
            else:
                assert words[0] == "python", f"the test does not know {line!r}"
                runpy.run_path(str(here / words[1]), run_name="__main__")
            allowed = {expected} if exact or words[:2] != ["molehunt", "check"] else {0, 1}
            assert code in allowed, f"{line!r} ended with {code}"
    monkeypatch.delitem(sys.modules, "my_attack", raising=False)
    return commands


@pytest.mark.usefixtures("references")
def test_the_tutorial_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    commands = follow(TUTORIAL.read_text(), tmp_path, monkeypatch, exact=False)
    assert len(commands) == 13
    said = capfd.readouterr().out
    assert "Dress rehearsal of round III" in said
    assert read_submission(tmp_path / "kit" / "my_attack" / "mine.zip").open_seal().attack == "MyAttack"
    assert read_submission(tmp_path / "kit" / "my_attack" / "set.zip").board == "data"
    assert read_submission(tmp_path / "kit" / "submission.zip").open_seal().attack == "badnets"


@pytest.mark.slow
def test_the_tutorials_attack_passes_every_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(TUTORIAL.read_text(), tmp_path, monkeypatch, exact=True)
