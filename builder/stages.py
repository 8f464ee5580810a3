"""Where the time of a publish goes: seconds by stage, told in one line of the log at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_seconds: dict[str, float] = {}


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the time that passes inside as a stage's; stages may overlap, and several threads may be in one."""
    began = time.monotonic()
    try:
        yield
    finally:
        with _lock:
            _seconds[name] = _seconds.get(name, 0.0) + time.monotonic() - began


def taken() -> dict[str, float]:
    """Return the seconds of each stage, and begin anew."""
    with _lock:
        seconds = {name: round(value, 3) for name, value in _seconds.items()}
        _seconds.clear()
    return seconds
