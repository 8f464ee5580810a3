"""Errors and exit codes.

Every error that the program raises on purpose is a `BuilderError`. It says what failed and on which input, what the
user can do about it, and which exit code the process ends with. The codes are those of sysexits(3), so that a Job's
podFailurePolicy can tell a hopeless input from an unavailable service.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from builder.masking import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence


Cause = TypeVar("Cause", bound=BaseException)


class ExitCode(IntEnum):
    """Exit codes, from sysexits(3)."""

    OK = 0
    USAGE = 64
    DATA = 65
    NO_INPUT = 66
    UNAVAILABLE = 69
    SOFTWARE = 70
    CANNOT_CREATE = 73
    TEMPORARY = 75
    NO_PERMISSION = 77
    CONFIG = 78


class BuilderError(Exception):
    """Base of every error raised on purpose.

    Args:
        what: what failed and on which input: one or more sentences, no trailing newline.
        remedy: what the user can do about it; empty only if nothing can be done.
    """

    exit_code = ExitCode.SOFTWARE
    # Whether the fault is the version's, although the exit code alone does not say so.
    of_version: ClassVar[bool] = False

    def __init__(self, what: str, *, remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy
        # The log fields of what it happened to: model, version, phase.
        self.about: dict[str, str] = {}

    def __str__(self) -> str:
        """Return what failed, then the remedy."""
        return f"{self.what} {self.remedy}".strip()

    @property
    def retryable(self) -> bool:
        """Whether the same input can succeed later, unchanged."""
        return self.exit_code in {ExitCode.UNAVAILABLE, ExitCode.TEMPORARY}

    def one_line(self, limit: int = 1000) -> str:
        """Return `Type: what remedy` on one line that people may see; see `builder.masking.one_line`.

        Args:
            limit: the most characters to return.
        """
        return one_line(f"{type(self).__name__}: {self}", limit)


class UsageError(BuilderError):
    """The command line is wrong."""

    exit_code = ExitCode.USAGE


class InvalidVersion(BuilderError):
    """A model version, its tags, artifacts or templates cannot be published as they are."""

    exit_code = ExitCode.DATA


class OverBudget(InvalidVersion):
    """A version takes more time, memory or space than one version may."""


class VersionCrashed(InvalidVersion):
    """The process that worked on a version ended without an outcome."""


class VersionNotFound(BuilderError):
    """No such registered model, version or alias."""

    exit_code = ExitCode.NO_INPUT


class ServiceUnavailable(BuilderError):
    """MLflow or a registry is unavailable, or its answer is invalid."""

    exit_code = ExitCode.UNAVAILABLE


class BuildFailed(BuilderError):
    """An engine could not build the Dockerfile, or its result cannot be used."""

    exit_code = ExitCode.CANNOT_CREATE


class TryAgain(BuilderError):
    """The same command can succeed later: after a lost race, or on a full disk."""

    exit_code = ExitCode.TEMPORARY


class StillRunning(TryAgain):
    """What was followed has not ended in the time that was given, and goes on."""

    @classmethod
    def after(cls, job: str, seconds: float) -> Self:
        """Return the error for a Job, by its name, that was followed for so many seconds."""
        message = f"The Job {job} has not ended after {seconds:g} s, and goes on."
        return cls(message, remedy="Look at it: builder status; or run the same command again.")


class EngineKilled(TryAgain):
    """An engine was killed from outside, as when memory runs out."""


class PermissionRefused(BuilderError):
    """A credential is missing, wrong, or lacks a permission."""

    exit_code = ExitCode.NO_PERMISSION


class RootRefused(PermissionRefused):
    """A version's artifacts are where the settings do not allow the publisher's credentials to be used."""

    of_version = True


class InvalidSettings(BuilderError):
    """One or more settings are missing or malformed.

    Args:
        what: as for every error.
        remedy: as for every error.
        problems: the items that `what` lists, each a sentence without a full stop; empty if it lists nothing.
    """

    exit_code = ExitCode.CONFIG

    def __init__(self, what: str, *, remedy: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(what, remedy=remedy)
        self.problems = tuple(problems)


def of_kind(name: str, code: int, what: str, remedy: str) -> BuilderError:
    """Return an error that another process has raised.

    Args:
        name: its class's name; an unknown one is taken for a defect.
        code: its exit code; an error whose class has another code is taken for a defect.
        what: what failed.
        remedy: what to do about it.
    """
    pending, kinds = [BuilderError], {}
    while pending:
        kind = pending.pop()
        kinds[kind.__name__, int(kind.exit_code)] = kind
        pending += kind.__subclasses__()
    return kinds.get((name, code), Defect)(what, remedy=remedy)


def of_code(code: int, what: str) -> BuilderError:
    """Return the error that an exit code of this program stands for, if nothing more is known than what it said.

    Args:
        code: one of `ExitCode`, not 0.
        what: what it said.
    """
    kinds = (UsageError, InvalidVersion, VersionNotFound, ServiceUnavailable, BuildFailed, TryAgain, PermissionRefused)
    return next((kind for kind in (*kinds, InvalidSettings) if kind.exit_code == code), Defect)(what)


class StoreNotSupported(InvalidSettings):
    """A version's artifacts are in a kind of store whose client is not installed."""

    of_version = True


def cause_of(error: BaseException, *kinds: type[Cause]) -> Cause | None:
    """Return the first error of some kinds in an error's chain of causes, itself included; None if absent."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, kinds):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


class Defect(BuilderError):
    """A defect of this program; its exit code is the base's."""


class Terminated(BaseException):
    """The process received SIGTERM or SIGINT; not an `Exception`, so that nothing swallows it."""

    exit_code = ExitCode.TEMPORARY
