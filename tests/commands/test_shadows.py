"""`molehunt shadows`: a file of meta-classifiers, which the other commands take, and a run that goes on."""

from pathlib import Path

import pytest

from molehunt import meta_files, shadows
from molehunt.cli import main
from molehunt.metas import digest
from molehunt.training import Recipe

HURRIED = Recipe(epochs=0.2, batch=50, optimizer="adamw", lr=4e-3)
Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shadows, "recipe_for", lambda *_: HURRIED)
    monkeypatch.chdir(tmp_path)


def growing(*options: str) -> int:
    """Train two shadow models and one meta-classifier."""
    return main(["shadows", "--task", "mnist5k", "--count", "1", "--metas", "1", "--threads", "1", *options])


def test_the_file_is_there_and_says_what_it_is_made_of(tmp_path: Path, capsys: Out) -> None:
    assert growing() == 0
    said, told = capsys.readouterr()
    assert "1 meta-classifiers, from 1 clean and 1 backdoored badnets_cnn models of mnist5k" in said
    assert "1/2 shadow models: 2 models" in told
    assert "2/2 meta-classifier 1" in told
    (made,), about = meta_files.load(tmp_path / "mnist5k-badnets_cnn.safetensors")
    assert about["recipe"] == HURRIED.to_json()
    assert (about["task"], about["network"], about["shadows"]) == ("mnist5k", "badnets_cnn", 1)
    assert made.settings.per_class
    assert not made.settings.robust


def test_what_is_made_is_not_made_again_and_other_settings_are_others(tmp_path: Path, capsys: Out) -> None:
    assert growing("--out", "a") == 0
    assert growing("--out", "b") == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "meta-classifier 1" not in capsys.readouterr().err.rpartition("Training 2 shadow")[2]
    assert growing("--out", "c", "--seed", "7") == 0
    assert growing("--out", "d", "--robust") == 0
    a, c, d = (meta_files.load(tmp_path / name)[0] for name in "acd")
    assert len({digest(a), digest(c), digest(d)}) == 3
    assert d[0].settings.robust


@pytest.mark.parametrize(
    "options",
    [
        ["--count", "0"],
        ["--metas", "0"],
        ["--metas", "101"],
        ["--network", "nope"],
        ["--task", "nope"],
        ["--images", "9999999"],
        ["--out", "no/such/folder/x"],
    ],
)
def test_what_cannot_be_made_is_refused(options: list[str], tmp_path: Path) -> None:
    assert growing(*options) == 3
    assert not list(tmp_path.glob("*.safetensors"))
