import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from molehunt.datasets import ChecksumError, DataError, cache, fetch, list_datasets, load, verify
from molehunt.datasets.cache import sha256

from .conftest import Server, Tiny, idx_bytes

Make = Callable[..., Tiny]


def put(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def changed(tiny: Tiny) -> dict[str, bytes]:
    """Return the files with one test label changed: well formed, and not the data set."""
    y = tiny.parts["test"].y.astype(np.uint8)
    y[0] = (y[0] + 1) % 3
    return tiny.files | {"t10k-labels-idx1-ubyte.gz": gzip.compress(idx_bytes(y))}


def left() -> list[str]:
    """Return the files in the cache but for the lock."""
    return sorted(
        str(p.relative_to(cache.root())) for p in cache.root().rglob("*") if p.is_file() and p.suffix != ".lock"
    )


def test_fetches_checks_and_caches(tiny: Make, server: Server) -> None:
    it = tiny()
    arrays = load("tiny", "train")
    assert np.array_equal(arrays.x, it.parts["train"].x)
    assert np.array_equal(arrays.y, it.parts["train"].y)
    asked = len(server.asked)
    assert np.array_equal(load("tiny", "test").y, it.parts["test"].y)
    assert len(server.asked) == asked, "the cache was not used"
    assert left() == ["tiny/test.safetensors", "tiny/train.safetensors"]
    assert verify("tiny") == it.data.sums


def test_a_wrong_sum_names_both_and_leaves_nothing(tiny: Make, server: Server) -> None:
    it = tiny()
    server.files.update(changed(it))
    with pytest.raises(ChecksumError, match="tiny test from http") as caught:
        fetch("tiny")
    assert caught.value.expected == it.data.sums["test"]
    assert it.data.sums["test"] in str(caught.value)
    assert caught.value.found in str(caught.value)
    assert caught.value.found != caught.value.expected
    assert left() == []
    server.files.update(it.files)
    fetch("tiny")
    assert verify("tiny") == it.data.sums


def test_continues_an_interrupted_fetch(tiny: Make, server: Server) -> None:
    it = tiny()
    name = "train-images-idx3-ubyte.gz"
    server.cut[name] = [40, 40, 40]
    with pytest.raises(DataError, match=name):
        fetch("tiny")
    assert f"downloads/tiny/{name}.part" in left()
    assert not cache.path("tiny", "train").exists()
    fetch("tiny")
    assert (name, "bytes=120-", '"one"') in server.asked
    assert verify("tiny") == it.data.sums
    assert left() == ["tiny/test.safetensors", "tiny/train.safetensors"]


def test_goes_on_to_the_next_source(tiny: Make, server: Server) -> None:
    tiny(sources=3)
    fetch("tiny")
    assert [name for name, _, _ in server.asked if "gone" in name] == [
        "gone/gone/train-images-idx3-ubyte.gz",
        "gone/train-images-idx3-ubyte.gz",
    ]


def test_the_last_error_lists_every_source_and_why(
    tiny: Make, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(sources=2)
    server.files["t10k-labels-idx1-ubyte.gz"] = b"<html>please log in</html>"
    monkeypatch.setenv("MOLEHUNT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError) as caught:
        fetch("tiny")
    text = str(caught.value)
    assert f"{tmp_path / 'nowhere'} (MOLEHUNT_DATA): no folder" in text
    assert f"{server.address}gone/: train-images-idx3-ubyte.gz: HTTPStatusError" in text
    assert "t10k-labels-idx1-ubyte.gz is damaged: Not a gzipped file" in text
    assert "--folder" in text
    assert left() == [], "a file that is not what it should be must be read anew"


def test_a_named_folder_comes_first(
    tiny: Make, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = tiny()
    monkeypatch.setenv("MOLEHUNT_DATA", str(put(it.files, tmp_path / "data" / "tiny").parent))
    assert np.array_equal(load("tiny", "test").x, it.parts["test"].x)
    assert server.asked == []


def test_a_folder_argument_is_the_only_source(tiny: Make, server: Server, tmp_path: Path) -> None:
    it = tiny()
    with pytest.raises(DataError, match=r"tiny is not in .*nowhere"):
        fetch("tiny", folder=tmp_path / "nowhere")
    plain = {name.removesuffix(".gz"): gzip.decompress(content) for name, content in it.files.items()}
    fetch("tiny", folder=put(plain, tmp_path / "data"))
    assert server.asked == []
    assert verify("tiny") == it.data.sums


def test_a_folder_with_other_data_is_refused(tiny: Make, tmp_path: Path) -> None:
    it = tiny()
    with pytest.raises(ChecksumError, match="nothing of it was kept"):
        fetch("tiny", folder=put(changed(it), tmp_path / "data"))
    assert left() == []


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "pickle"])
def test_a_damaged_cache_is_noticed_and_replaced(tiny: Make, damage: str) -> None:
    it = tiny()
    fetch("tiny")
    path = cache.path("tiny", "train")
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:-3],
            "bit": content[:-1] + bytes([content[-1] ^ 1]),
            "empty": b"",
            "pickle": b"\x80\x04K\x01.",
        }[damage]
    )
    with pytest.raises(DataError, match="molehunt data fetch tiny"):
        load("tiny", "train")
    with pytest.raises(DataError, match="molehunt data fetch tiny"):
        verify("tiny")
    fetch("tiny")
    assert verify("tiny") == it.data.sums


