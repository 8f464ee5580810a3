"""Files in a folder that a hostile process may have written, and may still write.

Nothing here follows a link, opens anything but a regular file, or waits for one: a folder is opened component by
component, relative to the one before it, and what was opened is what is checked.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO that takes the file's place between the look and the opening would be waited for.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
CHUNK = 1 << 20


class Unsafe(Exception):
    """A path is missing, is a link, or is neither file nor folder where it should be; the message names it."""


@contextlib.contextmanager
def opened(folder: Path, *parts: str) -> Iterator[tuple[int, int]]:
    """Open a regular file below a folder, and give its descriptor and its size in bytes.

    Args:
        folder: the last component may not be a link; those before it are the caller's, and trusted.
        parts: the folders below it, and last the file; each a plain name.

    Raises:
        Unsafe: a part is missing, a link, or of the wrong kind.
    """
    with contextlib.ExitStack() as stack:
        where = Path(folder.name)
        try:
            here = os.open(folder, _FOLDER)
            stack.callback(os.close, here)
            for part in parts[:-1]:
                where /= part
                here = os.open(_plain(part), _FOLDER, dir_fd=here)
                stack.callback(os.close, here)
            where /= parts[-1]
            # A device may do something when it is opened, so it is looked at first.
            _regular(os.stat(_plain(parts[-1]), dir_fd=here, follow_symlinks=False), where)
            file = os.open(parts[-1], _FILE, dir_fd=here)
            stack.callback(os.close, file)
            status = os.fstat(file)
        except OSError as error:
            message = f"{where} cannot be opened as what it should be: {error.strerror}"
            raise Unsafe(message) from error
        _regular(status, where)
        yield file, status.st_size


def chunks(file: int, limit: int) -> Iterator[bytes]:
    """Yield a file's bytes from its beginning, at most `limit` of them and one more where it holds more."""
    offset = 0
    while offset <= limit and (chunk := os.pread(file, min(CHUNK, limit + 1 - offset), offset)):
        offset += len(chunk)
        yield chunk


def is_hollow(file: int, size: int) -> bool:
    """Return whether a file of `size` bytes has more holes than bytes that somebody wrote: lseek(2), SEEK_DATA.

    Where a file system does not tell, a file has none.
    """
    written, at = 0, 0
    while 2 * written < size:
        try:
            start = os.lseek(file, at, os.SEEK_DATA)
            at = os.lseek(file, start, os.SEEK_HOLE)
        except OSError:  # ENXIO: nothing but holes from here on
            return True
        written += at - start
    return False


def read(folder: Path, *parts: str, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes below a folder.

    Raises:
        Unsafe: as `opened`, or the file is larger.
    """
    with opened(folder, *parts) as (file, _):
        content = b"".join(chunks(file, limit))
    if len(content) > limit:
        message = f"{Path(folder.name, *parts)} is larger than {limit} bytes"
        raise Unsafe(message)
    return content


def _plain(part: str) -> str:
    if not part or part in {".", ".."} or "/" in part or "\0" in part:
        message = f"{part!r} is not a file's name"
        raise Unsafe(message)
    return part


def _regular(status: os.stat_result, where: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        message = f"{where} is not a regular file"
        raise Unsafe(message)
