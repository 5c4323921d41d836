from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molehunt.datasets import folder as module
from molehunt.datasets import read_folder


def picture(path: Path, *, mode: str = "RGB", size: tuple[int, int] = (6, 5), color: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (color,) * len(mode) if mode in ("RGB", "RGBA", "LA", "CMYK") else color).save(path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Ten pictures, 5 high and 6 wide, for each of "cat" and "bird"."""
    for name in ("cat", "bird"):
        for k in range(10):
            picture(tmp_path / name / f"{k}.png", color=10 * k + (name == "cat"))
    return tmp_path


def test_reads_one_class_per_folder(classes: Path) -> None:
    found = read_folder(classes)
    assert found.classes == ("bird", "cat")
    assert found.arrays.x.shape == (20, 3, 5, 6)
    assert found.arrays.y.tolist() == [0] * 10 + [1] * 10
    assert found.arrays.x[:, 0, 0, 0].tolist() == [10 * k for k in range(10)] + [10 * k + 1 for k in range(10)]


def test_passes_over_what_is_no_picture(classes: Path) -> None:
    before = read_folder(classes)
    (classes / "notes.txt").write_text("a file beside the classes")
    (classes / "cat" / "notes.txt").write_text("a file beside the pictures")
    picture(classes / ".git" / "a.png")
    picture(classes / "cat" / ".thumbnails" / "a.png")
    assert np.array_equal(read_folder(classes).arrays.x, before.arrays.x)


def test_the_commonest_size_rules_unless_one_is_named(classes: Path) -> None:
    picture(classes / "cat" / "more" / "large.jpg", size=(60, 50), color=200)
    found = read_folder(classes)
    assert found.arrays.x.shape == (21, 3, 5, 6)
    assert abs(int(found.arrays.x[-1].mean()) - 200) < 3
    assert read_folder(classes, size=(8, 9)).arrays.x.shape == (21, 3, 8, 9)


def test_gray_pictures_have_one_channel(tmp_path: Path) -> None:
    for name, mode in (("a", "L"), ("b", "LA")):
        for k in range(10):
            picture(tmp_path / name / f"{k}.png", mode=mode, color=k)
    assert read_folder(tmp_path).arrays.x.shape == (20, 1, 5, 6)
    picture(tmp_path / "a" / "color.png")
    assert read_folder(tmp_path).arrays.x.shape == (21, 3, 5, 6)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("L", "bmp"),
        ("P", "gif"),
        ("P", "png"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("RGB", "webp"),
        ("RGB", "tiff"),
    ],
)
def test_reads_common_forms(classes: Path, mode: str, suffix: str) -> None:
    picture(classes / "cat" / f"a.{suffix}", mode=mode)
    assert read_folder(classes).arrays.x.shape == (21, 3, 5, 6)


def test_a_palette_with_transparency_is_read_without_a_warning(classes: Path) -> None:
    image = Image.new("P", (6, 5))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(classes / "cat" / "a.png", transparency=b"\x00\x80")
    x = read_folder(classes).arrays.x
    assert any((row[:, 0, 0] == [10, 20, 30]).all() for row in x)


def test_copies_of_one_file_have_one_group(classes: Path) -> None:
    (classes / "cat" / "copy.png").write_bytes((classes / "cat" / "3.png").read_bytes())
    group = read_folder(classes).arrays.group
    assert group is not None
    assert len(set(group.tolist())) == 20
    assert group[13] == group[20]


def test_refuses_what_is_no_such_folder(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        read_folder(classes / "nowhere")
    with pytest.raises(ValueError, match=r"a folder per class, at least two, got \[\]"):
        read_folder(classes / "cat")
    monkeypatch.setattr(module, "MOST_BYTES", 20 * 90 - 1)
    with pytest.raises(ValueError, match=r"\(20, 3, 5, 6\) take more than 1799 bytes; name a smaller size"):
        read_folder(classes)
    (classes / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match="class 'cat' has 9 pictures, at least 10 are needed"):
        read_folder(classes)


def test_refuses_folders_of_splits(classes: Path) -> None:
    (classes / "cat").rename(classes / "train")
    (classes / "bird").rename(classes / "test")
    with pytest.raises(ValueError, match="look like splits, not classes"):
        read_folder(classes)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x80\x04K\x01.", "bad.png is damaged: cannot identify"), (b"", "bad.png is damaged")],
)
def test_refuses_files_that_are_no_pictures(classes: Path, content: bytes, message: str) -> None:
    (classes / "cat" / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_folder(classes)


def test_refuses_a_picture_that_breaks_off(classes: Path) -> None:
    path = classes / "cat" / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4_000])
    with pytest.raises(ValueError, match=r"noise\.png is damaged"):
        read_folder(classes)


def test_refuses_sixteen_bits(classes: Path) -> None:
    Image.fromarray(np.full((5, 6), 40_000, np.uint16)).save(classes / "cat" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: expected 8 bits per channel, got Pillow mode 'I;16'"):
        read_folder(classes)
