"""Work on versions, each piece in a child process of its own: nothing that it does, crash included, reaches the next.

The child holds the credentials that the work needs, and reads what strangers wrote. What it answers is therefore held
against a type, and bounded; so is what it logs, which comes out of this process as if it had been logged here.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from builder import log
from builder.batch.supervisor import GRACE, HEAD, TERMINATE, End, Work
from builder.budget import Budget, out_of_memory
from builder.errors import BuilderError, Defect, ExitCode, TryAgain, VersionCrashed
from builder.masking import known_secrets, mask_forms
from builder.process import Lines

Result = TypeVar("Result")

_log = log.get_logger("children")
# An answer is a kilobyte, of `warm --verify` some hundreds.
_MOST_ANSWER = 16 << 20
_MOST_EVENT = 64 << 10
# An engine may say much about one version; beyond this nobody reads it.
_MOST_LOGGED = 32 << 20
_CHUNK = 1 << 16
# Nothing of this environment's is read before the path is this process's.
_START = """\
import json, socket, sys
sys.path[:] = json.loads(sys.argv[1])
from builder.batch.supervisor import main
main(socket.socket(fileno=int(sys.argv[2])), sys.argv[3:])
"""
# No work here computes with several threads, and a process that is to fork must have one alone.
_ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


_RESULT, _EVENT = b"R", b"E"
# The exit code of a child that was refused memory; none of sysexits(3).
_OUT_OF_MEMORY = 12
# What a logger's call has as names of its own.
_RESERVED = frozenset({"event", "level", "exc_info", "stack_info", "stacklevel", "extra", "args", "self"})
_REPORT = (
    "Something in the version's files or tags ends the process; the log has more. Correct it, or remove the target tag."
)
_KILLED = (
    "The publisher did not send that: probably memory ran out. Give the container more memory, or lower VERSION_MEMORY "
    "so that a version is told in time."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    """A log line of a child's.

    Attributes:
        name: the logger's, without `builder.`.
        level: the number of its severity.
        event: what happened.
        fields: what stands beside.
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
        self._control: socket.socket | None = None
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
        self, call: Callable[[], Result], kind: type[Result], *, whose: str, folders: Sequence[Path] = ()
    ) -> Result:
        """Return what a call returns, made in a child of its own.

        A request to end this process is handed on, and raised when the child has ended.

        Args:
            call: a function of a module of ours, or a partial of one, with arguments that can be pickled. It should
                return failures, and raise none.
            kind: the type of what it returns: a dataclass that pydantic can write as JSON, and read.
            whose: the version, as errors name it.
            folders: where it writes, beside the temporary folder.

        Raises:
            OverBudget: it took more than it may.
            VersionCrashed: it ended without an answer.
            TryAgain: it was asked to end, and this process was not.
        """
        control = self._started()
        answered, answer = os.pipe()
        printed, output = os.pipe()
        answers = _Answers(answered, printed)
        child = partial(_in_child, call, kind, logging.getLogger("builder").getEffectiveLevel(), known_secrets())
        work = pickle.dumps(Work(call=pickle.dumps(child), budget=self._budget, folders=tuple(folders)))
        try:
            try:
                socket.send_fds(control, [HEAD.pack(len(work))], [answer, output])
                control.sendall(work)
            except OSError as error:
                raise _gone() from error
            finally:
                os.close(answer)
                os.close(output)
            end = self._end(control, answers)
        except BaseException:
            self._stop(control, answers)
            raise
        finally:
            answers.close()
        return _result(end, answers, kind, whose, self._budget)

    def _started(self) -> socket.socket:
        if self._control is None:
            self._control, theirs = socket.socketpair()
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

    def _stop(self, control: socket.socket, answers: _Answers) -> None:
        """Ask the child to end, and wait until it has; it may have an outcome to record."""
        with suppress(OSError, BuilderError):
            control.sendall(TERMINATE)
            self._end(control, answers)
        self.__exit__()

    @staticmethod
    def _end(control: socket.socket, answers: _Answers) -> End:
        """Return how the child ended, and take what it answers and prints meanwhile."""
        said = bytearray()
        while len(said) < HEAD.size or len(said) < HEAD.size + HEAD.unpack(said[: HEAD.size])[0]:
            waiting: list[Any] = [control, *answers.open]
            ready = select.select(waiting, [], [])[0]
            answers.take([each for each in ready if each is not control])
            if control in ready:
                chunk = control.recv(_CHUNK)
                if not chunk:
                    raise _gone()
                said += chunk
        answers.take_rest()
        return TypeAdapter(End).validate_json(bytes(said[HEAD.size :]))


