"""One file over HTTP, continued where an interrupted download has stopped."""

import time
from pathlib import Path

import httpx

from molehunt.datasets.decode import LARGEST
from molehunt.datasets.sources import Progress

# Nobody there: the next source is asked soon. A slow server that does answer is waited for.
TIMEOUT = httpx.Timeout(15.0, connect=5.0)
ATTEMPTS = 3


def download(address: str, target: Path, progress: Progress | None = None) -> None:
    """Fetch one file over HTTP; what an earlier, interrupted call has read is kept and continued.

    While it is incomplete it is called `target`.part; the validator of the server's version (ETag) lies beside it, so
    that a file that has changed meanwhile is read from its start.

    Raises:
        OSError: the address cannot be reached, answers with an error, or breaks off again and again.
        ValueError: the file is larger than any data set, or the server compresses on the way.
    """
    if target.exists():
        return
    part = target.with_name(target.name + ".part")
    tag = target.with_name(target.name + ".tag")
    try:
        with httpx.Client(timeout=TIMEOUT, follow_redirects=True) as client:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    _continue(client, address, part, tag, progress)
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    raise  # nobody there: asking again changes nothing and takes long
                except (httpx.TransportError, EOFError):
                    if attempt == ATTEMPTS:
                        raise
                    time.sleep(0.2 * attempt)
                else:
                    break
    except (httpx.HTTPError, httpx.InvalidURL, EOFError, ImportError) as error:  # ImportError: a SOCKS proxy is set
        raise OSError(f"{target.name}: {type(error).__name__}: {error}") from error
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
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise ValueError(f"{address}: sent compressed ({answer.headers['content-encoding']}) although asked not to")
        resumed = answer.status_code == httpx.codes.PARTIAL_CONTENT
        if resumed and not answer.headers.get("content-range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise EOFError(f"asked for bytes from {have}, got {answer.headers.get('content-range')!r}")
        have = have if resumed else 0
        length = answer.headers.get("content-length")
        total = have + int(length) if length else None
        if total is not None and total > LARGEST:
            raise ValueError(f"{address}: announces {total} bytes, more than {LARGEST}")
        part.parent.mkdir(parents=True, exist_ok=True)
        validator = answer.headers.get("etag", "")
        if validator and not validator.startswith("W/"):
            tag.write_text(validator)
        else:
            tag.unlink(missing_ok=True)
        with part.open("ab" if resumed else "wb") as file:
            # Raw and as it comes: httpx would hold back, and lose, what does not fill a chunk when the line breaks.
            for chunk in answer.iter_raw():
                have += file.write(chunk)
                if have > LARGEST:
                    raise ValueError(f"{address}: more than {LARGEST} bytes")
                if progress is not None:
                    progress(address, have, total)
    if total is not None and have != total:
        raise EOFError(f"{have} of {total} bytes")
