"""How much memory a job takes: its own processes, and what a daemon runs for it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

_PERIOD = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


class Peak:
    """The most memory that some processes held together.

    Attributes:
        bytes: the largest sum of resident sets seen; pages that two processes share count twice.
    """

    def __init__(self) -> None:
        self.bytes = 0


@contextlib.contextmanager
def peak_memory(daemon: str) -> Iterator[Peak]:
    """Watch the processes that this one starts meanwhile, and all that descends from them, ten times a second.

    Args:
        daemon: a folder that is named in the command lines of a daemon and its shims, whose processes and containers
            are counted too; empty for none.
    """
    peak, stop = Peak(), threading.Event()
    before = {pid for pid, (parent, _) in _processes().items() if parent == os.getpid()}
    marked: dict[int, bool] = {}

    def watch() -> None:
        while not stop.wait(_PERIOD):
            processes = _processes()
            roots = {pid for pid, (parent, _) in processes.items() if parent == os.getpid()} - before
            if daemon:
                for pid in processes:
                    if pid not in marked:
                        marked[pid] = pid != os.getpid() and _is_named(pid, daemon)
                roots |= {pid for pid in processes if marked[pid]}
            peak.bytes = max(peak.bytes, _PAGE * _resident(processes, roots))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _processes() -> dict[int, tuple[int, int]]:
    """Return the parent and the resident pages of every process."""
    found = {}
    for entry in os.listdir(_PROC):  # noqa: PTH208 - ten times a second, names alone
        if entry.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                # The name, in parentheses, may hold anything.
                fields = (_PROC / entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                found[int(entry)] = (int(fields[1]), int(fields[21]))
    return found


def _resident(processes: dict[int, tuple[int, int]], roots: set[int]) -> int:
    """Return the resident pages of the roots and their descendants."""
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in processes.items():
        children.setdefault(parent, []).append(pid)
    seen, waiting = set[int](), list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in seen:
            seen.add(pid)
            waiting += children.get(pid, [])
    return sum(processes[pid][1] for pid in seen)


def _is_named(pid: int, text: str) -> bool:
    try:
        return text.encode() in (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
