"""Many versions, one bad one: the loop that a sweep, a download and the making of layers have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar

from pydantic import ConfigDict
from structlog.stdlib import BoundLogger

from builder import log
from builder.batch.children import Children
from builder.budget import Budget
from builder.errors import BuilderError, Defect, ExitCode, VersionNotFound
from builder.models.version import ModelVersion
from builder.reference import Reference

AnyResult = TypeVar("AnyResult", bound="Result")

# Errors with these exit codes are about a version's own content; all others hinder the publisher itself.
_OWN_FAULTS = frozenset({ExitCode.DATA, ExitCode.NO_INPUT, ExitCode.CANNOT_CREATE})


# sweep: `published` was made now; `current` was there; `foreign` is an image of another publisher's; `waiting`
# has failed too often, and waits for a change.
# download: `new`, `changed`, `unchanged`.
# warm: `warm`, all is there now; `verified`, all that is there is what it should be; `different`, something is not;
# `unproven`, a layer cannot be rebuilt for comparison; `passed over`, it is not made of wheel layers.
# All: `failed`; `gone` was deleted, or lost its target tag, before or while this ran, which is no failure.
State = Literal[
    "published", "current", "foreign", "waiting", "new", "changed", "unchanged",
    "warm", "verified", "different", "unproven", "passed over", "failed", "gone",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one version, in a sweep, a download, or while layers were made ahead of time.

    Attributes:
        name: the version as logs name it, or the requirements file.
        state: what became of it.
        version: the version; None for a requirements file.
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
                return replace(work(), name=name, version=version)
        except VersionNotFound as error:
            if not self.gone:
                return self._failure(version, error)
            self._lines(name).info(self.gone, detail=error.what)
            return self.kind(name=name, version=version, state="gone", detail=error.one_line())
        except BuilderError as error:
            return self._failure(version, error)

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
            version=version,
            state="failed",
            detail=error.one_line(),
            exit_code=int(error.exit_code),
            error=error,
            own_fault=error.of_version or error.exit_code in _OWN_FAULTS,
        )

    def _lines(self, name: str) -> BoundLogger:
        return log.get_logger(self.logger).bind(**{self.key: name})
