"""One image's trial: a container is started, asked and judged."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib import resources

from builder.errors import InvalidVersion
from builder.log import get_logger
from builder.smoke.containers import CannotRun, CannotStart, ContainerRuntime, Ended, Limits
from builder.smoke.question import Answer, Question, event_of, last_words, listening, printable

# Seconds that a program which answers nothing has to run: where it opens a port, and where that cannot be seen.
MOMENT, LONG_MOMENT = 3.0, 10.0
_PAUSE = 0.5
_GRACE = 15.0
_SHORT = 30.0
_MOST_LINES = 2000
_MOST_SHOWN = 10
_SOCKETS = ("/proc/net/tcp", "/proc/net/tcp6")
_READ_SOCKETS = f"import sys\nfor name in {_SOCKETS!r}:\n    sys.stdout.write(open(name).read())\n"
# What runtimes end with where a container has no such program.
_NO_PROGRAM = frozenset({126, 127})
_log = get_logger("smoke")


class SmokeTestFailed(InvalidVersion):
    """The image was run, and does not do what it is for."""


class OutOfMemory(CannotRun):
    """The container was killed for the memory it used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """An image that answered.

    Attributes:
        seconds: from its container's start to the first answer; None where nothing could be asked.
        what: what it did, a few words.
    """

    seconds: float | None
    what: str


class Trial:
    """One container's trial; whoever runs it removes the container afterwards.

    Args:
        runtime: runs it.
        name: of its image, and of the container.
        question: what it is asked.
        timeout: seconds it may take from its start to all its answers.
    """

    def __init__(self, runtime: ContainerRuntime, name: str, question: Question, *, timeout: float) -> None:
        self._runtime = runtime
        self._name = name
        self._question = question
        self._timeout = timeout
        self._began = 0.0

    def run(self, limits: Limits) -> Passed:
        """Start the container and ask it.

        Raises:
            CannotRun: it cannot be run here.
            SmokeTestFailed: it ended, or does not answer as it should.
        """
        self._began = time.monotonic()
        try:
            self._runtime.start(self._name, limits)
        except CannotStart as error:
            message = f"A container of the image does not start: {printable(str(error))}."
            raise SmokeTestFailed(message, remedy="See to the image's user, command and entry point.") from error
        return self._ask_server() if self._question.model else self._watch()

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _ask_server(self) -> Passed:
        """Ask MLflow's scoring server, from within the container: nothing else reaches it."""
        heard = _Heard()
        (port,) = self._question.ports
        program = (resources.files("builder.smoke") / "ask.py").read_text(encoding="utf-8")
        argv = ["python", "-I", "-c", program, str(port), self._question.model, f"{self._timeout:.0f}"]
        self._runtime.execute(self._name, argv, heard, timeout=self._timeout + _GRACE)
        answer = Answer.read(heard.lines)
        if answer.finished and not answer.problem:
            what = f"answers its {answer.example}" if answer.example else "loads its model (no input example)"
            return Passed(seconds=round(max(heard.first - self._began, 0), 1), what=what)
        if ended := self._runtime.ended(self._name, within=_PAUSE):
            raise self._end(ended, "it answered")
        if answer.problem:
            what = f"MLflow's server does not answer the model's own {answer.example}: {answer.problem}"
            remedy = "A prediction of the stored input example has to succeed: correct the model, and register it anew."
            raise self._failure(what, remedy)
        asked = "the model's input example" if answer.loaded else "GET /ping"
        what = f"MLflow's server does not answer {asked} within {self._timeout:g} seconds"
        raise self._failure(what, "Make the model load and predict quicker, or raise SMOKE_TEST_TIMEOUT.")

    def _watch(self) -> Passed:
        """Watch a program that is not known to answer anything: it runs on, and opens a port that its image exposes."""
        opened = self._wait_for_port(frozenset(self._question.ports)) if self._question.ports else None
        enough = LONG_MOMENT if opened is None else MOMENT
        if ended := self._runtime.ended(self._name, within=max(enough - self._elapsed, 0)):
            raise self._end(ended, f"{enough:g} seconds had passed")
        return Passed(seconds=opened, what="runs" if opened is None else "runs, with its port open")

    def _wait_for_port(self, wanted: frozenset[int]) -> float | None:
        """Return the seconds after which one of the ports was open; None where the image has nothing that tells."""
        while True:
            if ended := self._runtime.ended(self._name, within=_PAUSE):
                raise self._end(ended, "it opened a port")
            found = self._open_ports()
            if found is None:
                return None
            if found & wanted:
                return round(self._elapsed, 1)
            if self._elapsed > self._timeout:
                ports = ", ".join(map(str, sorted(wanted)))
                others = f"; open is {', '.join(map(str, sorted(found)[:_MOST_SHOWN]))}" if found else ""
                what = (
                    f"the program runs, but after {self._timeout:g} seconds no port is open that the image exposes "
                    f"({ports}){others}"
                )
                remedy = "Listen on the port that the image exposes (EXPOSE; 8080 without a Dockerfile)."
                raise self._failure(what, remedy)

    def _open_ports(self) -> frozenset[int] | None:
        """Return the ports that are open in the container; None where its image has no program that tells."""
        for argv in (["cat", *_SOCKETS], ["python", "-I", "-c", _READ_SOCKETS], ["python3", "-I", "-c", _READ_SOCKETS]):
            heard = _Heard()
            code = self._runtime.execute(self._name, argv, heard, timeout=_SHORT)
            if code not in _NO_PROGRAM:
                return listening(heard.lines)
        return None

    def _end(self, ended: Ended, before: str) -> SmokeTestFailed | OutOfMemory:
        if ended.of_memory:
            return OutOfMemory(self._name)
        what = f"its container ended with exit code {ended.code} before {before}"
        remedy = "What it needs and the image lacks belongs into the version: correct it, and register a new one."
        return self._failure(what, remedy)

    def _failure(self, what: str, remedy: str) -> SmokeTestFailed:
        lines = self._runtime.log(self._name)
        for line in lines:
            _log.error("the container said", line=printable(line))
        words = last_words(lines)
        message = f"The image does not serve: {what}{f'; its last lines: {words}' if words else ''}."
        return SmokeTestFailed(message, remedy=remedy)


@dataclass(slots=True)
class _Heard:
    """What a program in a container prints: its first lines, and when it said that the server answers.

    Attributes:
        lines: the first of them.
        first: when, in monotonic seconds; 0 where it has not.
    """

    lines: list[str] = field(default_factory=list)
    first: float = 0.0

    def __call__(self, line: str) -> None:
        """Take one line."""
        if not self.first and event_of(line).get("event") == "ping":
            self.first = time.monotonic()
        if len(self.lines) < _MOST_LINES:
            self.lines.append(line)
