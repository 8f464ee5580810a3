"""A strict reader of zip archives: an archive that two programs could read in two ways is refused.

`zipfile` reads the central directory. What it does not check is checked here: that the end records, the directory and
the members' own headers agree, and that no byte of the archive belongs to none of them.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from builder.oci.layer import Corrupt, Inflater

_END = struct.Struct("<4s4HIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_CENTRAL_SIZE, _LENGTHS = 46, struct.Struct("<28x3H")
_EXTRA = struct.Struct("<HH")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ZIP64, _UNICODE_PATH = 0x0001, 0x7075
STORED, DEFLATED = ZIP_STORED, ZIP_DEFLATED
_ENCRYPTED, _COMPRESSION, _DESCRIPTOR, _UTF8 = 0x2041, 0x0006, 0x0008, 0x0800

# The largest wheels there are have about 15,000 files; these bound the memory that an archive can take.
MOST_MEMBERS = 100_000
MOST_DIRECTORY = 32 << 20
LONGEST_PATH = 1024
LONGEST_NAME = 255
DEEPEST_PATH = 64
_NEVER = re.compile(r"[\x00-\x1f\x7f\\]")


class BadArchive(Exception):
    """An archive, or a member of it, is invalid; the message says how, and which member."""


def read_directory(file: int) -> tuple[list[ZipInfo], int]:
    """Return the entries of the central directory, and where it begins.

    Args:
        file: descriptor of a regular file.

    Raises:
        BadArchive: the file is no zip archive, or one of several parts; the directory and the end records disagree; a
            member begins behind the directory's beginning, or is larger than all that is before it.
    """
    count, size, start = _end(file)
    _check_directory(file, count, start, start + size)
    try:
        with open(file, "rb", closefd=False) as stream, ZipFile(stream) as archive:
            entries = archive.infolist()
    except UnicodeDecodeError as error:
        message = f"the name {error.object[:200]!r} is not UTF-8, though it says so"
        raise BadArchive(message) from error
    except (BadZipFile, NotImplementedError) as error:
        message = f"its directory cannot be read: {error}"
        raise BadArchive(message) from error
    for entry in entries:
        _zip64(entry.extra, repr(entry.orig_filename))
        if entry.volume:
            refuse("it is one part of an archive that has several")
        if entry.header_offset >= start or entry.compress_size > start:
            refuse(f"{entry.orig_filename[:200]!r} begins beyond the archive's members, or is larger than all of them")
    return entries, start


def _check_directory(file: int, count: int, start: int, end: int) -> None:
    """Refuse a directory that does not end behind as many entries as declared.

    `zipfile` makes an object of each entry that fits in the directory, whatever their declared number, and cuts the
    last one short where the directory ends within it.
    """
    position = start
    while count and position + _CENTRAL_SIZE <= end:
        position += _CENTRAL_SIZE + sum(_LENGTHS.unpack(read_at(file, position, _LENGTHS.size)))
        count -= 1
    if position > end:
        refuse("its directory is cut off")
    if count or position < end:
        refuse("its directory has another size, or other members, than its end record says")


def _end(file: int) -> tuple[int, int, int]:
    """Return the number of members, the directory's size, and where it begins, as the end records declare them."""
    whole = os.fstat(file).st_size
    if whole < _END.size:
        refuse("it is too short for a zip archive")
    end = whole - _END.size
    signature, *fields, comment = _END.unpack(read_at(file, end, _END.size))
    if signature != b"PK\x05\x06" or comment:
        refuse("it has no end record of a zip archive at its end")
    before = _LOCATOR.size + _END64.size
    if end >= before and (locator := read_at(file, end - _LOCATOR.size, _LOCATOR.size)).startswith(b"PK\x06\x07"):
        end -= before
        signature, length, _, _, *fields64 = _END64.unpack(read_at(file, end, _END64.size))
        _, disk, offset, disks = _LOCATOR.unpack(locator)
        if (signature, length, disk, offset) != (b"PK\x06\x06", _END64.size - 12, 0, end) or disks > 1:
            refuse("its zip64 end record is broken, or not where its locator says")
        full = (_FULL16,) * 4 + (_FULL32,) * 2
        if any(old not in {new, most} for old, new, most in zip(fields, fields64, full, strict=True)):
            refuse("its two end records disagree")
        fields = fields64
    disk, start, here, count, size, offset = fields
    if disk or start or here != count:
        refuse("it is one part of an archive that has several")
    if offset + size != end:
        refuse("there is something before, behind or between the parts of the archive")
    if count > MOST_MEMBERS or size > MOST_DIRECTORY:
        refuse(f"it has more than {MOST_MEMBERS:,} members, or a directory of more than {MOST_DIRECTORY >> 20} MiB")
    return count, size, offset


def _raw_name(entry: ZipInfo) -> bytes:
    """Return a member's name as the archive has it."""
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")


def _zip64(extra: bytes, what: str) -> list[int]:
    """Return the 64-bit numbers in a member's extra fields."""
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


def _checked_name(entry: ZipInfo) -> str:
    """Return a member's name, if a regular file or a directory of that name can be installed."""
    name = entry.orig_filename
    check_path(name.removesuffix("/"))
    if entry.flag_bits & _ENCRYPTED:
        refuse(f"{name!r} is encrypted")
    if entry.flag_bits & ~(_COMPRESSION | _DESCRIPTOR | _UTF8):
        refuse(f"{name!r} has flags ({entry.flag_bits:#06x}) that no wheel needs")
    if entry.compress_type not in {STORED, DEFLATED}:
        refuse(f"{name!r} is compressed by method {entry.compress_type}; wheels are deflated or stored")
    if entry.compress_type == STORED and entry.file_size != entry.compress_size:
        refuse(f"{name!r} is stored, but its two sizes differ")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if name.endswith("/"):
        if entry.file_size or kind not in {0, stat.S_IFDIR}:
            refuse(f"{name!r} is a directory with content")
    elif kind not in {0, stat.S_IFREG}:
        refuse(f"{name!r} is a link, a device or the like")
    return name


