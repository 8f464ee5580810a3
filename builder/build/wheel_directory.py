"""The central directory of a zip archive, read strictly, and the paths in it.

The source is APPNOTE.TXT 6.3.10 by PKWARE, sections 4.3.12 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_EXTRA = struct.Struct("<HH")
_FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF
_ZIP64, _UNICODE_PATH = 0x0001, 0x7075

STORED, DEFLATED = 0, 8
_ENCRYPTED, COMPRESSION, DESCRIPTOR, _UTF8 = 0x2041, 0x0006, 0x0008, 0x0800

# The largest wheels there are have about 15,000 files; these bound the memory that an archive can take.
MOST_MEMBERS = 100_000
MOST_DIRECTORY = 32 << 20
LONGEST_PATH = 1024
LONGEST_NAME = 255
DEEPEST_PATH = 64
_NEVER = re.compile(r"[\x00-\x1f\x7f\\]")


class BadArchive(Exception):
    """The archive, or a member of it, is not what it should be; the message says what and of which member."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A member as the central directory tells it."""

    raw: bytes
    flags: int
    method: int
    crc: int
    compressed: int
    size: int
    attributes: int
    header: int

    @property
    def name(self) -> str:
        """The name, for people: what is not valid is replaced."""
        return self.raw.decode("utf-8" if self.flags & _UTF8 else "cp437", "replace")


def read_directory(file: int) -> tuple[list[Entry], int]:
    """Return what the central directory tells, and where it begins.

    Args:
        file: descriptor of a regular file.

    Raises:
        BadArchive: it is no zip archive, or one of several parts, or what stands in it besides is not accounted for;
            a member begins behind the directory's beginning, or is larger than all that is before it.
    """
    end = os.fstat(file).st_size - _END.size
    if end < 0:
        refuse("it is too short for a zip archive")
    signature, disk, start, here, count, size, offset, comment = _END.unpack(read_at(file, end, _END.size))
    if signature != b"PK\x05\x06" or comment:
        refuse("a zip archive's end record does not stand at its end")
    disks = {disk, start}
    locator = end - _LOCATOR.size
    if locator >= 0 and (data := read_at(file, locator, _LOCATOR.size))[:4] == b"PK\x06\x07":
        end, values = _end64(file, *_LOCATOR.unpack(data)[1:], locator=locator)
        for old, new, full in zip((here, count, size, offset), values, (_FULL16,) * 2 + (FULL32,) * 2, strict=True):
            if old not in {new, full}:
                refuse("its two end records contradict each other")
        here, count, size, offset = values
        disks -= {_FULL16}
    if disks - {0} or here != count:
        refuse("it is one part of an archive that has several")
    if offset + size != end:
        refuse("there is something before, behind or between the parts of the archive")
    if count > MOST_MEMBERS or size > MOST_DIRECTORY:
        refuse(f"it has more than {MOST_MEMBERS:,} members, or a directory of more than {MOST_DIRECTORY >> 20} MiB")
    return list(_directory(read_at(file, offset, size), count, before=offset)), offset


def _end64(file: int, disk: int, offset: int, disks: int, *, locator: int) -> tuple[int, tuple[int, int, int, int]]:
    """Return where the zip64 end record stands and what it tells."""
    if disk or disks > 1 or offset + _END64.size != locator:
        refuse("its zip64 end record does not stand where it should")
    record = _END64.unpack(read_at(file, offset, _END64.size))
    signature, length, _, _, disk, start, here, count, size, directory = record
    if signature != b"PK\x06\x06" or length != _END64.size - 12 or disk or start:
        refuse("its zip64 end record is none")
    return offset, (here, count, size, directory)


