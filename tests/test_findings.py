import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from molehunt.findings import Abstention, Cost, Failure, Finding, Outcome, Verdict, load, save
from molehunt.triggers import Patch, Warp


def finding() -> Finding:
    return Finding(
        defense="made_up",
        score=1.25,
        class_scores=torch.tensor([0.1, 0.2, 0.7]),
        trigger=Patch.square((3, 8, 8)),
        target=2,
        input_scores=torch.arange(5.0),
        sample_scores=torch.arange(4.0, dtype=torch.float64),
        repaired={"head.weight": torch.randn(3, 4, generator=torch.Generator()), "n": torch.tensor(7)},
        radius=0.5,
        details={"curve": torch.tensor([0.9, 0.8]), "rows": [{"name": "a", "k": 1}], "none": None, "flag": True},
        cost=Cost(seconds=1.5, forward=100, backward=50, peak_bytes=2**30),
        record={"seed": 3, "configuration": {"steps": 100}},
    )


def kept(outcome: Outcome | Verdict, folder: Path) -> Any:
    save(outcome, folder / "answer.json")
    return load(folder / "answer.json")


def tensor_file(folder: Path, tensor: Tensor) -> Path:
    """The file that holds a tensor, found by its content."""
    from safetensors.torch import load_file

    found = [
        path
        for path in (folder / "tensors").iterdir()
        if torch.equal(load_file(path)["tensor"].double(), tensor.double())
    ]
    assert len(found) == 1
    return found[0]


def test_a_finding_comes_back_as_it_was(tmp_path: Path) -> None:
    before, after = finding(), kept(finding(), tmp_path)
    assert type(after) is Finding
    for name in ("defense", "score", "target", "radius", "cost", "record"):
        assert getattr(after, name) == getattr(before, name)
    for name in ("class_scores", "input_scores", "sample_scores"):
        assert torch.equal(getattr(after, name), getattr(before, name))
        assert getattr(after, name).dtype == getattr(before, name).dtype
    assert before.repaired is not None
    assert after.repaired is not None
    assert after.repaired.keys() == before.repaired.keys()
    assert all(torch.equal(after.repaired[k], v) for k, v in before.repaired.items())
    assert torch.equal(after.trigger.mask, before.trigger.mask)  # type: ignore[union-attr]
    assert torch.equal(after.details["curve"], torch.tensor([0.9, 0.8]))
    assert after.details["rows"] == [{"name": "a", "k": 1}]
    assert after.details["none"] is None
    assert after.details["flag"] is True


@pytest.mark.parametrize(
    "outcome",
    [
        Abstention(defense="made_up", reason="needs a stream of inputs"),
        Failure(defense="made_up", kind="time", message="late", trace="Traceback", cost=Cost(seconds=2.0)),
        Failure(defense="made_up", kind="died", message="signal 9", record={"seed": 1}),
    ],
)
def test_what_is_no_finding_comes_back_too(outcome: Outcome, tmp_path: Path) -> None:
    assert kept(outcome, tmp_path) == outcome


def test_a_verdict_comes_back_with_its_outcomes_in_order(tmp_path: Path) -> None:
    verdict = Verdict(
        p=0.75,
        q=torch.tensor([0.25, 0.75]),
        trigger=Warp(flow=torch.ones(2, 4, 4)),
        target=1,
        repaired={"w": torch.ones(2)},
        outcomes=(finding(), Abstention(defense="b", reason="no"), Failure(defense="c", kind="raised", message="m")),
        p_values={"made_up": 0.1},
        details={"before": 0.9},
    )
    after = kept(verdict, tmp_path)
    assert isinstance(after, Verdict)
    assert after.repaired is not None
    assert (after.p, after.target, after.p_values, after.details) == (0.75, 1, {"made_up": 0.1}, {"before": 0.9})
    assert torch.equal(after.q, verdict.q)
    assert [type(o) for o in after.outcomes] == [Finding, Abstention, Failure]
    first = after.outcomes[0]
    assert isinstance(first, Finding)
    assert torch.equal(first.details["curve"], torch.tensor([0.9, 0.8]))
    assert torch.equal(after.repaired["w"], torch.ones(2))


