"""Files in a folder that a hostile process may have written, and may still write; and the rules for their paths.

Nothing here follows a link, opens anything but a file or a folder, or waits for one: a path is opened component by
component, relative to the one before it, and what was opened is what is checked.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from builder.errors import InvalidVersion

CHUNK = 1 << 20
# A folder on the way is only passed through; where the system has no O_PATH it has to be readable.
_PASSAGE = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: a FIFO that takes the file's place between the look and the opening would be waited for.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Unsafe(Exception):
    """A path is missing, is a link, or is neither file nor folder where it should be; the message names it."""


def _open(here: int, parts: Sequence[str]) -> int:
    """Open a file or a folder below another folder, and return its descriptor.

    Args:
        here: descriptor of the other folder; it is closed.
        parts: the folders below it, and last the file; each a plain name. None for the folder itself.

    Raises:
        Unsafe: a part is not a plain name, a link, or of the wrong kind.
        OSError: a part is missing, or cannot be opened.
    """
    try:
        *folders, name = [_plain(part) for part in parts] or ["."]
        for folder in folders:
            try:
                child = os.open(folder, _PASSAGE | os.O_NOFOLLOW, dir_fd=here)
            except NotADirectoryError as error:
                message = f"{folder} cannot be opened as a folder: {error.strerror}"
                raise Unsafe(message) from error
            os.close(here)
            here = child
        # A device may do something when it is opened, so it is looked at first.
        _check_kind(os.stat(name, dir_fd=here, follow_symlinks=False), name)
        file = os.open(name, _FILE, dir_fd=here)
    finally:
        os.close(here)
    try:
        _check_kind(os.fstat(file), name)
    except Unsafe:
        os.close(file)
        raise
    return file


def _plain(part: str) -> str:
    if not part or part in {".", ".."} or "/" in part or "\0" in part:
        message = f"{part!r} is not a file's name"
        raise Unsafe(message)
    return part


def _check_kind(status: os.stat_result, name: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        message = f"{name} is not a regular file but a link"
        raise Unsafe(message)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        message = f"{name} is not a regular file"
        raise Unsafe(message)


# ---- a version's artifacts


@contextmanager
def open_beneath(root: str | os.PathLike[str], relative: str) -> Iterator[int | None]:
    """Open the file or folder `root / relative`, and yield its descriptor, or None where there is nothing.

    Args:
        root: a folder; links on the way to it are followed.
        relative: a path with forward slashes and no `..`; `.` for the folder itself.

    Raises:
        InvalidVersion: there is a link on the way, or something that cannot be opened.
    """
    descriptor = None
    here = os.open(root, _PASSAGE)
    try:
        descriptor = _open(here, [] if relative == "." else relative.split("/"))
    except FileNotFoundError:
        pass
    except (OSError, Unsafe) as error:
        why = error.strerror if isinstance(error, OSError) else error
        message = f"{relative!r} of the version's artifacts cannot be read: {why}."
        raise InvalidVersion(message, remedy="It must be a file in a folder; links are not followed.") from error
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


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
        _check_regular(descriptor, relative)
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
        _check_regular(descriptor, relative)
        with open(descriptor, "rb", buffering=0, closefd=False) as content:  # a descriptor
            return hashlib.file_digest(content, "sha256").hexdigest(), os.fstat(descriptor).st_size


def _check_regular(descriptor: int, relative: str) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        message = f"{relative!r} of the version's artifacts is not a file."
        raise InvalidVersion(message, remedy="Log a file under this name.")


# ---- image layouts, and files of a context


@contextmanager
def opened(folder: Path, *parts: str) -> Iterator[tuple[int, int]]:
    """Open a regular file below a folder, and yield its descriptor and its size in bytes.

    Args:
        folder: the last component may not be a link; those before it are the caller's, and trusted.
        parts: the folders below it, and last the file; each a plain name.

    Raises:
        Unsafe: a part is missing, a link, or of the wrong kind.
    """
    where = Path(folder.name, *parts)
    try:
        file = _open(os.open(folder, _PASSAGE | os.O_NOFOLLOW), parts)
    except OSError as error:
        message = f"{where} cannot be opened as a file: {error.strerror}"
        raise Unsafe(message) from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            message = f"{where} is not a regular file"
            raise Unsafe(message)
        yield file, status.st_size
    finally:
        os.close(file)


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


# ---- rules for paths

# A relative path that means the same in a Dockerfile, a shell and a requirements file, and needs no quoting there.
SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.@+-]*)*")
MOST_FOLDERS_DEEP = 64
# Linux's own limits, in bytes.
_LONGEST_PATH = 3000
_LONGEST_COMPONENT = 255
# Control characters, surrogates that no file name can hold, and Unicode's line and paragraph separators.
_REFUSED_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
_SHOWN = 200


def checked_path(path: str) -> str:
    """Return an artifact's path in Unicode's normal form C, if a file may have it in the context.

    Args:
        path: the path as an artifact store gave it.

    Raises:
        InvalidVersion: the path is absolute, has an empty, `.` or `..` component, a backslash, a control character or
            a line break, or is longer than a file system takes.
    """
    problem = path_problem(path)
    if problem:
        message = f"The artifact {path[:_SHOWN]!r} cannot be taken into the context: {problem}."
        raise InvalidVersion(message, remedy="Log the file under another name and register the model again.")
    return unicodedata.normalize("NFC", path)


def path_problem(path: str) -> str:
    """Return what is wrong with an artifact's path; the empty string for nothing."""
    parts = path.split("/")
    problems = {
        "its path has a control character or a line break": any(
            unicodedata.category(character) in _REFUSED_CATEGORIES for character in path
        ),
        "its path has a backslash": "\\" in path,
        "its path is absolute": path.startswith("/"),
        "its path has a '..' and may leave the context": ".." in parts,
        "its path has a component that is empty or '.'": "." in parts or "" in parts,
        f"its path is more than {MOST_FOLDERS_DEEP} folders deep": len(parts) > MOST_FOLDERS_DEEP,
        "its path is longer than a file system takes": _too_long(path),
    }
    return next((problem for problem, there in problems.items() if there), "")


def _too_long(path: str) -> bool:
    encoded = unicodedata.normalize("NFC", path).encode("utf-8", "surrogatepass")
    return len(encoded) > _LONGEST_PATH or any(len(part) > _LONGEST_COMPONENT for part in encoded.split(b"/"))
