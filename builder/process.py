"""Processes and threads that can be ended: one program run, what it left behind; a map over daemon threads."""

from __future__ import annotations

import codecs
import fcntl
import os
import queue
import resource
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from builder.errors import BuildFailed

if TYPE_CHECKING:
    from collections.abc import Iterator


Item = TypeVar("Item")
Result = TypeVar("Result")
_LONG = 3600.0


def side_by_side(
    work: Callable[[Item], Result], items: Sequence[Item], *, threads: int, every: float
) -> Iterator[Result | None]:
    """Apply `work` to every item in several threads; yield results as they come, and None after a while without one.

    An error ends it: no further item is begun, those in progress are waited for, and it is raised. A request to end the
    process waits for none of them, since a large file would take minutes; `concurrent.futures` would wait.

    Args:
        work: what to do.
        items: what to do it to, in this order.
        threads: the most threads at a time.
        every: seconds after which None is yielded.
    """
    running = _Threads(work, items, threads)
    try:
        yield from running.results(every)
    except Exception:
        running.join()
        raise
    finally:
        running.stop.set()


@contextmanager
def in_background(
    tasks: Sequence[Callable[[], Result]], *, threads: int, stop: threading.Event
) -> Iterator[Callable[[], list[Result]]]:
    """Run tasks in several threads, beside what is done in the context; they have ended when that is left.

    Errors and what is no error are as in `side_by_side`, whether they come of a task or of the context.

    Args:
        tasks: what to run, in this order.
        threads: the most threads at a time.
        stop: is set when tasks that have begun should end early.

    Yields:
        What waits for all tasks, and returns their results in the order of the tasks.
    """
    running = _Threads(lambda task: (task[0], task[1]()), list(enumerate(tasks)), threads)

    def results() -> list[Result]:
        found = dict(each for each in running.results(_LONG) if each is not None)
        return [found[number] for number in range(len(tasks))]

    try:
        yield results
    except Exception:
        running.stop.set()
        stop.set()
        running.join()
        raise
    except BaseException:
        running.stop.set()
        stop.set()
        raise
    running.join()


