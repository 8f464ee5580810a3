"""The smoke test: an image is run and asked before its tag moves (SMOKE_TEST)."""

from __future__ import annotations

import functools
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from builder.errors import InvalidSettings, InvalidVersion, ServiceUnavailable
from builder.log import get_logger
from builder.masking import masked, one_line
from builder.oci import from_bytes, to_bytes
from builder.reference import Digest, Platform
from builder.settings import Settings
from builder.smoke.runtime import (
    CannotRun,
    CannotStart,
    ContainerRuntime,
    Content,
    Docker,
    Ended,
    Limits,
    NoContainers,
    Podman,
    Unfit,
    native_platform,
    new_name,
    without_volumes,
)

_SERVER = "mlflow.pyfunc.scoring_server"
_MODEL_PATH = "__pyfunc_model_path__"
_PORT = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/tcp)?")
_LAST_PORT = 65535
_MOST_PORTS = 64
_MOST_VOLUMES = 32
# An absolute folder without what `--tmpfs folder:options` would take for something else.
_VOLUME = re.compile(r"(?:/[A-Za-z0-9_.@+-]+)+")
_MOST_EVENT_CHARACTERS = 4000
_LONGEST_PROBLEM = 500
_LONGEST_LINE = 300
_LONGEST_SAYING = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The requests to a container of an image.

    Attributes:
        ports: TCP ports that the image exposes; one of them has to be open.
        model: folder of the model in the image where MLflow's scoring server is what runs; empty where something else
            does, which is not known to answer anything.
        volumes: folders that the image declares as volumes: it expects to be able to write there.
    """

    ports: tuple[int, ...]
    model: str = ""
    volumes: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Question:
        """Return the requests for an image, from its config as JSON, which may be a stranger's."""
        runtime = config.get("config")
        runtime = runtime if isinstance(runtime, Mapping) else {}
        ports = _ports(runtime.get("ExposedPorts"))
        command = [word for name in ("Entrypoint", "Cmd") for word in _words(runtime.get(name))]
        entries = [entry.partition("=") for entry in _words(runtime.get("Env"))]
        model = next((value for name, _, value in entries if name == _MODEL_PATH), "")
        port = _serving_port(command) if any(word.startswith(_SERVER) for word in command) else 0
        if model and port in ports:
            ports = (port,)
        else:
            model = ""
        volumes = runtime.get("Volumes")
        names = [name.rstrip("/") for name in volumes][:_MOST_VOLUMES] if isinstance(volumes, Mapping) else []
        return cls(
            ports=ports,
            model=model,
            volumes=tuple(name for name in names if _VOLUME.fullmatch(name) and ".." not in name.split("/")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of asking MLflow's server.

    Attributes:
        loaded: whether it answered, so that its model is loaded: every release loads it before.
        finished: whether all requests were sent.
        example: the file of the input example that was sent; empty for no example.
        problem: what is wrong with the answer to it; empty where nothing is.
    """

    loaded: bool = False
    finished: bool = False
    example: str = ""
    problem: str = ""

    @classmethod
    def read(cls, lines: Iterable[str]) -> Answer:
        """Return what the lines of `builder.smoke.ask` say; they may be a stranger's."""
        found = cls()
        for line in lines:
            event = event_of(line)
            if event.get("event") == "ping":
                found = cls(loaded=True)
            elif event.get("event") == "answer" and found.loaded:
                example, problem = (printable(str(event.get(name, "")), _LONGEST_PROBLEM) for name in _SAID)
                return cls(loaded=True, finished=True, example=example, problem=problem)
        return found


_SAID = ("example", "problem")


def event_of(line: str) -> dict[str, Any]:
    """Return one line of `builder.smoke.ask`; empty for any other line."""
    if len(line) > _MOST_EVENT_CHARACTERS or not line.startswith("{"):
        return {}
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def printable(text: str, limit: int = _LONGEST_LINE) -> str:
    """Return a line that a stranger's program wrote: no control character, no secret, bounded."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: 2 * limit])
    return one_line(masked(shown), limit)


def last_words(lines: Sequence[str]) -> str:
    """Return the end of a container's log as one line for an error: the last lines, as far as they fit."""
    kept: list[str] = []
    for line in reversed(lines):
        text = printable(line)
        if text and sum(map(len, kept)) + len(text) > _LONGEST_SAYING and kept:
            break
        kept += [text] if text else []
    return " | ".join(reversed(kept))


def _ports(exposed: object) -> tuple[int, ...]:
    found: list[int] = []
    for name in list(exposed)[:_MOST_PORTS] if isinstance(exposed, Mapping) else []:
        if match := _PORT.fullmatch(str(name)):
            found += range(int(match[1]), min(int(match[2] or match[1]), int(match[1]) + _MOST_PORTS) + 1)
    return tuple(sorted({port for port in found if 0 < port <= _LAST_PORT})[:_MOST_PORTS])


def _serving_port(command: Sequence[str]) -> int:
    """Return the port that uvicorn or gunicorn listens on; 0 where that is unknown."""
    for option, value in pairwise(command):
        if option in {"--port", "--bind"} and re.fullmatch(r"(?:.*:)?[0-9]{1,5}", value):
            return int(value.rpartition(":")[2])
    return 0


def _words(value: object) -> list[str]:
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []


# Seconds that a program which answers nothing has to run: where it opens a port, and where that cannot be seen.
MOMENT, LONG_MOMENT = 3.0, 10.0
_PAUSE = 0.5
_GRACE = 15.0
_MOST_LINES = 2000
_MOST_SHOWN = 10


class SmokeTestFailed(InvalidVersion):
    """The image was run, and does not do what it is for."""


class OutOfMemory(CannotRun):
    """The container was killed for the memory it used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """An image that answered.

    Attributes:
        seconds: from its container's start to the first answer; None where no request could be sent.
        what: what it did, a few words.
    """

    seconds: float | None
    what: str


class Trial:
    """One container's trial; the caller removes the container afterwards.

    Args:
        runtime: runs it.
        name: of its image, and of the container.
        question: the requests to it.
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
        try:
            self._runtime.start(self._name, limits)
        except CannotStart as error:
            message = f"A container of the image does not start: {printable(str(error))}."
            raise SmokeTestFailed(message, remedy="See to the image's user, command and entry point.") from error
        # What a busy machine needs to start it is not the image's.
        self._began = time.monotonic()
        return self._ask_server() if self._question.model else self._watch()

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _ask_server(self) -> Passed:
        """Ask MLflow's scoring server, from within the container: nothing else reaches it."""
        heard = _Heard()
        (port,) = self._question.ports
        program = (resources.files("builder.smoke") / "ask.py").read_text(encoding="utf-8")
        model = self._runtime.path(self._question.model)
        arguments = (str(port), model, f"{self._timeout:.0f}")
        self._runtime.run_python(self._name, program, *arguments, output=heard, timeout=self._timeout + _GRACE)
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
        request = "the model's input example" if answer.loaded else "GET /ping"
        what = f"MLflow's server does not answer {request} within {self._timeout:g} seconds"
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
            found = self._runtime.open_ports(self._name)
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
        said = f"; its last lines: {words}" if words else ""
        if not lines and self._runtime.log_is_at:
            said = f"; its log: {self._runtime.log_is_at}"
        message = f"The image does not serve: {what}{said}."
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


_LOADING = 3600
_SPARE = 0.75
_MEMORY = 4 << 30
_PASSED = re.compile(r"passed: \S+ (sha256:[0-9a-f]{64})\b.*")
_REMEDY = "Install podman or Docker where the publisher runs, or set SMOKE_TEST=auto."
_log = get_logger("smoke")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that can be run.

    Attributes:
        platform: what it runs on.
        digest: of its manifest.
        content: gives what it is made of.
    """

    platform: Platform
    digest: Digest
    content: Callable[[], Content] = field(repr=False)


class SmokeTests:
    """The smoke tests of one command.

    Args:
        settings: SMOKE_TEST and what belongs to it.
        runtimes: what may run containers here, in order: a Pod's sidecar; None for podman and Docker.
        native: this machine's platform.
    """

    def __init__(
        self, settings: Settings, runtimes: Sequence[ContainerRuntime] | None = None, native: Platform | None = None
    ) -> None:
        self._mode = settings.smoke_test
        self._timeout = settings.smoke_test_timeout
        self._memory = settings.smoke_test_memory
        self._candidate = settings.smoke_test_candidate
        self.native = native or native_platform()
        self._variables = settings.container_variables
        self._given = runtimes
        # Those that could not run anything, with why: not tried again by this command.
        self._unusable: dict[str, str] = {}
        self._checked = False
        self._logged: set[str] = set()

    @functools.cached_property
    def _runtimes(self) -> Sequence[ContainerRuntime]:
        if self._given is not None:
            return self._given
        return [Podman(self._variables, self.native), Docker(self._variables, self.native)]

    def refuse(self, platforms: Sequence[Platform], *, asked_by_version: bool) -> None:
        """Refuse, before anything is made, what SMOKE_TEST=required does not allow.

        Args:
            platforms: those that the image will have.
            asked_by_version: whether the version's own tag chose them.

        Raises:
            InvalidSettings: no container can be run here, or not for a platform of TARGET_PLATFORMS.
            InvalidVersion: the version asks for other platforms alone.
        """
        if self._mode != "required":
            return
        if self.native not in platforms:
            kind = InvalidVersion if asked_by_version else InvalidSettings
            message = f"SMOKE_TEST is required, {self._other(platforms)}."
            raise kind(message, remedy=f"Add {self.native} to the platforms, or publish on a machine of one of them.")
        if not self._checked and not self._any_runs():
            message = f"SMOKE_TEST is required, and no container can be run here: {self._why()}."
            raise InvalidSettings(message, remedy=_REMEDY)
        self._checked = True

    def describe(self, platforms: Sequence[Platform]) -> str:
        """Return what would be done about an image of these platforms, for people; nothing is started."""
        if self._mode == "off":
            return "off"
        if self._candidate:
            return f"runs in the Pod as {self._candidate}, for the node's platform"
        if self.native not in platforms:
            return f"not possible: {self._other(platforms)}"
        here = [runtime.name for runtime in self._runtimes if runtime.available()]
        return f"runs {self.native} with {' or '.join(here)}" if here else f"not possible: {self._why()}"

    def check(self) -> tuple[bool, str]:
        """Return whether a container runs here, and which runtime runs it, or why none does; the smallest is run."""
        if not self._any_runs():
            return False, self._why()
        return True, next(each.name for each in self._runtimes if each.name not in self._unusable and each.available())

    def run(
        self, images: Sequence[Candidate], *, before: str, folder: Path, record: Callable[[str], None]
    ) -> None:  # fmt: skip
        """Run the image of this machine's platform, unless that was done, and record what came of it.

        Args:
            images: all that the tag will name.
            before: what was recorded last.
            folder: where an image may be written.
            record: takes one line for the version's tags.

        Raises:
            SmokeTestFailed: it does not serve.
            ServiceUnavailable: it cannot be run, and SMOKE_TEST is required.
            InvalidVersion: as that, and the image is the reason.
            BuilderError: what reading the image from the registry raises.
        """
        if self._mode == "off":
            record("off")
            return
        if all(image.platform != self.native for image in images):
            self._impossible(self._other([image.platform for image in images]), record)
            return
        image = self.untested(images, before=before)
        if image is None:
            _log.info("smoke test passed before", result=before)
            return
        what = f"{image.platform} {image.digest}"
        try:
            passed_now = self._tried(image, folder)
        except SmokeTestFailed:
            record(f"failed: {what}")
            raise
        except OutOfMemory as error:
            memory = f"{self._limits(()).memory >> 20} MB"
            if self._memory:
                record(f"failed: {what}")
                message = f"The image's container was killed: it needs more than {memory} of memory."
                raise SmokeTestFailed(message, remedy="Raise SMOKE_TEST_MEMORY, or make the model smaller.") from error
            self._impossible(f"it needs more memory than this machine can spare ({memory})", record, error)
        except CannotRun as error:
            self._impossible(str(error), record, error)
        else:
            after = "" if passed_now.seconds is None else f" after {passed_now.seconds} s"
            record(f"passed: {what} {passed_now.what}{after}")

    def untested(self, images: Sequence[Candidate], *, before: str) -> Candidate | None:
        """Return the image that `run` would run; None if there is none, or it has passed.

        Args:
            images: all that the tag will name.
            before: what was recorded last.
        """
        image = next((image for image in images if image.platform == self.native), None)
        passed = _PASSED.fullmatch(before)
        if self._mode == "off" or image is None or (passed and passed[1] == str(image.digest)):
            return None
        return image

    def _tried(self, image: Candidate, folder: Path) -> Passed:
        """Run an image by the first runtime that can; raises `CannotRun` where none can."""
        usable = [each for each in self._runtimes if each.name not in self._unusable and each.available()]
        if not usable:
            raise NoContainers(self._why())
        content = image.content()
        config = from_bytes(content.config)
        question = Question.of(config)
        content = replace(content, config=to_bytes(without_volumes(config)))
        name = new_name(time.time() + self._timeout + _LOADING, secrets.token_hex(6))
        _log.info("smoke test", platform=str(image.platform), bytes=content.size)
        why = ""
        for runtime in usable:
            try:
                runtime.check()
                runtime.sweep(time.time())
                runtime.load(content, name, folder)
                passed = self._judged(runtime, name, question)
            except (OutOfMemory, Unfit):
                raise
            except CannotRun as error:
                why = str(error)
                if isinstance(error, NoContainers):
                    self._unusable[runtime.name] = printable(why)
            else:
                _log.info("smoke test passed", what=passed.what, seconds=passed.seconds, runtime=runtime.name)
                return passed
            finally:
                runtime.remove(name)
        raise CannotRun(why)

    def _judged(self, runtime: ContainerRuntime, name: str, question: Question) -> Passed:
        try:
            passed = Trial(runtime, name, question, timeout=self._timeout).run(self._limits(question.volumes))
        except SmokeTestFailed:
            runtime.confirm()
            raise
        runtime.confirm()
        return passed

    def _any_runs(self) -> bool:
        """Return whether a container was seen to run here."""
        for runtime in self._runtimes:
            try:
                if runtime.name not in self._unusable and runtime.available():
                    runtime.check()
                    return True
            except CannotRun as error:
                self._unusable[runtime.name] = printable(str(error))
        return False

    def _impossible(self, why: str, record: Callable[[str], None], error: CannotRun | None = None) -> None:
        why = printable(why)
        record(f"not possible: {why}")
        if self._mode == "required":
            message = f"SMOKE_TEST is required, and the image cannot be run here: {why}."
            if isinstance(error, Unfit):
                raise InvalidVersion(message, remedy="Make the line `USER 10001` the last USER of the Dockerfile.")
            raise ServiceUnavailable(message, remedy=_REMEDY) from error
        if why not in self._logged:
            self._logged.add(why)
            # A machine that runs no containers, as in a cluster, is to be expected; all else may be mended.
            line = _log.info if error is None or isinstance(error, NoContainers) else _log.warning
            line("smoke test not possible", why=why)

    def _why(self) -> str:
        return "; ".join(self._unusable.values()) or "neither podman nor Docker is here"

    def _other(self, platforms: Sequence[Platform]) -> str:
        return f"this machine runs {self.native}, and the image is for {', '.join(map(str, platforms))}"

    def _limits(self, volumes: Sequence[str]) -> Limits:
        memory = self._memory << 20 if self._memory else int(_available() * _SPARE)
        return Limits(memory=memory, seconds=self._timeout + 120, volumes=tuple(volumes))


def _available() -> int:
    """Return the bytes of memory that this machine can give without swapping; a guess where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return _MEMORY
