"""What an attack of one's own is made of: its package, or its file and what lies beside it and is imported."""

import importlib
import sys
import types
from pathlib import Path

import pytest

from molehunt.attacks import BadNets
from molehunt.game import code

CLASS = "\n\nclass Mine:\n    pass\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def load(module: str) -> type:
    for name in [name for name in sys.modules if name.partition(".")[0] == module.partition(".")[0]]:
        del sys.modules[name]
    importlib.invalidate_caches()
    kind: type = importlib.import_module(module).Mine
    return kind


def put(files: dict[str, str]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


def names(kind: type) -> list[str]:
    return [path.relative_to(Path.cwd()).as_posix() for path in code.files_of(kind)]


def test_an_attack_of_molehunt_has_no_files_of_ones_own() -> None:
    assert code.files_of(BadNets) == ()


def test_a_class_without_a_file_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "session_for_test", types.ModuleType("session_for_test"))
    typed = type("Typed", (), {"__module__": "session_for_test"})
    assert code.files_of(typed) == ()
    assert code.line_of(KeyError("raised"), typed) is None
    assert code.digest(typed) == code.digest(BadNets)


def test_a_single_file_and_what_it_imports_beside_it() -> None:
    put(
        {
            "alone_for_test.py": f"import math, near_for_test, torch{CLASS}",
            "near_for_test.py": "def f():\n    from far_for_test.deep import g\n    import alone_for_test\n",
            "far_for_test/__init__.py": "",
            "far_for_test/deep.py": "g = 1",
            "far_for_test/__pycache__/deep.pyc": "",
            "unread.py": "",
            "test_alone_for_test.py": "import alone_for_test",
        }
    )
    kind = load("alone_for_test")
    assert names(kind) == ["alone_for_test.py", "far_for_test/__init__.py", "far_for_test/deep.py", "near_for_test.py"]
    before = code.digest(kind)
    put({"unread.py": "changed"})
    assert code.digest(kind) == before
    put({"far_for_test/deep.py": "g = 2"})
    assert code.digest(kind) != before
    put({"near_for_test.py": "no Python ("})
    assert names(kind) == ["alone_for_test.py", "near_for_test.py"]


def test_a_package_counts_with_its_data() -> None:
    put(
        {
            "pack_for_test/__init__.py": "",
            "pack_for_test/inner/attack.py": f"from . import other\nimport near_for_test{CLASS}",
            "pack_for_test/inner/other.py": "",
            "pack_for_test/pattern.txt": "1",
            "near_for_test.py": "",
            "other.py": "",
        }
    )
    kind = load("pack_for_test.inner.attack")
    assert names(kind) == [
        "near_for_test.py",
        "pack_for_test/__init__.py",
        "pack_for_test/inner/attack.py",
        "pack_for_test/inner/other.py",
        "pack_for_test/pattern.txt",
    ]
    before = code.digest(kind)
    put({"pack_for_test/pattern.txt": "2"})
    assert code.digest(kind) != before


def test_of_what_is_installed_nothing_beside_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put({"site-packages/alone_for_test.py": f"import near_for_test{CLASS}", "site-packages/near_for_test.py": ""})
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    assert names(load("alone_for_test")) == ["site-packages/alone_for_test.py"]


def test_the_digest_does_not_depend_on_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for place in ("here", "there"):
        put({f"{place}/alone_for_test.py": CLASS})
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / place))
            digests.append(code.digest(load("alone_for_test")))
    assert digests[0] == digests[1]


def test_the_last_line_of_ones_own_is_named() -> None:
    put({"alone_for_test.py": f"import json\n\n\ndef f(text):\n    return json.loads(text){CLASS}"})
    kind = load("alone_for_test")
    with pytest.raises(ValueError, match="Expecting value") as caught:
        sys.modules["alone_for_test"].f("no JSON")
    assert code.line_of(caught.value, kind) == "alone_for_test.py:5"
    assert code.line_of(caught.value, BadNets) is None
    assert code.line_of(KeyError("never raised"), kind) is None
