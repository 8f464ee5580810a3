"""A layer: a deterministic tar archive in gzip members, written piece by piece, its digests known at the end.

The members hold one archive together, as RFC 1952 (2.2) allows. A file that is at hand as a deflate stream, such as a
zip archive holds it, closes a member as it is: before it in the same member stand blocks of ours with what precedes it
in the archive (padding, headers), and behind it the checksum of both. So nothing is compressed twice, and nothing of
the layer depends on a compressor of this machine.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from builder.images import deflate, tar
from builder.images.descriptor import OCI_LAYER, Descriptor
from builder.reference import Digest

MEDIA_TYPE = f"{OCI_LAYER}+gzip"
# What is yielded, and what is inflated, at a time.
CHUNK = 1 << 18
# The most bytes of headers in one block: the encoder's work grows with their square.
_HEADERS = 1 << 13
# No name, no time, no flags; "unknown" operating system, as other layers have it (RFC 1952, 2.3).
_MEMBER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"

Observer = Callable[[bytes], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What is known of a layer when it has been written.

    Attributes:
        digest: of the blob, compressed or not.
        size: of the blob, bytes.
        diff_id: digest of the archive.
        uncompressed: the archive's size in bytes.
        media_type: what the blob is.
        note: what its maker says of it beside; no part of its bytes.
    """

    digest: Digest
    size: int
    diff_id: Digest
    uncompressed: int
    media_type: str = MEDIA_TYPE
    note: str = ""

    @property
    def descriptor(self) -> Descriptor:
        """What names the layer in a manifest."""
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
    """Writes a layer: each method yields what there is of it, in chunks of about 256 KiB, to be sent in that order.

    The order of the entries is the caller's. A directory that was not written stands before the first entry below it,
    with mode 0755: without an entry of its own, its mode would be a matter of who unpacks the layer.

    Args:
        measures: whether the digests are wanted; without them, `layer` is never there.
    """

    def __init__(self, *, measures: bool = True) -> None:
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
        """What was written.

        Raises:
            RuntimeError: it has no end yet.
        """
        if self._layer is None:
            message = "the layer has not been written to its end"
            raise RuntimeError(message)
        return self._layer

    def directory(self, path: str) -> Iterator[bytes]:
        """Write a directory, and those above it, unless they stand there already.

        Args:
            path: relative, without a slash at its end.
        """
        self._parents(f"{path}/")
        yield from self._flush_headers()

    def symlink(self, path: str, target: str) -> Iterator[bytes]:
        """Write a symbolic link that leads to `target`."""
        self._parents(path)
        self._headers += tar.symlink_header(path, target)
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
        self._headers += tar.file_header(path, content.size, executable=executable)
        yield from self._deflated(content, observe) if isinstance(content, Deflated) else self._plain(content, observe)
        self._headers = tar.padding(content.size)

    def finish(self) -> Iterator[bytes]:
        """Write the end; from then on `layer` is there."""
        self._headers += tar.END
        self._write_headers()
        self._put(deflate.ALIGN + deflate.LAST)
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
            self._headers += tar.directory_header(directory)

    def _deflated(self, content: Deflated, observe: Observer | None) -> Iterator[bytes]:
        self._write_headers()
        self._put(deflate.ALIGN)
        inflater = deflate.Inflater(content.size, content.crc, CHUNK)
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
        # Blocks are cut at the same places however the content comes, and an empty one aligns what follows.
        held, got, opening = b"", 0, b""
        for chunk in content.chunks:
            got += len(chunk)
            if observe:
                observe(chunk)
            waiting, start = memoryview(held + chunk if held else chunk), 0
            while len(waiting) - start >= deflate.LARGEST_STORED:
                end = start + deflate.LARGEST_STORED
                self._store(opening, waiting[start:end])
                start, opening = end, b"\x00"
                yield from self._drain()
            held = bytes(waiting[start:])
            yield from self._drain()
        if got != content.size:
            message = f"it holds {got} bytes, and {content.size} are declared"
            raise deflate.Corrupt(message)
        if held or not opening:
            self._store(opening, held)

    def _store(self, opening: bytes, block: bytes | memoryview) -> None:
        self._account(block)
        self._put(opening + deflate.stored(block))

    def _write_headers(self) -> None:
        """Write the headers that wait, and the opening of a block that holds its bytes as they are."""
        if not self._open:
            self._open = True
            self._put(_MEMBER)
        self._account(self._headers)
        for start in range(0, len(self._headers), _HEADERS):
            headers = self._headers[start : start + _HEADERS]
            if start:
                self._put(deflate.ALIGN)
            # A name in another script has no short codes.
            encodable = deflate.encodable(headers)
            self._put(deflate.fixed(headers) if encodable else b"\x00" + deflate.stored(headers) + b"\x00")
        self._headers = b""

    def _flush_headers(self) -> Iterator[bytes]:
        """Write headers that no file follows, when many of them wait."""
        if len(self._headers) >= _HEADERS:
            self._write_headers()
            self._put(deflate.ALIGN)
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
