"""What the tests of data sets share: an empty cache, a small server, and files of a tiny data set."""

import gzip
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from molehunt.datasets import DATASETS, Arrays, Dataset
from molehunt.datasets.cache import sha256
from molehunt.datasets.decode import idx_pair
from molehunt.datasets.sources import Official


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache, and none goes through a proxy to reach this machine."""
    monkeypatch.setenv("MOLEHUNT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MOLEHUNT_DATA", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@dataclass
class Server:
    """Files over HTTP on this machine, with ways to misbehave.

    Attributes:
        address: where it listens, ending in a slash.
        files: content by name.
        etag: the validator it sends, none when empty.
        cut: bytes after which it drops the connection, by name; each entry is used up once per item.
        ranges: whether it honors Range.
        asked: every request: name, Range and If-Range header.
    """

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    etag: str = '"one"'
    cut: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
            it.asked.append((name, wanted, condition))
            if name not in it.files:
                self.send_error(404)
                return
            body = it.files[name]
            start = 0
            if wanted and it.ranges and (condition is None or condition == it.etag):
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            if it.etag:
                self.send_header("ETag", it.etag)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            cuts = it.cut.get(name, [])
            self.wfile.write(body[start : start + cuts.pop(0)] if cuts else body[start:])

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    it = Server(address=f"http://127.0.0.1:{httpd.server_address[1]}/")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield it
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """Write an idx file as MNIST has it: two zero bytes, the type, the rank, big-endian sizes, the bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes() + array.tobytes()


@dataclass(frozen=True)
class Tiny:
    """A data set of a few pictures that is registered for the test, and its files."""

    data: Dataset
    files: dict[str, bytes]
    parts: dict[str, Arrays]


@pytest.fixture
def tiny(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tiny]:
    """Return what registers a data set "tiny" with twelve training and six test pictures, offered by the server."""

    def make(*, pinned: bool = True, sources: int = 1) -> Tiny:
        rng = np.random.default_rng(0)
        parts = {}
        files = {}
        for part, stem, count in (("train", "train", 12), ("test", "t10k", 6)):
            x = rng.integers(0, 256, (count, 4, 5), np.uint8)
            y = rng.integers(0, 3, count, np.uint8)
            parts[part] = Arrays(x[:, None], y.astype(np.int64))
            files[f"{stem}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(x))
            files[f"{stem}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(y))
        server.files.update(files)
        data = Dataset(
            name="tiny",
            shape=(1, 4, 5),
            classes=("a", "b", "c"),
            rows={"train": 12, "test": 6},
            sums={part: sha256(arrays) for part, arrays in parts.items()} if pinned else {},
            decode=idx_pair,
            sources=tuple(Official(server.address + "gone/" * n, tuple(files)) for n in reversed(range(sources))),
        )
        monkeypatch.setitem(DATASETS, "tiny", data)
        return Tiny(data, files, parts)

    return make
