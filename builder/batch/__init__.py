"""Many versions: each piece of work in a child process of its own, so that none can harm the others."""

from __future__ import annotations

import json
import logging
import os
import pickle
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from structlog.stdlib import BoundLogger

from builder import log
from builder.batch.supervisor import GRACE, TERMINATE, End, Work
from builder.budget import Budget, out_of_memory
from builder.errors import (
    BuilderError,
    BuildFailed,
    Defect,
    ExitCode,
    InvalidSettings,
    InvalidVersion,
    PermissionRefused,
    ServiceUnavailable,
    TryAgain,
    UsageError,
    VersionCrashed,
    VersionNotFound,
    of_kind,
)
from builder.masking import known_secrets, mask_forms, masked
from builder.models import ModelVersion
from builder.process import Lines
from builder.reference import Reference

AnyResult = TypeVar("AnyResult", bound="Result")

# Errors with these exit codes are about a version's own content; all others hinder the publisher itself.
_OWN_FAULTS = frozenset({ExitCode.DATA, ExitCode.NO_INPUT, ExitCode.CANNOT_CREATE})


# sweep: `published` was made now; `current` was there; `foreign` is an image of another publisher's; `waiting`
# has failed, and waits for a change or for its next attempt. In a cluster: `submitted`, a Job was made now; `running`,
# it has one; `queued` waits for others to end.
# download: `new`, `changed`, `unchanged`.
# warm: `warm`, all is there now; `verified`, all that is there is what it should be; `different`, something is not;
# `unproven`, a layer cannot be rebuilt for comparison; `passed over`, it is not made of wheel layers.
# All: `failed`; `gone` was deleted, or lost its target tag, before or while this ran, which is no failure.
State = Literal[
    "published", "current", "foreign", "waiting", "submitted", "running", "queued", "new", "changed", "unchanged",
    "warm", "verified", "different", "unproven", "passed over", "failed", "gone",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one version, in a sweep, a download, or while layers were made ahead of time.

    Attributes:
        name: the version as logs name it, or the requirements file.
        state: what became of it.
        version: the version, without its tags: thousands of them are kept to the end; None for a requirements file.
        reference: the digest reference that was published now; None elsewhere.
        folder: where a downloaded version is, or would be; None elsewhere.
        detail: the reason, or the error, on one line.
        exit_code: the code that this result alone would end the process with.
        error: the error of a failure.
        own_fault: whether a failure is the version's own, and says nothing of the publisher.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)

    name: str
    state: State
    version: ModelVersion | None = None
    reference: Reference | None = None
    folder: Path | None = None
    detail: str = ""
    exit_code: int = 0
    error: BuilderError | None = None
    own_fault: bool = False

    @property
    def summary(self) -> str:
        """What a table shows beside the state."""
        return str(self.reference or self.detail or self.folder or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Generic[AnyResult]):
    """One command over many versions: a version that fails, whatever the reason, stops no other.

    Attributes:
        kind: the type of its results.
        logger: the name of its log.
        modules: what is slow to import, and every child needs.
        failed: the log's event for a failure.
        gone: the log's event for a version that was deleted meanwhile; empty where that is a failure.
        key: the log's field that names the version.
    """

    kind: type[AnyResult]
    logger: str
    modules: tuple[str, ...]
    failed: str = "failed"
    gone: str = "gone"
    key: str = "version"

    def results(
        self, budget: Budget, versions: Iterable[ModelVersion], work: Callable[[Children, ModelVersion], AnyResult]
    ) -> Iterator[AnyResult]:
        """Work on versions one after another, and yield what became of each.

        Args:
            budget: what each version may take.
            versions: the versions, in their order.
            work: what is done with each; it calls `Children.run` for all that reads a version's content.
        """
        with Children(budget, modules=self.modules) as children:
            for version in versions:
                yield self.result(version, partial(work, children, version))

    def result(self, version: ModelVersion, work: Callable[[], AnyResult]) -> AnyResult:
        """Return what became of one version; its failure, if it fails, is a result as well."""
        name = str(version)
        try:
            with self.defects(name):
                return replace(work(), name=name, version=version.untagged())
        except VersionNotFound as error:
            if not self.gone:
                return self._failure(version, error)
            self._lines(name).info(self.gone, detail=error.what)
            return self.kind(name=name, version=version.untagged(), state="gone", detail=error.one_line())
        except BuilderError as error:
            return self._failure(version, error)
        except MemoryError:
            # A child's own is an answer of `Children`; this one is of the work beside it.
            return self._failure(version, out_of_memory(version))

    @contextmanager
    def defects(self, name: str) -> Iterator[None]:
        """Log an unforeseen error with its traceback, and raise `Defect` in its place.

        Args:
            name: the version that is worked on.
        """
        try:
            yield
        except (BuilderError, MemoryError):
            raise  # `Children` knows what a MemoryError means
        except Exception as error:
            self._lines(name).exception("defect")
            raise Defect(type(error).__name__) from error

    def _failure(self, version: ModelVersion, error: BuilderError) -> AnyResult:
        self._lines(str(version)).error(self.failed, error=error.one_line())
        return self.kind(
            name=str(version),
            version=version.untagged(),
            state="failed",
            detail=error.one_line(),
            exit_code=int(error.exit_code),
            error=error,
            own_fault=error.of_version or error.exit_code in _OWN_FAULTS,
        )

    def _lines(self, name: str) -> BoundLogger:
        return log.get_logger(self.logger).bind(**{self.key: name})


Answer = TypeVar("Answer")

_log = log.get_logger("children")
# A frame of an answer: its length, a byte that says what it is, JSON. It is read without waiting for its end, which a
# hostile child may never send.
_HEAD = struct.Struct(">I")
# An answer is a kilobyte, of `warm --verify` some hundreds.
_MOST_ANSWER = 16 << 20
_MOST_EVENT = 64 << 10
# An engine may print much about one version; further lines are left out.
_MOST_LOGGED = 32 << 20
_CHUNK = 1 << 16
# Nothing of this environment's is read before the path is this process's.
_START = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from multiprocessing.connection import Connection
from builder.batch.supervisor import main
main(Connection(int(sys.argv[2])), sys.argv[3:])
"""
# No work here computes with several threads, and a process that is to fork must have one alone.
_ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


_ANSWER, _FAILURE, _EVENT = b"A", b"F", b"E"
# The exit code of a child that was refused memory; sysexits(3) has no such code.
_OUT_OF_MEMORY = 12
# What a logger's call has as names of its own.
_RESERVED = frozenset({"event", "level", "exc_info", "stack_info", "stacklevel", "extra", "args", "self"})
_REPORT = (
    "Something in the version's files or tags ends the process; the log has more. Correct it, or remove the target tag."
)
_KILLED = (
    "The publisher did not send that signal: probably memory ran out. Give the container more memory, or lower "
    "VERSION_MEMORY, so that a version is ended with a reason before that."
)
# For an error whose class only the child knows.
_BY_EXIT_CODE: dict[ExitCode, type[BuilderError]] = {
    ExitCode.USAGE: UsageError,
    ExitCode.DATA: InvalidVersion,
    ExitCode.NO_INPUT: VersionNotFound,
    ExitCode.UNAVAILABLE: ServiceUnavailable,
    ExitCode.CANNOT_CREATE: BuildFailed,
    ExitCode.TEMPORARY: TryAgain,
    ExitCode.NO_PERMISSION: PermissionRefused,
    ExitCode.CONFIG: InvalidSettings,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    """A log line of a child's.

    Attributes:
        name: the logger's, without `builder.`.
        level: the number of its severity.
        event: what happened.
        fields: further fields.
    """

    name: Annotated[str, Field(pattern=r"^[a-z_.]{1,50}$")]
    level: Annotated[int, Field(ge=logging.DEBUG, le=logging.CRITICAL)]
    event: str
    fields: dict[str, Any] = field(default_factory=dict)


_EVENTS = TypeAdapter(_Event)


class Children:
    """Does work in children, one at a time. A context manager, whose helper process starts with the first work.

    Args:
        budget: what each may take.
        modules: what is slow to import, and every child needs.
    """

    def __init__(self, budget: Budget, *, modules: Sequence[str] = ()) -> None:
        self._budget = budget
        self._modules = modules
        self._control: Connection | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the helper process, and with it whatever is being done."""
        if self._control and self._supervisor:
            self._control.close()
            with suppress(subprocess.TimeoutExpired):
                self._supervisor.wait(GRACE)
            self._supervisor.kill()
            self._supervisor.wait()
        self._control = self._supervisor = None

    def run(
        self,
        call: Callable[[], Answer],
        kind: type[Answer],
        *,
        whose: str,
        folders: Sequence[Path] = (),
        ended: Callable[[BuilderError], None] = lambda _: None,
    ) -> Answer:
        """Call a function in a child of its own, and return what it returns.

        A request to end this process is passed on, and raised when the child has ended.

        Args:
            call: a function of a module of ours, or a partial of one, with arguments that can be pickled.
            kind: the type of its result: a dataclass that pydantic can write as JSON, and read.
            whose: the version, as errors name it.
            folders: where it writes, beside the temporary folder.
            ended: called with the error before it is raised, where the child ended without an answer.

        Raises:
            BuilderError: the function raised it.
            OverBudget: it took more than it may.
            VersionCrashed: it ended without an answer.
            TryAgain: the child was asked to end, and this process was not.
        """
        control = self._started()
        answered, answer = os.pipe()
        printed, output = os.pipe()
        answers = _Answers(answered, printed)
        child = partial(_in_child, call, kind, logging.getLogger("builder").getEffectiveLevel(), known_secrets())
        work = Work(call=pickle.dumps(child), budget=self._budget, folders=tuple(folders))
        try:
            try:
                control.send(work)
                for descriptor in (answer, output):
                    send_handle(control, descriptor, None)
            except OSError as error:
                raise _gone() from error
            finally:
                os.close(answer)
                os.close(output)
            end = self._end(control, answers)
        except BaseException as error:
            self._stop(control, answers)
            if isinstance(error, BuilderError):
                ended(error)
            raise
        finally:
            answers.close()
        try:
            raised = _failure(answers.failure, whose) if end.code == 0 and not end.bound and answers.failure else None
            result = None if raised else _result(end, answers, kind, whose, self._budget)
        except BuilderError as error:
            ended(error)
            raise
        if raised:
            raise raised
        return cast("Answer", result)

    def _started(self) -> Connection:
        if self._control is None:
            self._control, theirs = Pipe()
            argv = [sys.executable, "-I", "-c", _START, json.dumps(sys.path), str(theirs.fileno()), *self._modules]
            with theirs:
                self._supervisor = subprocess.Popen(
                    argv,
                    env={**os.environ, **_ONE_THREAD},
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        return self._control

    def _stop(self, control: Connection, answers: _Answers) -> None:
        """Have the child end, and wait for that; it may have an outcome to record."""
        with suppress(OSError, BuilderError):
            control.send(TERMINATE)
            self._end(control, answers)
        self.__exit__()

    @staticmethod
    def _end(control: Connection, answers: _Answers) -> End:
        """Return how the child ended, and take what it answers and prints meanwhile."""
        ready: list[Any] = []
        while control not in ready:
            waiting: list[Any] = [control, *answers.open]
            ready = select.select(waiting, [], [])[0]
            answers.take([each for each in ready if each is not control])
        try:
            end = control.recv_bytes()
        except (OSError, EOFError):
            raise _gone() from None
        answers.take_rest()
        return TypeAdapter(End).validate_json(end)


def _gone() -> Defect:
    message = "The process that supervises the work on versions has ended."
    return Defect(message, remedy="See the lines above: it may have run out of memory.")


class _Answers:
    """What a child answers, logs and prints; the last of its answers counts.

    Args:
        answered: descriptor that its answers come from.
        printed: descriptor that its stdout and stderr come from.
    """

    def __init__(self, answered: int, printed: int) -> None:
        self.open = [answered, printed]
        self.result: bytes | None = None
        self.failure: bytes | None = None
        self._answered, self._printed = answered, printed
        self._buffer = bytearray()
        self._lines = Lines()
        self._logged = 0

    def take(self, ready: Sequence[Any]) -> None:
        """Read once from what is ready."""
        for descriptor in ready:
            chunk = os.read(descriptor, _CHUNK)
            if not chunk:
                self._end_of(descriptor)
            elif descriptor == self._printed:
                for line in self._lines.feed(chunk):
                    self._print(line)
            else:
                self._buffer += chunk
                self._frames()

    def take_rest(self) -> None:
        """Read what is left, once the child has ended; another process may still hold the other end."""
        while self.open and (ready := select.select(self.open, [], [], 0)[0]):
            self.take(ready)
        for line in self._lines.rest():
            self._print(line)
        if self._logged > _MOST_LOGGED:
            _log.warning("a version logged too much, and its further lines were left out", mebibytes=_MOST_LOGGED >> 20)

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in (self._answered, self._printed):
            os.close(descriptor)

    def _end_of(self, descriptor: int) -> None:
        self.open.remove(descriptor)

    def _frames(self) -> None:
        while len(self._buffer) >= _HEAD.size:
            (length,) = _HEAD.unpack(self._buffer[: _HEAD.size])
            if length > _MOST_ANSWER:
                # Not an answer, and where the next one begins is unknown.
                self._end_of(self._answered)
                return
            if len(self._buffer) < _HEAD.size + length:
                return
            frame = bytes(self._buffer[_HEAD.size : _HEAD.size + length])
            del self._buffer[: _HEAD.size + length]
            if frame[:1] == _ANSWER:
                self.result = frame[1:]
            elif frame[:1] == _FAILURE:
                self.failure = frame[1:]
            elif self._room(length):
                _relog(frame[1:])

    def _print(self, line: str) -> None:
        if line.strip() and self._room(len(line)):
            _log.warning("printed", line=log.safe_line(line))

    def _room(self, size: int) -> bool:
        self._logged += size
        return self._logged <= _MOST_LOGGED


def _result(end: End, answers: _Answers, kind: type[Answer], whose: str, budget: Budget) -> Answer:
    """Return what a child answered.

    Raises:
        OverBudget, VersionCrashed, TryAgain: as `Children.run`.
    """
    if end.bound:
        raise budget.exceeded(whose, end.bound, end.amount)
    if end.code == _OUT_OF_MEMORY:
        raise out_of_memory(whose)
    if end.code == ExitCode.TEMPORARY:
        message = f"The publisher's process for {whose} was asked to end by a signal."
        raise TryAgain(message, remedy="Publish the version again.")
    if end.code == 0 and answers.result is not None:
        with suppress(ValidationError, BuilderError):
            return TypeAdapter(kind).validate_json(answers.result)
        raise _unreadable(whose)
    if end.code < 0:
        message = f"The publisher's process for {whose} was killed by {_name(-end.code)}."
        raise VersionCrashed(message, remedy=_KILLED if end.code == -signal.SIGKILL else _REPORT)
    message = f"The publisher's process for {whose} ended with exit code {end.code}, without an outcome."
    raise VersionCrashed(message, remedy=_REPORT)


def _unreadable(whose: str) -> VersionCrashed:
    return VersionCrashed(f"The publisher's process for {whose} gave an answer that cannot be read.", remedy=_REPORT)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """An error of a child's.

    Attributes:
        name: its class's.
        exit_code: its exit code.
        of_version: whether the version's author is to blame although the exit code alone does not say so.
        what: what failed.
        remedy: what to do about it.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z]{1,50}$")]
    exit_code: ExitCode
    of_version: bool
    what: str
    remedy: str


def _failure(frame: bytes, whose: str) -> BuilderError:
    """Return the error that a child has raised.

    Its class may be of a module that only the child imports, or be made of other arguments: then one of the same name
    is derived from the exit code's class.

    Raises:
        VersionCrashed: the frame is not such an error.
    """
    try:
        failure = TypeAdapter(_Failure).validate_json(frame)
    except ValidationError:
        raise _unreadable(whose) from None
    with suppress(TypeError):
        error = of_kind(failure.name, failure.exit_code, failure.what, failure.remedy)
        if type(error).__name__ == failure.name:
            return error
    base = _BY_EXIT_CODE.get(failure.exit_code, Defect)
    kind: type[BuilderError] = type(failure.name, (base,), {"of_version": failure.of_version})
    return kind(failure.what, remedy=failure.remedy)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _relog(frame: bytes) -> None:
    """Log what a child wants to have logged."""
    try:
        event = _EVENTS.validate_json(frame)
    except ValidationError:
        return
    fields = {name: value for name, value in event.fields.items() if name not in _RESERVED}
    log.get_logger(event.name).log(event.level, event.event, **fields)


# ---- in the child


def _in_child(
    call: Callable[[], Answer], kind: type[Answer], level: int, secrets: Mapping[str, bool], answers: int
) -> int:  # fmt: skip
    """Do the work, and answer; return the exit code."""
    mask_forms(secrets)
    sender = _Sender(answers)
    logger = logging.getLogger("builder")
    logger.handlers[:] = [sender]
    logger.propagate = False
    logger.setLevel(level)
    try:
        answer = call()
        sender.send(_ANSWER, _json(TypeAdapter(kind).dump_python(answer, mode="json")))
    except BuilderError as error:
        failure = _Failure(
            name=type(error).__name__,
            exit_code=ExitCode(error.exit_code),
            of_version=error.of_version,
            what=masked(error.what),
            remedy=masked(error.remedy),
        )
        sender.send(_FAILURE, _json(asdict(failure)))
    except MemoryError:
        return _OUT_OF_MEMORY
    finally:
        sender.finish()
    return 0


def _json(value: Any) -> bytes:
    """Return JSON that pydantic reads: what is no Unicode, such as half of a surrogate pair, is replaced."""
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace")


class _Sender(logging.Handler):
    """Sends log records and the result.

    Its thread alone writes: a signal that is handled in the midst of a frame would leave a part of one.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record."""
        said = dict(record.msg) if isinstance(record.msg, dict) else {"event": record.getMessage()}
        event: dict[str, Any] = {
            "name": record.name.removeprefix("builder."),
            "level": record.levelno,
            "event": str(said.pop("event", "")),
            "fields": said,
        }
        text = _json(event)
        if len(text) > _MOST_EVENT:
            text = _json({**event, "event": event["event"][:1000], "fields": {"cut": str(said)[:10_000]}})
        self.send(_EVENT, text)

    def send(self, kind: bytes, text: bytes) -> None:
        """Send a frame."""
        self._frames.put(_HEAD.pack(len(text) + 1) + kind + text)

    def finish(self) -> None:
        """Wait until all is sent."""
        self._frames.put(None)
        self._thread.join()

    def _write(self) -> None:
        with suppress(OSError):  # the other end is closed
            while (frame := self._frames.get()) is not None:
                view = memoryview(frame)
                while view:
                    view = view[os.write(self._descriptor, view) :]
