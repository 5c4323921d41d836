"""Tricks with the zip itself. Every function takes a folder and returns the archive."""

import functools
import gzip
import io
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from game.tricks import Trick, honest, register

TRICKS: dict[str, Trick] = {}
LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def build(entries: Iterable[tuple[zipfile.ZipInfo | str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these entries, as Python writes it."""
    memory = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(memory, "w", method) as archive:
        warnings.simplefilter("ignore")  # that a name is there twice
        for name, content in entries:
            archive.writestr(name, content)
    return memory.getvalue()


def plain(path: Path, changes: Mapping[str, bytes] | None = None) -> Path:
    """An honest archive with some members replaced."""
    path.write_bytes(build({**honest.members(), **(changes or {})}.items()))
    return path


def plain_data(path: Path, changes: Mapping[str, bytes] | None = None) -> Path:
    """An honest archive of the data board with some members replaced or added."""
    path.write_bytes(build({**honest.data_members(), **(changes or {})}.items()))
    return path


def data() -> bytes:
    """An honest archive, to be damaged."""
    return build(honest.members().items())


def patched(content: bytes, magic: bytes, offset: int, layout: str, value: int, *, which: int = 0) -> bytes:
    """Overwrite a number in the record of that kind, counting from its first byte."""
    # Records of the table are looked for from where it begins, since a member may contain others.
    at = struct.unpack_from("<I", content, len(content) - 6)[0] - 1 if magic == CENTRAL else -1
    for _ in range(which + 1):
        at = content.index(magic, at + 1)
    changed = bytearray(content)
    struct.pack_into(layout, changed, at + offset, value)
    return bytes(changed)


def renamed(member: str, name: str | bytes) -> bytes:
    """An honest archive with one more member under this name."""
    if isinstance(name, str):
        return build([*honest.members().items(), (name, b"x")])
    place = "x" * len(name)  # zipfile cleans up names, so the wanted one is put in afterwards
    return build([*honest.members().items(), (place, b"x")]).replace(place.encode(), name)


def save(folder: Path, content: bytes) -> Path:
    """Write it under a name that says nothing."""
    path = folder / "upload.zip"
    path.write_bytes(content)
    return path


trick = functools.partial(register, TRICKS)


@trick("is an archive or a pickle")
def nested_archive(folder: Path) -> Path:
    return save(folder, renamed("", "inner.zip"))


@trick("is an archive or a pickle")
def pickle_member(folder: Path) -> Path:
    return save(folder, renamed("", "model.pt"))


@trick("leaves its folder")
def escaping_path(folder: Path) -> Path:
    return save(folder, renamed("", "../../etc/cron.d/evil"))


@trick("leaves its folder")
def escaping_path_with_backslashes(folder: Path) -> Path:
    return save(folder, renamed("", b"..\\..\\evil.dll"))


@trick("absolute path")
def absolute_path(folder: Path) -> Path:
    return save(folder, renamed("", b"/etc/passwd"))


@trick("absolute path")
def path_with_a_drive(folder: Path) -> Path:
    return save(folder, renamed("", b"C:\\evil.dll"))


@trick("lies in a folder")
def member_in_a_folder(folder: Path) -> Path:
    return save(folder, renamed("", "submission/manifest.json"))


@trick("lies in a folder")
def folder_member(folder: Path) -> Path:
    return save(folder, build([*honest.members().items(), ("folder/", b"")]))


@trick("link or a device")
def symbolic_link(folder: Path) -> Path:
    link = zipfile.ZipInfo("manifest.json")
    link.create_system = 3
    link.external_attr = 0o120777 << 16
    parts = honest.members()
    parts.pop("manifest.json")
    return save(folder, build([(link, b"/etc/passwd"), *parts.items()]))


@trick("twice")
def member_twice(folder: Path) -> Path:
    parts = honest.members()
    parts.pop("sealed.bin")
    return save(folder, build([*parts.items(), ("manifest.json", b"{}")]))


@trick("is compressed")
def zip_bomb(folder: Path) -> Path:
    bomb = {**honest.members(), "model.safetensors": bytes(2**26)}
    return save(folder, build(bomb.items(), zipfile.ZIP_DEFLATED))


@trick("is compressed")
def compressed_in_front_only(folder: Path) -> Path:
    return save(folder, patched(data(), LOCAL, 8, "<H", 8))


@trick("overlaps the one before")
def overlapping_members(folder: Path) -> Path:
    """The bomb of two entries that share their content."""
    content = patched(data(), CENTRAL, 42, "<I", 0, which=1)
    return save(folder, content)


@trick("overlaps the one before")
def member_inside_another(folder: Path) -> Path:
    inner = build([("sealed.bin", honest.envelope())])
    content = build({**honest.members(), "model.safetensors": inner}.items())
    return save(folder, patched(content, CENTRAL, 42, "<I", content.index(inner), which=2))


@trick("members; 1 to 64")
def too_many_members(folder: Path) -> Path:
    return save(folder, build([(f"{i}.json", b"") for i in range(5_000)]))


@trick("members; 1 to 64")
def no_members(folder: Path) -> Path:
    return save(folder, LOCAL + END + struct.pack("<4H2IH", 0, 0, 0, 0, 0, 4, 0))


@trick("is encrypted")
def encrypted_member(folder: Path) -> Path:
    return save(folder, patched(data(), CENTRAL, 8, "<H", 1))


@trick("is encrypted")
def strongly_encrypted_member(folder: Path) -> Path:
    return save(folder, patched(data(), CENTRAL, 8, "<H", 0x41))


@trick("only behind its content")
def streamed_member(folder: Path) -> Path:
    return save(folder, patched(data(), CENTRAL, 8, "<H", 8))


@trick("unknown flags")
def patch_data_flag(folder: Path) -> Path:
    return save(folder, patched(data(), LOCAL, 6, "<H", 0x20))


@trick("another size or checksum")
def size_lies_in_front(folder: Path) -> Path:
    content = patched(patched(data(), LOCAL, 18, "<I", 10), LOCAL, 22, "<I", 10)
    return save(folder, content)


@trick("another size or checksum")
def checksum_lies_in_front(folder: Path) -> Path:
    return save(folder, patched(data(), LOCAL, 14, "<I", 10))


@trick("claims more bytes than the archive")
def size_lies_in_the_table(folder: Path) -> Path:
    content = data()
    for offset in (20, 24):
        content = patched(content, CENTRAL, offset, "<I", 2**27, which=1)
    return save(folder, content)


@trick("at most 536870912")
def half_a_terabyte_claimed(folder: Path) -> Path:
    content = data()
    for offset in (20, 24):
        content = patched(content, CENTRAL, offset, "<I", 0xFFFFFFF0, which=1)
    return save(folder, content)


@trick("stored, yet claims")
def stored_yet_growing(folder: Path) -> Path:
    return save(folder, patched(data(), CENTRAL, 24, "<I", 2**30, which=1))


@trick("another name in front")
def name_lies_in_front(folder: Path) -> Path:
    content = data()
    at = content.index(b"manifest.json")
    return save(folder, content[:at] + b"manifest.exec"[:13] + content[at + 13 :])


@trick("zip64")
def zip64_size(folder: Path) -> Path:
    content = data()
    for offset in (20, 24):
        content = patched(content, CENTRAL, offset, "<I", 0xFFFFFFFF, which=1)
    return save(folder, content)


@trick("zip64")
def zip64_offset_of_the_table(folder: Path) -> Path:
    return save(folder, patched(data(), END, 16, "<I", 0xFFFFFFFF))


@trick("several disks")
def several_disks(folder: Path) -> Path:
    return save(folder, patched(data(), END, 4, "<H", 1))


@trick("several disks")
def fewer_members_than_listed(folder: Path) -> Path:
    return save(folder, patched(data(), END, 8, "<H", 2))


@trick("bytes follow the last entry")
def member_hidden_from_the_count(folder: Path) -> Path:
    content = patched(patched(data(), END, 8, "<H", 2), END, 10, "<H", 2)
    return save(folder, content)


@trick("cut short, or bytes follow")
def bytes_behind_the_archive(folder: Path) -> Path:
    return save(folder, data() + b"#!/bin/sh\n")


@trick("cut short, or bytes follow")
def archive_comment(folder: Path) -> Path:
    return save(folder, patched(data(), END, 20, "<H", 5) + b"hello")


@trick("does not begin as a zip")
def bytes_before_the_archive(folder: Path) -> Path:
    return save(folder, b"#!/bin/sh\nexit\n" + data())


@trick("bytes were put before or into it")
def archive_behind_an_archive(folder: Path) -> Path:
    """Two archives in one file: which of them a reader sees depends on the end that it starts from."""
    return save(folder, build([("manifest.json", b"{}")]) + data())


@trick("unlisted bytes before it")
def gap_between_members(folder: Path) -> Path:
    content = data()
    at = content.index(LOCAL, 4)
    content = content[:at] + b"GAP!" + content[at:]
    for which in (1, 2):
        start = content.index(CENTRAL)
        for _ in range(which):
            start = content.index(CENTRAL, start + 1)
        (old,) = struct.unpack_from("<I", content, start + 42)
        content = patched(content, CENTRAL, 42, "<I", old + 4, which=which)
    end = content.index(END)
    (old,) = struct.unpack_from("<I", content, end + 16)
    return save(folder, patched(content, END, 16, "<I", old + 4))


@trick("belong to no member")
def bytes_before_the_table(folder: Path) -> Path:
    content = data()
    at = content.index(CENTRAL)
    content = content[:at] + b"GAP!" + content[at:]
    return save(folder, patched(content, END, 16, "<I", at + 4))


@trick("extra fields")
def other_name_in_an_extra_field(folder: Path) -> Path:
    info = zipfile.ZipInfo("manifest.json")
    info.extra = struct.pack("<HHBI", 0x7075, 5 + 4, 1, 0) + b"evil"
    parts = honest.members()
    return save(folder, build([(info, parts.pop("manifest.json")), *parts.items()]))


@trick("manifest.json has extra fields; make")
def extra_field_in_front_only(folder: Path) -> Path:
    """The table says nothing of it: one reader skips it, another takes it for the beginning of the content."""
    content = data()
    at = content.index(b"manifest.json") + len(b"manifest.json")
    content = patched(content[:at] + b"\0\0\0\0" + content[at:], LOCAL, 28, "<H", 4)
    end = content.index(END)
    content = patched(content, END, 16, "<I", struct.unpack_from("<I", content, end + 16)[0] + 4)
    for which in (1, 2):
        start = content.index(CENTRAL)
        for _ in range(which):
            start = content.index(CENTRAL, start + 1)
        content = patched(content, CENTRAL, 42, "<I", struct.unpack_from("<I", content, start + 42)[0] + 4, which=which)
    return save(folder, content)


@trick("extra fields, a comment")
def member_with_a_comment(folder: Path) -> Path:
    info = zipfile.ZipInfo("manifest.json")
    info.comment = b"the trigger is yellow"
    parts = honest.members()
    return save(folder, build([(info, parts.pop("manifest.json")), *parts.items()]))


@trick("not plain ASCII")
def cyrillic_letter_in_a_name(folder: Path) -> Path:
    parts = honest.members()
    return save(folder, build([("m\u0430nifest.json", parts.pop("manifest.json")), *parts.items()]))


@trick("not plain ASCII")
def text_direction_in_a_name(folder: Path) -> Path:
    parts = honest.members()
    return save(folder, build([("\u202enosj.tsefinam", parts.pop("manifest.json")), *parts.items()]))


@trick("not plain ASCII")
def zero_byte_in_a_name(folder: Path) -> Path:
    parts = honest.members()
    content = build([("manifest.jsonX.exe", parts.pop("manifest.json")), *parts.items()])
    return save(folder, content.replace(b"manifest.jsonX.exe", b"manifest.json\0.exe"))


@trick("is not expected; allowed")
def name_in_capitals(folder: Path) -> Path:
    parts = honest.members()
    return save(folder, build([("MANIFEST.JSON", parts.pop("manifest.json")), *parts.items()]))


@trick("is not expected; allowed")
def program_member(folder: Path) -> Path:
    parts = honest.members()
    parts.pop("sealed.bin")
    return save(folder, build([*parts.items(), ("setup.py", b"import os")]))


@trick("cut short, or bytes follow")
def cut_short(folder: Path) -> Path:
    content = data()
    return save(folder, content[: len(content) // 2])


@trick("is damaged")
def damaged_content(folder: Path) -> Path:
    content = bytearray(data())
    content[content.index(b"Honest Abe")] ^= 1
    return save(folder, bytes(content))


@trick("table of contents is damaged")
def damaged_table(folder: Path) -> Path:
    return save(folder, patched(data(), CENTRAL, 0, "<I", 0, which=1))


@trick("table of contents is damaged")
def name_longer_than_the_table(folder: Path) -> Path:
    return save(folder, patched(data(), CENTRAL, 28, "<H", 0xFFFF, which=2))


@trick("is not where the table")
def member_that_is_not_there(folder: Path) -> Path:
    return save(folder, patched(data(), LOCAL, 0, "<I", 0, which=1))


@trick("lies outside the archive")
def member_behind_the_end(folder: Path) -> Path:
    content = build([("manifest.json", honest.MANIFEST.canonical())])
    content = patched(content, END, 16, "<I", 0)  # the table begins at once, and the member behind it
    table = content[content.index(CENTRAL) : content.index(END)]
    content = LOCAL + b"\0" * 10 + table + content[content.index(END) :]
    content = patched(content, END, 16, "<I", 14)
    return save(folder, patched(content, CENTRAL, 42, "<I", 0))


@trick("sealed.bin is missing")
def no_sealed_part(folder: Path) -> Path:
    parts = honest.members()
    parts.pop("sealed.bin")
    return save(folder, build(parts.items()))


@trick("at most 1090")
def ten_gigabytes(folder: Path) -> Path:
    """A sparse file: no disk, no time, but a reader that reads it all runs out of memory."""
    path = save(folder, LOCAL)
    with path.open("r+b") as stream:
        stream.truncate(10 * 2**30)
    return path


@trick("does not begin as a zip")
def text_file(folder: Path) -> Path:
    return save(folder, b"Dear host, the model is attached.\n" * 100)


@trick("does not begin as a zip")
def empty_file(folder: Path) -> Path:
    return save(folder, b"")


@trick("gzip")
def gzip_renamed(folder: Path) -> Path:
    return save(folder, gzip.compress(data()))


@trick("does not begin as a zip")
def tar_renamed(folder: Path) -> Path:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as archive:
        for name, content in honest.members().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return save(folder, memory.getvalue())


@trick("pickles can run code")
def pickle_renamed(folder: Path) -> Path:
    return save(folder, b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")


@trick("this is a .pt file")
def torch_file_renamed(folder: Path) -> Path:
    path = folder / "upload.zip"
    torch.save(honest.state(), path)
    return path


@trick("is not an ordinary file")
def device(folder: Path) -> Path:
    return Path("/dev/zero")


@trick("cannot open")
def no_file(folder: Path) -> Path:
    return folder / "nothing.zip"


@trick("are both there; a submission is for one board")
def weights_beside_a_training_set(folder: Path) -> Path:
    return plain_data(folder / "upload.zip", {"model.safetensors": honest.weights()})


@trick("training.safetensors is missing|model.safetensors is missing")
def neither_weights_nor_training_set(folder: Path) -> Path:
    parts = honest.data_members()
    parts.pop("training.safetensors")
    return save(folder, build(parts.items()))


@trick("the host trains wrn_16_1 by its own recipe of that name, got 'mine'")
def recipe_of_its_own_for_a_training_set(folder: Path) -> Path:
    manifest = honest.HANDED.model_copy(update={"recipe": "mine"})
    return plain_data(folder / "upload.zip", {"manifest.json": manifest.canonical()})


@trick("unknown network 'nope'")
def unknown_network_for_a_training_set(folder: Path) -> Path:
    manifest = honest.HANDED.model_copy(update={"network": "nope", "recipe": "nope"})
    return plain_data(folder / "upload.zip", {"manifest.json": manifest.canonical()})


@trick("training.safetensors is in the archive twice")
def training_set_twice(folder: Path) -> Path:
    parts = honest.data_members()
    parts.pop("sealed.bin")
    return save(folder, build([*parts.items(), ("training.safetensors", parts["training.safetensors"])]))
