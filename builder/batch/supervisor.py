"""The process that has every version's work done in a child of its own, and watches it.

`builder.batch.children` starts it, as a fresh interpreter: it has one thread and has read nothing of a stranger's, so
that forking it is safe and costs milliseconds, with all that is slow to import imported once. It is told of a piece of
work by its control socket, forks, measures what all processes that come of it take together, and ends them all,
whatever ended the work. It knows nothing of versions, and reads nothing that the work writes.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import math
import os
import pickle
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from builder.budget import Bound, Budget
from builder.errors import ExitCode, Terminated
from builder.process import (
    PREFIX,
    adopt_orphans,
    descendants,
    end_with_parent,
    is_bounded,
    kill_descendants,
    lock,
    memory_of,
    remove_leftovers,
)

if TYPE_CHECKING:
    from types import FrameType


HEAD = struct.Struct(">I")
TERMINATE = b"T"
# Seconds that work has between a request to end and its end; it has an outcome to record.
GRACE = 20.0
_END = 10.0
# Measuring takes at most a fiftieth of the time, walking folders too.
_EVERY = 0.2
_SHARE = 50
_MOMENT = 0.002
_OOM_SCORE = Path("/proc/self/oom_score_adj")
# What a process may reserve beyond what it may have: stacks of threads, what an allocator keeps.
_RESERVED = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A piece of work. Only a process that is trusted may send one: it is code.

    Attributes:
        call: pickled: what the child calls with the descriptor that it answers on, and whose result is its exit code.
        budget: what it may take.
        folders: where it writes, beside a temporary folder of its own.
    """

    call: bytes
    budget: Budget
    folders: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How work ended.

    Attributes:
        code: its exit code; negative is the signal that ended it.
        bound: the setting whose bound it exceeded, for which it was ended; empty where it did not.
        amount: what it had taken then, in seconds or bytes.
    """

    code: int
    bound: Bound | Literal[""] = ""
    amount: float = 0.0


def main(control: socket.socket, modules: Sequence[str]) -> None:
    """Do the work that comes by a socket until that closes.

    Args:
        control: bytes with a length before them are work, sent with the descriptors of what is answered on and of what
            stands for stdout and stderr; what is sent back is the end of the work.
        modules: what to import beforehand.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    adopt_orphans()
    for name in modules:
        importlib.import_module(name)
    remove_leftovers()
    gc.freeze()
    while (received := _received(control)) is not None:
        work, descriptors = received
        end = _Watch(control, work).over(descriptors)
        if end is None:
            return
        text = json.dumps({"code": end.code, "bound": end.bound, "amount": end.amount}).encode()
        control.sendall(HEAD.pack(len(text)) + text)


def _received(control: socket.socket) -> tuple[Work, list[int]] | None:
    """Return the next piece of work and its descriptors; None where there is no more."""
    try:
        head, descriptors, _, _ = socket.recv_fds(control, HEAD.size, 2)
        # A request to end that came when there was nothing left to end is the last that comes.
        if len(head) != HEAD.size:
            return None
        (length,) = HEAD.unpack(head)
        data = bytearray()
        while len(data) < length:
            chunk = control.recv(length - len(data))
            if not chunk:
                return None
            data += chunk
    except OSError:
        return None
    work = pickle.loads(bytes(data))  # noqa: S301  # see Work
    return work, descriptors


class _Watch:
    """One piece of work, while it is done."""

    def __init__(self, control: socket.socket, work: Work) -> None:
        self._control = control
        self._work = work
        self._usage = _Usage()
        self._folder = ""
        self._pid = 0

    def over(self, descriptors: Sequence[int]) -> End | None:
        """Return how the work ended, with nothing of it left; None where whoever wanted it has gone meanwhile."""
        self._folder = tempfile.mkdtemp(prefix=f"{PREFIX}version-")
        # The child inherits the lock, and it goes when the child does.
        locked = lock(Path(self._folder))
        alive, held = os.pipe()
        here = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            os.close(alive)
            self._control.close()
            _be_child(self._work, descriptors, self._folder, here)
        os.close(held)
        os.close(locked)
        for descriptor in descriptors:
            os.close(descriptor)
        try:
            return self._watched(alive)
        finally:
            os.close(alive)
            with suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            kill_descendants(_END)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _watched(self, alive: int) -> End | None:
        waiting = [alive, self._control.fileno()]
        killed_at = math.inf
        closed = math.inf
        while not self._exited():
            # What holds `alive` open has ended, and a moment is left of it; who closes it on purpose is watched on.
            ending = alive not in waiting and time.monotonic() - closed < 1
            ready = select.select(waiting, [], [], _MOMENT if ending else self._usage.pause)[0]
            if alive in ready:
                waiting.remove(alive)
                closed = time.monotonic()
            if ending or alive in ready:
                continue
            if self._control.fileno() in ready:
                if self._control.recv(1) != TERMINATE:
                    return None
                os.kill(self._pid, signal.SIGTERM)
                waiting = [descriptor for descriptor in waiting if descriptor == alive]
                killed_at = time.monotonic() + GRACE
            if time.monotonic() > killed_at:
                return End(code=-signal.SIGKILL, bound="")
            self._usage.measure(self._pid, (Path(self._folder), *self._work.folders))
            if exceeded := self._usage.exceeded(self._work.budget):
                return End(code=-signal.SIGKILL, bound=exceeded[0], amount=exceeded[1])
        return End(code=self._code())

    def _exited(self) -> bool:
        """Return whether the child has ended; it stays a zombie, so that its group's number is not given away."""
        return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _code(self) -> int:
        """Return the exit code of the child, which has ended and stays a zombie; negative is a signal."""
        ended = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        if ended is None:
            raise AssertionError
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


