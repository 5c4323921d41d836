"""Files of meta-classifiers: what was written is read, and a stranger's file is looked at first."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from molehunt import calibration, meta_files
from molehunt.metas import Meta, Settings, digest

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
    metas = [meta(0), meta(1, per_class=True)]
    meta_files.save(metas, tmp_path / "m.safetensors", {"shadows": 8})
    read = meta_files.load(tmp_path / "m.safetensors")
    assert digest(read) == digest(metas)
    assert [one.settings for one in read] == [one.settings for one in metas]
    assert not any(p.requires_grad or one.training for one in read for p in one.parameters())
    assert told(tmp_path / "m.safetensors")["about"] == {"shadows": 8}


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
    ],
)
def test_another_file_is_refused(about: str | None, tmp_path: Path) -> None:
    save_file({"0.queries": torch.zeros(2, *SHAPE)}, tmp_path / "m", None if about is None else {"about": about})
    with pytest.raises(ValueError, match="holds no meta-classifiers"):
        meta_files.load(tmp_path / "m")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"0.queries": torch.zeros(2)}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="holds no meta-classifiers"):
        meta_files.load(tmp_path / "m.pt")


def test_tensors_that_do_not_fit_are_refused_and_the_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m"
    meta_files.save([meta(0), meta(1)], path)
    tensors, about = load_file(path), json.dumps(told(path))
    tensors["1.queries"] = torch.full_like(tensors["1.queries"], torch.nan)
    save_file(tensors, path, {"about": about})
    with pytest.raises(ValueError, match=r"meta-classifier 2: .* finite numbers"):
        meta_files.load(path)


def test_a_huge_file_is_not_even_opened(tmp_path: Path) -> None:
    with (tmp_path / "m").open("wb") as file:
        file.truncate(meta_files.LARGEST + 1)
    with pytest.raises(ValueError, match="has 67108865 bytes"):
        meta_files.load(tmp_path / "m")


@pytest.mark.parametrize("task", ["mnist5k"])
def test_those_of_the_package_are_those_that_the_calibration_was_made_with(task: str) -> None:
    metas, population = meta_files.shipped(task, "badnets_cnn"), calibration.shipped(task, "badnets_cnn")
    assert metas is not None
    assert population is not None
    assert population.defenses["mntd"]["metas"] == digest(metas)
    assert all(tuple(one.queries.shape[1:]) == (1, 28, 28) and one.classes == 10 for one in metas)


def test_where_none_come_with_the_package_there_are_none() -> None:
    assert meta_files.shipped("mnist5k", "no network") is None
