"""What an author's input does to a reader, seen from outside: in a process that may die of it."""

import multiprocessing
import os
import resource
import signal
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection

from builder.errors import BuilderError

MIB = 1 << 20
# What the issue allows an input. The process gets more, so that a test tells how much it was.
SECONDS, MEMORY = 1.0, 256 * MIB
_MOST_SECONDS, _MOST_MEMORY = 20, 1024 * MIB

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hypothesis", "yaml", "builder.wheels.requirements", "builder.wheels.wheel"])

_REFERENCE_SECONDS = 0.045


def slowness(share: float = 1.0) -> float:
    """Return how many times the processor time of a quiet machine things take here now; 1 at least.

    Two busy threads of one core take about twice as much of it each.

    Args:
        share: of the work that this is measured with.
    """
    begun = time.thread_time()
    sum(number * number for number in range(int(1_000_000 * share)))
    return max(1.0, (time.thread_time() - begun) / (share * _REFERENCE_SECONDS))


def quick(took: float, seconds: float = SECONDS, *, before: float = 1.0) -> bool:
    """Return whether something took less than some seconds of processor time, as a quiet machine has them.

    Args:
        took: processor time, just now.
        seconds: what it may take.
        before: the slowness before it.
    """
    return took < seconds or took < seconds * max(before, slowness())


@dataclass(frozen=True)
class Outcome:
    """How it ended: an error's type and text, its exit code where it is typed, or a signal; and what it took."""

    error: str = ""
    message: str = ""
    exit_code: int = 0
    signal: str = ""
    seconds: float = 0.0
    memory: int = 0
    slowness: float = 1.0

    def check(self, *, exit_code: int = 65, says: str = "", seconds: float = SECONDS):
        assert not self.signal, f"ended by {self.signal}"
        assert self.exit_code == exit_code, f"{self.error}: {self.message}"
        assert says in self.message
        assert self.seconds < seconds * self.slowness
        assert self.memory < MEMORY


def bounded(function, *arguments, seconds: int = _MOST_SECONDS) -> Outcome:
    """Return what became of a call of a module's function in a process of its own.

    Args:
        function: what is called.
        arguments: its arguments, which can be pickled.
        seconds: processor time after which it is ended.
    """
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_run, args=(theirs, seconds, function, arguments))
    process.start()
    theirs.close()
    try:
        outcome = ours.recv()
    except EOFError:
        outcome = None
    process.join()
    if outcome is None:
        code = process.exitcode or 0
        return Outcome(signal=signal.Signals(-code).name if code < 0 else f"exit {code}")
    return outcome


def _run(pipe: Connection, seconds: int, function, arguments) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = _peak()
    size = int(_status("VmSize")) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + _MOST_MEMORY,) * 2)
    slow = slowness()
    begin = time.process_time()
    try:
        function(*arguments)
        told = {}
    except BuilderError as error:
        told = {"error": type(error).__name__, "message": str(error), "exit_code": int(error.exit_code)}
    except BaseException as error:  # noqa: BLE001  # whatever else it raises is what the test wants to know
        text = "".join(traceback.format_exception(error))[-4000:]
        told = {"error": type(error).__name__, "message": text, "exit_code": 70}
    took, memory = time.process_time() - begin, _peak() - before
    pipe.send(Outcome(**told, seconds=took, memory=memory, slowness=max(slow, slowness())))
    pipe.close()
    os._exit(0)


def _peak() -> int:
    return int(_status("VmHWM")) * 1024


def _status(name: str) -> str:
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        return next(line.split()[1] for line in status if line.startswith(f"{name}:"))
