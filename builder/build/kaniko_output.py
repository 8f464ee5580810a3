"""Kaniko's output: handed on without its noise, and remembered as far as a failure needs it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from builder.build.failure import Printed, failure
from builder.errors import EngineKilled

if TYPE_CHECKING:
    from builder.build.engine import Output
    from builder.errors import BuilderError
    from builder.reference import Platform

_KILLED = -9
# logrus' text format: time="…" level=info msg="…", with Go's quoting.
_LOGGED = re.compile(r'time="[^"]*" level=(?P<level>[a-z]+) msg=(?P<message>"(?:[^"\\]|\\.)*"?|\S*)')
_INSTRUCTION = re.compile(
    r"(?:ADD|COPY|RUN|USER|WORKDIR|ENV|ARG|LABEL|CMD|ENTRYPOINT|EXPOSE|VOLUME|SHELL|HEALTHCHECK)\s"
)
# Every instruction is logged up to four times, and the same two lines begin every build.
_NOISE = re.compile(r"(?:Cmd|Args|Running): |active feature flags: |credential providers by priority: ")
# What it ends with, after the last log line and not in the log's format.
_OWN_WORDS = re.compile(r"error (?:building|pushing|resolving|checking|changing) |panic: |fatal error: ")
_STEP_FAILED = "failed to execute command"
_WRAPPING = re.compile(
    r"^(?:error building image: |error building stage: |failed to execute command: |"
    r"unable to complete operation after \d+ attempts, last error: |waiting for process to exit: )+"
)


class KanikoOutput:
    """Takes Kaniko's lines; knows afterwards why it failed.

    Args:
        output: called with each line that is worth a reader's time.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._step = ""
        self._printed = Printed()
        self._words = ""  # Kaniko's own last words

    def __call__(self, line: str) -> None:
        """Take one line."""
        logged = _LOGGED.fullmatch(line)
        if not logged:
            self._take_raw(line)
            return
        level, message = logged["level"], _unquoted(logged["message"])
        if _NOISE.match(message):
            return
        if _INSTRUCTION.match(message):
            self._step = message
            self._printed.clear()
        if level in {"error", "fatal", "panic"}:
            self._words = message
        self._output(message if level == "info" else f"{level}: {message}")

    def _take_raw(self, line: str) -> None:
        if _OWN_WORDS.match(line):
            self._words = line
        else:
            self._printed.take(line)
        self._output(line)

    def failure(self, code: int, platform: Platform) -> BuilderError:
        """Return the error for an executor that ended with `code`."""
        if code == _KILLED:
            message = f"Kaniko was killed while it built {platform}."
            return EngineKilled(message, remedy="Most often memory ran out: raise the container's memory limit.")
        words = self._words or self._printed.last
        in_step = _STEP_FAILED in words
        return failure(
            "Kaniko",
            platform,
            _WRAPPING.sub("", words) or f"exit code {code}",
            step=self._step if in_step else "",
            printed=self._printed if in_step else None,
        )


def _unquoted(text: str) -> str:
    """Return what Go quoted; its few escapes that JSON does not know stay as they are."""
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text.strip('"')