def check_path(path: str) -> None:
    """Refuse a path that is not a plain relative one, or that has a special meaning in an image's layer.

    Letters' case and Unicode's two ways to write an accent make different names, as on every Linux file system.

    Raises:
        BadArchive: it is absolute, has '.', '..', a backslash, a control character or an empty part, is too long or too
            deep, or has a part that begins with `.wh.`, which deletes a file of the layers below.
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
        executable: whether its mode has an execute bit, as for pip.
    """

    name: str
    method: int
    crc: int
    size: int
    compressed: int
    offset: int
    executable: bool


class Archive:
    """An open archive with a consistent directory.

    Args:
        file: descriptor of a regular file; the caller closes it.

    Raises:
        BadArchive: it is no zip archive, can be read in more than one way, or is a bomb.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self.size = os.fstat(file).st_size
        entries, directory = read_directory(file)
        self.members = tuple(self._members(entries, directory))

    def raw(self, member: Member) -> Iterator[bytes]:
        """Yield a member's bytes in the archive, compressed or not."""
        end = member.offset + member.compressed
        for position in range(member.offset, end, _CHUNK):
            yield read_at(self._file, position, min(_CHUNK, end - position))

    def content(self, member: Member) -> Iterator[bytes]:
        """Yield a member's content.

        Raises:
            BadArchive: it differs from its declaration.
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
            refuse(f"{member.name!r} cannot be read: its CRC-32 is not the declared one")

    def read(self, member: Member, limit: int) -> bytes:
        """Return a member's content of at most `limit` bytes.

        Raises:
            BadArchive: it is larger, or differs from its declaration.
        """
        if member.size > limit:
            refuse(f"{member.name!r} has {member.size:,} bytes; {limit:,} are the most for such a file")
        return b"".join(self.content(member))

    def _members(self, entries: list[ZipInfo], directory: int) -> Iterator[Member]:
        names: set[str] = set()
        total = 0
        entries.sort(key=lambda entry: entry.header_offset)
        position = 0
        for entry, following in zip(entries, [*(entry.header_offset for entry in entries[1:]), directory], strict=True):
            name = _checked_name(entry)
            if name in names:
                refuse(f"{name!r} is in it twice")
            names.add(name)
            total += entry.file_size
            offset = self._local(entry, position, following)
            position = following
            if not name.endswith("/"):
                mode = entry.external_attr >> 16
                yield Member(
                    name=name,
                    method=entry.compress_type,
                    crc=entry.CRC,
                    size=entry.file_size,
                    compressed=entry.compress_size,
                    offset=offset,
                    executable=stat.S_ISREG(mode) and bool(mode & 0o111),
                )
        if position != directory:
            refuse("there is something before, behind or between the parts of the archive")
        if total > FREE_SIZE + MOST_RATIO * self.size:
            refuse(f"it would grow to {total:,} bytes, more than {MOST_RATIO} times its size: a zip bomb")

    def _local(self, entry: ZipInfo, position: int, following: int) -> int:
        """Return where a member's bytes begin, after a comparison of its own header with the directory.

        Args:
            entry: the member.
            position: where it must begin.
            following: where the next one does.
        """
        what, raw = repr(entry.orig_filename), _raw_name(entry)
        if entry.header_offset != position or following - position < _LOCAL.size + len(raw):
            refuse(f"the member {what} overlaps another one, or does not follow the one before it")
        signature, _, flags, method, _, _, crc, compressed, size, length, extra = _LOCAL.unpack(
            read_at(self._file, position, _LOCAL.size)
        )
        start: int = position + _LOCAL.size + length + extra
        if signature != b"PK\x03\x04" or start > following:
            refuse(f"the member {what} is not where the directory says")
        fields = read_at(self._file, position + _LOCAL.size, length + extra)
        sizes = iter(_zip64(fields[length:], what))
        size, compressed = (next(sizes, value) if value == _FULL32 else value for value in (size, compressed))
        described = bool(flags & _DESCRIPTOR)
        same = fields[:length] == raw and method == entry.compress_type
        same = same and not (flags ^ entry.flag_bits) & ~_COMPRESSION
        local, central = (crc, compressed, size), (entry.CRC, entry.compress_size, entry.file_size)
        if not same or (local != central and not (described and local in {(0, 0, 0), (0, _FULL32, _FULL32)})):
            refuse(f"the local header of {what} disagrees with the central directory")
        gap = following - start - entry.compress_size
        if gap and not (described and self._is_descriptor(start + entry.compress_size, gap, central)):
            refuse(f"the member {what} is not followed by the next one")
        return start

    def _is_descriptor(self, position: int, length: int, central: tuple[int, int, int]) -> bool:
        """Return whether the bytes behind a member's are a descriptor that agrees with the directory."""
        forms = [struct.pack(form, *central) for form in ("<III", "<IQQ") if form == "<IQQ" or max(central) <= _FULL32]
        return 0 < length <= _LONGEST_DESCRIPTOR and read_at(self._file, position, length) in {
            signature + form for form in forms for signature in (b"", b"PK\x07\x08")
        }
