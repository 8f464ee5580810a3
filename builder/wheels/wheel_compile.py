"""The program that compiles a wheel's Python files; `builder.wheels.bytecode` runs it and nothing imports it for more.

What Python writes into a .pyc depends on what the process did before: which strings it has interned decides whether
two equal sets of strings in a source are one constant or two, and how often an object is referred to decides a bit of
its type (seen: 1 file of pandas' 1,440 and 2 of MLflow's 1,315, compiled in another order). So the files are compiled
in groups, each in a child forked from a process that has done nothing else; a group is a matter of the wheel alone,
and so is the result, whatever the number of processes.

It is started with the standard library alone: `python -S -P -s -B wheel_compile.py FD FIRST STEP SECONDS`. It reads
the groups as JSON from stdin, takes every STEP-th of them from FIRST on, reads the sources from the wheel open at FD,
gives each SECONDS of processor time and as many for each MiB of it, and writes a frame for each to stdout.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import marshal
import os
import resource
import signal
import struct
import sys
import time
import zlib
from contextlib import suppress
from typing import Any

# Number of the file, what became of it, processor time in microseconds, size and CRC-32 of the content, size of the
# deflate stream that follows.
FRAME = struct.Struct("<IBQIII")
COMPILED, NO_SOURCE, DIED = 0, 1, 2
# The largest source that was seen (6 MB, an API's client) takes 150 MB.
MEMORY = 1 << 29
_STACK = 8 << 20
# Of 31.7 MB of bytecode (scikit-learn with its requirements) level 4 leaves 11.7 MB in 0.44 s, 6 leaves 11.4 MB in
# 0.71 s, 1 leaves 12.6 MB in 0.35 s.
_LEVEL = 4
# Constants are computed while a source is compiled (`"a" * 4000`), so a small one can have bytecode without end. Of
# real ones, what is above 64 KiB is up to 2.5 times as large as its source.
_MOST_GROWTH, _FREE_SIZE = 20, 1 << 16
_UNCHECKED_HASH = 0b01
_STORED = 0


def identity() -> tuple[str, str]:
    """Return what decides a compiled file's bytes, as a word, and the tag in its name.

    The word names the interpreter's version and a digest of its magic number and of what its zlib makes of some text,
    since builds of zlib differ in what they write.
    """
    lines = (hashlib.sha256(b"%d" % number).hexdigest()[: 7 + number % 50] for number in range(2000))
    text = " ".join(lines).encode()
    state = hashlib.sha256(importlib.util.MAGIC_NUMBER)
    state.update(deflated(text * 2))
    info = sys.version_info
    version = f"{info.major}.{info.minor}.{info.micro}"
    if info.releaselevel != "final":
        version += f"-{info.releaselevel}{info.serial}"
    return f"{sys.implementation.name}-{version}-{state.hexdigest()[:12]}", str(sys.implementation.cache_tag)


def deflated(content: bytes) -> bytes:
    """Return `content` as a raw deflate stream."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(content) + compressor.flush()


def bytecode(source: bytes, path: str) -> bytes | None:
    """Return a .pyc that Python believes without looking at the source (PEP 552).

    None where the source does not compile, or to bytecode more than 20 times as large.

    Args:
        source: a Python file's content.
        path: where tracebacks say that it stands.
    """
    try:
        code = compile(source, path, "exec", dont_inherit=True, optimize=0)
        body = marshal.dumps(code)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError, SystemError):
        # As with pip, which installs such files too: templates, files for another Python, tests of parsers.
        return None
    if len(body) > _FREE_SIZE + _MOST_GROWTH * len(source):
        return None
    header = importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH.to_bytes(4, "little") + importlib.util.source_hash(source)
    return header + body


def _source(wheel: int, job: dict[str, Any]) -> bytes | None:
    raw = os.pread(wheel, job["compressed"], job["offset"])
    if job["method"] == _STORED:
        return raw
    try:
        # Whoever reads the wheel for its layer refuses it, where this is not what was declared.
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, job["size"] + 1)
    except zlib.error:
        return None


def _group(wheel: int, jobs: list[dict[str, Any]], seconds: int) -> None:
    for job in jobs:
        # Processor time of one file; the signal ends the process, whatever it does.
        signal.setitimer(signal.ITIMER_PROF, seconds * (1 + job["size"] / (1 << 20)))
        begin = time.process_time_ns()
        source = _source(wheel, job)
        compiled = bytecode(source, job["path"]) if source is not None else None
        stream = deflated(compiled) if compiled is not None else b""
        spent = (time.process_time_ns() - begin) // 1000
        if compiled is None:
            _write(FRAME.pack(job["number"], NO_SOURCE, spent, 0, 0, 0))
        else:
            head = FRAME.pack(job["number"], COMPILED, spent, len(compiled), zlib.crc32(compiled), len(stream))
            _write(head + stream)


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(sys.stdout.fileno(), view) :]


def _limit(what: int, amount: int) -> None:
    _, hard = resource.getrlimit(what)
    with suppress(ValueError, OSError):
        resource.setrlimit(what, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


def _main() -> None:
    if sys.argv[1:] == ["--identify"]:
        json.dump(identity(), sys.stdout)
        return
    wheel, first, step, seconds = map(int, sys.argv[1:])
    groups = json.load(sys.stdin)
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_STACK, _STACK)
    _limit(resource.RLIMIT_CORE, 0)
    gc.disable()
    gc.freeze()
    for jobs in groups[first::step]:
        child = os.fork()
        if not child:
            status = 1
            try:
                _group(wheel, jobs, seconds)
                status = 0
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        if ended:
            # A negative code is the signal that ended the child, of which only the sign is lost in the frame.
            _write(FRAME.pack(jobs[0]["number"], DIED, 0, abs(os.waitstatus_to_exitcode(ended)), 0, 0))
            return


if __name__ == "__main__":
    _main()
