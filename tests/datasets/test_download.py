from pathlib import Path

import pytest

from molehunt.datasets import download as module
from molehunt.datasets.download import download

from .conftest import Server

BODY = bytes(range(256)) * 40


def test_reads_the_file_and_reports_every_step(server: Server, tmp_path: Path) -> None:
    server.files["a"] = BODY
    steps: list[tuple[str, int, int | None]] = []
    download(server.address + "a", tmp_path / "new" / "a", lambda *step: steps.append(step))
    assert (tmp_path / "new" / "a").read_bytes() == BODY
    assert steps[-1] == (server.address + "a", len(BODY), len(BODY))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a"], "helper files were left"


def test_does_not_ask_again_for_what_is_there(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"here")
    download(server.address + "a", tmp_path / "a")
    assert server.asked == []


def test_continues_after_the_connection_broke(server: Server, tmp_path: Path) -> None:
    server.files["a"] = BODY
    server.cut["a"] = [3_000]
    download(server.address + "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY
    assert server.asked == [("a", None, None), ("a", "bytes=3000-", '"one"')]


def test_continues_what_an_earlier_run_has_read(server: Server, tmp_path: Path) -> None:
    server.files["a"] = BODY
    server.cut["a"] = [1_000, 1_000, 1_000]
    with pytest.raises(OSError, match="a: "):
        download(server.address + "a", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "a.part").stat().st_size == 3_000
    download(server.address + "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY
    assert server.asked[-1] == ("a", "bytes=3000-", '"one"')


def test_continues_after_the_reader_was_stopped(server: Server, tmp_path: Path) -> None:
    server.files["a"] = BODY * 100  # several chunks, so that there is something to continue

    def stop(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.address + "a", tmp_path / "a", stop)
    read = (tmp_path / "a.part").stat().st_size
    assert 0 < read < len(BODY) * 100
    download(server.address + "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY * 100
    assert server.asked[-1][1] == f"bytes={read}-"


def test_starts_again_when_the_file_has_changed(server: Server, tmp_path: Path) -> None:
    server.files["a"] = BODY
    server.cut["a"] = [1_000, 1_000, 1_000]
    with pytest.raises(OSError, match="a: "):
        download(server.address + "a", tmp_path / "a")
    server.files["a"], server.etag = BODY[::-1], '"two"'
    download(server.address + "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY[::-1]


def test_starts_again_when_the_server_knows_no_ranges(server: Server, tmp_path: Path) -> None:
    server.files["a"] = BODY
    server.ranges = False
    (tmp_path / "a.part").write_bytes(b"x" * 500)
    download(server.address + "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY


def test_starts_again_when_more_was_read_than_there_is(server: Server, tmp_path: Path) -> None:
    server.files["a"] = BODY
    server.etag = ""
    (tmp_path / "a.part").write_bytes(b"x" * (len(BODY) + 1))
    download(server.address + "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY


def test_a_missing_file_is_an_error_that_names_it(server: Server, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a: HTTPStatusError: .*404"):
        download(server.address + "a", tmp_path / "a")
    assert len(server.asked) == 1, "asking again changes nothing"
    assert list(tmp_path.glob("a*")) == []


def test_nobody_there_is_an_error_at_once(tmp_path: Path) -> None:
    # Port 9 (discard) of this machine: nobody listens.
    with pytest.raises(OSError, match="a: ConnectError"):
        download("http://127.0.0.1:9/a", tmp_path / "a")


def test_refuses_a_file_larger_than_any_data_set(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["a"] = BODY
    monkeypatch.setattr(module, "LARGEST", len(BODY) - 1)
    with pytest.raises(ValueError, match="announces 10240 bytes, more than 10239"):
        download(server.address + "a", tmp_path / "a")