class _Threads(Generic[Item, Result]):
    """Threads that have begun; the process may end while they run."""

    def __init__(self, work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> None:
        self.stop = threading.Event()
        self._work, self._count = work, len(items)
        self._todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
        for item in items:
            self._todo.put(item)
        self._done: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()
        # What they log names what the thread that began them works on; a context can be entered by one at a time.
        self._threads = [
            threading.Thread(target=copy_context().run, args=(self._run,), daemon=True)
            for _ in range(min(threads, len(items)))
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait for what has begun."""
        for thread in self._threads:
            thread.join()

    def results(self, every: float) -> Iterator[Result | None]:
        """Yield all results, and None whenever none came for `every` seconds; raise the first error."""
        left = self._count
        while left:
            try:
                result, error = self._done.get(timeout=every)
            except queue.Empty:
                yield None
                continue
            if error:
                raise error
            left -= 1
            yield result

    def _run(self) -> None:
        with suppress(queue.Empty):
            while not self.stop.is_set():
                item = self._todo.get_nowait()
                try:
                    self._done.put((self._work(item), None))
                except BaseException as error:  # noqa: BLE001, it is raised where it is waited for
                    self.stop.set()
                    self._done.put((None, error))


# Called with each line of the engine's output, without its newline.
Output = Callable[[str], None]

LONGEST_LINE = 4000
# Seconds between SIGTERM and SIGKILL.
GRACE = 10.0
# Seconds after which an exit is noticed although something still holds the program's output open.
_POLL = 0.2
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What each process of a program may take.

    Attributes:
        memory: bytes that it may reserve for itself (RLIMIT_DATA).
        processor: seconds of processor time; SIGXCPU ends a process that takes more.
    """

    memory: int
    processor: int


class Runner(Protocol):
    """Runs a program; `run` is the one that does, and a test may pass its own to an engine."""

    def __call__(  # noqa: D102  # `run` says it
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        timeout: float,
        output: Output,
        name: str,
        limits: Limits | None = None,
    ) -> int: ...


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    timeout: float,
    output: Output,
    name: str,
    limits: Limits | None = None,
) -> int:
    """Run a program and return its exit code.

    The child has a session and process group of its own, reads nothing, and sees `env` and no other variable. Its
    stdout and stderr are one stream. Whatever ends this call (the child's exit, the timeout, an exception such as
    `Terminated` or one that `output` raises), no process of the session is alive after it: SIGTERM to the group, at
    most ten seconds, SIGKILL to all. After the program's own exit, what it left behind gets SIGKILL at once.

    Args:
        argv: the program and its arguments; no shell reads them. The program is looked up in `env`'s PATH.
        env: the whole environment of the child.
        cwd: folder the child starts in.
        timeout: seconds the child may take.
        output: called with each line, without its newline. A line that a carriage return overwrites is not shown,
            bytes that are not UTF-8 are replaced, and a line is cut after 4,000 characters.
        name: what messages call the program.
        limits: what its processes may take, where the system can limit those of others (Linux); None frees them of
            the limit of memory that this process has, as an engine's steps need what they need.

    Returns:
        The exit code; negative is the signal that ended the child.

    Raises:
        BuildFailed: the program cannot be started, or took longer than `timeout`.
    """
    try:
        child = subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
        )
    except OSError as error:
        message = f"{name} cannot be started: {argv[0]}: {error.strerror or error}."
        raise BuildFailed(message, remedy="Install it, or choose another engine with BUILD_ENGINE.") from error
    stream = _Stream(child)
    try:
        _limit(child.pid, limits)
        for line in stream.lines(time.monotonic() + timeout):
            output(line)
        if not stream.exited():
            message = f"{name} took longer than {timeout:g} seconds, and was killed."
            raise BuildFailed(message, remedy="Raise BUILD_TIMEOUT, or make the Dockerfile's steps quicker.")
    finally:
        stream.end()
    return child.returncode


def _limit(pid: int, limits: Limits | None) -> None:
    """Set a new process's limits: from here, as no code may run between fork and exec beside other threads."""
    wanted = {resource.RLIMIT_DATA: (limits.memory, 0) if limits else (resource.RLIM_INFINITY, 0)}
    if limits:
        # A second between the two: who ignores SIGXCPU gets SIGKILL.
        wanted[resource.RLIMIT_CPU] = (limits.processor, 1)
    for what, (amount, more) in wanted.items():
        # It may have ended by now. A hard limit can be lowered only.
        with suppress(OSError, ValueError, AttributeError):
            _, hard = resource.prlimit(pid, what)
            soft = hard if amount == resource.RLIM_INFINITY else _least(amount, hard)
            resource.prlimit(pid, what, (soft, _least(amount + more, hard) if limits else hard))


def _least(amount: int, hard: int) -> int:
    return amount if hard == resource.RLIM_INFINITY else min(amount, hard)


