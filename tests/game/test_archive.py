"""The one kind of zip that a submission may be."""

import io
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from game.tricks import archives
from molehunt.game import archive
from molehunt.game.archive import SubmissionError

ALLOWED = {"a.txt": 100, "b.bin": 1000}
PARTS = {"a.txt": b"hello", "b.bin": bytes(range(200))}


def read(content: bytes, allowed: dict[str, int] | None = None) -> dict[str, bytes]:
    members = archive.read(io.BytesIO(content), len(content), allowed or ALLOWED)
    return {name: member.read() for name, member in members.items()}


def write(path: Path, parts: dict[str, bytes]) -> bytes:
    archive.write(path, [(name, lambda c=content: [c[:3], c[3:]]) for name, content in parts.items()])  # type: ignore[misc]
    return path.read_bytes()


def test_reads_what_it_writes_and_what_zip_tools_store(tmp_path: Path) -> None:
    assert read(write(tmp_path / "x.zip", PARTS)) == PARTS
    assert read(archives.build(PARTS.items())) == PARTS


def test_zip_tools_read_what_it_writes(tmp_path: Path) -> None:
    write(tmp_path / "x.zip", PARTS)
    with zipfile.ZipFile(tmp_path / "x.zip") as found:
        assert found.testzip() is None
        assert {name: found.read(name) for name in found.namelist()} == PARTS


def test_the_bytes_depend_on_names_and_contents_alone(tmp_path: Path) -> None:
    one = write(tmp_path / "x.zip", PARTS)
    (tmp_path / "y").mkdir()
    assert write(tmp_path / "y" / "other.zip", PARTS) == one
    with zipfile.ZipFile(tmp_path / "x.zip") as found:
        assert {info.date_time for info in found.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_member_is_read_in_place_and_as_often_as_wanted(tmp_path: Path) -> None:
    content = write(tmp_path / "x.zip", PARTS)
    member = archive.read(io.BytesIO(content), len(content), ALLOWED)["b.bin"]
    first, second = member.open(), member.open()
    assert first.read(3) == second.read(3) == bytes(range(3))
    assert second.seek(-2, io.SEEK_END) == 198
    assert second.read() == bytes([198, 199])
    assert first.read() == bytes(range(3, 200))
    assert first.read() == b""


@pytest.mark.parametrize(("name", "limit"), [("a.txt", 4), ("b.bin", 199)])
def test_every_member_has_its_limit(name: str, limit: int, tmp_path: Path) -> None:
    content = write(tmp_path / "x.zip", PARTS)
    read(content, {**ALLOWED, name: limit + 1})
    with pytest.raises(SubmissionError, match=f"{name} has {limit + 1} bytes; at most {limit}"):
        read(content, {**ALLOWED, name: limit})


SAMPLE = archives.build(PARTS.items())


@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_archives_are_refused_or_say_the_same(changes: list[tuple[int, int]]) -> None:
    """What is not covered by a check (dates, versions, modes of files) changes no content."""
    content = bytearray(SAMPLE)
    for place, value in changes:
        content[place] = value
    try:
        found = read(bytes(content))
    except SubmissionError:
        return
    assert found.keys() <= PARTS.keys()
    # A checksum of 32 bits finds every damage of so few bytes, unless the checksums are changed with them.
    assert found == PARTS


@settings(max_examples=200)
@given(st.binary(max_size=100), st.integers(0, 2))
def test_any_bytes_are_refused(content: bytes, kind: int) -> None:
    padded = (b"", archives.LOCAL, archives.LOCAL)[kind] + content
    with pytest.raises(SubmissionError):
        read(padded + (b"", b"", archives.END + bytes(18))[kind])


@settings(max_examples=200)
@given(st.integers(0, len(SAMPLE)), st.binary(min_size=1, max_size=30))
def test_bytes_put_anywhere_are_refused(place: int, more: bytes) -> None:
    with pytest.raises(SubmissionError):
        read(SAMPLE[:place] + more + SAMPLE[place:])


@pytest.mark.parametrize("length", range(0, len(SAMPLE), 7))
def test_a_part_of_an_archive_is_refused(length: int) -> None:
    with pytest.raises(SubmissionError):
        read(SAMPLE[:length])
