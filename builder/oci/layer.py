"""A layer: a deterministic tar archive in gzip members, written piece by piece, its digests known at the end."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from builder.oci import OCI_LAYER, Descriptor
from builder.reference import Digest

# The last block of a deflate stream: fixed codes, and nothing in it.
LAST = b"\x03\x00"
LARGEST_STORED = 0xFFFF


class Corrupt(Exception):
    """A deflate stream differs from what was declared of it; the message says how."""


def deflated(content: bytes) -> bytes:
    """Return content as deflate blocks that are not the last of a stream and end on a byte boundary.

    The blocks refer to nothing before them. Their bytes depend on zlib: see `zlib_identity`.
    """
    # A window and tables for a few headers: with zlib's own defaults, most of the time would go into clearing memory.
    compressor = zlib.compressobj(6, zlib.DEFLATED, -10, 4)
    return compressor.compress(content) + compressor.flush(zlib.Z_SYNC_FLUSH)


@cache
def zlib_identity() -> str:
    """Return a word of eight hexadecimal digits for what this process's zlib makes of headers.

    Versions and builds of zlib (zlib-ng, Intel's, those of s390x) differ in what they write.
    """
    names = (hashlib.sha256(b"%d" % number).hexdigest() for number in range(64))
    headers = [file_header(f"opt/model/{name[: 2 + number]}", 97 * number) for number, name in enumerate(names)]
    state = hashlib.sha256()
    for sample in (*headers, b"".join(headers)):
        state.update(deflated(sample))
    return state.hexdigest()[:8]


def stored(content: bytes | memoryview) -> bytes:
    """Return a deflate block without compression, which is not the last of a stream.

    Args:
        content: at most 65,535 bytes.
    """
    size = len(content)
    return b"".join((b"\x00", size.to_bytes(2, "little"), (size ^ LARGEST_STORED).to_bytes(2, "little"), content))


class Inflater:
    """Reads a raw deflate stream piece by piece, and checks its declared size and checksum.

    Args:
        size: bytes that it must give.
        crc: CRC-32 that they must have.
        chunk: the most bytes in a piece of what it gives.
    """

    def __init__(self, size: int, crc: int, chunk: int) -> None:
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        self._size = size
        self._crc = crc
        self._chunk = chunk
        self._got = 0
        self._sum = 0

    def feed(self, compressed: bytes) -> Iterator[bytes]:
        """Take more of the stream, and yield its content.

        Raises:
            Corrupt: it is not a deflate stream, gives more than was declared, or goes on behind its end.
        """
        full = False
        while compressed or full:
            if self._inflate.eof:
                message = "bytes follow the end of its deflate stream"
                raise Corrupt(message)
            # One byte more than declared is enough to see that it is too long.
            most = min(self._chunk, self._size - self._got + 1)
            try:
                content = self._inflate.decompress(compressed, most)
            except zlib.error as error:
                message = f"its deflate stream is broken ({error})"
                raise Corrupt(message) from error
            compressed = self._inflate.unconsumed_tail or self._inflate.unused_data
            # A repetition may have more to give although every byte of it was taken.
            full = len(content) == most and not self._inflate.eof
            self._got += len(content)
            if self._got > self._size:
                message = f"it holds more than the {self._size} bytes declared"
                raise Corrupt(message)
            self._sum = zlib.crc32(content, self._sum)
            if content:
                yield content

    def end(self) -> None:
        """Check the stream at its end.

        Raises:
            Corrupt: it is cut off, or its size or checksum is another one.
        """
        if not self._inflate.eof:
            message = "its deflate stream is cut off"
            raise Corrupt(message)
        if self._got != self._size:
            message = f"it holds {self._got} bytes, and {self._size} are declared"
            raise Corrupt(message)
        if self._sum != self._crc:
            message = "its CRC-32 is not the declared one"
            raise Corrupt(message)


BLOCK = 512
# 1980-01-02T00:00:00Z, which is not before 1980 in any time zone: zip files know no earlier time.
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
    """Return the header of a file: one block, or three where its name or size needs a pax header.

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
        target: of the link.
    """
    return _entry(path, b"2", mode=0o777, target=target)


def padding(size: int) -> bytes:
    """Return the zeros between a content of `size` bytes and the next block."""
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
    # Readers of the pax header ignore the size here, and others cannot read a file of that size.
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


MEDIA_TYPE = f"{OCI_LAYER}+gzip"
# Bytes that are yielded, or inflated, at a time.
CHUNK = 1 << 18
# The most bytes of headers that wait for a file.
_MOST_HEADERS = 1 << 15
# No name, no time, no flags; "unknown" operating system, as other layers have it (RFC 1952, 2.3).
_MEMBER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"

Observer = Callable[[bytes], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer that was written.

    Attributes:
        digest: of the blob, compressed or not.
        size: of the blob, bytes.
        diff_id: digest of the archive.
        uncompressed: the archive's size in bytes.
        media_type: of the blob.
        note: a remark of its maker; no part of its bytes.
    """

    digest: Digest
    size: int
    diff_id: Digest
    uncompressed: int
    media_type: str = MEDIA_TYPE
    note: str = ""

    @property
    def descriptor(self) -> Descriptor:
        """The layer's entry in a manifest."""
        return Descriptor(media_type=self.media_type, digest=self.digest, size=self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deflated:
    """A file's content as a raw deflate stream (RFC 1951).

    Attributes:
        chunks: the stream, in pieces of any size.
        size: of the content, bytes.
        crc: CRC-32 of the content.
    """

    chunks: Iterable[bytes]
    size: int
    crc: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A file's content as it is; the layer holds it without compression.

    Attributes:
        chunks: the content, in pieces of any size: the layer is the same.
        size: of the content, bytes.
    """

    chunks: Iterable[bytes]
    size: int


class LayerWriter:
    """Writes a layer: each method yields the next part of it, in chunks of about 256 KiB, to be sent in that order.

    The order of the entries is the caller's. A directory that was not written gets an entry before the first one below
    it, with mode 0755: without one, its mode would depend on the program that unpacks the layer.

    Args:
        compresses: whether the headers are compressed, so that the layer depends on this process's zlib.
        measures: whether the digests are wanted; without them, `layer` is never there.
    """

    def __init__(self, *, compresses: bool = True, measures: bool = True) -> None:
        self._compresses = compresses
        self._measures = measures
        self._out: list[bytes] = []
        self._waiting = 0
        self._blob = hashlib.sha256()
        self._size = 0
        self._archive = hashlib.sha256()
        self._uncompressed = 0
        self._open = False
        self._crc = 0
        self._length = 0
        self._headers = b""
        self._directories: set[str] = set()
        self._layer: Layer | None = None

    @property
    def layer(self) -> Layer:
        """The layer that was written.

        Raises:
            RuntimeError: it has no end yet.
        """
        if self._layer is None:
            message = "the layer has not been written to its end"
            raise RuntimeError(message)
        return self._layer

    def directory(self, path: str) -> Iterator[bytes]:
        """Write a directory, and those above it, unless they are there already.

        Args:
            path: relative, without a slash at its end.
        """
        self._parents(f"{path}/")
        yield from self._flush_headers()

    def symlink(self, path: str, target: str) -> Iterator[bytes]:
        """Write a symbolic link that leads to `target`."""
        self._parents(path)
        self._headers += symlink_header(path, target)
        yield from self._flush_headers()

    def file(
        self, path: str, content: Deflated | Plain, *, executable: bool = False, observe: Observer | None = None
    ) -> Iterator[bytes]:
        """Write a file.

        Args:
            path: relative, with forward slashes; not one that was written before.
            content: its content.
            executable: whether its mode is 0755, not 0644.
            observe: called with the content, piece by piece, as it is written.

        Raises:
            Corrupt: the content is not what was declared. What was yielded so far is then no layer.
        """
        self._parents(path)
        self._headers += file_header(path, content.size, executable=executable)
        yield from self._deflated(content, observe) if isinstance(content, Deflated) else self._plain(content, observe)
        self._headers = padding(content.size)

    def finish(self) -> Iterator[bytes]:
        """Write the end; from then on `layer` is there."""
        self._headers += END
        self._write_headers()
        self._put(LAST)
        self._close()
        if self._out:
            yield self._flush()
        if not self._measures:
            return
        self._layer = Layer(
            digest=Digest(f"sha256:{self._blob.hexdigest()}"),
            size=self._size,
            diff_id=Digest(f"sha256:{self._archive.hexdigest()}"),
            uncompressed=self._uncompressed,
        )

    def _parents(self, path: str) -> None:
        missing = []
        above = path.rpartition("/")[0]
        while above and above not in self._directories:
            missing.append(above)
            above = above.rpartition("/")[0]
        for directory in reversed(missing):
            self._directories.add(directory)
            self._headers += directory_header(directory)

    def _deflated(self, content: Deflated, observe: Observer | None) -> Iterator[bytes]:
        self._write_headers()
        inflater = Inflater(content.size, content.crc, CHUNK)
        for chunk in content.chunks:
            for piece in inflater.feed(chunk):
                self._account(piece)
                if observe:
                    observe(piece)
            self._put(chunk)
            yield from self._drain()
        inflater.end()
        self._close()

    def _plain(self, content: Plain, observe: Observer | None) -> Iterator[bytes]:
        self._write_headers()
        # Blocks are cut at the same places, however the content comes.
        rest, got = b"", 0
        for chunk in content.chunks:
            got += len(chunk)
            if observe:
                observe(chunk)
            waiting, start = memoryview(rest + chunk if rest else chunk), 0
            while len(waiting) - start >= LARGEST_STORED:
                self._store(waiting[start : start + LARGEST_STORED])
                start += LARGEST_STORED
                yield from self._drain()
            rest = bytes(waiting[start:])
        if got != content.size:
            message = f"it holds {got} bytes, and {content.size} are declared"
            raise Corrupt(message)
        if rest:
            self._store(rest)
        yield from self._drain()

    def _store(self, block: bytes | memoryview) -> None:
        self._account(block)
        self._put(stored(block))

    def _write_headers(self) -> None:
        """Write the headers that wait; what follows begins on a byte boundary."""
        if not self._open:
            self._open = True
            self._put(_MEMBER)
        headers, self._headers = self._headers, b""
        if self._compresses:
            self._account(headers)
            self._put(deflated(headers))
        else:
            for start in range(0, len(headers), LARGEST_STORED):
                self._store(headers[start : start + LARGEST_STORED])

    def _flush_headers(self) -> Iterator[bytes]:
        """Write headers that no file follows, when many of them wait."""
        if len(self._headers) >= _MOST_HEADERS:
            self._write_headers()
        yield from self._drain()

    def _close(self) -> None:
        # The length is that of RFC 1952: modulo 2^32.
        self._put(self._crc.to_bytes(4, "little") + (self._length & 0xFFFFFFFF).to_bytes(4, "little"))
        self._open, self._crc, self._length = False, 0, 0

    def _account(self, archive: bytes | memoryview) -> None:
        if self._measures:
            self._archive.update(archive)
        self._crc = zlib.crc32(archive, self._crc)
        self._length += len(archive)
        self._uncompressed += len(archive)

    def _put(self, compressed: bytes) -> None:
        self._out.append(compressed)
        self._waiting += len(compressed)

    def _drain(self) -> Iterator[bytes]:
        if self._waiting >= CHUNK:
            yield self._flush()

    def _flush(self) -> bytes:
        chunk = b"".join(self._out)
        self._out.clear()
        self._waiting = 0
        if self._measures:
            self._blob.update(chunk)
        self._size += len(chunk)
        return chunk
