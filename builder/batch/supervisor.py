"""The supervisor: a process that forks a child for each piece of work, and watches it.

`builder.batch` starts it, as a fresh interpreter: it has one thread and has read nothing of a stranger's, so
that forking it is safe and costs milliseconds, with all that is slow to import imported once. It receives a piece of
work by its control socket, forks, measures what all processes of the work take together, and ends them all, whatever
ended the work. It knows nothing of versions, and reads nothing that the work writes.
"""

from __future__ import annotations

import ctypes
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
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from builder.budget import Bound, Budget
from builder.errors import ExitCode, Terminated
from builder.process import PREFIX, lock, remove_leftovers

if TYPE_CHECKING:
    from types import FrameType


TERMINATE = "terminate"
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
_PROC = Path("/proc")
_PAGE = resource.getpagesize()
_TICKS = os.sysconf("SC_CLK_TCK")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


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


def main(control: Connection, modules: Sequence[str]) -> None:
    """Do the work that comes by a connection until that closes.

    Args:
        control: `Work` comes by it with two descriptors, for the answers, and for stdout and stderr; the end of the
            work is sent back.
        modules: what to import beforehand.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _adopt_orphans()
    for name in modules:
        importlib.import_module(name)
    remove_leftovers()
    gc.freeze()
    while (received := _received(control)) is not None:
        work, descriptors = received
        end = _Watch(control, work).over(descriptors)
        if end is None:
            return
        control.send_bytes(json.dumps(asdict(end)).encode())


def _received(control: Connection) -> tuple[Work, list[int]] | None:
    """Return the next piece of work and its descriptors; None where there is no more."""
    try:
        work = control.recv()
        # A request to end that came when there was nothing left to end is the last that comes.
        return (work, [recv_handle(control), recv_handle(control)]) if isinstance(work, Work) else None
    except (OSError, EOFError):
        return None


class _Watch:
    """One piece of work, while it is done."""

    def __init__(self, control: Connection, work: Work) -> None:
        self._control = control
        self._work = work
        self._usage = _Usage()
        self._folder = ""
        self._pid = 0

    def over(self, descriptors: Sequence[int]) -> End | None:
        """Return how the work ended, with nothing of it left; None where the parent has ended meanwhile."""
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
            _kill_descendants(_END)
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
                if not self._is_to_terminate():
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

    def _is_to_terminate(self) -> bool:
        try:
            return bool(self._control.recv() == TERMINATE)
        except (OSError, EOFError):
            return False

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
        processes = _descendants(os.getpid())
        ours = [process for process in processes if _is_bounded(process)]
        engine = len(ours) < len(processes)
        child = next((process for process in ours if process.pid == pid), None)
        self.memory = sum(_memory_of(process) for process in ours)
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
        """Return the first bound that is exceeded, and the amount taken; None where all are kept."""
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
        _end_with_parent(parent)
        answers, output = descriptors
        os.set_inheritable(answers, False)  # noqa: FBT003  # the name says it
        _stand_alone(output, folder)
        _bound(work.budget)
        call: Callable[[int], int] = pickle.loads(work.call)  # noqa: S301  # see Work
        code = call(answers)
    except Terminated:
        code = ExitCode.TEMPORARY
    except BaseException:  # noqa: BLE001  # nothing above would handle it
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


# ---- all that descends from this process


@dataclass(frozen=True, slots=True)
class _Process:
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


def _adopt_orphans() -> None:
    """Become the parent of descendants whose parent has ended, so that none is lost."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _end_with_parent(parent: int) -> None:
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


def _descendants(root: int) -> list[_Process]:
    """Return the living processes that descend from one; proc(5) has the fields."""
    by_parent: dict[int, list[_Process]] = {}
    for status in _PROC.glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # The name is in parentheses, and may hold parentheses and blanks itself.
            fields = status.read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] == "Z" and int(fields[1]) != root:
                continue
            times = [int(field) / _TICKS for field in fields[11:15]]
            process = _Process(int(status.parent.name), int(fields[1]), times[0] + times[1], times[2] + times[3])
            by_parent.setdefault(process.parent, []).append(process)
    found: list[_Process] = []
    waiting = [root]
    while waiting:
        children = by_parent.pop(waiting.pop(), [])
        found += children
        waiting += [child.pid for child in children]
    return found


def _memory_of(process: _Process) -> int:
    """Return the bytes of memory that a process has and that are no file's; 0 where it has ended."""
    with suppress(OSError, ValueError, IndexError):
        _, resident, shared, *_ = (_PROC / str(process.pid) / "statm").read_text().split()
        return (int(resident) - int(shared)) * _PAGE
    return 0


def _is_bounded(process: _Process) -> bool:
    """Return whether a process has a limit of memory, which it inherits; True where that is unknown."""
    with suppress(OSError, AttributeError):
        return resource.prlimit(process.pid, resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY
    return True


def _kill_descendants(seconds: float) -> None:
    """Kill all that descends from this process, and reap what became its children.

    Args:
        seconds: how long to try, where a process may not be killed or does not end.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for process in _descendants(os.getpid()):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)
