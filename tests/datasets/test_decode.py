import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molehunt.datasets import decode
from molehunt.datasets.decode import Files, cifar10, csv_digits, gtsrb, idx, unpack

from .conftest import idx_bytes

RNG = np.random.default_rng(7)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)])
def test_reads_idx(tmp_path: Path, shape: tuple[int, ...], zipped: bool) -> None:
    array = RNG.integers(0, 256, shape, np.uint8)
    path = tmp_path / ("a.gz" if zipped else "a")
    path.write_bytes(gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array))
    assert np.array_equal(idx(path), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "idx header"),
        (b"\x80\x04K\x01.", "idx header .* got 80 04 4b 01"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "unsigned bytes"),
        (b"\0\0\x08\x02\0\0\0\x01", "ends inside its header"),
        (idx_bytes(np.zeros(9, np.uint8))[:-1], "needs 9 bytes after the header, got 8"),
        (idx_bytes(np.zeros(9, np.uint8)) + b"x", "needs 9 bytes after the header, got more"),
        (b"\0\0\x08\x04" + b"\xff" * 16, "more than"),
    ],
)
def test_refuses_what_is_no_idx(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        idx(tmp_path / "a")


def cifar_pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 256, (count, 3, 32, 32), np.uint8), RNG.integers(0, 10, count)


def test_both_forms_of_cifar10_give_the_same(tmp_path: Path) -> None:
    x, y = cifar_pictures(10)
    binary, png = tmp_path / "binary", tmp_path / "png"
    for folder in (binary, png):
        folder.mkdir()
    for k in range(5):
        rows = slice(2 * k, 2 * k + 2)
        # Official: label, then the three planes. Package: a picture whose rows are the flattened pictures.
        records = np.concatenate([y[rows, None].astype(np.uint8), x[rows].reshape(2, -1)], 1)
        (binary / f"data_batch_{k + 1}.bin").write_bytes(records.tobytes())
        Image.fromarray(x[rows].transpose(0, 2, 3, 1).reshape(2, 1024, 3)).save(png / f"data_batch_{k + 1}.png")
    (png / "train_lables.json").write_text(json.dumps(y.tolist()))
    for folder in (binary, png):
        found = cifar10(Files(roots=(folder,)), "train")
        assert np.array_equal(found.x, x)
        assert np.array_equal(found.y, y)
        assert found.y.dtype == np.int64


def test_cifar10_refuses_what_does_not_fit(tmp_path: Path) -> None:
    files = Files(roots=(tmp_path,))
    with pytest.raises(FileNotFoundError, match=r"no test_batch.bin in "):
        cifar10(files, "test")
    (tmp_path / "test_batch").write_bytes(b"\x80\x02}.")
    with pytest.raises(ValueError, match="the pickled version, which is not read"):
        cifar10(files, "test")
    (tmp_path / "test_batch.bin").write_bytes(b"x" * 3072)
    with pytest.raises(ValueError, match="rows of 3073 bytes, got 3072"):
        cifar10(files, "test")
    Image.new("RGB", (1023, 2)).save(tmp_path / "test_batch.png")
    (tmp_path / "test_lables.json").write_text("[1]")
    with pytest.raises(ValueError, match="1024 wide, got RGB 1023 wide"):
        cifar10(files, "test")
    Image.new("RGB", (1024, 2)).save(tmp_path / "test_batch.png")
    with pytest.raises(ValueError, match=r"expected 2 labels, got shape \(1,\)"):
        cifar10(files, "test")


def test_reads_digits_from_csv(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (3, 784))
    path = tmp_path / "a.csv.gz"

    def write(table: np.ndarray) -> None:
        with gzip.open(path, "wt") as file:
            file.writelines(",".join(map(str, row)) + "\n" for row in table)

    write(np.column_stack([x, [4, 5, 6]]))
    found = csv_digits(path)
    assert np.array_equal(found.x.reshape(3, 784), x)
    assert found.y.tolist() == [4, 5, 6]
    write(x)
    with pytest.raises(ValueError, match="785 numbers per line"):
        csv_digits(path)
    write(np.column_stack([x, [4, 5, 256]]))
    with pytest.raises(ValueError, match="got 0 to 256"):
        csv_digits(path)


HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"


def write_gtsrb(folder: Path) -> np.ndarray:
    """Write one track of two photographs per class and two test photographs; return the signs of the tracks."""
    signs = RNG.integers(0, 256, (43, 32, 32, 3), np.uint8)
    for label in range(43):
        at = folder / "GTSRB" / "Final_Training" / "Images" / f"{label:05d}"
        at.mkdir(parents=True)
        lines = []
        for shot in range(2):
            # The sign lies 5 right of and 6 below the corner; the box names first and last pixel.
            photograph = np.zeros((45, 40, 3), np.uint8)
            photograph[6:38, 5:37] = signs[label]
            name = f"{label:05d}_{shot:05d}.ppm"
            Image.fromarray(photograph).save(at / name)
            lines.append(f"{name};40;45;5;6;36;37;{label}\n")
        (at / f"GT-{label:05d}.csv").write_text(HEADER + "".join(lines))
    at = folder / "GTSRB" / "Final_Test" / "Images"
    at.mkdir(parents=True)
    lines = []
    for k, label in enumerate((7, 3)):
        Image.fromarray(signs[label]).resize((64, 64), Image.Resampling.NEAREST).save(at / f"{k:05d}.ppm")
        lines.append(f"{k:05d}.ppm;64;64;0;0;63;63;{label}\n")
    (folder / "GT-final_test.csv").write_text(HEADER + "".join(lines))
    return signs


def test_reads_gtsrb_cut_to_the_box(tmp_path: Path) -> None:
    signs = write_gtsrb(tmp_path)
    files = Files(roots=(tmp_path,))
    train = gtsrb(files, "train")
    assert train.x.shape == (86, 3, 32, 32)
    assert np.array_equal(train.x[::2], signs.transpose(0, 3, 1, 2))
    assert train.y.tolist() == [label for label in range(43) for _ in range(2)]
    assert train.group is not None
    assert np.array_equal(train.group[::2], train.group[1::2])
    assert len(set(train.group.tolist())) == 43
    test = gtsrb(files, "test")
    assert test.x.shape == (2, 3, 32, 32)
    assert test.y.tolist() == [7, 3]


def test_gtsrb_refuses_tables_that_do_not_fit(tmp_path: Path) -> None:
    write_gtsrb(tmp_path)
    files = Files(roots=(tmp_path,))
    table = tmp_path / "GTSRB/Final_Training/Images/00004/GT-00004.csv"
    table.write_text(table.read_text().replace(";4\n", ";5\n"))
    with pytest.raises(ValueError, match="listed as class 5 in the folder of class 4"):
        gtsrb(files, "train")
    (tmp_path / "GT-final_test.csv").write_text("Filename;Width\n00000.ppm;64\n")
    with pytest.raises(ValueError, match="cannot read the row"):
        gtsrb(files, "test")
    (tmp_path / "GT-final_test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"GT-final_test\.csv"):
        gtsrb(files, "test")


def test_unpacks_zip_and_tar(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/a", b"one")
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("in/b")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"two"))
    for name in ("a.zip", "b.tgz"):
        unpack(tmp_path / name, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out" / "in").iterdir()) == ["a", "b"]


def test_unpacking_stays_inside(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../escaped", b"x")
    unpack(tmp_path / "a.zip", tmp_path / "out")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../escaped"), io.BytesIO())
    with pytest.raises(ValueError, match="is damaged"):
        unpack(tmp_path / "b.tar.gz", tmp_path / "out")
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tgz"])
def test_refuses_damaged_archives(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<html>please log in</html>")
    with pytest.raises(ValueError, match="is damaged"):
        unpack(tmp_path / name, tmp_path)


def test_refuses_archives_that_unpack_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LARGEST", 1_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(1_001))
    with pytest.raises(ValueError, match="unpacks to 1001 bytes, more than 1000"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"expected a \.zip"):
        unpack(tmp_path / "a.rar", tmp_path / "out")
