"""The program in a process of its own, with trainings of a moment, that can be killed at a chosen moment.

The process kills itself with SIGKILL, which nothing can catch, in the middle of writing a file: half of it is there
under a temporary name. So the moment is always the same, however fast the machine is.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from molehunt.bank import roster
from molehunt.training import Recipe

HURRIED = Recipe(epochs=0.1, batch=50, optimizer="adamw", lr=4e-3, augment="crop", shift=1)

PROGRAM = """
import importlib, os, signal, sys
from pathlib import Path
from molehunt.bank import roster
from molehunt.training import Recipe

# Here and not below: processes that this one starts import it again, and have to train as it does.
RECIPE = Recipe(epochs=0.1, batch=50, optimizer="adamw", lr=4e-3, augment="crop", shift=1)
roster.recipe_for = lambda *_: RECIPE


def die(module, number):
    writer = module.write_atomically
    left = [number]

    def write(path, pieces, **settings):
        left[0] -= 1
        if left[0]:
            return writer(path, pieces, **settings)
        data = b"".join(pieces)
        (path.parent / ".part-of-the-killed").write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    module.write_atomically = write


if __name__ == "__main__":
    from molehunt.cli import main

    name, _, number = os.environ.get("MOLEHUNT_TEST_DIES", "").partition(":")
    if name:
        die(importlib.import_module(name), int(number))
    sys.exit(main(sys.argv[1:]))
"""


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process as the program below does."""
    monkeypatch.setattr(roster, "recipe_for", lambda *_: HURRIED)


def start(folder: Path, *arguments: str, dies: str = "") -> subprocess.CompletedProcess[str]:
    """Run the program from a folder.

    Args:
        folder: where it runs; a file with the program lies there afterwards.
        arguments: of the command line.
        dies: "MODULE:N", where it is killed: in the middle of the N-th file that the module writes.
    """
    script = folder / "program.py"
    script.write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env={**os.environ, "MOLEHUNT_TEST_DIES": dies, "OMP_NUM_THREADS": "1"},
        text=True,
        check=False,
        capture_output=True,
        timeout=120,
    )


def killed(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a process ended by SIGKILL."""
    return done.returncode == -signal.SIGKILL
