"""Waiting in tests: for events, with bounds that only a hang reaches, however busy the machine is."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from typing import Any

# Seconds. What is waited for comes within one on an idle machine; where it never comes, this is less than the bound of
# a whole test (`timeout` in pyproject.toml), and the test's own message is seen.
HANG = 300.0
# For a command that waits for whole publishes, or for namespaces to be gone; a test may have two of them.
LONG_HANG = 800.0


def ended(pid: int) -> bool:
    """Wait until a process has ended, ours or another's child; False where it still runs after `HANG`."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], HANG)[0])
    finally:
        os.close(process)


def growing(first: float) -> Iterator[float]:
    """Yield limits in seconds for what must begin before it is cut short: the next where it had not begun."""
    seconds = first
    while seconds < HANG:
        yield seconds
        seconds *= 4
    message = f"it did not begin within {seconds / 4:g} seconds"
    raise AssertionError(message)


def until(there: Callable[[], Any], seconds: float = HANG) -> Any:
    """Return what a function returns, once that is true; it is asked again and again, since nothing tells."""
    deadline = time.monotonic() + seconds
    while not (found := there()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
    return found
