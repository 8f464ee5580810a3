"""The files that a hook leaves: dominostats.json for Domino's dashboard, and a result for programs.

Each is replaced whole or not at all. What others wrote into dominostats.json stays; a file that cannot be read as a
flat JSON object is left as it is.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

STATS = "dominostats.json"
_MOST_BYTES = 10 << 20


def add_stats(path: Path, values: Mapping[str, object]) -> str:
    """Add values to a stats file, and return why that was not possible; empty if it was.

    Args:
        path: the file; it need not exist.
        values: by the name of the dashboard's column; an `error` of an earlier failure goes when they have none.
    """
    try:
        there = _read(path)
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return f"{path} is left as it is: {why}"
    if there.get("state") in {"failed", "running"}:
        there = {name: value for name, value in there.items() if name not in {"error", "exit_code"}}
    return write(path, {**there, **values})


def write(path: Path, values: Mapping[str, object]) -> str:
    """Write a JSON file, whole or not at all, and return why that was not possible; empty if it was."""
    text = json.dumps(values, indent=2) + "\n"
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(_mode(path))
        Path(temporary).replace(path)
    except OSError as error:
        with suppress(OSError):
            Path(temporary).unlink()
        return f"{path} cannot be written: {error.strerror}"
    return ""


def _read(path: Path) -> dict[str, Any]:
    """Return what a stats file holds; nothing if it does not exist.

    Raises:
        ValueError: it is no JSON object, or has more than 10 MiB.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            message = "it is no file"
            raise ValueError(message)
        content = file.read(_MOST_BYTES + 1)
    try:
        found = json.loads(content) if len(content) <= _MOST_BYTES else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        message = "it holds something else than a JSON object"
        raise ValueError(message)  # noqa: TRY004  # the type is not the caller's fault
    return found


def _mode(path: Path) -> int:
    """Return the mode of a file that is replaced, or that of a new one."""
    with suppress(OSError):
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask
