"""`molehunt convert`: plain tensors become safetensors, everything else is refused."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from game.tricks import parameters, torch_files
from molehunt import conversion
from molehunt.cli import main


def test_a_file_of_tensors_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "model.pt", tmp_path / "model.safetensors"
    weights = {"module.a": torch.ones(2, 3), "module.steps": torch.tensor(7)}
    torch.save({"state_dict": weights}, source)
    assert main(["convert", str(source), str(target)]) == 0
    assert torch.equal(safetensors.torch.load_file(target)["a"], weights["module.a"])
    said = capsys.readouterr().out
    assert "1 tensors" in said
    assert "state_dict" in said
    assert "steps" in said


@pytest.mark.parametrize("trick", parameters(dict(list(torch_files.TRICKS.items())[:3])))
def test_a_hostile_file_is_refused(trick: object, tmp_path: Path) -> None:
    source, target = tmp_path / "model.pt", tmp_path / "model.safetensors"
    source.write_bytes(trick.make())  # type: ignore[attr-defined]
    assert main(["convert", str(source), str(target)]) == 3
    assert not target.exists()


def test_the_target_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "convert", lambda *_: pytest.fail("it was converted"))
    for target in (tmp_path / "model.pt", tmp_path / "none" / "model.safetensors"):
        assert main(["convert", str(tmp_path / "model.pt"), str(target)]) == 3


def test_a_mistake_in_the_converter_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr(conversion, "convert", broken)
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")]) == 70