class _Stream:
    """A child's output, and its end."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None  # noqa: S101  # Popen was given a pipe
        self._child = child
        self._pipe = child.stdout
        self._open = True

    def exited(self) -> bool:
        """Return whether the child has ended; it stays a zombie, so that its group's number is not given away."""
        if self._child.returncode is not None:
            return True
        return os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def lines(self, deadline: float) -> Iterator[str]:
        """Yield lines until the child has ended and its output is read, or until the deadline (monotonic seconds)."""
        lines = Lines()
        while (left := deadline - time.monotonic()) > 0:
            gone = self.exited()
            yield from lines.feed(self._read(0 if gone else min(left, _POLL)))
            # What the child wrote before it ended is in the pipe by now, and the chunk above may not be all of it.
            if gone and not self._ready(0):
                break
        yield from lines.rest()

    def end(self) -> None:
        """End every process of the child's group, and reap the child."""
        try:
            if not self.exited():
                self._signal(signal.SIGTERM)
                deadline = time.monotonic() + GRACE
                while not self.exited() and time.monotonic() < deadline:
                    self._read(0.05)  # a child that waits for its pipe to be read could not end
        finally:
            self._signal(signal.SIGKILL)
            _end_session(self._child.pid)
            self._child.wait()
            self._pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._child.pid, number)
        except ProcessLookupError:
            pass  # the group is gone
        except PermissionError:
            self._child.send_signal(number)  # a member of the group runs as another user

    def _ready(self, seconds: float) -> bool:
        if not self._open:
            time.sleep(seconds)
            return False
        return bool(select.select([self._pipe], [], [], seconds)[0])

    def _read(self, seconds: float) -> bytes:
        """Return what the pipe holds, waiting at most so long for it; empty at its end too."""
        if not self._ready(seconds):
            return b""
        chunk = os.read(self._pipe.fileno(), _CHUNK)
        self._open = bool(chunk)
        return chunk


def _end_session(leader: int) -> None:
    """Send SIGKILL to every process of a session: Kaniko gives each RUN step a process group of its own.

    The leader has not been waited for, so that its number is not given to another session (proc(5): in `stat` the
    session is the fourth field behind the name, which may hold blanks and parentheses).
    """
    killed: set[str] = set()
    before = -1
    # Again until nobody new is there: one that was about to start another may have done so.
    while before < len(killed):
        before = len(killed)
        for status in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                session = status.read_text(errors="replace").rpartition(")")[2].split()[3]
                if int(session) == leader:
                    os.kill(int(status.parent.name), signal.SIGKILL)
                    killed.add(status.parent.name)


class Lines:
    """Lines of a terminal's output, made from bytes as they come.

    Args:
        limit: the most characters of a line; one that is longer ends with an ellipsis.
    """

    def __init__(self, limit: int = LONGEST_LINE) -> None:
        self._limit = limit
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._line = ""
        self._overwrite = False

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Take more bytes, and yield the lines that are complete with them."""
        *complete, last = self._decoder.decode(chunk).split("\n")
        for text in complete:
            self._add(text)
            yield self._take()
        self._add(last)

    def rest(self) -> Iterator[str]:
        """Yield the line that no newline ended, if there is one."""
        self._add(self._decoder.decode(b"", final=True))
        if self._line:
            yield self._take()

    def _add(self, text: str) -> None:
        """Append text to the line; what follows a carriage return replaces it, unless it is blank."""
        for number, segment in enumerate(text.split("\r")):
            self._overwrite = self._overwrite or number > 0
            if not segment or (self._overwrite and not segment.strip()):
                continue
            before = "" if self._overwrite else self._line
            self._line = before + segment[: self._limit + 1 - len(before)] if len(before) <= self._limit else before
            self._overwrite = False

    def _take(self) -> str:
        line, self._line, self._overwrite = self._line, "", False
        return line if len(line) <= self._limit else line[: self._limit - 1] + "…"


PREFIX = "model-image-builder-"
# Seconds between the making of a folder and its lock, with room for a machine that is busy.
_YOUNG = 60.0


def lock(folder: Path) -> int:
    """Lock a folder, and return the descriptor that holds the lock until the last process with it has ended.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it is no folder, or cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def remove_leftovers() -> int:
    """Remove what this user's killed processes left in the temporary folder, and return how many folders there were."""
    removed = 0
    with suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with suppress(OSError):
                removed += _removed(folder)
    return removed


def _removed(folder: Path) -> bool:
    descriptor = lock(folder)
    try:
        status = os.fstat(descriptor)
        ours = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == stat.S_IRWXU
        if not ours or time.time() - status.st_mtime < _YOUNG:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return True
    finally:
        os.close(descriptor)
