import hashlib
from pathlib import Path

import numpy as np
import platformdirs
import pytest

from molehunt.datasets import Arrays, DataError, cache

ARRAYS = Arrays(np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2), np.asarray([1, 0]), np.asarray([7, 7]))


def test_the_sum_covers_type_shape_and_bytes() -> None:
    plain = Arrays(ARRAYS.x, ARRAYS.y)
    text = b"uint8 (2, 3, 2, 2)\n" + bytes(range(24)) + b"int64 (2,)\n" + bytes([1, *[0] * 15])
    assert cache.sha256(plain) == hashlib.sha256(text).hexdigest()
    others = [
        ARRAYS,
        Arrays(ARRAYS.x.reshape(2, 3, 4, 1), ARRAYS.y),
        Arrays(ARRAYS.x[::-1], ARRAYS.y),
        Arrays(ARRAYS.x, ARRAYS.y[::-1]),
    ]
    assert len({cache.sha256(arrays) for arrays in [plain, *others]}) == 5


def test_the_sum_does_not_depend_on_the_layout_in_memory() -> None:
    turned = Arrays(np.asfortranarray(ARRAYS.x), ARRAYS.y.astype(">i8"), ARRAYS.group)
    assert cache.sha256(turned) == cache.sha256(ARRAYS)


@pytest.mark.parametrize("arrays", [ARRAYS, Arrays(ARRAYS.x[:, ::-1], ARRAYS.y)])
def test_reads_what_was_written(arrays: Arrays) -> None:
    path = cache.write("a", "train", arrays)
    found = cache.read("a", "train")
    assert found is not None
    assert cache.sha256(found) == cache.sha256(arrays)
    assert [p.name for p in path.parent.iterdir()] == ["train.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_is_not_there_is_none() -> None:
    assert cache.read("a", "train") is None
    assert cache.recorded("a") == {}


def test_records_sums(tmp_path: Path) -> None:
    cache.record("a", {"train": "00"})
    assert cache.recorded("a") == {"train": "00"}
    (cache.root() / "a" / "sums.json").write_text("[]")
    with pytest.raises(DataError, match="expected an object of sums, got list"):
        cache.recorded("a")


def test_the_folder_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.root() == tmp_path / "cache"
    monkeypatch.setenv("MOLEHUNT_CACHE", "~/elsewhere")
    assert cache.root() == Path.home() / "elsewhere"
    monkeypatch.delenv("MOLEHUNT_CACHE")
    assert cache.root() == platformdirs.user_cache_path("molehunt")


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("MOLEHUNT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="set MOLEHUNT_CACHE"), cache.lock("a"):
        pass
