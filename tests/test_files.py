"""Strangers' files are opened with care, ours are written whole or not at all."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from molehunt.files import Refused, exactly, open_regular, write_atomically


def test_opens_an_ordinary_file_and_says_how_long_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with open_regular(tmp_path / "a") as (stream, size):
        assert (stream.read(), size) == (b"12345", 5)


def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="not an ordinary file"), open_regular(tmp_path / "pipe"):
        pass


@pytest.mark.parametrize("name", ["nothing", "zero\0byte"])
def test_what_cannot_be_opened_is_a_refusal(name: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot open"), open_regular(tmp_path / name):
        pass


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not an ordinary file"), open_regular(tmp_path):
        pass


def test_fewer_bytes_than_wanted_are_a_refusal() -> None:
    assert exactly(io.BytesIO(b"123"), 2) == b"12"
    with pytest.raises(Refused, match="ends 1 bytes too early"):
        exactly(io.BytesIO(b"123"), 4)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_atomically(target, [b"old"])

    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, pieces())
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_mode_is_the_one_asked_for(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", [b""], mode=0o600)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
