"""Files in a folder that a hostile process may have written, and may still write.

Nothing here follows a link, opens anything but a regular file, or waits for one: a folder is opened component by
component, relative to the one before it, and what was opened is what is checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from builder.errors import InvalidVersion

# A folder on the way is only passed through; where the system has no O_PATH it has to be readable.
_PASSAGE = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY


@contextmanager
def open_beneath(root: str | os.PathLike[str], relative: str) -> Iterator[int | None]:
    """Open `root / relative` for reading, and yield its descriptor, or None where there is nothing.

    Args:
        root: a folder; links on the way to it are followed.
        relative: a path with forward slashes and no `..`; `.` for the folder itself.

    Raises:
        InvalidVersion: there is a link on the way, or something that cannot be opened.
    """
    descriptor = os.open(root, _PASSAGE)
    try:
        *folders, name = relative.split("/")
        try:
            for folder in folders:
                descriptor = _step(descriptor, folder, _PASSAGE)
            descriptor = _step(descriptor, name, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            yield None
        except OSError as error:
            message = f"{relative!r} of the version's artifacts cannot be read: {error.strerror}."
            raise InvalidVersion(message, remedy="It must be a file in a folder; links are not followed.") from error
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def _step(parent: int, name: str, flags: int) -> int:
    child = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    os.close(parent)
    return child


# A relative path that means the same in a Dockerfile, a shell and a requirements file.
SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.@+-]*)*")


def read_beneath(root: Path, relative: str, limit: int) -> bytes | None:
    """Return the content of the file `root / relative`, or None where there is none.

    Args:
        root: a folder.
        relative: a path with forward slashes and no `..`.
        limit: the most bytes to read.

    Raises:
        InvalidVersion: there is a link on the way, something else than a file, or a file that is larger.
    """
    with open_beneath(root, relative) as descriptor:
        if descriptor is None:
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            message = f"{relative!r} of the version's artifacts is not a file."
            raise InvalidVersion(message, remedy="Log a file under this name.")
        content = bytearray()
        while len(content) <= limit and (chunk := os.read(descriptor, limit + 1 - len(content))):
            content += chunk
        if len(content) > limit:
            message = f"{relative!r} of the version's artifacts is larger than {limit:,} bytes."
            raise InvalidVersion(message, remedy="Log a smaller one.")
        return bytes(content)


def exists_beneath(root: Path, relative: str) -> bool:
    """Return whether `root / relative` is a file or a folder, and no link on the way to it."""
    try:
        with open_beneath(root, relative) as descriptor:
            return descriptor is not None
    except InvalidVersion:
        return False


def digest_beneath(root: Path, relative: str) -> tuple[str, int] | None:
    """Return the SHA-256 (64 hexadecimal digits) and the bytes of the file `root / relative`, or None for none.

    Raises:
        InvalidVersion: there is a link on the way, or something else than a file.
    """
    with open_beneath(root, relative) as descriptor:
        if descriptor is None:
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            message = f"{relative!r} of the version's artifacts is not a file."
            raise InvalidVersion(message, remedy="Log a file under this name.")
        with open(descriptor, "rb", buffering=0, closefd=False) as content:  # a descriptor
            return hashlib.file_digest(content, "sha256").hexdigest(), os.fstat(descriptor).st_size


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
