"""Where the time of a publish goes: seconds by stage, told in one line of the log at its end; and how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Meter(Protocol):
    """Is told what moves, from any thread, some times for each MiB."""

    def __call__(self, what: str, done: int, more: int) -> None:
        """Take note.

        Args:
            what: `wheels` and `uploads` are in bytes, `layers` are counted.
            done: how much has moved since it was told last; fewer than none where it begins again.
            more: how much is known to have to move beside what was known.
        """
        ...


_meter: ContextVar[Meter | None] = ContextVar("meter", default=None)
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


@contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Tell a meter what moves in the context, in threads that are begun there as well."""
    token = _meter.set(meter)
    try:
        yield
    finally:
        _meter.reset(token)


def moved(what: str, done: int = 0, *, more: int = 0) -> None:
    """Tell the meter of this context, if there is one; see `Meter`."""
    meter = _meter.get()
    if meter:
        meter(what, done, more)
