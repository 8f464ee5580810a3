"""Open a path below a folder that others can write to: step by step, no link followed, no device waited for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from builder.errors import InvalidVersion

# A folder on the way is only passed through; where the system has no O_PATH it has to be readable.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY


@contextmanager
def open_beneath(root: str | os.PathLike[str], relative: str) -> Iterator[int | None]:
    """Open `root / relative` for reading, and yield its descriptor, or None where there is nothing.

    Args:
        root: a folder; links on the way to it are followed.
        relative: a path with forward slashes and no `..`; `.` for the folder itself.

    Raises:
        InvalidVersion: there is a link on the way, or something that cannot be opened.
    """
    descriptor = os.open(root, _FOLDER)
    try:
        *folders, name = relative.split("/")
        try:
            for folder in folders:
                descriptor = _step(descriptor, folder, _FOLDER)
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
