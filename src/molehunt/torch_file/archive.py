"""The zip around the numbers of a ``.pt`` file."""

import io
import struct
import zipfile
import zlib
from typing import BinaryIO

from molehunt.strict_json import show
from molehunt.torch_file.program import RefusedFile

LOCAL = struct.Struct("<4s5H3I2H")
MOST_PICKLE = 2**23
MOST_MEMBERS = 20_000
BLOCK = 2**20


class Archive:
    """The zip around the numbers.

    Args:
        stream: the file.

    Raises:
        RefusedFile: it is no such zip, or one that could grow when it is read.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        start = stream.read(512)
        if start.startswith((b"\x80\x02\x8a\x0a", b"\x80\x02}", b"\x80\x02c")) or start[257:262] == b"ustar":
            raise RefusedFile(
                "it is a bare pickle, as torch before 1.6 wrote; where it was made, save it with a newer torch"
            )
        if not start.startswith(b"PK\x03\x04"):
            raise RefusedFile("it is not a file that torch.save writes, which is a zip")
        try:
            infos = zipfile.ZipFile(stream).infolist()
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise RefusedFile(f"its zip is damaged: {error}") from None
        if len(infos) > MOST_MEMBERS:
            raise RefusedFile(f"its zip has {len(infos)} members; at most {MOST_MEMBERS} are read")
        self._members = {info.filename: info for info in infos}
        if len(self._members) != len(infos):
            raise RefusedFile("its zip has two members of one name")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise RefusedFile("its zip is compressed, which torch.save does not do: it could grow a thousandfold")
            if info.flag_bits & 1:
                raise RefusedFile("its zip is encrypted")
        # An allocation follows the sizes that are stated, so they are compared with what there is.
        if sum(info.file_size for info in infos) > stream.seek(0, io.SEEK_END):
            raise RefusedFile("its zip states sizes that are larger than the file")
        programs = [name for name in self._members if name.rpartition("/")[2] == "data.pkl"]
        if len(programs) != 1:
            raise RefusedFile(f"its zip has {len(programs)} members named data.pkl, expected one")
        self._folder = programs[0].removesuffix("data.pkl")
        if any(name.startswith((self._folder + "code/", self._folder + "constants.pkl")) for name in self._members):
            raise RefusedFile("it is a TorchScript archive, which carries code; save model.state_dict() instead")
        if self._read(self._folder + "byteorder", 16, default=b"little") != b"little":
            raise RefusedFile("its numbers are in big-endian order; save it on an ordinary machine")

    def program(self) -> bytes:
        """Return the pickle."""
        return self._read(self._folder + "data.pkl", MOST_PICKLE)

    def size(self, key: str) -> int:
        """Return the bytes of a storage."""
        return self._info(self._folder + "data/" + key).file_size

    def check(self, key: str) -> None:
        """Compare a storage with its checksum, piece by piece.

        Raises:
            RefusedFile: they differ.
        """
        info = self._info(self._folder + "data/" + key)
        found = 0
        for start in range(0, info.file_size, BLOCK):
            found = zlib.crc32(self.numbers(key, start, min(BLOCK, info.file_size - start)), found)
        if found != info.CRC:
            raise RefusedFile("its zip is damaged: numbers do not have the checksum that is stated")

    def numbers(self, key: str, start: int, count: int) -> bytes:
        """Return a range of bytes of a storage."""
        return self._range(self._info(self._folder + "data/" + key), start, count)

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise RefusedFile(f"its zip lacks {show(name)}, to which its pickle refers")
        return self._members[name]

    def _range(self, info: zipfile.ZipInfo, start: int, count: int) -> bytes:
        # Directly and not through the zip module, which reads everything before `start` to get there.
        self._stream.seek(info.header_offset)
        header = self._stream.read(LOCAL.size)
        if len(header) < LOCAL.size or not header.startswith(b"PK\x03\x04"):
            raise RefusedFile("its zip is damaged: a member is not where the table of contents says")
        *_, name, extra = LOCAL.unpack(header)
        self._stream.seek(info.header_offset + LOCAL.size + name + extra + start)
        data = self._stream.read(count)
        if start + count > info.file_size or len(data) != count:
            raise RefusedFile("its zip is cut short")
        return data

    def _read(self, name: str, most: int, default: bytes | None = None) -> bytes:
        if default is not None and name not in self._members:
            return default
        info = self._info(name)
        if info.file_size > most:
            raise RefusedFile(f"{show(name)} has {info.file_size} bytes; at most {most} are read")
        return self._range(info, 0, info.file_size)
