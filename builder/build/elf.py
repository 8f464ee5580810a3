"""What a shared library says of itself: its name, the libraries it needs, and whether Python can import it.

It is read as the loader reads it, from the program headers and the dynamic section (System V ABI, chapter 5), by a few
reads of bounded size. docs/decisions/0043-system-libraries.md says why not by pyelftools.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from typing import IO, NamedTuple

_MAGIC = b"\x7fELF"
# A name that the loader looks for in its folders; one with a slash is a path.
NAME = re.compile(r"[A-Za-z0-9._+-]{1,255}")
_SHARED = 3
_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRINGS, _STRINGS_SIZE, _SONAME = 1, 5, 10, 14
# The largest that were seen: 12 program headers, 50 entries, 36 libraries needed, 60 MB of names.
_MOST_HEADERS, _MOST_ENTRIES, _MOST_NEEDED, _MOST_STRINGS = 256, 4096, 256, 128 << 20
_CHUNK = 1 << 20
# Names stand near the beginning or, where auditwheel has changed them, at the end. Of the libraries seen, which have up
# to 860 MB, those of tensorflow reach furthest from there: to 93 MB.
_HEAD, _TAIL = 96 << 20, 16 << 20
# The header, a program header and an entry of the dynamic section, in files of 32 and of 64 bits.
_HEADER = {1: "16xHHIIIIIHHH", 2: "16xHHIQQQIHHH"}
_SEGMENT = {1: "IIIIIIII", 2: "IIQQQQQQ"}
_ENTRY = {1: "iI", 2: "qQ"}
_ORDER = {1: "<", 2: ">"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Elf:
    """A shared library.

    Attributes:
        machine: what it runs on, as the ABI numbers machines: 62 for amd64.
        soname: its own name; empty where it has none.
        needed: the names of the libraries that the loader looks for before it can be used, in order.
        importable: whether it defines what Python calls to import it.
    """

    machine: int
    soname: str
    needed: tuple[str, ...]
    importable: bool


def read_elf(file: IO[bytes], module: str) -> Elf | None:
    """Return what a shared library says; None for anything else, and for one that no loader could use.

    Names that are no plain file names are left out.

    Args:
        file: the library; is read at any place.
        module: the name that Python would import it by.
    """
    try:
        return _read(file, module)
    except (struct.error, LookupError, ValueError):
        return None


def parts_of(head: bytes, size: int) -> list[range]:
    """Return the parts of a library in which `read_elf` finds what any linker wrote; none for another file.

    They may overlap.

    Args:
        head: the file's beginning, with its program headers.
        size: of the file, bytes.
    """
    try:
        layout = _layout(io.BytesIO(head))
    except (struct.error, LookupError):
        return []
    if layout is None:
        return []
    dynamic = range(layout.dynamic[0], layout.dynamic[0] + layout.dynamic[1])
    return [range(_HEAD), dynamic, range(size - _TAIL, size)]


class _Layout(NamedTuple):
    """What the headers of a library say: an entry's form, and where what is loaded, and the dynamic section, stands."""

    machine: int
    entry: struct.Struct
    loaded: list[tuple[int, int, int]]
    dynamic: tuple[int, int]


def _layout(file: IO[bytes]) -> _Layout | None:
    start = _at(file, 0, 64)
    if not start.startswith(_MAGIC):
        return None
    order, bits = _ORDER[start[5]], start[4]
    header, segment, entry = (struct.Struct(order + form[bits]) for form in (_HEADER, _SEGMENT, _ENTRY))
    kind, machine, _, _, where, _, _, _, size, count = header.unpack_from(start)
    if kind != _SHARED or size != segment.size or count > _MOST_HEADERS:
        return None
    loaded, dynamic = [], (0, 0)
    for fields in segment.iter_unpack(_at(file, where, size * count)):
        offset, address, length = (fields[1], fields[2], fields[4]) if bits == 1 else (fields[2], fields[3], fields[5])
        if fields[0] == _LOAD:
            loaded.append((address, length, offset))
        elif fields[0] == _DYNAMIC:
            length = min(length, _MOST_ENTRIES * entry.size)
            dynamic = offset, length - length % entry.size
    return _Layout(machine, entry, loaded, dynamic)


def _read(file: IO[bytes], module: str) -> Elf | None:
    layout = _layout(file)
    if layout is None:
        return None
    values: dict[int, list[int]] = {}
    for tag, value in layout.entry.iter_unpack(_at(file, *layout.dynamic)):
        if tag == 0:
            break
        values.setdefault(tag, []).append(value)
    (begin,), (length,) = values[_STRINGS], values[_STRINGS_SIZE]
    (table, *_) = [
        start + begin - address for address, size, start in layout.loaded if address <= begin < address + size
    ]

    def name(place: int) -> str:
        text = _at(file, table + place, min(256, length - place)) if place < length else b""
        found = text.partition(b"\0")[0].decode("latin-1")
        return found if NAME.fullmatch(found) else ""

    needed = (name(place) for place in values.get(_NEEDED, [])[:_MOST_NEEDED])
    return Elf(
        machine=layout.machine,
        soname=name(values[_SONAME][0]) if _SONAME in values else "",
        needed=tuple(dict.fromkeys(filter(None, needed))),
        importable=bool(module) and _holds(file, table, min(length, _MOST_STRINGS), f"PyInit_{module}\0".encode()),
    )


def _holds(file: IO[bytes], start: int, length: int, word: bytes) -> bool:
    """Return whether a part of a file holds a word."""
    overlap = len(word) - 1
    return any(
        word in _at(file, start + place, min(_CHUNK + overlap, length - place)) for place in range(0, length, _CHUNK)
    )


def _at(file: IO[bytes], place: int, size: int) -> bytes:
    """Return the bytes at a place; a file that ends before gives fewer, wherever the place is said to be."""
    file.seek(min(place, file.seek(0, io.SEEK_END)))
    return file.read(size)
