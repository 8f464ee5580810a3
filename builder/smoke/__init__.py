"""The smoke test: an image is run and queried before its tag moves (SMOKE_TEST)."""

from __future__ import annotations

import platform as machine
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from builder.errors import InvalidSettings, InvalidVersion, ServiceUnavailable
from builder.log import get_logger
from builder.oci.descriptor import from_bytes, to_bytes
from builder.reference import Digest, Platform
from builder.settings import Settings
from builder.smoke.runtime import CannotRun, ContainerRuntime, Content, Docker, Limits, NoContainers, Podman, new_name
from builder.smoke.trial import OutOfMemory, Passed, Question, SmokeTestFailed, Trial, printable, without_volumes

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
        runtimes: what may run containers here, in order; None for podman and Docker.
        native: this machine's platform.
    """

    def __init__(
        self, settings: Settings, runtimes: Sequence[ContainerRuntime] | None = None, native: Platform | None = None
    ) -> None:
        self._mode = settings.smoke_test
        self._timeout = settings.smoke_test_timeout
        self._memory = settings.smoke_test_memory
        self.native = native or Platform.parse(f"linux/{machine.machine().lower()}")
        environ = settings.container_variables
        self._runtimes = [Podman(environ, self.native), Docker(environ, self.native)] if runtimes is None else runtimes
        # Those that could not run anything, with why: not tried again by this command.
        self._unusable: dict[str, str] = {}
        self._checked = False
        self._logged: set[str] = set()

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
        if self.native not in platforms:
            return f"not possible: {self._other(platforms)}"
        here = [runtime.name for runtime in self._runtimes if runtime.available()]
        return f"runs {self.native} with {' or '.join(here)}" if here else f"not possible: {self._why()}"

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
            BuilderError: what reading the image from the registry raises.
        """
        if self._mode == "off":
            record("off")
            return
        image = next((image for image in images if image.platform == self.native), None)
        if image is None:
            self._impossible(self._other([image.platform for image in images]), record)
            return
        if (passed := _PASSED.fullmatch(before)) and passed[1] == str(image.digest):
            _log.info("smoke test passed before", digest=str(image.digest))
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
            with tempfile.TemporaryDirectory(prefix="smoke-", dir=folder) as place:
                try:
                    runtime.check()
                    runtime.sweep(time.time())
                    runtime.load(content, name, Path(place))
                    passed = Trial(runtime, name, question, timeout=self._timeout).run(self._limits(question.volumes))
                except OutOfMemory:
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