@dataclass
class _Usage:
    """What work has taken so far.

    What an engine takes is no part of it: it has bounds of its own, its steps may need much, and it is known by having
    no limit of memory (`builder.process`).
    """

    pause: float = _EVERY
    seconds: float = 0.0
    processor: float = 0.0
    memory: int = 0
    size: int = 0
    _at: float = field(default_factory=time.monotonic)
    _walk_at: float = field(default_factory=time.monotonic)
    _total: float = 0.0
    _own: float = 0.0
    _engine: bool = False

    def measure(self, pid: int, folders: Sequence[Path]) -> None:
        """Measure what descends from this process, the child `pid` first of all."""
        began = time.monotonic()
        processes = descendants(os.getpid())
        ours = [process for process in processes if is_bounded(process)]
        engine = len(ours) < len(processes)
        child = next((process for process in ours if process.pid == pid), None)
        self.memory = sum(memory_of(process) for process in ours)
        total = sum(process.own + process.children for process in ours)
        own = child.own if child else self._own
        # An engine's processor time is its parent's as soon as it has ended.
        self.processor += max(0.0, own - self._own if engine or self._engine else total - self._total)
        self.seconds += 0.0 if engine else began - self._at
        if not engine and began > self._walk_at:
            self.size = sum(map(_size, folders))
            self._walk_at = time.monotonic() + max(10 * _EVERY, _SHARE * (time.monotonic() - began))
        self._at, self._total, self._own, self._engine = began, total, own, engine
        self.pause = max(_EVERY, _SHARE * (time.monotonic() - began))

    def exceeded(self, budget: Budget) -> tuple[Bound, float] | None:
        """Return the first bound that is exceeded, and by which amount; None where there is none."""
        taken: tuple[tuple[Bound, float, float], ...] = (
            ("VERSION_MEMORY", self.memory, budget.memory),
            ("VERSION_PROCESSOR_TIME", self.processor, budget.processor),
            ("VERSION_BYTES", self.size, budget.size),
            ("VERSION_TIMEOUT", self.seconds, budget.seconds),
        )
        return next(((bound, amount) for bound, amount, most in taken if amount > most), None)


def _size(folder: Path) -> int:
    """Return the bytes that a folder takes on disk; its files come and go while they are counted."""
    size = 0
    waiting = [str(folder)]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
    return size


def _be_child(work: Work, descriptors: Sequence[int], folder: str, parent: int) -> None:
    """Do the work, and end this process."""
    code: int = ExitCode.SOFTWARE
    try:
        os.setsid()
        end_with_parent(parent)
        answers, output = descriptors
        os.set_inheritable(answers, False)  # noqa: FBT003  # the name says it
        _stand_alone(output, folder)
        _bound(work.budget)
        call: Callable[[int], int] = pickle.loads(work.call)  # noqa: S301  # see Work
        code = call(answers)
    except Terminated:
        code = ExitCode.TEMPORARY
    except BaseException:  # noqa: BLE001  # there is nobody above
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stderr.flush()
        # Nobody waits for threads, and nothing that another process has begun is ended here as well.
        os._exit(code)


def _stand_alone(output: int, folder: str) -> None:
    """Take streams, signals and a temporary folder of one's own."""
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, stream in ((null, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, stream)
    os.close(output)
    os.close(null)
    faulthandler.enable()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _terminated)
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise Terminated


def _bound(budget: Budget) -> None:
    """Limit what this process, and what it starts, may reserve; whatever is started can lift the limit of memory.

    Between two measurements a process can take gigabytes. Where memory runs out nevertheless, the kernel should choose
    this process and not its parents.
    """
    with suppress(OSError):
        _OOM_SCORE.write_text("500")
    for what, amount in ((resource.RLIMIT_DATA, budget.memory + _RESERVED), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(what)
        with suppress(ValueError, OSError):
            resource.setrlimit(what, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))
