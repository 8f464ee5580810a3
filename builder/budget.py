"""The budget of one version: seconds, processor time, memory, bytes and files."""

from __future__ import annotations

import resource
import signal
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from builder.errors import OverBudget

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from builder.models import Artifact, ModelVersion
    from builder.settings import CatalogSettings


Bound = Literal["VERSION_TIMEOUT", "VERSION_PROCESSOR_TIME", "VERSION_MEMORY", "VERSION_BYTES"]
_REMEDY = "Make the version smaller, or raise {name}; docs/settings.md says what it bounds."
# A container's memory limit in cgroups of version 2 and 1. At three quarters of it, a version is ended with an error,
# before the kernel kills a process of its choice.
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_SHARE = 0.75
_STATUS = Path("/proc/self/status")
# Seconds after which the exception is raised again, if something has swallowed it: more than a program gets to end.
_AGAIN = 30.0
_SOON = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The bounds of one version's work, without an engine's time, processor time and memory.

    Attributes:
        seconds: wall-clock time.
        processor: seconds of processor time, of all processes together.
        memory: bytes of memory not backed by files, of all processes together.
        size: bytes on disk, in the folders of the work.
    """

    seconds: float
    processor: float
    memory: int
    size: int

    @classmethod
    def of(cls, settings: CatalogSettings) -> Self:
        """Return the settings' budget, with no more memory than the container allows."""
        has = _container_memory()
        memory = int(settings.version_memory)
        return cls(
            seconds=settings.version_timeout,
            processor=settings.version_processor_time,
            memory=min(memory, int(has * _SHARE)) if has else memory,
            size=int(settings.version_bytes),
        )

    def exceeded(self, whose: str, bound: Bound, amount: float) -> OverBudget:
        """Return the error for a bound that was exceeded.

        Args:
            whose: the version.
            bound: the setting.
            amount: the usage when it was noticed, in seconds or bytes.
        """
        taken = {
            "VERSION_TIMEOUT": f"more than {self.seconds:g} seconds",
            "VERSION_PROCESSOR_TIME": f"{amount:.0f} seconds of processor time; the limit is {self.processor:g}",
            "VERSION_MEMORY": f"{_mib(amount)} of memory; the limit is {_mib(self.memory)}",
            "VERSION_BYTES": f"{_mib(amount)} on disk; the limit is {_mib(self.size)}",
        }[bound]
        message = f"The work on {whose} was ended: it took {taken} ({bound})."
        return OverBudget(message, remedy=_REMEDY.format(name=bound))


class Deadline:
    """Ends work in this process that exceeds its time, processor time or memory.

    Other processes are bounded where they are started. A sweep's children are watched from outside as well.

    Args:
        budget: the bounds; if the work has several parts, each has what the earlier ones left.
        whose: the version, as errors name it.
    """

    def __init__(self, budget: Budget, whose: object) -> None:
        self._budget = budget
        self._whose = str(whose)
        self._left = {signal.ITIMER_REAL: budget.seconds, signal.ITIMER_PROF: budget.processor}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Bound the work in the context, if this is the main thread: no other can be interrupted.

        Timers, handlers and limits are restored afterwards. A timer that ends earlier is left alone.

        Raises:
            OverBudget: the work exceeded its budget.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with ExitStack() as stack:
            bounds: tuple[tuple[int, signal.Signals, Bound], ...] = (
                (signal.ITIMER_REAL, signal.SIGALRM, "VERSION_TIMEOUT"),
                (signal.ITIMER_PROF, signal.SIGPROF, "VERSION_PROCESSOR_TIME"),
            )
            try:
                stack.enter_context(_limited(self._budget.memory))
                for timer, number, bound in bounds:
                    stack.enter_context(self._timed(timer, number, bound))
                yield
            except _Expired as expired:
                amount = self._budget.processor if expired.bound == "VERSION_PROCESSOR_TIME" else self._budget.seconds
                raise self._budget.exceeded(self._whose, expired.bound, amount) from None

    @contextmanager
    def _timed(self, timer: int, number: signal.Signals, bound: Bound) -> Iterator[None]:
        """Raise _Expired in the context when a timer ends."""
        active = True

        def ended(_signal: int, _frame: FrameType | None) -> None:
            if active:
                raise _Expired(bound)

        before, interval = signal.getitimer(timer)
        if 0 < before < self._left[timer]:
            yield
            return
        clock = time.monotonic if timer == signal.ITIMER_REAL else time.process_time
        began = clock()
        handler = signal.signal(number, ended)
        signal.setitimer(timer, max(self._left[timer], _SOON), _AGAIN)
        try:
            yield
        finally:
            active = False
            signal.setitimer(timer, 0)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
            taken = clock() - began
            self._left[timer] -= taken
            if before:
                signal.setitimer(timer, max(before - taken, _SOON), interval)


class _Expired(BaseException):
    """A bound was exceeded; as with `Terminated`, nothing may swallow it, and threads are not waited for."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self.bound = bound


@contextmanager
def _limited(memory: int) -> Iterator[None]:
    """Limit the bytes that this process may reserve beyond what it has, if the system counts them."""
    try:
        has = next(int(line.split()[1]) << 10 for line in _STATUS.read_text().splitlines() if line.startswith("VmData"))
        before = resource.getrlimit(resource.RLIMIT_DATA)
    except (OSError, StopIteration, ValueError):
        yield
        return
    bounds = [bound for bound in before if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([has + memory, *bounds]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def out_of_memory(version: object) -> OverBudget:
    """Return the error for work that reached the budget's limit of memory."""
    message = f"The work on {version} needs more memory than is allowed (VERSION_MEMORY)."
    return OverBudget(message, remedy=_REMEDY.format(name="VERSION_MEMORY"))


def check_listing(settings: CatalogSettings, version: ModelVersion, artifacts: Sequence[Artifact]) -> None:
    """Raise OverBudget if a version has too many or too large artifacts, before any is downloaded."""
    if len(artifacts) > settings.version_files:
        message = f"{version} has {len(artifacts)} artifacts; the limit is {settings.version_files} (VERSION_FILES)."
        raise OverBudget(message, remedy=_REMEDY.format(name="VERSION_FILES"))
    size = sum(artifact.size or 0 for artifact in artifacts)
    if size > settings.version_bytes:
        message = (
            f"The artifacts of {version} have {_mib(size)}; the limit is {_mib(settings.version_bytes)} "
            "(VERSION_BYTES)."
        )
        raise OverBudget(message, remedy=_REMEDY.format(name="VERSION_BYTES"))


def _mib(size: float) -> str:
    return f"{int(size) >> 20:,} MiB"


def _container_memory() -> int | None:
    """Return this container's memory limit in bytes; None if it has none."""
    for path in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):
            return int(path.read_text())
    return None
