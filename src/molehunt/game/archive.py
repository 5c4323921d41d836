"""The one kind of zip that a submission may be: a few stored files, end to end, and nothing else.

Zip readers are lenient, and differ: in which of two sizes they believe, whether they search for the table of
contents, what they do with a name that is there twice. Every such liberty has been used to show a checker one thing and
a loader another. So this reader knows only the subset that `write` writes, requires every byte of the file to be
accounted for, and never extracts anything: members are read in place.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from molehunt.files import Refused, exactly, write_atomically
from molehunt.strict_json import show

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
LOCAL_MAGIC, CENTRAL_MAGIC, END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
NAME_BYTES = 64
MOST_MEMBERS = 64  # more than any list of names, so that an unknown name is reported as such
BLOCK = 2**20

# Every archive of ours has the date on which the format begins: a time stamp says when, and so who, and so what.
DATE, TIME = (0 << 9) | (1 << 5) | 1, 0
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".pt", ".pth")


class SubmissionError(Refused):
    """A submission is refused; the message says what is wrong with it and, where it helps, what to do."""


class Window(io.RawIOBase):
    """Part of a file, read as if it were all of one."""

    def __init__(self, stream: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._stream, self._start, self._size, self._at = stream, start, size, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset from the beginning, the current place or the end, and say where that is."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill a buffer as far as the part reaches, and say how many bytes that were."""
        view = memoryview(buffer)[: max(0, self._size - self._at)]
        self._stream.seek(self._start + self._at)
        got: int = self._stream.readinto(view)  # type: ignore[attr-defined]
        self._at += got
        return got


@dataclass(frozen=True)
class Member:
    """One file of an archive or of a folder.

    Attributes:
        name: its name, from the list that the reader was given.
        size: its length in bytes.
        open: gives a new stream over it, to be read while the archive is open.
    """

    name: str
    size: int
    open: Callable[[], BinaryIO]

    def read(self) -> bytes:
        """Return the whole content; only for members that are known to be small."""
        return bytes(exactly(self.open(), self.size, SubmissionError))


class _Record(NamedTuple):
    """What the table of contents says about one member."""

    name: str
    crc: int
    size: int
    offset: int


def read(stream: BinaryIO, size: int, allowed: Mapping[str, int]) -> dict[str, Member]:
    """Check an archive from end to end and list its members.

    Args:
        stream: the file, open for reading.
        size: its length in bytes.
        allowed: the names that may be in it, each with the largest size in bytes.

    Returns:
        The members that are there, by name.

    Raises:
        SubmissionError: anything but a plain archive of allowed members: compressed, encrypted, doubled, nested,
            linked or otherwise named members, more bytes than the members have, sizes or checksums that lie.
    """
    most = sum(allowed.values()) + (len(allowed) + 1) * (LOCAL.size + CENTRAL.size + NAME_BYTES)
    if size > most:
        raise SubmissionError(f"the archive has {size} bytes; at most {most} are read")
    _check_kind(stream, size)
    count, begin = _read_end(stream, size)
    records = _read_table(stream, count, begin, size - END.size, allowed)
    expected, members = 0, {}
    for record in sorted(records, key=lambda r: r.offset):
        if record.offset != expected:
            kind = "overlaps the one before" if record.offset < expected else "leaves unlisted bytes before it"
            raise SubmissionError(f"{record.name} {kind}: it is at {record.offset}, expected {expected}")
        expected = _check_local(stream, record, begin)
        opener = partial(_window, stream, expected - record.size, record.size)
        members[record.name] = Member(record.name, record.size, opener)
    if expected != begin:
        raise SubmissionError(f"{begin - expected} bytes of the archive belong to no member")
    for record in records:
        _check_content(members[record.name], record.crc)
    return members


