"""FILE.py:CALLABLE: the user's own code, and every way in which it does not come to a module."""

import sys
from pathlib import Path

import pytest
from torch import nn

from molehunt import networks
from molehunt.foreign import ForeignError, code

MINE = """
from torch import nn
from beside import WIDTH

class Net(nn.Sequential):
    def __init__(self, classes, width=WIDTH):
        super().__init__(nn.Flatten(), nn.Linear(4, width), nn.Linear(width, classes))

def ten(): return Net(10)
def text(): return "no module"
def breaks(): raise KeyError("key")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 6")
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


@pytest.mark.parametrize(("call", "width"), [("ten", 6), ("Net(10)", 6), ("Net(10, width=3)", 3)])
def test_a_function_or_a_class_with_plain_arguments(file: Path, call: str, width: int) -> None:
    path = list(sys.path)
    made = code.build(f"{file}:{call}")
    assert isinstance(made, nn.Sequential)
    assert made[1].out_features == width
    assert sys.path == path
    assert code.short_name(f"{file}:{call}") == f"mine.py:{call.partition('(')[0]}"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("Missing", "defines no Missing; it has Net, breaks, ten, text"),
        ("Net", r"raised TypeError: .*; give arguments as in mine.py:Net\(10\)"),
        ("breaks", "raised KeyError: 'key'"),
        ("text", "returned a str, expected a torch.nn.Module"),
        ("Net(open('x'))", "expected plain values as arguments"),
        ("Net(10", None),
    ],
)
def test_what_does_not_come_to_a_module_is_refused(file: Path, call: str, says: str | None) -> None:
    if says is None:
        assert not code.is_code(f"{file}:{call}")
        return
    with pytest.raises(ForeignError, match=says):
        code.build(f"{file}:{call}")


def test_a_file_that_is_not_there_or_does_not_import(tmp_path: Path) -> None:
    with pytest.raises(ForeignError, match="no file"):
        code.build(f"{tmp_path / 'none.py'}:Net")
    (tmp_path / "bad.py").write_text("import no_such_package_anywhere")
    with pytest.raises(ForeignError, match="cannot be imported: ModuleNotFoundError"):
        code.build(f"{tmp_path / 'bad.py'}:Net")


@pytest.mark.parametrize("name", [None, "resnet18", "timm:resnet18", "folder/net.py", "net.py:"])
def test_other_names_are_no_code(name: str | None) -> None:
    assert not code.is_code(name)


def test_nothing_but_a_scan_runs_it(file: Path) -> None:
    """What a host, a game or a manifest names as a network is looked up, never imported."""
    with pytest.raises(ValueError, match="unknown network"):
        networks.build(f"{file}:ten", (1, 2, 2), 10)
