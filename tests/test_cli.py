"""The program: how it ends, what it says, and that nothing else is mistaken for an answer."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from molehunt import cli, datasets
from molehunt.cli import main
from molehunt.files import Refused

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"
START = "import sys; from molehunt.cli import main; sys.exit(main())"


def commands() -> dict[str, Any]:
    """Every command by its full name."""
    found: dict[str, Any] = {}

    def collect(command: Any, name: str) -> None:
        below = getattr(command, "commands", None)
        if below is None:
            found[name] = command
            return
        for word, other in below.items():
            collect(other, f"{name} {word}".strip())

    collect(typer.main.get_command(cli.app), "")
    return found


def start(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the program as a process."""
    command = [sys.executable, "-c", START, *arguments]
    return subprocess.run(command, text=True, check=False, timeout=120, stderr=subprocess.PIPE, **settings)


def broken(error: BaseException) -> Callable[..., Any]:
    """A function that only raises."""

    def raising(*_: object, **__: object) -> Any:
        raise error

    return raising


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert f"molehunt {name}" in said
    assert len(said.splitlines()) > 5


def test_help_imports_nothing_heavy() -> None:
    heavy = "torch", "numpy", "scipy", "pydantic", "matplotlib", "PIL", "httpx", "jinja2"
    code = (
        f"import sys; from molehunt.cli import main; main(['--help']); print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_versions_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == main(["--version"]) == 0
    first, second = (part for part in capsys.readouterr().out.split("molehunt ") if part)
    assert first == second
    assert "torch" in first


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "bogus",
        "--bogus",
        "data",
        "data bogus",
        "scan",
        "scan x --bogus",
        "scan x --seed one",
        "scan x --seed -1",
        "scan x --found-at",
        "check",
        "check x --references 4",
        "convert x",
        "train --seed 0.5",
        "play --teams 0",
        "play --isolated --bogus",
        "data fetch",
    ],
)
def test_wrong_usage_exits_3(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 3
    assert "molehunt" in "".join(capsys.readouterr())


def test_a_process_ends_with_the_same_code() -> None:
    done = start("scan", stdout=subprocess.PIPE)
    assert done.returncode == 3
    assert done.stdout == ""
    assert "molehunt scan --help" in done.stderr
    assert start("version", stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("boom"),
        ValueError("boom"),
        OSError("boom"),
        KeyError("boom"),
        MemoryError(),
        RecursionError("boom"),
        AssertionError(),
        ImportError("no torch here"),
        GeneratorExit(),
        typer.Abort(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_of_the_program_exits_70(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MOLEHUNT_DEBUG", raising=False)
    monkeypatch.setattr(datasets, "list_datasets", broken(error))
    assert main(["data", "list"]) == 70
    said = capsys.readouterr().err
    assert type(error).__name__ in said
    assert "MOLEHUNT_DEBUG=1" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("way", ["option", "variable"])
def test_the_traceback_is_shown_on_request(
    way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets, "list_datasets", broken(RuntimeError("boom")))
    if way == "variable":
        monkeypatch.setenv("MOLEHUNT_DEBUG", "1")
    assert main([*(["--debug"] if way == "option" else []), "data", "list"]) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Refused("no"), 3),
        (datasets.DataError("no"), 3),
        (KeyboardInterrupt(), 130),
        (SystemExit(0), 141),
        (SystemExit(1), 141),
        (SystemExit(2), 141),
        (BrokenPipeError(32, "Broken pipe"), 141),
    ],
    ids=repr,
)
def test_what_is_raised_decides_the_code(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_drop_output", lambda: None)  # it would silence the test run itself
    monkeypatch.setattr(datasets, "list_datasets", broken(error))
    assert main(["data", "list"]) == code


def test_a_command_without_an_answer_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.callback(invoke_without_command=True)(lambda: None)
    monkeypatch.setattr(cli, "app", app)
    assert main([]) == 70


def test_nobody_reads_the_output() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert start("data", "list", stdout=writing).returncode == 141
    finally:
        os.close(writing)


def test_a_poor_terminal_gets_question_marks() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    code = "from molehunt import cli; cli.main(['version']); cli.consoles.result().print('90 % ≥ 80 %')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.endswith("90 % ? 80 %\n")


@pytest.mark.parametrize("name", ["\x1b[31mred", "[bold]name[/bold]", "\u202eback", "a\nb", "\udc80", ":smile:"])
def test_hostile_names_in_errors_are_only_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", name]) == 3
    assert main([name]) == 3
    assert main(["scan", name, "--task", "mnist5k"]) == 3
    said = capsys.readouterr().err
    assert not set("\x1b\u202e\udc80") & set(said)
    if name.isascii() and name.isprintable():
        assert said.count(name) == 3


def test_the_page_has_every_command_and_option_and_no_other() -> None:
    text = PAGE.read_text()
    found = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        if title.startswith("`molehunt "):
            found[title.strip("`").removeprefix("molehunt ")] = set(re.findall(r"^\| `(--[a-z-]+)", body, re.MULTILINE))
    assert found == {
        name: {o for p in command.params for o in p.opts if o.startswith("--") and o != "--help"}
        for name, command in commands().items()
    }
    for code in (0, 1, 2, 3, 70, 130, 141):
        assert re.search(rf"^\| {code} \|", text, re.MULTILINE)


@pytest.mark.parametrize("module", ["molehunt", "molehunt.cli"])
def test_as_a_module_it_is_the_same_program(module: str) -> None:
    """A run that does nothing must never exit with 0, which is an answer."""
    done = subprocess.run(
        [sys.executable, "-m", module, "scan", "nowhere.zip", "--task", "mnist5k"], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "nowhere.zip" in done.stderr


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_are_told_how_long_to_wait_before_torch_is_loaded(given: dict[str, str], wanted: str | None) -> None:
    code = "import os, sys; import molehunt.cli; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    clean = {k: v for k, v in os.environ.items() if k not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **given}, capture_output=True, text=True, check=True
    )
    assert ended.stdout.split() == [str(wanted), "False"]
