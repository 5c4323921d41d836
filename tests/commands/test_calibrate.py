"""`molehunt calibrate` refuses what it does not know, before it works."""

from pathlib import Path

import pytest

from molehunt.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--network", "vit_tiny"], "no bank of 'vit_tiny'"),
        (["--defense", "magic"], "unknown defense 'magic'; known: "),
        (["--out", "nowhere/scores.json"], "there is no folder nowhere"),
        ([], "198 models are not trained yet, calibrate-clean-000 first: run molehunt bank build"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *arguments]) == 3
    assert said in capsys.readouterr().err
    assert not (tmp_path / "mnist5k-badnets_cnn.json").exists()
