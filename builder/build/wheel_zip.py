"""A zip archive that others made, read strictly: one way to read it, or none.

Python's `zipfile` is made to open what can be opened. A wheel's layer is found again by the wheel's hash alone, so that
what is in it must not be a matter of opinion: the archive begins with its first member and ends with its end record,
the members stand one behind the other, and what a member says of itself is what the directory says. PyPI asks for about
the same since 2025. The source is APPNOTE.TXT 6.3.10 by PKWARE.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from builder.build.wheel_directory import (
    COMPRESSION,
    DEFLATED,
    DESCRIPTOR,
    FULL32,
    BadArchive,
    Entry,
    checked_name,
    read_at,
    read_directory,
    refuse,
    zip64,
)
from builder.images.deflate import Corrupt, Inflater

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
