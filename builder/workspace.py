"""The workspace: the folder through which fetch, build and push hand over, and nothing else.

    plan.json     written by fetch; what push believes
    recipe.json   written by fetch; what images of wheel layers are made from
    context/      written by fetch; what the engine builds from
    description/  written by fetch, and gone at its end: what describes the model, read before the rest is downloaded
    layouts/      written by build, a folder for each platform
    result.json   written by build: the platforms built, and the failure

An author's Dockerfile runs as root in the build phase, so all output of build is untrusted: links are not followed,
only regular files are opened, sizes are bounded, and the content is validated by a schema. The files that build writes
are written in place, never renamed, since in a Pod each is a mount of its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from builder.errors import (
    BuilderError,
    BuildFailed,
    Defect,
    EngineKilled,
    InvalidSettings,
    InvalidVersion,
    ServiceUnavailable,
    TryAgain,
    UsageError,
    cause_of,
)
from builder.masking import one_line
from builder.models.errors import on_disk
from builder.plan import AsPlatform, Plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from builder.reference import Platform


_MOST_PLAN_BYTES = 64 << 20
_MOST_RESULT_BYTES = 1 << 20
_MOST_TEXT = 4000


# The failures that a build phase may report. The report is untrusted, so it decides an exit code and nothing else.
_FAILURES: dict[str, type[BuilderError]] = {
    kind.__name__: kind for kind in (BuildFailed, ServiceUnavailable, TryAgain, EngineKilled, InvalidSettings, Defect)
}


class BuildResult(BaseModel):
    """The build phase's own report.

    Attributes:
        engine: the engine's name.
        built: the platforms whose layout was made.
        failure: the name of the error that ended it; empty if it succeeded.
        what: what failed.
        remedy: what to do about it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str = Field("", max_length=100)
    built: tuple[AsPlatform, ...] = Field((), max_length=100)
    failure: str = Field("", max_length=100)
    what: str = Field("", max_length=_MOST_TEXT)
    remedy: str = Field("", max_length=_MOST_TEXT)

    def failing(self, error: BuilderError) -> BuildResult:
        """Return this result, ended by an error."""
        texts = {"what": one_line(error.what, _MOST_TEXT), "remedy": one_line(error.remedy, _MOST_TEXT)}
        return self.model_copy(update={"failure": type(error).__name__, **texts})

    def check(self) -> None:
        """Raise the error that ended the build phase, if one did.

        Raises:
            BuildFailed: a Dockerfile could not be built.
            BuilderError: another error that a build can end with.
        """
        if self.failure:
            kind = _FAILURES.get(self.failure, BuildFailed)
            raise kind(one_line(self.what, _MOST_TEXT), remedy=one_line(self.remedy, _MOST_TEXT))


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folder, and the paths in it."""

    folder: Path

    @property
    def context(self) -> Path:
        """The folder a Dockerfile is built from."""
        return self.folder / "context"

    @property
    def description(self) -> Path:
        """The folder that a version is planned from, before its artifacts are downloaded."""
        return self.folder / "description"

    @property
    def dockerfile(self) -> Path:
        """The rendered Dockerfile, in the context."""
        return self.context / "Dockerfile"

    def layout(self, platform: Platform) -> Path:
        """The folder of one platform's OCI image layout."""
        return self.folder / "layouts" / platform.folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this program out of the folder for the duration of the context.

        Raises:
            TryAgain: another one is using it.
            InvalidSettings: the folder cannot be made or read.
        """
        with on_disk(f"make the workspace {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            message = f"Another publish is using the workspace {self.folder}."
            raise TryAgain(message, remedy="Wait for it to end, or set another BUILDER_WORKSPACE.") from error
        finally:
            os.close(descriptor)

    def clear_plan(self) -> None:
        """Remove an earlier run's plan and result, so that they are not taken for this run's."""
        with on_disk(f"write to the workspace {self.folder}"):
            for name in ("plan.json", "recipe.json", "result.json"):
                (self.folder / name).unlink(missing_ok=True)

    def prepare(self, *, keep_context: bool = False) -> None:
        """Make the workspace ready: remove what an earlier run left, and keep files that are not ours.

        Args:
            keep_context: leave the context, so that an interrupted download can resume.

        Raises:
            TryAgain: the disk is full.
            InvalidSettings: the folder cannot be made or written.
        """
        self.clear_plan()
        layouts = self.folder / "layouts"
        with on_disk(f"write to the workspace {self.folder}"):
            for path in (layouts, self.description, *(() if keep_context else (self.context,))):
                if path.is_symlink():
                    path.unlink()
                elif path.exists():
                    shutil.rmtree(path)
            layouts.mkdir()
            (self.folder / "result.json").touch()

    @contextmanager
    def describing(self) -> Iterator[Path]:
        """Yield the empty folder `description`, and remove it afterwards."""
        with on_disk(f"write to the workspace {self.folder}"):
            self.description.mkdir()
        try:
            yield self.description
        finally:
            shutil.rmtree(self.description, ignore_errors=True)

    def change_context(self, files: Mapping[str, bytes]) -> None:
        """Replace the content of files in the context, by path; their modes and times stay."""
        with on_disk(f"write to {self.context}"):
            for path, content in files.items():
                file = self.context / path
                status = file.lstat()
                file.write_bytes(content)
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    def write_dockerfile(self, content: bytes) -> None:
        """Write the rendered Dockerfile into the context, over an artifact of that name.

        Raises:
            InvalidVersion: the artifacts have a folder of that name.
        """
        if self.dockerfile.is_dir() and not self.dockerfile.is_symlink():
            message = "The version has a folder 'Dockerfile' where the rendered file belongs."
            raise InvalidVersion(message, remedy="Log that folder under another name.")
        with on_disk(f"write {self.dockerfile}"):
            # A new file: a link in its place would lead to another one.
            self.dockerfile.unlink(missing_ok=True)
            with self.dockerfile.open("xb") as file:
                file.write(content)

    def write_plan(self, plan: Plan) -> None:
        """Write plan.json.

        Raises:
            InvalidVersion: the version has more artifacts than a plan can list.
        """
        text = plan.model_dump_json(indent=1).encode()
        if len(text) > _MOST_PLAN_BYTES:
            message = f"{plan.version} has {len(plan.artifacts)} artifacts, more than a plan can list."
            raise InvalidVersion(message, remedy="Log small files as one archive.")
        with on_disk(f"write to the workspace {self.folder}"):
            (self.folder / "plan.json").write_bytes(text)

    def plan(self) -> Plan:
        """Return the plan that fetch wrote.

        Raises:
            UsageError: it is missing, or this program did not write it.
        """
        path = self.folder / "plan.json"
        try:
            return Plan.model_validate_json(_read_regular(path, _MOST_PLAN_BYTES))
        except (OSError, ValidationError, BuilderError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            message = f"The workspace {self.folder} has no readable plan: {one_line(why, 200)}."
            raise UsageError(message, remedy="Run 'builder fetch' first, with the same BUILDER_WORKSPACE.") from error

    def write_recipe(self, content: bytes) -> None:
        """Write recipe.json."""
        with on_disk(f"write to the workspace {self.folder}"):
            (self.folder / "recipe.json").write_bytes(content)

    def recipe(self) -> bytes:
        """Return what fetch wrote into recipe.json.

        Raises:
            UsageError: it is missing.
        """
        try:
            return _read_regular(self.folder / "recipe.json", _MOST_PLAN_BYTES)
        except OSError as error:
            message = f"The workspace {self.folder} has no readable recipe: {error.strerror}."
            raise UsageError(message, remedy="Run 'builder fetch' first, with the same BUILDER_WORKSPACE.") from error

    def write_result(self, result: BuildResult) -> None:
        """Write result.json, in place, and never through a link that a RUN step has put there.

        Raises:
            BuildFailed: it is no longer a file.
            TryAgain: the disk is full.
            InvalidSettings: it cannot be written.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with (
                on_disk(f"write to the workspace {self.folder}"),
                os.fdopen(os.open(self.folder / "result.json", flags, 0o644), "w") as file,
            ):
                file.write(result.model_dump_json())
        except InvalidSettings as error:
            cause = cause_of(error, OSError)
            if cause is None or cause.errno not in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:
                raise
            message = "result.json in the workspace was replaced by something that is not a file."
            raise BuildFailed(message, remedy="Remove the RUN step of the Dockerfile that did it.") from error

    def result(self) -> BuildResult:
        """Return the build phase's report, read as untrusted input.

        Raises:
            BuildFailed: build wrote nothing, or something that is not a result.
        """
        try:
            return BuildResult.model_validate_json(_read_regular(self.folder / "result.json", _MOST_RESULT_BYTES))
        except (OSError, ValidationError, ValueError, BuilderError) as error:
            message = "The build phase left no readable result."
            raise BuildFailed(message, remedy="See its log. The order of phases is fetch, build, push.") from error

    def discard(self) -> None:
        """Remove the files of an interrupted publish, as far as possible.

        Raises:
            TryAgain, InvalidSettings: as `locked`.
        """
        if not self.folder.is_dir():
            return
        with self.locked():
            for name in ("layouts", "context", "description", ".context.unfinished"):
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def remove(self) -> None:
        """Remove the whole folder, as far as possible."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes, without following a link at its end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            message = f"{path.name} is not a regular file of at most {limit} bytes"
            raise OSError(message)
        return file.read(limit)