def write(path: Path, members: Iterable[tuple[str, Callable[[], Iterable[bytes]]]]) -> None:
    """Write an archive that depends on nothing but the names and contents of its members.

    Args:
        path: the archive; replaced as a whole.
        members: names in order, each with a function that yields its content piece by piece. It is called twice.
    """
    listed = [(name.encode("ascii"), content, *_measure(content())) for name, content in members]

    def pieces() -> Iterator[bytes]:
        offset, table = 0, []
        for name, content, size, crc in listed:
            common = (20, 0, 0, TIME, DATE, crc, size, size, len(name), 0)
            yield LOCAL.pack(LOCAL_MAGIC, *common) + name
            yield from content()
            # 3 is Unix; the mode in the upper half of the attributes is that of an ordinary file.
            table.append(CENTRAL.pack(CENTRAL_MAGIC, 3 << 8 | 20, *common, 0, 0, 0, 0o100644 << 16, offset) + name)
            offset += LOCAL.size + len(name) + size
        yield b"".join(table)
        yield END.pack(END_MAGIC, 0, 0, len(table), len(table), sum(map(len, table)), offset, 0)

    write_atomically(path, pieces())


def _window(stream: BinaryIO, start: int, size: int) -> BinaryIO:
    return io.BufferedReader(Window(stream, start, size))


def _measure(pieces: Iterable[bytes]) -> tuple[int, int]:
    size = crc = 0
    for piece in pieces:
        size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc


def _check_kind(stream: BinaryIO, size: int) -> None:
    stream.seek(0)
    start = bytes(exactly(stream, min(size, 4), SubmissionError))
    if start[:2] == b"\x1f\x8b":
        raise SubmissionError("this is a gzip file; a submission is a plain zip, made by `molehunt train` or `pack`")
    if start[:1] == b"\x80":
        raise SubmissionError("this is a pickle; pickles can run code and are never read")
    if size < END.size or start != LOCAL_MAGIC:
        raise SubmissionError("this does not begin as a zip archive with members does")
    stream.seek(LOCAL.size)
    if b"/data.pkl" in stream.read(NAME_BYTES):  # the first member's name, in every file of torch.save
        raise SubmissionError("this is a .pt file and not a submission; only `molehunt convert` reads those")


def _read_end(stream: BinaryIO, size: int) -> tuple[int, int]:
    """Return the number of members and where the table of contents begins."""
    stream.seek(size - END.size)
    magic, disk, first, here, count, length, begin, comment = END.unpack(exactly(stream, END.size, SubmissionError))
    if magic != END_MAGIC or comment:
        raise SubmissionError("the archive does not end where its table of contents does: cut short, or bytes follow")
    if 0xFFFF in (disk, first, here, count) or 0xFFFFFFFF in (length, begin):
        raise SubmissionError("the archive uses zip64 numbers, which no submission needs")
    if disk or first or here != count:
        raise SubmissionError("the archive claims to be one of several disks")
    if not 0 < count <= MOST_MEMBERS:
        raise SubmissionError(f"the archive lists {count} members; 1 to {MOST_MEMBERS} are read")
    if begin + length != size - END.size:
        raise SubmissionError("the table of contents is not where the archive says: bytes were put before or into it")
    return count, begin


def _read_table(stream: BinaryIO, count: int, begin: int, stop: int, allowed: Mapping[str, int]) -> list[_Record]:
    stream.seek(begin)
    table = bytes(exactly(stream, stop - begin, SubmissionError))
    records: list[_Record] = []
    at = 0
    for _ in range(count):
        if len(table) - at < CENTRAL.size or table[at : at + 4] != CENTRAL_MAGIC:
            raise SubmissionError("the table of contents is damaged")
        fields = CENTRAL.unpack_from(table, at)
        _, made_by, _, flags, method, _, _, crc, packed, size, name_size, extra, comment, disk, _, mode, offset = fields
        at += CENTRAL.size
        raw = table[at : at + name_size]
        at += name_size + extra + comment
        if at > len(table):
            raise SubmissionError("the table of contents is damaged")
        name = _check_name(raw, made_by >> 8, mode, allowed)
        _check_storage(name, flags, method, packed, size)
        if extra or comment or disk:
            # Extra fields can carry other sizes and other names than the ones that were checked.
            raise SubmissionError(f"{name} has extra fields, a comment or a disk number; make the archive with `pack`")
        if name in {record.name for record in records}:
            raise SubmissionError(f"{name} is in the archive twice")
        if size > allowed[name]:
            raise SubmissionError(f"{name} has {size} bytes; at most {allowed[name]} are read")
        records.append(_Record(name, crc, size, offset))
    if at != len(table):
        raise SubmissionError("bytes follow the last entry of the table of contents")
    return records