def _directory(data: bytes, count: int, *, before: int) -> Iterator[Entry]:
    """Yield the entries of a central directory that must be filled by so many of them, `before` bytes into the file."""
    position = 0
    for _ in range(count):
        if position + _CENTRAL.size > len(data):
            refuse("its directory is cut off")
        fields = _CENTRAL.unpack_from(data, position)
        signature, _, _, flags, method, _, _, crc, compressed, size, length, extra, comment, disk, _, mode, header = (
            fields
        )
        start = position + _CENTRAL.size
        position = start + length + extra + comment
        if signature != b"PK\x01\x02" or position > len(data):
            refuse("its directory is broken")
        raw = data[start : start + length]
        more = iter(zip64(data[start + length : start + length + extra], repr(raw)))
        size, compressed, header = (next(more, v) if v == FULL32 else v for v in (size, compressed, header))
        if disk:
            refuse("it is one part of an archive that has several")
        if header >= before or compressed > before:
            refuse(f"{raw[:200]!r} begins beyond the archive's members, or is larger than all of them")
        yield Entry(raw, flags, method, crc, compressed, size, mode, header)
    if position != len(data):
        refuse("its directory has another size than its end record says")


def zip64(extra: bytes, what: str) -> list[int]:
    """Return the 64-bit numbers of a member's extra fields."""
    numbers: list[int] = []
    position = 0
    while position < len(extra):
        if position + _EXTRA.size > len(extra):
            refuse(f"the extra fields of {what} are broken")
        kind, length = _EXTRA.unpack_from(extra, position)
        position += _EXTRA.size
        value = extra[position : position + length]
        position += length
        if (
            position > len(extra)
            or kind == _UNICODE_PATH
            or (kind == _ZIP64 and (numbers or length not in {8, 16, 24}))
        ):
            refuse(f"the extra fields of {what} are broken, or give it another name")
        if kind == _ZIP64:
            numbers = [number for (number,) in struct.iter_unpack("<Q", value)]
    return numbers


def checked_name(entry: Entry) -> str:
    """Return a member's name, if a regular file or a directory of that name can be installed."""
    try:
        name = entry.raw.decode("utf-8" if entry.flags & _UTF8 else "cp437")
    except UnicodeDecodeError as error:
        message = f"the name {entry.raw!r} is not UTF-8, though it says so"
        raise BadArchive(message) from error
    check_path(name.removesuffix("/"))
    if entry.flags & _ENCRYPTED:
        refuse(f"{name!r} is encrypted")
    if entry.flags & ~(COMPRESSION | DESCRIPTOR | _UTF8):
        refuse(f"{name!r} has flags ({entry.flags:#06x}) that no wheel needs")
    if entry.method not in {STORED, DEFLATED}:
        refuse(f"{name!r} is compressed by method {entry.method}; wheels are deflated or stored")
    if entry.method == STORED and entry.size != entry.compressed:
        refuse(f"{name!r} is stored, but its two sizes differ")
    kind = stat.S_IFMT(entry.attributes >> 16)
    if name.endswith("/"):
        if entry.size or kind not in {0, stat.S_IFDIR}:
            refuse(f"{name!r} is a directory with content")
    elif kind not in {0, stat.S_IFREG}:
        refuse(f"{name!r} is a link, a device or the like")
    return name


def check_path(path: str) -> None:
    """Refuse a path that is not a plain relative one, or that means something else in an image's layer.

    Letters' case and Unicode's two ways to write an accent make different names, as on every Linux file system.

    Raises:
        BadArchive: it is absolute, has '.', '..', a backslash, a control character or an empty part, is too long or too
            deep, or has a part that begins with `.wh.`, which in a layer deletes a file of the layers below it.
    """
    parts = path.split("/")
    if _NEVER.search(path):
        refuse(f"the path {path[:200]!r} has a backslash or a control character")
    if any(part in {"", ".", ".."} for part in parts):
        refuse(f"the path {path[:200]!r} is absolute, or has an empty part, '.' or '..'")
    if any(part.startswith(".wh.") for part in parts):
        refuse(f"the path {path[:200]!r} would delete a file of another layer")
    if (
        len(path.encode()) > LONGEST_PATH
        or len(parts) > DEEPEST_PATH
        or any(len(part.encode()) > LONGEST_NAME for part in parts)
    ):
        refuse(f"the path {path[:200]!r} is too long, or too deep")


def read_at(file: int, position: int, size: int) -> bytes:
    """Return so many bytes of a file; raises `BadArchive` where there are fewer."""
    data = os.pread(file, size, position)
    if len(data) != size:
        refuse("the archive is cut off")
    return data


def refuse(why: str) -> NoReturn:
    """Raise `BadArchive`, which says `why`."""
    raise BadArchive(why)
