"""Which files the code of a defense is: half of MNTD lies where meta-classifiers are."""

from pathlib import Path

import pytest

from molehunt.bank import code
from molehunt.defenses import MNTD, STRIP


def test_the_code_of_mntd_is_that_of_its_meta_classifiers_too() -> None:
    names = [path.relative_to(base).as_posix() for base, path in code._files(MNTD)]
    assert sorted(names) == ["metas.py", "mntd.py"]


def test_other_defenses_do_not_change_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {kind: code.digest(kind) for kind in (MNTD, STRIP)}
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: read(p) + (b"#" if p.name == "metas.py" else b""))
    assert code.digest(MNTD) != before[MNTD]
    assert code.digest(STRIP) == before[STRIP]
