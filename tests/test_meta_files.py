"""Files of meta-classifiers: what was written is read, and a stranger's file is looked at first."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from molehunt import calibration, meta_files
from molehunt.metas import Meta, Settings, digest
from molehunt.tasks import get_task

SHAPE = (1, 6, 6)


def meta(seed: int, **settings: object) -> Meta:
    """A small one."""
    made = Settings(queries=2, hidden=3, **settings)  # type: ignore[arg-type]
    return Meta(SHAPE, 4, (0.5,), (0.3,), made, torch.Generator().manual_seed(seed))


def told(path: Path) -> dict[str, object]:
    """What the file says beside its tensors."""
    length = int.from_bytes(path.read_bytes()[:8], "little")
    found: dict[str, object] = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["about"])
    return found


def test_what_was_written_is_read(tmp_path: Path) -> None:
    metas = [meta(0), meta(1, per_class=False)]
    meta_files.save(metas, tmp_path / "m.safetensors", {"shadows": 8})
    read, about = meta_files.load(tmp_path / "m.safetensors")
    assert about == {"shadows": 8}
    assert digest(read) == digest(metas)
    assert [one.settings for one in read] == [one.settings for one in metas]
    assert not any(p.requires_grad or one.training for one in read for p in one.parameters())


def test_the_same_ones_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        meta_files.save([meta(0)], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("count", [0, meta_files.MOST + 1])
def test_none_or_too_many_are_not_written(count: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"1 to 100 meta-classifiers, got {count}"):
        meta_files.save([meta(0)] * count, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "about",
    [
        None,
        "no JSON",
        "[]",
        json.dumps({"format": "molehunt meta-classifiers 2", "metas": []}),
        json.dumps({"format": meta_files.FORMAT, "metas": []}),
        json.dumps({"format": meta_files.FORMAT, "metas": ["x"]}),
        json.dumps({"format": meta_files.FORMAT}),
        "[" * 100_000,
        '{"format": 1, "format": 2}',
    ],
)
def test_another_file_is_refused(about: str | None, tmp_path: Path) -> None:
    save_file({"0.queries": torch.zeros(2, *SHAPE)}, tmp_path / "m", None if about is None else {"about": about})
    with pytest.raises(ValueError, match="no meta-classifiers"):
        meta_files.load(tmp_path / "m")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"0.queries": torch.zeros(2)}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="no meta-classifiers"):
        meta_files.load(tmp_path / "m.pt")


def test_tensors_that_do_not_fit_are_refused_and_the_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m"
    meta_files.save([meta(0), meta(1)], path)
    tensors, about = load_file(path), json.dumps(told(path))
    tensors["1.queries"] = torch.full_like(tensors["1.queries"], torch.nan)
    save_file(tensors, path, {"about": about})
    with pytest.raises(ValueError, match=r"meta-classifier 2: .* finite numbers"):
        meta_files.load(path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("0.queries", torch.zeros(2, *SHAPE, dtype=torch.float64)),
        ("0.queries", torch.zeros(2, *SHAPE, dtype=torch.int64)),
        ("0.queries", torch.zeros(3, *SHAPE)),
        ("0.hidden.weight", torch.zeros(3, 9)),
        ("0.more", torch.zeros(1)),
    ],
)
def test_a_tensor_of_another_kind_is_refused(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "m"
    meta_files.save([meta(0)], path)
    save_file(load_file(path) | {name: tensor}, path, {"about": json.dumps(told(path))})
    with pytest.raises(ValueError, match="meta-classifier 1: "):
        meta_files.load(path)


def test_no_classes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    meta_files.save([meta(0)], path)
    about: dict[str, Any] = told(path)
    about["metas"][0]["classes"] = 0
    tensors = load_file(path) | {"0.hidden.weight": torch.zeros(3, 0)}
    save_file(tensors, path, {"about": json.dumps(about)})
    with pytest.raises(ValueError, match="0 classes"):
        meta_files.load(path)


def test_only_those_for_the_same_models_are_chosen(tmp_path: Path) -> None:
    task, path = get_task("mnist5k"), tmp_path / "m"
    right = Meta(task.shape, 10, task.mean, task.std, Settings(), torch.Generator().manual_seed(0))
    meta_files.save([right], path, {"task": "mnist5k", "network": "lenet5"})
    found = meta_files.chosen(path, task, "lenet5")
    assert found is not None
    assert digest(found) == digest([right])
    with pytest.raises(ValueError, match="for lenet5 models of mnist5k, not for badnets_cnn models of mnist5k"):
        meta_files.chosen(path, task, "badnets_cnn")
    with pytest.raises(ValueError, match=r"not for lenet5 models of mnist$"):
        meta_files.chosen(path, get_task("mnist"), "lenet5")
    meta_files.save([right], path)
    with pytest.raises(ValueError, match="for None models of None"):
        meta_files.chosen(path, task, "lenet5")
    meta_files.save([meta(0)], path, {"task": "mnist5k", "network": "lenet5"})
    with pytest.raises(ValueError, match="mnist5k has"):
        meta_files.chosen(path, task, "lenet5")
    assert meta_files.chosen(None, task, "lenet5") is None


def test_a_huge_file_is_not_even_opened(tmp_path: Path) -> None:
    with (tmp_path / "m").open("wb") as file:
        file.truncate(meta_files.LARGEST + 1)
    with pytest.raises(ValueError, match="has 67108865 bytes"):
        meta_files.load(tmp_path / "m")


@pytest.mark.parametrize("task", ["mnist5k", "mnist"])
def test_those_of_the_package_are_those_that_the_calibration_was_made_with(task: str) -> None:
    metas, population = meta_files.shipped(task, "badnets_cnn"), calibration.shipped(task, "badnets_cnn")
    assert metas is not None
    assert population is not None
    assert population.defenses["mntd"]["metas"] == digest(metas)
    assert all(tuple(one.queries.shape[1:]) == (1, 28, 28) and one.classes == 10 for one in metas)


def test_where_none_come_with_the_package_there_are_none() -> None:
    assert meta_files.shipped("mnist5k", "no network") is None
