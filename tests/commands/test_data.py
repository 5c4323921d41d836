"""`molehunt data`: what is here, what can be had, and what is wrong with it."""

from pathlib import Path

import numpy as np
import pytest

from molehunt import datasets
from molehunt.cli import main
from molehunt.commands.consoles import messages
from molehunt.commands.fetching import ensure
from molehunt.datasets import cache
from molehunt.datasets.decode import Arrays


def test_the_list_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in datasets.DATASETS)
    rows = {line.split()[0]: line for line in said.splitlines() if line.split()}
    assert "yes" in rows["mnist5k"]
    assert "no:" in rows["mnist"]


def test_the_embedded_set_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", "mnist5k"]) == main(["data", "verify", "mnist5k"]) == 0
    expected = datasets.DATASETS["mnist5k"].sums["all"]
    assert capsys.readouterr().out == f"mnist5k all {expected}\n" * 2


@pytest.mark.parametrize("command", ["fetch", "verify"])
def test_an_unknown_set_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", command, "nope"]) == 3
    assert "mnist5k" in capsys.readouterr().err


def test_what_is_not_here_cannot_be_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", "mnist"]) == 3
    assert "molehunt data fetch mnist" in capsys.readouterr().err


def test_a_folder_without_the_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", "mnist", "--folder", str(tmp_path)]) == 3
    assert str(tmp_path) in " ".join(capsys.readouterr().err.split())


def test_other_data_are_refused_with_both_sums(capsys: pytest.CaptureFixture[str]) -> None:
    arrays = Arrays(np.zeros((10_000, 1, 28, 28), np.uint8), np.zeros(10_000, np.int64), None)
    cache.write("mnist", "train", arrays)
    assert main(["data", "verify", "mnist"]) == 3
    said = capsys.readouterr().err
    assert cache.sha256(arrays) in said
    assert datasets.DATASETS["mnist"].sums["train"] in said


def test_a_command_fetches_only_what_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(datasets, "fetch", lambda name, *, progress: asked.append(name))
    for name in ("mnist5k", "mnist", "folder:/somewhere"):
        ensure(name, messages())
    assert asked == ["mnist"]


def test_downloads_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fetch(name: str, *, folder: Path | None, progress: datasets.Progress) -> None:
        for done in (0, 2**20, 2**21):
            progress("file\x1b.gz", done, 2**21)
        progress("other", 5, None)

    monkeypatch.setattr(datasets, "fetch", fetch)
    assert main(["data", "fetch", "mnist5k"]) == 0
    assert capsys.readouterr().err.splitlines() == ["fetching file<U+001B>.gz (2.0 MiB)", "fetching other"]