def _gone() -> Defect:
    message = "The process that watches over versions has ended."
    return Defect(message, remedy="See the lines above; it may have run out of memory.")


class _Answers:
    """What a child answers, logs and prints; the last of its answers is its result.

    Args:
        answered: descriptor that its answers come from.
        printed: descriptor that its stdout and stderr come from.
    """

    def __init__(self, answered: int, printed: int) -> None:
        self.open = [answered, printed]
        self.result: bytes | None = None
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
        """Read what is there, now that nothing is added; somebody else may still hold the other end."""
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
        while len(self._buffer) >= HEAD.size:
            (length,) = HEAD.unpack(self._buffer[: HEAD.size])
            if length > _MOST_ANSWER:
                # It is no answer, and nobody can tell where the next begins.
                self._end_of(self._answered)
                return
            if len(self._buffer) < HEAD.size + length:
                return
            frame = bytes(self._buffer[HEAD.size : HEAD.size + length])
            del self._buffer[: HEAD.size + length]
            if frame[:1] == _RESULT:
                self.result = frame[1:]
            elif self._room(length):
                _relog(frame[1:])

    def _print(self, line: str) -> None:
        if line.strip() and self._room(len(line)):
            _log.warning("printed", line=log.safe_line(line))

    def _room(self, size: int) -> bool:
        self._logged += size
        return self._logged <= _MOST_LOGGED


def _result(end: End, answers: _Answers, kind: type[Result], whose: str, budget: Budget) -> Result:
    """Return what a child answered.

    Raises:
        OverBudget, VersionCrashed, TryAgain: as `Children.run`.
    """
    if end.bound:
        raise budget.exceeded(whose, end.bound, end.amount)
    if end.code == _OUT_OF_MEMORY:
        raise out_of_memory(whose)
    if end.code == ExitCode.TEMPORARY:
        message = f"The publisher's process for {whose} was asked to end."
        raise TryAgain(message, remedy="Publish the version again.")
    if end.code == 0 and answers.result is not None:
        with suppress(ValidationError, BuilderError):
            return TypeAdapter(kind).validate_json(answers.result)
        message = f"The publisher's process for {whose} answered what cannot be read."
        raise VersionCrashed(message, remedy=_REPORT)
    if end.code < 0:
        message = f"The publisher's process for {whose} was killed by {_name(-end.code)}."
        raise VersionCrashed(message, remedy=_KILLED if end.code == -signal.SIGKILL else _REPORT)
    message = f"The publisher's process for {whose} ended with exit code {end.code}, and gave no outcome."
    raise VersionCrashed(message, remedy=_REPORT)


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
    call: Callable[[], Result], kind: type[Result], level: int, secrets: Mapping[str, bool], answers: int
) -> int:  # fmt: skip
    """Do the work, and answer; return the exit code."""
    mask_forms(secrets)
    sender = _Sender(answers)
    logger = logging.getLogger("builder")
    logger.handlers[:] = [sender]
    logger.propagate = False
    logger.setLevel(level)
    try:
        result = call()
        sender.send(_RESULT, _json(TypeAdapter(kind).dump_python(result, mode="json")))
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
        self._frames.put(HEAD.pack(len(text) + 1) + kind + text)

    def finish(self) -> None:
        """Wait until all is sent."""
        self._frames.put(None)
        self._thread.join()

    def _write(self) -> None:
        with suppress(OSError):  # nobody reads any more
            while (frame := self._frames.get()) is not None:
                view = memoryview(frame)
                while view:
                    view = view[os.write(self._descriptor, view) :]
