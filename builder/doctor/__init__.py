"""Whether everything that a publish needs is there: checks that run side by side, and say what to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from builder.errors import BuilderError, ExitCode
from builder.log import get_logger
from builder.process import side_by_side

State = Literal["ok", "warn", "fail", "skipped"]
Result = TypeVar("Result")

# Seconds until it is looked whether the time is over.
_TICK = 0.2
_log = get_logger("doctor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check has found.

    Attributes:
        check: what was checked; empty until the check has ended.
        state: `ok`; `warn` for what hinders no publish, or not all; `fail`; `skipped` for what cannot be seen from
            here.
        found: a sentence or two.
        remedy: what to do; empty where there is nothing to do.
        exit_code: of the program, if this were all that is wrong; 0 unless the state is `fail`.
    """

    check: str = ""
    state: State
    found: str
    remedy: str = ""
    exit_code: int = 0


def ok(found: str) -> Finding:
    """Return that all is well."""
    return Finding(state="ok", found=found)


def warn(found: str, remedy: str) -> Finding:
    """Return what hinders no publish, or not all of them, and what to do about it."""
    return Finding(state="warn", found=found, remedy=remedy)


def skipped(found: str, remedy: str = "") -> Finding:
    """Return why something cannot be seen from here, and perhaps how it can be seen."""
    return Finding(state="skipped", found=found, remedy=remedy)


def failed(error: BuilderError) -> Finding:
    """Return that what was checked is broken, as an error tells."""
    return Finding(state="fail", found=error.what, remedy=error.remedy, exit_code=int(error.exit_code))


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One row of the table.

    Attributes:
        name: what is checked.
        look: looks; a `BuilderError` that it raises is what it has found.
    """

    name: str
    look: Callable[[], Finding]

    def run(self) -> Finding:
        """Return what the check finds, whatever happens."""
        try:
            found = self.look()
        except BuilderError as error:
            found = failed(error)
        except Exception as error:  # noqa: BLE001 -- one check must not hide the others
            _log.debug("a check broke off", check=self.name, exc_info=error)
            what = f"The check itself broke off: {type(error).__name__}."
            remedy = "Please report it, with what LOG_LEVEL=debug shows."
            found = Finding(state="fail", found=what, remedy=remedy, exit_code=int(ExitCode.SOFTWARE))
        return replace(found, check=self.name)


class Once(Generic[Result]):
    """Something that several checks need: the first one makes it, the others wait. Thread-safe.

    Args:
        make: makes it; if it raises a `BuilderError`, each of them gets that.
    """

    def __init__(self, make: Callable[[], Result]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: list[Result] = []
        self._error: BuilderError | None = None

    def __call__(self) -> Result:
        """Return it."""
        with self._lock:
            if self._error is not None:
                raise self._error
            if not self._made:
                try:
                    self._made.append(self._make())
                except BuilderError as error:
                    self._error = error
                    raise
            return self._made[0]


def diagnose(checks: Sequence[Check], *, seconds: float) -> list[Finding]:
    """Run checks side by side, and return what they find, in their order.

    Args:
        checks: the checks.
        seconds: after which those that have not ended are given up.
    """
    deadline = time.monotonic() + seconds
    found: dict[int, Finding] = {}
    for result in side_by_side(_numbered, list(enumerate(checks)), threads=len(checks), every=_TICK):
        if result is not None:
            found[result[0]] = result[1]
        if time.monotonic() > deadline:
            break
    return [found.get(number) or _late(check, seconds) for number, check in enumerate(checks)]


def _numbered(item: tuple[int, Check]) -> tuple[int, Finding]:
    return item[0], item[1].run()


def _late(check: Check, seconds: float) -> Finding:
    what = f"There was no answer within {seconds:g} seconds."
    remedy = "Check the network between here and there: names, proxies, network policies. --timeout gives more time."
    return Finding(check=check.name, state="fail", found=what, remedy=remedy, exit_code=int(ExitCode.UNAVAILABLE))


def exit_code(findings: Iterable[Finding]) -> int:
    """Return the program's exit code: the highest of what failed, 0 where nothing did."""
    return max((finding.exit_code for finding in findings), default=0)
