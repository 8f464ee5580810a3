"""An artifact folder on this machine, which whoever logs models can write to as well.

MLflow's own repository for it looks at a path and then opens it, so that a link put there in between leads to any file
of the publisher's. Here every step is opened in turn without following links, and what was opened is what is listed and
copied. A second name of a file (a hard link) cannot be told from the file: Linux lets nobody make one of a file that
they may not read and write anyway, unless `fs.protected_hardlinks` was switched off.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from builder.errors import InvalidVersion
from builder.safe_open import open_beneath

if TYPE_CHECKING:
    from pathlib import Path

    from builder.models.roots import Folder

_CHUNK = 1 << 20
_SHOWN = 200
# What MLflow names a file that is still being written.
_UNFINISHED = ".artifact.uploading."


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder, as MLflow's repositories list them.

    Attributes:
        path: below the artifact folder.
        is_dir: whether it is a folder.
        file_size: bytes; None for a folder.
    """

    path: str
    is_dir: bool
    file_size: int | None


def there(folder: Folder) -> bool:
    """Return whether the artifact folder exists; OSError where its base cannot be opened is let through."""
    try:
        with open_beneath(folder.base, folder.beneath or ".") as descriptor:
            return descriptor is not None
    except FileNotFoundError:
        return False


def list_folder(folder: Folder, path: str) -> list[Entry]:
    """Return what is in a folder: nothing where there is no such folder.

    Args:
        folder: the artifact folder.
        path: of a folder below it; empty for itself.

    Raises:
        InvalidVersion: there is a link, or something that is neither a file nor a folder.
        OSError: the folder may not be read.
    """
    try:
        with open_beneath(folder.base, _joined(folder.beneath, path) or ".") as descriptor:
            if descriptor is None or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                return []
            names = [name for name in os.listdir(descriptor) if not name.startswith(_UNFINISHED)]  # noqa: PTH208 - a descriptor
            return [
                _entry(_joined(path, name), os.stat(name, dir_fd=descriptor, follow_symlinks=False)) for name in names
            ]
    except FileNotFoundError:
        # A run without artifacts has no folder; and a file that went while it was listed is not there.
        return []


def copy_file(folder: Folder, path: str, destination: Path, *, most: int) -> None:
    """Copy a file of an artifact folder.

    Args:
        folder: the artifact folder.
        path: of the file below it.
        destination: where to.
        most: bytes after which to stop, in case the file grows.

    Raises:
        InvalidVersion: there is a link on the way, or something else than a file.
        OSError: FileNotFoundError, or the file may not be read.
    """
    with open_beneath(folder.base, _joined(folder.beneath, path)) as descriptor:
        if descriptor is None:
            raise FileNotFoundError(2, os.strerror(2), path)
        _entry(path, os.fstat(descriptor), folders=False)
        with destination.open("wb") as copy:
            left = most
            while left > 0 and (chunk := os.read(descriptor, min(_CHUNK, left))):
                copy.write(chunk)
                left -= len(chunk)


def _entry(path: str, status: os.stat_result, *, folders: bool = True) -> Entry:
    if stat.S_ISREG(status.st_mode):
        return Entry(path, is_dir=False, file_size=status.st_size)
    if folders and stat.S_ISDIR(status.st_mode):
        return Entry(path, is_dir=True, file_size=None)
    what = "a link, and links are not followed" if stat.S_ISLNK(status.st_mode) else "neither a file nor a folder"
    message = f"The artifact {path[:_SHOWN]!r} is {what}."
    raise InvalidVersion(message, remedy="Log the file itself and register the model again.")


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name
