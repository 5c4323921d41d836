"""What is made of a child's remains; the answers that it can forge are in test_isolation.py."""

from pathlib import Path

import pytest

from molehunt import aftermath


@pytest.mark.parametrize(
    ("code", "output", "kind"),
    [
        (1, "ValueError: no", "raised"),
        (1, "MemoryError", "memory"),
        (-6, "terminate called after throwing an instance of 'std::bad_alloc'\nFatal Python error: Aborted", "memory"),
        (-6, "", "died"),
        (-9, "", "memory"),
        (-24, "", "time"),
        (-64, "", "died"),
    ],
)
def test_how_a_child_ended(code: int, output: str, kind: str) -> None:
    assert aftermath.death(code, output).kind == kind


def test_last_words_are_the_end_of_a_file_whatever_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "output"
    assert aftermath.last_words(path) == ""
    path.write_bytes(b"x" * 100 + b"\xff end")
    assert aftermath.last_words(path, 7) == "xx\ufffd end"


def test_bytes_are_counted_in_all_folders_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(bytes(10))
    (tmp_path / "b").write_bytes(bytes(5))
    assert aftermath.bytes_below(tmp_path) == 15
    (tmp_path / "c").symlink_to("/usr/bin/env")
    assert aftermath.bytes_below(tmp_path) < 100
