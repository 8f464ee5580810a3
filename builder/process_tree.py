"""The processes that descend from one: what they take together, and their end. Linux; elsewhere there are none."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_PAGE = resource.getpagesize()
_TICKS = os.sysconf("SC_CLK_TCK")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Process:
    """One process.

    Attributes:
        pid: its number.
        parent: its parent's number.
        own: seconds of processor time that it took itself.
        children: seconds that its children took which have ended.
    """

    pid: int
    parent: int
    own: float
    children: float


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent has ended, so that none is lost."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: int) -> None:
    """Be killed when the parent ends.

    Args:
        parent: its number: one that ended before this call is noticed as well.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants(root: int) -> list[Process]:
    """Return the living processes that descend from one; proc(5) has the fields."""
    by_parent: dict[int, list[Process]] = {}
    for status in _PROC.glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # The name stands in parentheses and may hold some, and blanks.
            fields = status.read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] == "Z" and int(fields[1]) != root:
                continue
            times = [int(field) / _TICKS for field in fields[11:15]]
            process = Process(int(status.parent.name), int(fields[1]), times[0] + times[1], times[2] + times[3])
            by_parent.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    waiting = [root]
    while waiting:
        children = by_parent.pop(waiting.pop(), [])
        found += children
        waiting += [child.pid for child in children]
    return found


def memory_of(process: Process) -> int:
    """Return the bytes of memory that a process has and that are no file's; 0 where it has ended."""
    with suppress(OSError, ValueError, IndexError):
        _, resident, shared, *_ = (_PROC / str(process.pid) / "statm").read_text().split()
        return (int(resident) - int(shared)) * _PAGE
    return 0


def is_bounded(process: Process) -> bool:
    """Return whether a process has a limit of memory, which it inherits; True where it cannot be told."""
    with suppress(OSError, AttributeError):
        return resource.prlimit(process.pid, resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY
    return True


def kill_descendants(seconds: float) -> None:
    """Kill all that descends from this process, and reap what became its children.

    Args:
        seconds: how long to try, where a process may not be killed or does not end.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for process in descendants(os.getpid()):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)