def test_without_a_pinned_sum_the_first_use_is_recorded(tiny: Make, server: Server) -> None:
    it = tiny(pinned=False)
    fetch("tiny")
    assert cache.recorded("tiny") == {part: sha256(arrays) for part, arrays in it.parts.items()}
    for part in it.parts:
        cache.path("tiny", part).unlink()
    server.files.update(changed(it))
    with pytest.raises(ChecksumError, match=r"recorded at the first use"):
        fetch("tiny")


def test_reading_one_part_does_not_touch_the_other(tiny: Make) -> None:
    it = tiny()
    fetch("tiny")
    cache.path("tiny", "train").write_bytes(b"damaged")
    assert np.array_equal(load("tiny", "test").y, it.parts["test"].y)


def test_a_failed_write_leaves_nothing(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        fetch("tiny")
    assert left() == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"t10k-labels-idx1-ubyte.gz": gzip.compress(idx_bytes(np.zeros(5, np.uint8)))}, "pictures .* and labels"),
        (
            {"t10k-labels-idx1-ubyte.gz": gzip.compress(idx_bytes(np.full(6, 3, np.uint8)))},
            "labels 0 to 2, got up to 3",
        ),
        (
            {
                "t10k-labels-idx1-ubyte.gz": gzip.compress(idx_bytes(np.zeros(2, np.uint8))),
                "t10k-images-idx3-ubyte.gz": gzip.compress(idx_bytes(np.zeros((2, 4, 5), np.uint8))),
            },
            r"expected pictures \(6, 1, 4, 5\), got \(2, 1, 4, 5\)",
        ),
    ],
)
def test_data_of_another_form_are_refused(tiny: Make, server: Server, files: dict[str, bytes], message: str) -> None:
    tiny(pinned=False)
    server.files.update(files)
    with pytest.raises(DataError, match=message):
        fetch("tiny")


def test_the_list_tells_what_is_here(tiny: Make) -> None:
    tiny()
    before = {row.name: row for row in list_datasets()}
    assert before["mnist5k"].cached
    assert not before["mnist"].cached
    assert (before["tiny"].cached, before["tiny"].images, before["tiny"].size) == (False, 18, 18 * 28)
    fetch("tiny")
    after = {row.name: row for row in list_datasets()}
    assert after["tiny"].cached
    assert after["tiny"].size == sum(cache.path("tiny", part).stat().st_size for part in ("train", "test"))


def test_unknown_names_are_errors_that_list_the_known() -> None:
    for call in (fetch, verify):
        with pytest.raises(ValueError, match=r"unknown data set 'imagenet'; known: mnist5k, mnist, "):
            call("imagenet")
    with pytest.raises(ValueError, match="mnist5k has no part 'test'; its parts: all"):
        load("mnist5k", "test")
    with pytest.raises(DataError, match="mnist is not in the cache"):
        verify("mnist")
