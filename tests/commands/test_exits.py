"""Exits: which errors are blamed on the input, and targets that cannot be written."""

from pathlib import Path

import pytest

from molehunt.commands.exits import InputError, check_target, given, reading
from molehunt.files import Refused


def test_blames_the_input_for_the_named_errors_only() -> None:
    with pytest.raises(InputError, match="too many"), given():
        raise ValueError("too many")
    with pytest.raises(InputError, match="FileNotFoundError"), given((OSError,)):
        raise FileNotFoundError
    with pytest.raises(ValueError, match="a bug"), given((OSError,)):
        raise ValueError("a bug")
    with pytest.raises(TypeError), given():
        raise TypeError


def test_a_target_is_looked_at_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("")
    for fine in (None, tmp_path / "new", tmp_path / "old"):
        check_target(fine)
    with pytest.raises(InputError, match="is a folder"):
        check_target(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        check_target(tmp_path / "none" / "file")


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever runs the tests may be allowed everything, so the system is asked to say no.
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="permission denied"):
        check_target(tmp_path / "new")


@pytest.mark.parametrize(
    ("target", "says"),
    [("file", "^{}/file is a file, and a folder is needed"), ("file/below", "^{}/file/below cannot be made: a part")],
)
def test_a_file_in_the_place_of_a_folder_is_said_in_words(target: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=says.format(tmp_path)), given((OSError,)):
        (tmp_path / target).mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match=f"^{tmp_path}/none: No such file"), given((OSError,)):
        (tmp_path / "none").read_text()


def test_a_refusal_names_the_file_once(tmp_path: Path) -> None:
    path = tmp_path / "upload.zip"
    with pytest.raises(InputError, match=f"^cannot open {path}: there is no such"), reading(path):
        raise AssertionError("nothing is there, so nothing is read")
    path.write_text("")
    with pytest.raises(InputError, match=f"^{path}: too long$"), reading(path):
        raise Refused("too long")
    with pytest.raises(InputError, match=f"^cannot read {path}$"), reading(path):
        raise Refused(f"cannot read {path}")
    with pytest.raises(ValueError, match="a bug"), reading(path):
        raise ValueError("a bug")
