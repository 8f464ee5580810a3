"""Temporary folders that a killed process of this program left; each is locked as long as its process lives."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PREFIX = "model-image-builder-"
# Seconds between the making of a folder and its lock, with room for a machine that is busy.
_YOUNG = 60.0


def lock(folder: Path) -> int:
    """Lock a folder, and return the descriptor that holds the lock until the last process with it has ended.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it is no folder, or cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def remove_leftovers() -> int:
    """Remove what this user's killed processes left in the temporary folder, and return how many folders there were."""
    removed = 0
    with suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with suppress(OSError):
                removed += _removed(folder)
    return removed


def _removed(folder: Path) -> bool:
    descriptor = lock(folder)
    try:
        status = os.fstat(descriptor)
        ours = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == stat.S_IRWXU
        if not ours or time.time() - status.st_mtime < _YOUNG:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return True
    finally:
        os.close(descriptor)