def _check_name(raw: bytes, system: int, mode: int, allowed: Mapping[str, int]) -> str:
    name = raw.decode("ascii", errors="replace")
    if name in allowed:
        if system == 3 and (mode >> 28) not in {0, 0o10}:  # the file type, where zero says nothing
            raise SubmissionError(f"{name} is a link or a device, not an ordinary file")
        return name
    shown = show(raw.decode("utf-8", errors="backslashreplace"))
    if raw.startswith((b"/", b"\\")) or raw[1:2] == b":":
        raise SubmissionError(f"the member {shown} has an absolute path")
    if b".." in raw.replace(b"\\", b"/").split(b"/"):
        raise SubmissionError(f"the member {shown} has a path that leaves its folder")
    if b"/" in raw or b"\\" in raw:
        raise SubmissionError(f"the member {shown} lies in a folder; members have plain names")
    if any(byte < 0x20 or byte > 0x7E for byte in raw):
        raise SubmissionError(f"the member {shown} has a name that is not plain ASCII")
    if name.lower().endswith(ARCHIVES):
        raise SubmissionError(f"the member {shown} is an archive or a pickle; neither is read")
    raise SubmissionError(f"the member {shown} is not expected; allowed: {', '.join(allowed)}")


def _check_storage(name: str, flags: int, method: int, packed: int, size: int) -> None:
    if flags & 0x2041:
        raise SubmissionError(f"{name} is encrypted")
    if flags & 0x0008:
        raise SubmissionError(f"{name} states its size only behind its content; make the archive with `pack`")
    if flags & ~0x0800:  # the flag that says a name is UTF-8 is harmless: names are ASCII
        raise SubmissionError(f"{name} has unknown flags {flags:#06x}")
    if method:
        raise SubmissionError(f"{name} is compressed; members are stored, so that no small file becomes a large one")
    if 0xFFFFFFFF in (packed, size):
        raise SubmissionError(f"{name} uses zip64 sizes, which no submission needs")
    if packed != size:
        raise SubmissionError(f"{name} is stored, yet claims {packed} bytes that become {size}")


def _check_local(stream: BinaryIO, record: _Record, begin: int) -> int:
    """Require the header in front of a member to agree with the table; return where its content ends."""
    if record.offset + LOCAL.size > begin:
        raise SubmissionError(f"{record.name} lies outside the archive")
    stream.seek(record.offset)
    fields = LOCAL.unpack(exactly(stream, LOCAL.size, SubmissionError))
    magic, _, flags, method, _, _, crc, packed, size, name_size, extra = fields
    if magic != LOCAL_MAGIC:
        raise SubmissionError(f"{record.name} is not where the table of contents says")
    content = record.offset + LOCAL.size + name_size + extra
    stop: int = content + record.size
    if stop > begin:
        raise SubmissionError(f"{record.name} claims more bytes than the archive has")
    _check_storage(record.name, flags, method, packed, size)
    if bytes(exactly(stream, name_size, SubmissionError)) != record.name.encode("ascii"):
        raise SubmissionError(f"{record.name} has another name in front of its content")
    if extra:
        raise SubmissionError(f"{record.name} has extra fields; make the archive with `pack`")
    if (crc, size) != (record.crc, record.size):
        raise SubmissionError(f"{record.name} has another size or checksum in front of its content than in the table")
    return stop


def _check_content(member: Member, crc: int) -> None:
    stream, left, found = member.open(), member.size, 0
    while left:
        piece = exactly(stream, min(left, BLOCK), SubmissionError)
        found, left = zlib.crc32(piece, found), left - len(piece)
    if found != crc:
        raise SubmissionError(f"{member.name} does not have the checksum that the archive states; it is damaged")
