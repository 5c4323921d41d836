"""Pictures in a .npz file: in every layout that is clear, and refused where it is not."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from molehunt.datasets import read_npz
from molehunt.tasks import SPLITS, get_task

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (20, 3, 6, 5), dtype=np.uint8)
Y = np.arange(20) % 2


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path / "a.npz", **arrays)
    return path / "a.npz"


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (X, X),
        (X.transpose(0, 2, 3, 1), X),
        (np.asfortranarray(X), X),
        (X / 255, X),
        ((X / 255).astype(np.float32), X),
        (X[:, 0], X[:, :1]),
        (X[:, :1], X[:, :1]),
        (X[:, :1].transpose(0, 2, 3, 1), X[:, :1]),
    ],
)
def test_every_clear_layout_gives_the_same_pictures(x: NDArray[Any], expected: NDArray[Any], tmp_path: Path) -> None:
    found = read_npz(saved(tmp_path, x=x, y=Y.astype(np.uint8)))
    assert np.array_equal(found.arrays.x, expected)
    assert found.arrays.y.tolist() == Y.tolist()
    assert found.classes == ("0", "1")


def test_classes_may_have_names_and_copies_one_group(tmp_path: Path) -> None:
    x = np.concatenate([X, X[:1]])
    found = read_npz(saved(tmp_path, x=x, y=[*Y, 0], classes=["cat", "dog"]))
    assert found.classes == ("cat", "dog")
    assert found.arrays.group is not None
    assert found.arrays.group[0] == found.arrays.group[-1] != found.arrays.group[1]


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": X}, "has x; expected arrays x"),
        ({"x": X, "y": Y, "z": Y}, "has x, y, z"),
        ({"x": X, "y": Y.astype(float)}, "y must be 20 whole numbers"),
        ({"x": X, "y": Y[:5]}, "y must be 20 whole numbers"),
        ({"x": X, "y": Y - 1}, "classes from 0, got -1"),
        ({"x": X, "y": Y * 2}, r"class 1 \('1'\) has no picture"),
        ({"x": X, "y": Y * 0}, "at least two classes"),
        ({"x": X, "y": Y, "classes": np.array(["a"])}, "classes must be 2 or more texts"),
        ({"x": X, "y": Y, "classes": np.array(["a", "b", "c"])}, r"class 2 \('c'\) has no picture"),
        ({"x": X.astype(np.int64), "y": Y}, "x must be uint8"),
        ({"x": X / 127.5 - 1, "y": Y}, r"must lie in \[0, 1\], before any normalization, got \[-1, 1\]"),
        ({"x": X / 255 + np.nan, "y": Y}, "must lie in"),
        ({"x": X[..., :3], "y": Y}, "both could be the channels"),
        ({"x": X[:, :2], "y": Y}, "neither is 1 or 3"),
        ({"x": X.reshape(20, -1), "y": Y}, "x must be"),
        ({"x": np.array([None, {}], dtype=object), "y": Y}, "only pickle could read"),
    ],
)
def test_what_is_not_clear_is_refused(arrays: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        read_npz(saved(tmp_path, **arrays))


def test_a_header_that_lies_about_its_size_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": (10**12, 3, 9, 9), "fortran_order": False, "descr": "|u1"})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    with pytest.raises(ValueError, match="which it does not have or is too much"):
        read_npz(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", b"no array")
    with pytest.raises(ValueError, match="'x' is no array of numpy"):
        read_npz(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="is damaged"):
        read_npz(tmp_path / "c.npz")
    with pytest.raises(ValueError, match="no file"):
        read_npz(tmp_path / "d.npz")


def test_as_a_task_it_has_splits_that_make_up_the_whole(tmp_path: Path) -> None:
    task = get_task(f"npz:{saved(tmp_path, x=X, y=Y, classes=['cat', 'dog'])}")
    assert (task.shape, task.classes) == ((3, 6, 5), ("cat", "dog"))
    assert task.mean[0] == pytest.approx(X[:, 0].mean() / 255, abs=1e-3)
    parts = [task.load(split) for split in SPLITS]
    assert sorted(torch.cat([p.x for p in parts]).sum((1, 2, 3)).tolist()) == pytest.approx(
        sorted((X / 255).sum((1, 2, 3)).tolist()), rel=1e-4
    )
