import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from molehunt import datasets, tasks
from molehunt.datasets import DATASETS, Arrays
from molehunt.tasks import SPLITS, TASKS, Images, Task, get_task, public_rows


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the user's cache is read, and nothing is remembered from test to test."""
    monkeypatch.setenv("MOLEHUNT_CACHE", str(tmp_path / "cache"))
    yield
    for cached in (tasks._load, tasks._public, tasks._folder, tasks._folder_task):
        cached.cache_clear()


def rows_of(images: Images) -> set[bytes]:
    return {row.numpy().tobytes() for row in images.x}


def test_every_data_set_is_a_task() -> None:
    assert list(TASKS) == list(DATASETS)
    for name, task in TASKS.items():
        assert get_task(name) is task
        assert (task.name, task.shape, task.classes) == (name, DATASETS[name].shape, DATASETS[name].classes)
        assert task.num_classes == len(set(task.classes)) == {"gtsrb": 43}.get(name, 10)
        assert len(task.mean) == len(task.std) == task.shape[0]
        assert all(0 < m < 1 for m in task.mean)
        assert all(0.1 < s < 0.5 for s in task.std)


def test_unknown_names_are_errors_that_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'imagenet'; known: mnist5k, mnist, .*, folder:PATH"):
        get_task("imagenet")
    with pytest.raises(ValueError, match="unknown split 'hidden'; known: train, validation, test"):
        get_task("mnist5k").load("hidden")  # type: ignore[arg-type]


