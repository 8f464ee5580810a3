"""Read a layer as it streams by: gzip members, and in them the entries of a tar archive.

`tarfile` takes a quarter longer, and reads what others do not; this reads as Go's archive/tar does, with which Docker
and containerd unpack. The formats are those of POSIX.1-2018 (`pax`, "ustar Interchange Format" and "pax Header Block")
and of GNU tar ("Basic Tar Format" in its manual). Whatever is not of these forms raises `Malformed`.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

from builder.images.descriptor import refuse
from builder.images.tar import BLOCK

REGULAR, HARD_LINK, SYMBOLIC_LINK, DIRECTORY = b"0", b"1", b"2", b"5"
# What is inflated at a time; the rest is copied where a gzip member ends, so it is kept small.
_INPUT, _OUTPUT = 1 << 14, 1 << 20
_GZIP = 31
# Go's limit for one extended header that precedes an entry; here for all of them together.
_MOST_EXTRA = 1 << 20
# Gzip members, headers and pax records in an image: what costs time and need not hold a byte. The largest images have
# about a million entries, each with a pax header of a few records.
_MOST_STEPS = 8_000_000
_NO_CONTENT = frozenset({HARD_LINK, SYMBOLIC_LINK, b"3", b"4", DIRECTORY, b"6"})
_PAX, _GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE = b"x", b"g", b"L", b"K", b"S"
_EXTRA = frozenset({_PAX, _GLOBAL, _LONG_NAME, _LONG_LINK})
_SPARSE_NAME = "GNU.sparse.name"
_MOST_SIZE = 1 << 50
_LONGEST_LENGTH = 20


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a tar archive.

    Attributes:
        path: as it stands there.
        kind: its type flag; `REGULAR` for each way to say it.
        target: of a link, as it stands there.
        mode: its permissions.
        size: of its content in the archive, bytes.
        sparse: whether that content is not the file's.
    """

    path: str
    kind: bytes
    target: str
    mode: int
    size: int
    sparse: bool


class Budget:
    """What reading all layers of an image may cost."""

    def __init__(self, steps: int = _MOST_STEPS) -> None:
        self._left = steps

    def spend(self, steps: int = 1) -> None:
        """Count steps; raises `Malformed` where there were too many."""
        self._left -= steps
        if self._left < 0:
            refuse("it has too many headers and records")


def inflated(chunks: Iterable[bytes], most: int, budget: Budget) -> Generator[bytes, None, None]:
    """Yield what gzip members hold, at most 1 MiB at a time.

    Args:
        chunks: the members, one after the other, in pieces of any size.
        most: bytes that they may hold together.
        budget: each member is a step.

    Raises:
        Malformed: they are no gzip members, end too early, or hold more.
    """
    member, size = zlib.decompressobj(_GZIP), 0
    for chunk in chunks:
        for start in range(0, len(chunk), _INPUT):
            data = chunk[start : start + _INPUT]
            while data:
                if member.eof:
                    budget.spend()
                    member = zlib.decompressobj(_GZIP)
                try:
                    piece = member.decompress(data, _OUTPUT)
                except zlib.error as error:
                    refuse("it is not compressed with gzip, or is damaged", error)
                size += len(piece)
                if size > most:
                    refuse(f"it has more than {most} bytes when it is not compressed")
                if piece:
                    yield piece
                data = member.unused_data or member.unconsumed_tail
    if not member.eof:
        refuse("it ends in the midst of its compressed content")


