"""What a program in a Pod takes, seen from the node: its start, its end, its memory, its processor time.

The node of scripts/cluster is this machine, so the processes of its containers are in /proc here.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_PROC = Path("/proc")
_TICK = os.sysconf("SC_CLK_TCK")
_LOOK = 0.01
_MEASURE = 0.02


@dataclass
class Ran:
    """A program that has run.

    Attributes:
        started: when, in seconds since the epoch; to a hundredth.
        ended: when.
        peak: the most memory it held, in bytes (VmHWM).
        processor: processor seconds.
    """

    started: float = 0.0
    ended: float = 0.0
    peak: int = 0
    processor: float = 0.0
    _gone: threading.Event = field(default_factory=threading.Event)

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return self.ended - self.started

    def wait(self, seconds: float = 600) -> None:
        """Wait for its end."""
        if not self._gone.wait(seconds):
            message = "the program in the Pod does not end, or was never seen"
            raise TimeoutError(message)


@contextlib.contextmanager
def watched(node: str, arguments: Collection[str]) -> Iterator[Ran]:
    """Watch for the next program of the builder image on a node, from here to its end.

    Args:
        node: its name, which is the control group of all its Pods.
        arguments: words of the program's command line, such as `sweep`.
    """
    ran, stop = Ran(), threading.Event()
    words = {word.encode() for word in arguments}
    before = set(_pids())

    def watch() -> None:
        while not stop.wait(_LOOK):
            for pid in set(_pids()) - before:
                command = _read(pid, "cmdline")
                if not command:
                    continue  # not yet, or no longer
                if (
                    words <= set(command.split(b"\0"))
                    and b"python" in command
                    and node in _read(pid, "cgroup").decode()
                ):
                    _follow(pid, ran)
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield ran
    finally:
        stop.set()


def processor_of(uri: str) -> float:
    """Return the processor seconds so far of the server that listens at an address of this machine, with its workers.

    Args:
        uri: ends in the port, which is in the command line of the server.
    """
    words = [b"--port", uri.rpartition(":")[2].encode()]
    found = {pid: _stat(pid) for pid in _pids()}
    sessions = {
        fields[3]
        for pid, fields in found.items()
        if fields and b"\0".join(words) in _read(pid, "cmdline") and b"mlflow" in _read(pid, "cmdline")
    }
    ticks = (int(fields[11]) + int(fields[12]) for fields in found.values() if fields and fields[3] in sessions)
    return sum(ticks) / _TICK


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; none where it has ended."""
    # The name, in parentheses, may hold anything.
    return _read(pid, "stat").decode(errors="replace").rpartition(")")[2].split()


def _follow(pid: int, ran: Ran) -> None:
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    descriptor = os.pidfd_open(pid)
    try:
        while True:
            with contextlib.suppress(IndexError, ValueError):
                fields = _stat(pid)
                ran.started = booted + int(fields[19]) / _TICK
                ran.processor = (int(fields[11]) + int(fields[12])) / _TICK
            for line in _read(pid, "status").decode().splitlines():
                if line.startswith("VmHWM:"):
                    ran.peak = int(line.split()[1]) * 1024
            if select.select([descriptor], [], [], _MEASURE)[0]:
                ran.ended = time.time()
                return
    finally:
        os.close(descriptor)
        ran._gone.set()  # noqa: SLF001 - its own module


def _pids() -> list[int]:
    return [int(name) for name in os.listdir(_PROC) if name.isdigit()]  # noqa: PTH208 - often, names alone


def _read(pid: int, file: str) -> bytes:
    try:
        return (_PROC / str(pid) / file).read_bytes()
    except OSError:
        return b""