def test_the_embedded_digits_are_split_by_a_fixed_rule() -> None:
    task = get_task("mnist5k")
    splits = [task.load(split) for split in SPLITS]
    for images, count in zip(splits, (3_500, 500, 1_000), strict=True):
        assert images.x.shape == (count, 1, 28, 28)
        assert images.x.dtype == torch.float32
        assert images.y.dtype == torch.int64
        assert images.y.bincount().tolist() == [count // 10] * 10
        assert images.x.min() == 0
        assert images.x.max() == 1
        # Well mixed from the start, so that a slice is a fair sample.
        assert images.y[: count // 10].bincount(minlength=10).min() > 0
    # Different pictures in all: 5 000 digits, none twice.
    assert len(set.union(*(rows_of(images) for images in splits))) == 5_000


def test_mean_and_deviation_are_those_of_the_training_split() -> None:
    task = get_task("mnist5k")
    x = task.load("train").x
    assert x.mean() == pytest.approx(task.mean[0], abs=1e-4)
    assert x.std() == pytest.approx(task.std[0], abs=1e-4)


def test_a_split_is_read_once() -> None:
    task = get_task("mnist5k")
    assert task.load("test") is task.load("test")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(-(2**63), 2**64 - 1))
def test_secret_splits_are_disjoint_fair_and_complete(seed: int) -> None:
    task = get_task("mnist5k")
    defender, hidden = task.secret(seed)
    assert len(defender.y) == len(hidden.y) == 500
    assert defender.y.bincount().tolist() == hidden.y.bincount().tolist() == [50] * 10
    assert rows_of(defender).isdisjoint(rows_of(hidden))
    assert rows_of(defender) | rows_of(hidden) == rows_of(task.load("test"))
    again, _ = task.secret(seed)
    assert torch.equal(again.x, defender.x)


def test_secret_seeds_differ() -> None:
    task = get_task("mnist5k")
    drawn = [frozenset(rows_of(task.secret(seed)[0])) for seed in range(8)]
    assert len(set(drawn)) == 8
    # Two random halves share half.
    assert all(200 < len(drawn[0] & other) < 300 for other in drawn[1:])


def test_the_defender_gets_a_thousand_of_a_large_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    part = Arrays(rng.integers(0, 256, (5_000, 1, 28, 28), np.uint8), rng.integers(0, 10, 5_000))
    monkeypatch.setattr(datasets, "load", lambda name, split: part)
    defender, hidden = get_task("mnist").secret(1)
    assert (len(defender.y), len(hidden.y)) == (1_000, 4_000)
    for y in (defender.y, hidden.y):
        share = y.bincount() / len(y)
        assert (share - torch.from_numpy(part.y).bincount() / 5_000).abs().max() <= 1 / len(y)
    # The front of either is a fair sample too.
    assert hidden.y[:200].bincount(minlength=10).min() > 0


def test_the_test_split_is_read_without_the_training_part(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Arrays(np.zeros((20, 3, 32, 32), np.uint8), np.arange(20) % 10)
    asked: list[str] = []

    def load(name: str, which: str) -> Arrays:
        asked.append(which)
        return part

    monkeypatch.setattr(datasets, "load", load)
    assert len(get_task("cifar10").load("test").y) == 20
    get_task("cifar10").secret(3)
    assert asked == ["test"]


def test_random_state_of_the_process_is_left_alone() -> None:
    before = torch.get_rng_state()
    get_task("mnist5k").secret(5)
    assert torch.equal(torch.get_rng_state(), before)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], tuple[int, ...]]:
    y = draw(st.lists(st.integers(0, 4), min_size=3, max_size=120))
    second = draw(st.integers(0, len(y) // 3))
    third = draw(st.integers(0, len(y) // 3))
    return y, (len(y) - second - third, second, third)


@given(cut=cuts(), name=st.sampled_from(["a", "b"]))
def test_public_splits_are_a_partition_in_proportion(cut: tuple[list[int], tuple[int, ...]], name: str) -> None:
    y, sizes = np.asarray(cut[0]), cut[1]
    splits = public_rows(y, sizes, name=name)
    assert [len(rows) for rows in splits] == list(sizes)
    assert sorted(np.concatenate(splits).tolist()) == list(range(len(y)))
    # The first cut is exact up to rounding; the second is made from what the first has left.
    share = np.bincount(y, minlength=5) * sizes[1] / len(y)
    assert (np.abs(np.bincount(y[splits[1]], minlength=5) - share) < 1).all()
    again = public_rows(y, sizes, name=name)
    assert all(np.array_equal(a, b) for a, b in zip(splits, again, strict=True))


def test_the_public_rule_is_the_documented_one() -> None:
    # Written a second time, since a changed rule would test old models on digits that they were trained on.
    def key(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    y = np.arange(5_000) // 500
    wanted: list[list[int]] = [[], [], []]
    for label in range(10):
        rows = sorted(range(500 * label, 500 * label + 500), key=lambda row: key(f"mnist5k/{row}"))
        for split, part in ((1, rows[:50]), (2, rows[50:150]), (0, rows[150:])):
            wanted[split] += part
    found = public_rows(y, (3_500, 500, 1_000), name="mnist5k")
    for split, rows in enumerate(wanted):
        assert found[split].tolist() == sorted(rows, key=lambda row: key(f"mnist5k/{split}/{row}"))
    assert torch.equal(get_task("mnist5k").load("test").y, torch.from_numpy(y[found[2]]))


def test_public_splits_depend_on_the_name_only_through_the_order() -> None:
    y = np.arange(1_000) % 10
    one, two = (public_rows(y, (900, 100), name=name)[1] for name in ("a", "b"))
    assert set(one.tolist()) != set(two.tolist())
    with pytest.raises(ValueError, match=r"sum to 1000 rows, got \(900, 99\)"):
        public_rows(y, (900, 99), name="a")


@given(st.lists(st.integers(1, 9), min_size=4, max_size=40), st.integers(0, 3))
def test_groups_stay_together(lengths: list[int], classes: int) -> None:
    group = np.repeat(np.arange(len(lengths)), lengths)
    y = group % (classes + 1)
    held = len(y) // 4
    train, validation = public_rows(y, (len(y) - held, held), name="a", group=group)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(y)))
    assert set(group[train].tolist()).isdisjoint(group[validation].tolist())
    assert abs(len(validation) - held) <= max(lengths) * (classes + 1)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of thirty random pictures, 4 high and 5 wide."""
    rng = np.random.default_rng(1)
    for name in ("left", "right"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(30):
            picture = rng.integers(0, 256, (4, 5, 3), np.uint8)
            Image.fromarray(picture).save(tmp_path / "set" / name / f"{k:02d}.png")
    return tmp_path / "set"


def test_a_folder_is_a_task(pictures: Path) -> None:
    task = get_task(f"folder:{pictures}")
    assert (task.shape, task.classes) == ((3, 4, 5), ("left", "right"))
    counts = {split: task.load(split).y.bincount().tolist() for split in SPLITS}
    assert counts == {"train": [21, 21], "validation": [3, 3], "test": [6, 6]}
    x = task.load("train").x
    assert np.allclose(x.mean((0, 2, 3)), task.mean, atol=1e-4)
    assert np.allclose(x.std((0, 2, 3), correction=0), task.std, atol=1e-4)
    assert get_task(task.name) is task
    assert len(set.union(*(rows_of(task.load(split)) for split in SPLITS))) == 60
    defender, hidden = task.secret(0)
    assert len(defender.y) == len(hidden.y) == 6


def test_a_folder_keeps_its_splits_when_it_moves(pictures: Path) -> None:
    splits = [rows_of(get_task(f"folder:{pictures}").load(split)) for split in SPLITS]
    moved = pictures.rename(pictures.with_name("moved"))
    for k, path in enumerate(sorted(moved.glob("left/*"))):
        path.rename(path.with_name(f"{(7 * k) % 30}-renamed.png"))
    assert [rows_of(get_task(f"folder:{moved}").load(split)) for split in SPLITS] == splits


def test_copies_in_a_folder_do_not_cross_splits(pictures: Path) -> None:
    for path in sorted(pictures.glob("*/*.png")):
        (path.parent / f"copy-{path.name}").write_bytes(path.read_bytes())
    task = get_task(f"folder:{pictures}")
    parts = [rows_of(task.load(split)) for split in SPLITS]
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 60


def test_a_folder_may_name_a_size(pictures: Path) -> None:
    task = get_task(f"folder:{pictures}?size=8x9")
    assert task.shape == (3, 8, 9)
    assert task.name == f"folder:{pictures}?size=8x9"
    assert task.load("test").x.shape == (12, 3, 8, 9)
    for bad in ("8", "8x", "0x9", "8x9x3", "8x2000", "-8x9"):
        with pytest.raises(ValueError, match="sides from 1 to 1024, got"):
            get_task(f"folder:{pictures}?size={bad}")


def test_a_folder_of_copies_is_refused(pictures: Path) -> None:
    for path in pictures.glob("left/*.png"):
        path.write_bytes((pictures / "left" / "00.png").read_bytes())
    with pytest.raises(ValueError, match=r"class 'left' has too few different pictures, none is left for \w+"):
        get_task(f"folder:{pictures}")


def test_a_folder_of_flat_pictures_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(10):
            # The same picture with another comment, so the files differ.
            Image.new("RGB", (4, 4), "red").save(tmp_path / "set" / name / f"{k}.jpg", comment=f"{name}{k}")
    with pytest.raises(ValueError, match="the same flat color in channel 0"):
        get_task(f"folder:{tmp_path / 'set'}")


def test_importing_tasks_opens_no_network_library() -> None:
    slow = ("httpx", "mlxtend", "pandas", "matplotlib")
    code = f"import sys, molehunt.tasks; print([name for name in {slow} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_real_sets_are_split_in_proportion(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOLEHUNT_CACHE")  # the user's own cache: what it holds is checked by its sum
    task: Task = get_task(name)
    train, validation, test = (task.load(split) for split in SPLITS)
    total = sum(DATASETS[name].rows.values())
    assert (len(train.y), len(validation.y), len(test.y)) == (total - 15_000, 5_000, 10_000)
    share = train.y.bincount() / len(train.y)
    assert (validation.y.bincount() / 5_000 - share).abs().max() < 3e-4
    assert np.allclose(train.x.mean((0, 2, 3)), task.mean, atol=1e-3)
    assert np.allclose(train.x.std((0, 2, 3)), task.std, atol=1e-3)