class Archive:
    """A tar archive that is read once; contents are passed over where nobody asks for them.

    Args:
        pieces: the archive, in pieces of any size but none that is empty.
        budget: each header and each pax record is a step; None for one of this archive's own.
    """

    def __init__(self, pieces: Iterator[bytes], budget: Budget | None = None) -> None:
        self._pieces = pieces
        self._budget = budget or Budget()
        self._piece = next(pieces, b"")
        self._at = 0
        self._left = 0

    def __iter__(self) -> Iterator[Entry]:
        """Yield the entries, up to the end of the archive.

        Raises:
            Malformed: it is no tar archive, or ends too early.
        """
        extra: dict[str, str] = {}
        left = _MOST_EXTRA
        while header := self._header():
            kind, size = header[156:157], _number(header[124:136])
            if kind in _EXTRA:
                left -= size
                if left < 0:
                    refuse("an extended header is too large, or there are too many before one entry")
                content = self._read(size)
                self._pass(-size % BLOCK)
                extra.update(_records(content, self._budget) if kind == _PAX else _named(kind, content))
                continue
            entry = _entry(header, extra, size)
            extra, left = {}, _MOST_EXTRA
            if header[156:157] == _SPARSE:
                more = header[482]
                while more:
                    self._budget.spend()
                    more = self._read(BLOCK)[504]
            self._left = entry.size
            yield entry
            self._pass(self._left + -entry.size % BLOCK)

    def content(self) -> bytes:
        """Return the content of the entry that was yielded last; asked for once at most."""
        size, self._left = self._left, 0
        return self._read(size)

    def _header(self) -> bytes:
        """Return the next header; empty at the end of the archive: two blocks of zeros, or simply nothing more."""
        self._budget.spend()
        header = self._some(BLOCK)
        if header and not any(header):
            header = self._some(BLOCK)
            if any(header):
                refuse("it is no tar archive, or is damaged")
            return b""
        if not header:
            return b""
        if len(header) < BLOCK:
            refuse("it ends in the midst of a header")
        # The field itself counts as blanks; some have summed signed bytes.
        told = _number(header[148:156])
        summed = sum(header) - sum(header[148:156]) + 8 * 32
        if told != summed and told != summed - 256 * sum(byte >> 7 for byte in header[:148] + header[156:]):
            refuse("it is no tar archive, or is damaged")
        return header

    def _read(self, size: int) -> bytes:
        content = self._some(size)
        if len(content) < size:
            refuse("it ends in the midst of a file")
        return content

    def _some(self, size: int) -> bytes:
        """Return the next bytes, fewer only where there are no more."""
        parts = []
        while size and self._piece:
            part = self._piece[self._at : self._at + size]
            self._at += len(part)
            size -= len(part)
            parts.append(part)
            if size:
                self._piece, self._at = next(self._pieces, b""), 0
        return b"".join(parts)

    def _pass(self, size: int) -> None:
        self._at += size
        while self._at > len(self._piece):
            self._at -= len(self._piece)
            self._piece = next(self._pieces, b"")
            if not self._piece:
                refuse("it ends in the midst of a file")


def _entry(header: bytes, extra: dict[str, str], size: int) -> Entry:
    path, kind = _text(header[:100]), header[156:157]
    if header[257:263] == b"ustar\0" and header[345]:
        path = f"{_text(header[345:500])}/{path}"
    path = extra.get(_SPARSE_NAME) or extra.get("path") or path
    if "size" in extra:
        size = _decimal(extra["size"])
    if kind == b"\0":
        kind = DIRECTORY if path.endswith("/") else REGULAR
    sparse = kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in extra)
    return Entry(
        path=path,
        kind=REGULAR if kind in {b"7", _SPARSE} else kind,
        target=extra.get("linkpath") or _text(header[157:257]),
        mode=_number(header[100:108]) & 0o7777,
        size=0 if kind in _NO_CONTENT else size,
        sparse=sparse,
    )


def _named(kind: bytes, content: bytes) -> dict[str, str]:
    """Return what GNU's header for a long name says; a global one is of no use here, as in Go."""
    if kind == _GLOBAL:
        return {}
    return {"path" if kind == _LONG_NAME else "linkpath": _text(content)}


def _records(content: bytes, budget: Budget) -> dict[str, str]:
    """Return the records of a pax header: each is its length, a blank, the key, `=`, the value and a line feed."""
    found = {}
    at = 0
    while at < len(content):
        budget.spend()
        blank = content.find(b" ", at, at + _LONGEST_LENGTH)
        length = content[at : max(at, blank)]
        end = at + int(length) if length.isdigit() else at
        key, equals, value = content[blank + 1 : max(blank, end - 1)].partition(b"=")
        if not equals or content[end - 1 : end] != b"\n" or b"\0" in key:
            refuse("it has a pax header that is none")
        if key in {b"path", b"linkpath", b"size"} or key.startswith(b"GNU.sparse."):
            if b"\0" in value:
                refuse("it has a name with a NUL in it")
            found[_text(key)] = _text(value)
        at = end
    return found


def _number(field: bytes) -> int:
    """Return a header's number: octal, or GNU's binary form."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        # 0xff is of a negative number, which makes it too large here.
        if value > _MOST_SIZE:
            refuse("it has a header with an impossible number")
        return value
    digits = field.strip(b" \0").partition(b"\0")[0]
    if digits.strip(b"01234567"):
        refuse("it has a header with a number that is none")
    return int(digits or b"0", 8)


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > len(str(_MOST_SIZE)):
        refuse("it has a pax header with an impossible size")
    return int(text)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
