"""A zip archive that others made, read strictly: one way to read it, or none."""

from __future__ import annotations

import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from builder.oci.layer import Corrupt, Inflater

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


_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_LONGEST_DESCRIPTOR = 24
# Deflate gives at most 1,032 bytes for one. Whole wheels give up to 20, and a small one may be all zeros.
MOST_RATIO = 100
FREE_SIZE = 256 << 20
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A file of the archive.

    Attributes:
        name: relative path with forward slashes, checked.
        method: STORED or DEFLATED.
        crc: CRC-32 of the content, as declared.
        size: of the content, bytes, as declared.
        compressed: bytes in the archive.
        offset: of those bytes in the archive.
        executable: whether its mode says so, as pip reads it.
    """

    name: str
    method: int
    crc: int
    size: int
    compressed: int
    offset: int
    executable: bool


class Archive:
    """An open archive, whose directory was read and found consistent.

    Args:
        file: descriptor of a regular file; the caller closes it.

    Raises:
        BadArchive: it is no zip archive, or one that can be read in more than one way, or a bomb.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self.size = os.fstat(file).st_size
        entries, directory = read_directory(file)
        self.members = tuple(self._members(entries, directory))

    def raw(self, member: Member) -> Iterator[bytes]:
        """Yield a member's bytes as they stand in the archive."""
        end = member.offset + member.compressed
        for position in range(member.offset, end, _CHUNK):
            yield read_at(self._file, position, min(_CHUNK, end - position))

    def content(self, member: Member) -> Iterator[bytes]:
        """Yield a member's content.

        Raises:
            BadArchive: it is not what was declared.
        """
        try:
            if member.method == DEFLATED:
                inflater = Inflater(member.size, member.crc, _CHUNK)
                for chunk in self.raw(member):
                    yield from inflater.feed(chunk)
                inflater.end()
                return
        except Corrupt as error:
            message = f"{member.name!r} cannot be read: {error}"
            raise BadArchive(message) from error
        crc = 0
        for chunk in self.raw(member):
            crc = zlib.crc32(chunk, crc)
            yield chunk
        if crc != member.crc:
            refuse(f"{member.name!r} cannot be read: its CRC-32 is another one than declared")

    def read(self, member: Member, limit: int) -> bytes:
        """Return a member's content of at most `limit` bytes.

        Raises:
            BadArchive: it is larger, or not what was declared.
        """
        if member.size > limit:
            refuse(f"{member.name!r} has {member.size:,} bytes; {limit:,} are the most for such a file")
        return b"".join(self.content(member))

    def _members(self, entries: list[Entry], directory: int) -> Iterator[Member]:
        names: set[str] = set()
        total = 0
        entries.sort(key=lambda entry: entry.header)
        position = 0
        for number, entry in enumerate(entries):
            following = entries[number + 1].header if number + 1 < len(entries) else directory
            name = checked_name(entry)
            if name in names:
                refuse(f"{name!r} is in it twice")
            names.add(name)
            total += entry.size
            offset = self._local(entry, position, following)
            position = following
            if not name.endswith("/"):
                mode = entry.attributes >> 16
                yield Member(
                    name=name,
                    method=entry.method,
                    crc=entry.crc,
                    size=entry.size,
                    compressed=entry.compressed,
                    offset=offset,
                    executable=stat.S_ISREG(mode) and bool(mode & 0o111),
                )
        if position != directory:
            refuse("there is something before, behind or between the parts of the archive")
        if total > FREE_SIZE + MOST_RATIO * self.size:
            refuse(f"it would grow to {total:,} bytes, more than {MOST_RATIO} times its size: a zip bomb")

    def _local(self, entry: Entry, position: int, following: int) -> int:
        """Return where a member's bytes begin, its own header compared with the directory.

        Args:
            entry: the member.
            position: where it must begin.
            following: where the next one does.
        """
        what = repr(entry.name)
        if entry.header != position or following - position < _LOCAL.size + len(entry.raw):
            refuse(f"the member {what} overlaps another one, or does not follow the one before it")
        signature, _, flags, method, _, _, crc, compressed, size, length, extra = _LOCAL.unpack(
            read_at(self._file, position, _LOCAL.size)
        )
        start: int = position + _LOCAL.size + length + extra
        if signature != b"PK\x03\x04" or start > following:
            refuse(f"the member {what} does not stand where the directory says")
        fields = read_at(self._file, position + _LOCAL.size, length + extra)
        sizes = iter(zip64(fields[length:], what))
        size, compressed = (next(sizes, value) if value == FULL32 else value for value in (size, compressed))
        described = bool(flags & DESCRIPTOR)
        same = fields[:length] == entry.raw and method == entry.method and not (flags ^ entry.flags) & ~COMPRESSION
        told, said = (crc, compressed, size), (entry.crc, entry.compressed, entry.size)
        if not same or (told != said and not (described and told in {(0, 0, 0), (0, FULL32, FULL32)})):
            refuse(f"the member {what} says another thing of itself than the directory")
        gap = following - start - entry.compressed
        if gap and not (described and self._described(start + entry.compressed, gap, said)):
            refuse(f"the member {what} is not followed by the next one")
        return start

    def _described(self, position: int, length: int, said: tuple[int, int, int]) -> bool:
        """Return whether what stands behind a member's bytes is a descriptor that repeats what the directory said."""
        forms = [struct.pack(form, *said) for form in ("<III", "<IQQ") if form == "<IQQ" or max(said) <= FULL32]
        return length <= _LONGEST_DESCRIPTOR and read_at(self._file, position, length) in {
            signature + form for form in forms for signature in (b"", b"PK\x07\x08")
        }
