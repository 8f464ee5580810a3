"""Deflate blocks that are a function of their content alone, and deflate streams that others made, checked.

zlib's compressors give other bytes in another version, another build, on another processor. What this program writes
by itself (tar headers, RECORD, scripts) must be the same everywhere, since a layer is known by its digest; so it is
written as blocks that leave a compressor no choice: fixed Huffman codes with runs of zeros as the only repetition, or
no compression at all. RFC 1951 is the source of every constant here.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from functools import lru_cache

# An empty block without compression behind `fixed`'s open one: all that follows stands on a byte boundary.
ALIGN = b"\x00\x00\xff\xff"
# The last block of a stream: fixed codes, and nothing in it.
LAST = b"\x03\x00"
LARGEST_STORED = 0xFFFF

# The fixed code of a byte below 144 is eight bits, 0x30 more than the byte, most significant bit first; turned round,
# it is a byte again, so that text is encoded by a table.
_SHORT = 144
_LITERAL = bytes(int(f"{0x30 + byte:08b}"[::-1], 2) if byte < _SHORT else 0 for byte in range(256))
_LONG = re.compile(rb"[\x90-\xff]")
# Shorter runs cost more as repetition than as literals.
_RUN = re.compile(rb"\x00{5,}")
_LONGEST_MATCH = 258
_SHORTEST_MATCH = 3
# (first length, extra bits) of the length codes 257 to 284; 285 is 258 and nothing else.
_LENGTHS = [(3 + n, 0) for n in range(8)] + [
    ((4 << extra) + 3 + (n << extra), extra) for extra in range(1, 6) for n in range(4)
]


class Corrupt(Exception):
    """A deflate stream is not what was declared; the message says how."""


def fixed(content: bytes) -> bytes:
    """Return one block that is not the last, with fixed codes, and the opening of a block without compression.

    What follows must be that block's length, its complement and its bytes: those of `stored`, or `ALIGN`.

    Args:
        content: bytes below 144 only, as in a tar header without a foreign name.

    Raises:
        ValueError: there is a byte that has no short code.
    """
    if _LONG.search(content):
        message = "only bytes below 144 have a short code"
        raise ValueError(message)
    bits, length = 0b010, 3  # not the last block; fixed codes
    position = 0
    for run in _RUN.finditer(content):
        text = content[position : run.start()].translate(_LITERAL)
        bits |= int.from_bytes(text, "little") << length
        length += 8 * len(text)
        position = run.end()
        zeros, size = _zeros(position - run.start())
        bits |= zeros << length
        length += size
    text = content[position:].translate(_LITERAL)
    bits |= int.from_bytes(text, "little") << length
    # Seven bits end the block, and three open the next: not the last, no compression. All of them are zeros.
    length += 8 * len(text) + 7 + 3
    return bits.to_bytes((length + 7) // 8, "little")


def encodable(content: bytes) -> bool:
    """Return whether `fixed` takes the content."""
    return not _LONG.search(content)


def stored(content: bytes | memoryview) -> bytes:
    """Return the length, its complement and the bytes of a block without compression, whose opening stands before it.

    Args:
        content: at most 65,535 bytes.
    """
    size = len(content)
    return b"".join((size.to_bytes(2, "little"), (size ^ LARGEST_STORED).to_bytes(2, "little"), content))


class Inflater:
    """Reads a raw deflate stream piece by piece, and believes nothing that was said about it.

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
        """Take more of the stream, and yield what it holds.

        Raises:
            Corrupt: it is not a deflate stream, gives more than was declared, or goes on behind its end.
        """
        full = False
        while compressed or full:
            if self._inflate.eof:
                message = "bytes follow the end of its deflate stream"
                raise Corrupt(message)
            # One byte more than declared is enough to know the lie.
            room = min(self._chunk, self._size - self._got + 1)
            try:
                content = self._inflate.decompress(compressed, room)
            except zlib.error as error:
                message = f"its deflate stream is broken ({error})"
                raise Corrupt(message) from error
            compressed = self._inflate.unconsumed_tail or self._inflate.unused_data
            # A repetition may have more to give although every byte of it was taken.
            full = len(content) == room and not self._inflate.eof
            self._got += len(content)
            if self._got > self._size:
                message = f"it holds more than the {self._size} bytes declared"
                raise Corrupt(message)
            self._sum = zlib.crc32(content, self._sum)
            if content:
                yield content

    def end(self) -> None:
        """Say that the stream has been given whole.

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
            message = "its CRC-32 is another one than declared"
            raise Corrupt(message)


@lru_cache(maxsize=4096)
def _zeros(count: int) -> tuple[int, int]:
    """Return the bits of so many zero bytes, and how many bits there are: a literal, and repetitions of it."""
    bits, length = _LITERAL[0], 8
    count -= 1
    while count:
        take = min(count, _LONGEST_MATCH)
        if 0 < count - take < _SHORTEST_MATCH:
            take -= _SHORTEST_MATCH
        match, size = _match(take)
        bits |= match << length
        length += size
        count -= take
    return bits, length


def _match(length: int) -> tuple[int, int]:
    """Return the bits of a repetition of the byte before it, and how many bits there are."""
    if length == _LONGEST_MATCH:
        code, extra, rest = 285, 0, 0
    else:
        code, (first, extra) = max((257 + n, entry) for n, entry in enumerate(_LENGTHS) if entry[0] <= length)
        rest = length - first
    # Codes from 256 to 279 have seven bits, those from 280 on have eight, beginning at 11000000.
    text = f"{code - 256:07b}" if code < 280 else f"{0xC0 + code - 280:08b}"  # noqa: PLR2004  # as RFC 1951, 3.2.6
    bits = int(text[::-1], 2) | rest << len(text)
    # Distance 1 is code 0, five zero bits.
    return bits, len(text) + extra + 5