def test_equal_tensors_are_kept_once(tmp_path: Path) -> None:
    same = {"a": torch.ones(100), "b": torch.ones(100), "c": torch.zeros(100)}
    kept(Finding(defense="made_up", details=same), tmp_path)
    kept(Finding(defense="other", details=same), tmp_path)
    assert len(list((tmp_path / "tensors").iterdir())) == 2


def test_a_tensor_on_a_strided_view_is_kept_by_value(tmp_path: Path) -> None:
    view = torch.arange(12.0).view(3, 4).T
    assert torch.equal(kept(Finding(defense="made_up", details={"v": view}), tmp_path).details["v"], view)


def test_a_tensor_changed_on_disk_is_refused(tmp_path: Path) -> None:
    scores = torch.tensor([0.1, 0.2, 0.7])
    save(finding(), tmp_path / "answer.json")
    path = tensor_file(tmp_path, scores)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="was changed on disk"):
        load(tmp_path / "answer.json")


def test_a_tensor_replaced_by_another_valid_one_is_refused(tmp_path: Path) -> None:
    save(finding(), tmp_path / "answer.json")
    one = tensor_file(tmp_path, torch.tensor([0.1, 0.2, 0.7]))
    one.write_bytes(tensor_file(tmp_path, torch.arange(5.0)).read_bytes())
    with pytest.raises(ValueError, match="was changed on disk"):
        load(tmp_path / "answer.json")


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 63, "A" * 64, "a" * 63 + "/", ""])
def test_a_tensor_name_that_is_no_hash_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    save(Finding(defense="made_up", details={"v": torch.ones(1)}), path)
    document = json.loads(path.read_text())
    document["details"]["v"]["tensor"] = name
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="expected a SHA-256 in hexadecimal"):
        load(path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "holds no outcome"),
        ({}, "holds no outcome"),
        ({"is": "cost", "seconds": 1.0}, "holds no outcome"),
        ({"is": "sorcery"}, "unknown record kind 'sorcery'"),
    ],
)
def test_what_is_no_record_is_refused(document: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "answer.json")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    save(Abstention(defense="made_up", reason="old"), tmp_path / "answer.json")
    with pytest.raises(ValueError, match="cannot keep a set in a record"):
        save(Finding(defense="made_up", details={"v": {1, 2}}), tmp_path / "answer.json")
    assert load(tmp_path / "answer.json") == Abstention(defense="made_up", reason="old")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["answer.json"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_kept_in_details(bad: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        save(Finding(defense="made_up", details={"v": bad}), tmp_path / "answer.json")
    assert not (tmp_path / "answer.json").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_cannot_rank_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="made_up: the score must be finite"):
        Finding(defense="made_up", score=bad)
    for name in ("class_scores", "input_scores", "sample_scores"):
        with pytest.raises(ValueError, match=f"{name} must be finite with one dimension"):
            Finding(defense="made_up", **{name: torch.tensor([0.0, bad])})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{name} must be finite with one dimension"):
            Finding(defense="made_up", **{name: torch.zeros(2, 2)})  # type: ignore[arg-type]


def test_a_trigger_and_its_class_come_together() -> None:
    with pytest.raises(ValueError, match="a trigger comes with the class"):
        Finding(defense="made_up", trigger=Patch.square((3, 8, 8)))
    with pytest.raises(ValueError, match="a trigger comes with the class"):
        Finding(defense="made_up", target=1)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_verdict_is_never_certain(p: float) -> None:
    with pytest.raises(ValueError, match="p must lie strictly between 0 and 1"):
        Verdict(p=p, q=torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("q", [[0.5, 0.4], [1.5, -0.5], [[0.5, 0.5]], [float("nan"), 1.0]])
def test_a_verdict_gives_class_probabilities(q: list[Any]) -> None:
    with pytest.raises(ValueError, match="q must be probabilities"):
        Verdict(p=0.5, q=torch.tensor(q))
