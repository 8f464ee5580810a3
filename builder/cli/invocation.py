"""One run of the program: what it reads, what it prints, and how it says what failed."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

import click

from builder.errors import ExitCode
from builder.masking import indented, masked, one_line, visible

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from structlog.stdlib import BoundLogger

    from builder.settings import CommonSettings

    S = TypeVar("S", bound=CommonSettings)


# A Pod's termination message has at most 4096 bytes.
_MOST_MESSAGE_BYTES = 4096
_MOST_SAID = 10_000


@dataclass
class Invocation:
    """One run of the program: its environment, where its product goes, and how it says what failed."""

    environ: Mapping[str, str]
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    # What the line of the log that says what failed names beside the reason.
    about: dict[str, str] = field(default_factory=dict)
    _logs: bool = False

    @contextmanager
    def reserved_stdout(self) -> Iterator[None]:
        """Keep the process's stdout for the command's product, and send everything else that is printed to stderr.

        A library that prints (MLflow does) must not get between a script and the digest reference it reads.
        """
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            with os.fdopen(os.dup(kept), "w", encoding="utf-8") as self.stdout:
                yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)

    def settings(self, kind: type[S], require: tuple[str, ...] = (), **overrides: object) -> S:
        """Return the settings of one kind, and send logs where they say."""
        from builder import log

        settings = kind.from_environ(self.environ, require, **overrides)
        log.configure(settings.log_format, settings.log_level)
        self._logs = True
        of_version = {"model": getattr(settings, "model_name", ""), "version": getattr(settings, "model_version", "")}
        self.about = {key: value for key, value in of_version.items() if value}
        return settings

    @property
    def log(self) -> BoundLogger:
        """Where commands log; `settings` comes first, since it says how."""
        from builder import log

        return log.get_logger("cli")

    def product(self, text: str) -> None:
        """Print lines on stdout. What other people wrote in them is masked before: a reference must stay as it is."""
        self.stdout.write("\n".join(visible(line) for line in text.split("\n")) + "\n")

    def failed(
        self,
        kind: str,
        what: str,
        remedy: str,
        code: int,
        problems: Sequence[str] = (),
        *,
        defect: Exception | None = None,
    ) -> None:
        """Say on stderr what failed and what to do, and leave it as a Pod's termination message.

        On a terminal, and where LOG_FORMAT is `text`, that is for people; elsewhere it is a line of the log.

        Args:
            kind: the error's name.
            what: what failed.
            remedy: what to do about it.
            code: the exit code.
            problems: what `what` lists after a colon, if it does: for people, a line for each.
            defect: what is shown with its traceback.
        """
        what, remedy = one_line(what, _MOST_SAID), one_line(remedy, _MOST_SAID)
        if sys.stderr.isatty() or self.environ.get("LOG_FORMAT") == "text":
            if defect:
                click.echo(indented("".join(traceback.format_exception(defect))), err=True)
            said = f"{what.partition(':')[0]}:" if len(problems) > 1 else what
            click.echo(f"{click.style('error:', fg='red', bold=True)} {said}", err=True)
            for problem in problems if len(problems) > 1 else ():
                click.echo(f"  - {one_line(problem, _MOST_SAID)}", err=True)
            if remedy:
                click.echo(f"  {click.style('what to do:', bold=True)} {remedy}", err=True)
        else:
            facts = {**self.about, "error": kind, "what": what, "remedy": remedy, "exit_code": int(code)}
            if self._logs:
                self.log.error("failed", **facts, exc_info=defect)
            else:
                # As lines of the log are. It is not there yet, and cannot be had where a request to end broke off its
                # import: what that leaves of modules is not imported again.
                when = datetime.now(UTC).isoformat().replace("+00:00", "Z")
                line = {**facts, "event": "failed", "level": "error", "timestamp": when}
                if defect:
                    line["exception"] = masked("".join(traceback.format_exception(defect)))
                click.echo(json.dumps(line), err=True)
        self.leave_message({"state": "failed", "error": one_line(f"{kind}: {what} {remedy}"), "exit_code": int(code)})

    def defect(self, error: Exception) -> None:
        """Say on stderr that this program is at fault, with where."""
        what = f"{type(error).__name__}: {one_line(str(error), 300)}"
        remedy = "This is a defect of the builder, not of your input. Please report it with the lines above."
        self.failed("Defect", what, remedy, ExitCode.SOFTWARE, defect=error)

    def leave_message(self, message: Mapping[str, object]) -> None:
        """Write the outcome to the termination log, where that file exists; long texts are cut to what it may hold."""
        path = Path(self.environ.get("TERMINATION_LOG") or "/dev/termination-log")
        limit = _MOST_MESSAGE_BYTES
        while len(text := _message(message, limit)) > _MOST_MESSAGE_BYTES and limit > 1:
            limit //= 2
        try:
            if path.is_file():
                path.write_text(text)
        except OSError as error:
            click.echo(visible(f"{path} cannot be written: {error.strerror}"), err=True)


def _message(message: Mapping[str, object], limit: int) -> str:
    """Return a termination message in ASCII, its texts cut to a limit; the image that was published is never masked."""
    whole = {"image", "tag"}
    return json.dumps(
        {
            key: one_line(value, limit) if isinstance(value, str) and key not in whole else value
            for key, value in message.items()
        }
    )
