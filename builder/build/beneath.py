"""Read a file beneath a folder that others have filled: no link is followed, no device opened, no bound passed."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from typing import TYPE_CHECKING

from builder.errors import InvalidVersion
from builder.safe_open import open_beneath

if TYPE_CHECKING:
    from pathlib import Path

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
