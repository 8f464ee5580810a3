"""Bytecode for a wheel's Python files, so that a container starts as if pip had compiled them.

Nothing of a wheel is executed: compiling reads source. A source can still ask for much time or memory, so it is
compiled in processes that are bounded in both (`wheel_compile`). A file that does not compile has no bytecode, as with
pip; a wheel whose compilation ends a process (too much time, a crash) is refused, since skipping that file would make
the layer depend on how fast the machine is. The sum of a wheel's and of a version's processor time is bounded, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from builder.errors import BuilderError, TryAgain
from builder.oci.layer import Deflated
from builder.wheels import wheel_compile
from builder.wheels.wheel_compile import COMPILED, DIED, FRAME, MEMORY
from builder.wheels.zip import Member

# Sources that are larger get no bytecode: the largest of real use have 3 MB, and compiling takes 100 times as much.
LARGEST_SOURCE = 8 << 20
# A fork costs some milliseconds, so that groups cannot be single files; they are small enough to share out evenly.
_GROUP_FILES = 32
_GROUP_BYTES = 1 << 19
# Without a frame for so long, something else than compiling keeps the processes.
_PATIENCE = 900.0
# Processor time of one version's wheels. 200 MB of sources, more than most environments have, take 22 s.
_MOST_SECONDS = 600.0
# Kept in memory until the layer is at it; beyond that, in a temporary file.
_IN_MEMORY = 8 << 20
# No environment, so no variable of Python's but the seed, which -I would ignore; no site-packages, no bytecode written.
_FLAGS = ("-S", "-P", "-s", "-B", "-Wignore")
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}


class CompilerDied(BuilderError):
    """A source ends the process that compiles it; whoever knows the wheel says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file to compile.

    Attributes:
        member: the file in the wheel.
        path: absolute, where it stands in the image.
    """

    member: Member
    path: str


class Budget:
    """Processor time that all compiling for a version shares.

    Args:
        seconds: how much there is.
    """

    def __init__(self, seconds: float = _MOST_SECONDS) -> None:
        self.seconds = seconds
        self._spent = 0.0
        self._lock = threading.Lock()

    def spend(self, seconds: float) -> bool:
        """Take some of it; return whether there was enough."""
        with self._lock:
            self._spent += seconds
            return self._spent <= self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """An interpreter that compiles for a model's Python.

    Attributes:
        executable: the interpreter.
        identity: a word of letters, digits, '.', '_' and '-' for all that decides what it writes.
        cache_tag: what a compiled file's name holds: `cpython-311`.
        workers: processes at a time; the result does not depend on it.
        seconds: processor time that one source may take, and as much again for each MiB of it; a wheel may take three
            times that, and as much again for each MiB of its sources.
        budget: what all wheels share.
    """

    executable: str
    identity: str
    cache_tag: str
    workers: int
    seconds: int = 10
    budget: Budget = field(default_factory=Budget, compare=False, repr=False)

    @classmethod
    def find(cls, python: str, *, executable: str = sys.executable, workers: int | None = None) -> Compiler | None:
        """Return a compiler for a model's Python; None where the interpreter is of another minor version, or is none.

        Args:
            python: the model's Python: `3.11`.
            executable: the interpreter.
            workers: processes at a time; None for as many as there are processors.
        """
        identity, cache_tag = _identity(executable)
        if not identity.startswith(f"cpython-{python}."):
            return None
        count = workers or _processors()
        return cls(executable=executable, identity=identity, cache_tag=cache_tag, workers=count)

    def compiled_path(self, path: str) -> str:
        """Return where the bytecode of a source stands: `a/__pycache__/b.cpython-311.pyc` for `a/b.py`."""
        folder, _, name = path.rpartition("/")
        return f"{folder}/__pycache__/{name.removesuffix('.py')}.{self.cache_tag}.pyc"

    @contextlib.contextmanager
    def compile(self, wheel: int, sources: Sequence[Source]) -> Iterator[Compilation]:
        """Compile sources in the background for as long as the context lasts.

        Args:
            wheel: descriptor of the wheel's file.
            sources: what to compile, in the order that decides the result.
        """
        groups = list(_groups(sources))
        jobs = json.dumps(groups).encode()
        count = min(self.workers, len(groups))
        size = sum(source.member.size for source in sources)
        allowed = self.seconds * (3 + size / (1 << 20))
        with contextlib.closing(Compilation([source.path for source in sources], allowed, self.budget)) as compilation:
            for number in range(count):
                arguments = map(str, (wheel, number, count, self.seconds))
                compilation.start([self.executable, *_FLAGS, wheel_compile.__file__, *arguments], jobs, wheel)
            yield compilation


class Compilation:
    """What a pool of processes has compiled so far.

    Args:
        paths: of the sources, by their numbers.
        seconds: processor time that they may take together.
        budget: what they share with those of other wheels.
    """

    def __init__(self, paths: Sequence[str], seconds: float, budget: Budget) -> None:
        self._paths = paths
        self._own, self._shared = Budget(seconds), budget
        self._spool = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115  # closed by `close`
        self._results: dict[int, tuple[int, int, int, int] | None] = {}
        self._changed = threading.Condition()
        self._died = ""
        self._exceeded = ""
        self._running = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []

    def start(self, command: list[str], jobs: bytes, wheel: int) -> None:
        """Start a process that inherits the descriptor `wheel`, tell it its jobs, and read what it writes."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
            pass_fds=(wheel,),
            start_new_session=True,
        )
        self._processes.append(process)
        thread = threading.Thread(target=self._collect, args=(process, jobs), daemon=True)
        self._threads.append(thread)
        with self._changed:
            self._running += 1
        thread.start()

    def result(self, number: int) -> Deflated | None:
        """Return the bytecode of a source, by its place in `sources`, when it is there; None where there is none.

        Raises:
            CompilerDied: a source took too much time or memory, or crashed the compiler.
            TryAgain: the processes were ended from outside, or do not answer.
        """
        with self._changed:
            there = self._changed.wait_for(
                lambda: number in self._results or self._died or self._exceeded or not self._running, _PATIENCE
            )
            if self._exceeded:
                raise CompilerDied(self._exceeded)
            if number in self._results:
                found = self._results[number]
                if found is None:
                    return None
                offset, length, size, crc = found
                self._spool.seek(offset)
                return Deflated(chunks=[self._spool.read(length)], size=size, crc=crc)
            died = self._died
        if died:
            raise CompilerDied(died)
        message = "Compiling was ended from outside." if there else f"Compiling has not answered for {_PATIENCE:.0f} s."
        raise TryAgain(message, remedy="It may have run out of memory: give it more, or publish without bytecode.")

    def close(self) -> None:
        """End what still runs."""
        for process in self._processes:
            # Nobody has waited for the process yet, so its group is still its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for thread in self._threads:
            thread.join()
        self._spool.close()

    def _collect(self, process: subprocess.Popen[bytes], jobs: bytes) -> None:
        told, pipe = process.stdin, process.stdout
        assert told  # noqa: S101  # for mypy: both are pipes
        assert pipe  # noqa: S101
        try:
            # The process writes nothing before it has read everything, so neither waits for the other.
            with contextlib.suppress(BrokenPipeError), told:
                told.write(jobs)
            with pipe:
                while len(head := pipe.read(FRAME.size)) == FRAME.size:
                    number, state, spent, size, crc, length = FRAME.unpack(head)
                    stream = pipe.read(length)
                    if len(stream) == length:
                        self._take(number, state, size, crc, stream)
                        self._spend(number, spent / 1e6)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _spend(self, number: int, seconds: float) -> None:
        if not self._own.spend(seconds):
            why = f"Its sources take more than {self._own.seconds:.0f} s of processor time to compile"
        elif not self._shared.spend(seconds):
            why = f"The sources of the version's wheels take more than {self._shared.seconds:.0f} s of processor time"
        else:
            return
        with self._changed:
            self._exceeded = self._exceeded or f"{why}; the last one was {self._paths[number]}."
            self._changed.notify_all()

    def _take(self, number: int, state: int, size: int, crc: int, stream: bytes) -> None:
        with self._changed:
            if state == DIED:
                # SIGKILL is the system's answer to too little memory, and says nothing of the source.
                if size != signal.SIGKILL:
                    # It is the group's number; what it gave before it died has been taken.
                    ended = next((n for n in range(number, len(self._paths)) if n not in self._results), number)
                    self._died = _death(size, self._paths[ended])
            elif state == COMPILED:
                offset = self._spool.seek(0, os.SEEK_END)
                self._spool.write(stream)
                self._results[number] = offset, len(stream), size, crc
            else:
                self._results[number] = None
            self._changed.notify_all()


