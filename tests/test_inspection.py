"""`molehunt.scan` from Python: any module, any pictures, the same report as the program's."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import molehunt
from molehunt import inspection
from molehunt.defenses import ABS, FineTuning, NeuralCleanse
from molehunt.findings import Abstention, Failure, Finding
from molehunt.networks import Network
from molehunt.report import scan_html
from molehunt.tasks import TASKS, Images
from molehunt.testing import planted

QUICK = {"neural_cleanse": NeuralCleanse(schedule=replace(NeuralCleanse().schedule, steps=30), limit=50)}
TARGET = 3


class Own(nn.Module):
    """A class of the user's own around a network with a planted backdoor; it wants pixels from 0 to 255."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x / 255)
        return out


@pytest.fixture(scope="module")
def clean() -> Images:
    found = planted(target=TARGET).suspect.clean
    assert found is not None
    return found


def test_the_package_imports_nothing_heavy_until_it_is_asked() -> None:
    code = "import sys, molehunt; print('torch' in sys.modules, 'scan' in molehunt.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'scna'"):
        molehunt.scna  # type: ignore[attr-defined]  # noqa: B018


def test_a_class_of_the_users_own_is_scanned_and_left_alone(clean: Images) -> None:
    own = Own(planted(target=TARGET).suspect.model).train()
    report = molehunt.scan(own, (clean.x, clean.y), normalize="bytes", ask=QUICK)
    assert report.verdict.target == TARGET
    assert report.network == "Own"
    assert report.task == "pictures of your own"
    assert report.accuracy is not None
    assert report.accuracy.before > 0.9
    assert report.asr is not None
    assert report.asr.before > 0.8
    assert own.training
    assert "pictures of your own" in scan_html(report)


def test_a_wrong_scale_is_in_the_notes() -> None:
    x, y = TASKS["mnist5k"].load("test")
    means = torch.stack([x[y == k].mean(0).flatten() for k in range(10)])
    nearest = nn.Linear(784, 10)
    nearest.weight.data, nearest.bias.data = means, -(means**2).sum(1) / 2
    report = molehunt.scan(nn.Sequential(nn.Flatten(), nearest), task="mnist5k", normalize="signed", ask={})
    assert any("scan again with --normalize none" in note for note in report.notes)


def test_a_repair_has_the_names_of_the_module_that_was_handed_in(
    clean: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Own(planted(target=TARGET).suspect.model)
    monkeypatch.setattr("molehunt.asking.REPAIR_FROM", 0.0)
    monkeypatch.setattr("molehunt.repair.REPAIR_FROM", 0.0)
    report = molehunt.scan(own, clean, normalize="bytes", ask={"fine_tuning": FineTuning(steps=1)})
    assert report.verdict.repaired is not None
    own.load_state_dict(dict(report.verdict.repaired))


def test_every_defense_answers_or_says_why_not(clean: Images) -> None:
    """A network without convolution: what needs one has no opinion."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.ReLU(), nn.Linear(8, 10))
    report = molehunt.scan(flat, clean, ask={"abs": ABS(), **QUICK})
    kinds = {o.defense: type(o) for o in report.verdict.outcomes}
    assert kinds == {"abs": Abstention, "neural_cleanse": Finding}
    assert not any(isinstance(o, Failure) for o in report.verdict.outcomes)


def test_pictures_come_from_a_file_of_arrays_or_a_task(clean: Images, tmp_path: Path) -> None:
    model = planted(target=TARGET).suspect.model
    np.savez(tmp_path / "a.npz", x=clean.x.numpy(), y=clean.y.numpy())
    report = molehunt.scan(model, tmp_path / "a.npz", ask={})
    assert report.task == f"npz:{tmp_path / 'a.npz'}"
    assert report.accuracy is not None
    assert report.accuracy.before > 0.9
    assert isinstance(model, Network)
    assert report.network == model.name


def test_a_file_of_weights_too(tmp_path: Path) -> None:
    made = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    torch.save(made.state_dict(), tmp_path / "a.pt")
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net(n): return nn.Sequential(nn.Flatten(), nn.Linear(784, n))"
    )
    report = molehunt.scan(tmp_path / "a.pt", task="mnist5k", network=f"{tmp_path / 'net.py'}:net(10)", ask={})
    assert (report.name, report.network) == ("a.pt", "net.py:net")


def test_what_does_not_fit_is_refused(clean: Images) -> None:
    model = planted().suspect.model
    for arguments, says in (
        ({}, "say what the model was trained for"),
        ({"clean": (clean.x * 255, clean.y)}, r"in \[0, 1\]"),
        ({"clean": (clean.x, clean.y[:5])}, "N labels"),
        ({"clean": (clean.x, clean.y), "classes": ["a", "b"]}, "labels must be 0 to 1, got 0 to 9"),
        ({"clean": (clean.x, clean.y), "task": "cifar10"}, r"expected pictures \(N, 3, 32, 32\)"),
        ({"clean": (clean.x, clean.y), "ask": ["nope"]}, "unknown defense 'nope'"),
        ({"clean": (clean.x, clean.y), "normalize": "odd"}, "expected a normalization"),
        ({"clean": "nowhere"}, "no folder"),
        ({"clean": "nowhere.npz"}, "no file"),
    ):
        with pytest.raises(ValueError, match=says):
            molehunt.scan(model, **arguments)


def test_pictures_are_shuffled_before_some_are_kept_from_the_defenses(clean: Images) -> None:
    order = clean.y.argsort()
    _, images, _ = inspection._pictures((clean.x[order], clean.y[order]), None, None, 0)
    assert len(set(images.y[-40:].tolist())) > 5
