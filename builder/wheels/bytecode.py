"""Compile a wheel's Python files: a program that `builder.wheels.install` runs, of the standard library alone.

    python -S -P -s -B bytecode.py WHEEL PARENT SECONDS TOTAL <SOURCES >BYTECODE

WHEEL is a descriptor of the wheel's file, open for reading. SOURCES is a JSON list: for each source its offset, its
compressed size, its zip method and its size in the wheel, and its path in the image. BYTECODE gets a frame for each, in
the same order. A source may take SECONDS of processor time, and as many for each MiB of it; all of them together TOTAL.
The signal that ends the process says which limit was reached (`SIGPROF` or `SIGXCPU`). The process also ends when
PARENT is no longer its parent.

What Python writes into a .pyc depends on what the process did before: which strings it has interned decides whether two
equal sets of strings in a source are one constant or two, and an object's number of references decides a bit of its
type (seen: 1 file of pandas' 1,440 and 2 of MLflow's 1,315, compiled in another order). So each wheel has a fresh
process, which compiles one file after the other. A change of this program may change that history: raise `LAYOUT`.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import marshal
import os
import resource
import signal
import struct
import sys
import zlib
from contextlib import suppress

# Size and CRC-32 of the content, and size of the deflate stream that follows; all zeros for a source without bytecode.
FRAME = struct.Struct("<III")
# The largest source that was seen (6 MB, an API's client) takes 150 MB.
MEMORY = 1 << 29
# One source that keeps the process for so long without using the processor is not what keeps it.
PATIENCE = 900
# The exit status where BYTECODE or WHEEL fails, as in sysexits.h.
UNAVAILABLE = os.EX_IOERR
_STACK = 8 << 20
# Of 31.7 MB of bytecode (scikit-learn with its requirements) level 4 leaves 11.7 MB in 0.44 s, 6 leaves 11.4 MB in
# 0.71 s, 1 leaves 12.6 MB in 0.35 s.
_LEVEL = 4
# Constants are computed while a source is compiled (`"a" * 4000`), so a small one can have bytecode without end. Of
# real ones, what is above 64 KiB is up to 2.5 times as large as its source.
_MOST_GROWTH, _FREE_SIZE = 20, 1 << 16
_UNCHECKED_HASH = 0b01
_STORED = 0


def deflated(content: bytes) -> bytes:
    """Return `content` as a raw deflate stream."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(content) + compressor.flush()


def compiled(source: bytes, path: str) -> bytes | None:
    """Return a .pyc that Python loads without a look at the source (PEP 552).

    None where the source does not compile, or compiles to bytecode more than 20 times as large.

    Args:
        source: a Python file's content.
        path: the file's path in tracebacks.
    """
    try:
        body = marshal.dumps(compile(source, path, "exec", dont_inherit=True, optimize=0))
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError, SystemError):
        # As with pip, which installs such files too: templates, files for another Python, tests of parsers.
        return None
    if len(body) > _FREE_SIZE + _MOST_GROWTH * len(source):
        return None
    header = importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH.to_bytes(4, "little") + importlib.util.source_hash(source)
    return header + body


def _frame(raw: bytes, method: int, size: int, path: str) -> bytes:
    """Return the frame of a source.

    Args:
        raw: its bytes in the wheel.
        method: its zip method.
        size: its declared size.
        path: its path in the image.
    """
    try:
        # The reader that writes the wheel's layer refuses a source that differs from its declaration.
        source = raw if method == _STORED else zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, size + 1)
    except zlib.error:
        source = b"\0"  # which does not compile
    content = compiled(source, path)
    if content is None:
        return FRAME.pack(0, 0, 0)
    stream = deflated(content)
    return FRAME.pack(len(content), zlib.crc32(content), len(stream)) + stream


def _limit(what: int, amount: int) -> None:
    _, hard = resource.getrlimit(what)
    with suppress(ValueError, OSError):
        resource.setrlimit(what, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


def main() -> None:
    """Compile the sources of a wheel."""
    wheel, parent, seconds, total = map(int, sys.argv[1:])
    sources = json.load(sys.stdin)
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_STACK, _STACK)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, total)
    gc.disable()
    for offset, compressed, method, size, path in sources:
        if os.getppid() != parent:
            return
        # Both signals end the process, whatever it does.
        signal.setitimer(signal.ITIMER_PROF, seconds * (1 + size / (1 << 20)))
        signal.alarm(PATIENCE)
        try:
            raw = os.pread(wheel, compressed, offset)
        except OSError:
            sys.exit(UNAVAILABLE)
        frame = memoryview(_frame(raw, method, size, path))
        try:
            while frame:
                frame = frame[os.write(sys.stdout.fileno(), frame) :]
        except OSError:
            sys.exit(UNAVAILABLE)


if __name__ == "__main__":
    main()