def _groups(sources: Sequence[Source]) -> Iterator[list[dict[str, int | str]]]:
    """Yield jobs in groups that depend on the sources alone."""
    group: list[dict[str, int | str]] = []
    size = 0
    for number, source in enumerate(sources):
        member = source.member
        if group and (len(group) == _GROUP_FILES or size + member.size > _GROUP_BYTES):
            yield group
            group, size = [], 0
        size += member.size
        group.append(
            {
                "number": number,
                "offset": member.offset,
                "compressed": member.compressed,
                "method": member.method,
                "size": member.size,
                "path": source.path,
            }
        )
    if group:
        yield group


def _death(status: int, path: str) -> str:
    if status == signal.SIGPROF:
        return f"Its source {path} takes too much time to compile."
    return f"Its source {path} ends the compiler (status {status}, with {MEMORY >> 20} MiB of memory)."


def _processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache
def _identity(executable: str) -> tuple[str, str]:
    if executable == sys.executable:
        return wheel_compile.identity()
    try:
        done = subprocess.run(
            [executable, *_FLAGS, wheel_compile.__file__, "--identify"],
            capture_output=True,
            env=_ENVIRONMENT,
            timeout=60,
            check=True,
        )
        identity, cache_tag = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return "", ""
    return str(identity), str(cache_tag)
