"""Headers of a tar archive: POSIX ustar, with a pax header where a name or a size needs one.

Python's `tarfile` writes some fields otherwise from version to version (the device numbers of a file, for one), and a
layer is known by its digest, so the 512 bytes are ours. Every entry belongs to root and has the same time. The source
is POSIX.1-2018, `pax`, "ustar Interchange Format" and "pax Header Block".
"""

from __future__ import annotations

import struct

BLOCK = 512
# 1980-01-02T00:00:00Z: zip files know no time before 1980, and so it is none in any time zone.
MTIME = 315_619_200
END = bytes(2 * BLOCK)
FILE_MODE = 0o644
PROGRAM_MODE = 0o755

_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x")
_LONGEST_NAME = 100
_LONGEST_PREFIX = 155
_LONGEST_SIZE = 8**11
_NUMBER = b"0000000\x00"


def file_header(path: str, size: int, *, executable: bool = False) -> bytes:
    """Return what stands before a file's content: one block, or three where its name or size needs a pax header.

    Args:
        path: relative, with forward slashes.
        size: of the content, bytes.
        executable: whether its mode is 0755, not 0644.
    """
    return _entry(path, b"0", size=size, mode=PROGRAM_MODE if executable else FILE_MODE)


def directory_header(path: str) -> bytes:
    """Return the entry of a directory of mode 0755.

    Args:
        path: relative, without a slash at its end.
    """
    return _entry(f"{path}/", b"5", mode=PROGRAM_MODE)


def symlink_header(path: str, target: str) -> bytes:
    """Return the entry of a symbolic link.

    Args:
        path: relative, with forward slashes.
        target: what it leads to, as it stands in the link.
    """
    return _entry(path, b"2", mode=0o777, target=target)


def padding(size: int) -> bytes:
    """Return what stands behind a content of `size` bytes, up to the next block."""
    return bytes(-size % BLOCK)


def _entry(path: str, kind: bytes, *, mode: int, size: int = 0, target: str = "") -> bytes:
    prefix, name = _split(path)
    link = _field(target, _LONGEST_NAME)
    records = b""
    if name is None:
        records += _record("path", path.encode())
        prefix, name = b"", path.encode("ascii", "replace")[:_LONGEST_NAME]
    if link is None:
        records += _record("linkpath", target.encode())
        link = target.encode("ascii", "replace")[:_LONGEST_NAME]
    if size >= _LONGEST_SIZE:
        records += _record("size", b"%d" % size)
    before = b""
    if records:
        before = (
            _block(name=b"PaxHeader", kind=b"x", mode=FILE_MODE, size=len(records)) + records + padding(len(records))
        )
    # Whoever reads the pax header ignores the size here, and nobody else can read a file of that size.
    shown = size if size < _LONGEST_SIZE else 0
    return before + _block(prefix=prefix, name=name, kind=kind, mode=mode, size=shown, link=link)


def _split(path: str) -> tuple[bytes, bytes | None]:
    """Return a path as ustar's prefix and name; no name where it does not fit, or is not ASCII."""
    name = _field(path, _LONGEST_NAME)
    if name is not None:
        return b"", name
    encoded = path.encode()
    # At the last slash that leaves the prefix short enough, so that the name is as short as it can be; not at one that
    # ends the path of a directory.
    cut = encoded.rfind(b"/", 0, min(_LONGEST_PREFIX + 1, len(encoded) - 1))
    if not path.isascii() or cut <= 0 or len(encoded) - cut - 1 > _LONGEST_NAME:
        return b"", None
    return encoded[:cut], encoded[cut + 1 :]


def _field(text: str, longest: int) -> bytes | None:
    return text.encode() if text.isascii() and len(text) <= longest else None


def _record(key: str, value: bytes) -> bytes:
    """Return a pax record, which begins with its own length."""
    rest = b" %s=%s\n" % (key.encode(), value)
    length = len(rest)
    while len(rest) + len(str(length)) != length:
        length = len(rest) + len(str(length))
    return b"%d%s" % (length, rest)


def _block(*, prefix: bytes = b"", name: bytes, kind: bytes, mode: int, size: int, link: bytes = b"") -> bytes:
    fields = [
        name,
        b"%07o\x00" % mode,
        _NUMBER,  # user
        _NUMBER,  # group
        b"%011o\x00" % size,
        b"%011o\x00" % MTIME,
        b" " * 8,
        kind,
        link,
        b"ustar\x00",
        b"00",
        b"",
        b"",
        _NUMBER,
        _NUMBER,
        prefix,
    ]
    checksum = sum(_HEADER.pack(*fields))
    fields[6] = b"%06o\x00 " % checksum
    return _HEADER.pack(*fields)
