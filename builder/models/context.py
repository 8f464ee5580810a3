"""The context: a version's artifacts in a folder of ours, whole, without links, always the same way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import InvalidSettings, InvalidVersion, TryAgain
from builder.models.answers import on_disk
from builder.models.artifacts import MODEL_FILE, checked_path
from builder.reference import Digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from builder.models.catalog import Artifact, Catalog
    from builder.models.version import ModelVersion

REQUIREMENTS = "requirements.txt"
_THREADS = 8
_REPORT_SECONDS = 0.5
# A file takes at least a block, and something should be left for whoever else writes to the disk.
_BLOCK = 4096
_SPARE = 16 << 20
_READ = 1 << 20
# python_env.yaml says `python: 3.11.7`, conda.yaml `- python=3.11.7`, MLmodel `python_version: 3.11.7`. They are a
# stranger's files, and this is all that is wanted of them.
_PYTHON = (
    ("python_env.yaml", re.compile(r"^python:[ \t]*['\"]?(\d+\.\d+)(?:\.\w+)?['\"]?[ \t]*$", re.MULTILINE)),
    (
        "conda.yaml",
        re.compile(r"^[ \t]*-[ \t]*['\"]?python[ \t]*=+[ \t]*(\d+\.\d+)(?:\.[\w*]+)*['\"]?[ \t]*$", re.MULTILINE),
    ),
    (MODEL_FILE, re.compile(r"^[ \t]+python_version:[ \t]*['\"]?(\d+\.\d+)(?:\.\w+)?['\"]?[ \t]*$", re.MULTILINE)),
)
_PYTHON_VERSION = re.compile(r"3\.[0-9]{1,2}")
_MOST_TEXT = 1 << 20


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download is.

    Attributes:
        files: files that are here.
        all_files: files there will be.
        size: bytes that are here, those of unfinished files included.
        all_sizes: bytes there will be, as far as the store tells sizes.
    """

    files: int
    all_files: int
    size: int
    all_sizes: int


def write_context(
    catalog: Catalog,
    version: ModelVersion,
    artifacts: Sequence[Artifact],
    folder: Path,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write a version's artifacts into `folder`, and nothing else: what was there before is removed.

    Files that an interrupted call for the same version and the same artifacts left there are kept: each was moved into
    its place when it was whole. Every file is readable by all and executable by none, and everything has the time at
    which the version was registered, so that two contexts of a version are the same.

    Args:
        catalog: where the artifacts are.
        version: the version.
        artifacts: its artifacts, as the catalog listed them.
        folder: where to; it and its parents are made.
        progress: called some times a second, in the calling thread.

    Raises:
        TryAgain: there is too little space, or the disk is full.
        InvalidVersion: a path is not safe, or two files meet on a file system that ignores case.
        ServiceUnavailable, PermissionRefused: as the catalog's `download`.
    """
    for artifact in artifacts:
        if checked_path(artifact.path) != artifact.path:
            message = f"The artifact {artifact.path!r} of {version} is not in normal form."
            raise InvalidVersion(message, remedy="List the version's artifacts again.")
    with on_disk(f"write {version} to {str(folder)!r}"):
        unfinished = _prepared(folder, _identity(version, artifacts))
        kept = _kept(folder, artifacts)
        missing = [artifact for artifact in artifacts if artifact.path not in kept]
        _check_space(folder, version, missing)
        _fetch(catalog, missing, folder, unfinished, _reporter(progress, artifacts, kept, unfinished))
        _settle(folder, version.created_ms)
        shutil.rmtree(unfinished)


def _identity(version: ModelVersion, artifacts: Sequence[Artifact]) -> str:
    """Return a hash of what is written; another one makes what an interrupted call left of no use."""
    what = [version.name, version.version, version.created_ms, version.source]
    files = [[artifact.path, artifact.size, artifact.root, artifact.remote] for artifact in artifacts]
    return hashlib.sha256(json.dumps([what, files]).encode()).hexdigest()


def _prepared(folder: Path, identity: str) -> Path:
    """Return the folder for unfinished files, beside `folder`; empty `folder` unless it was begun for `identity`.

    The folder of unfinished files lives as long as the context is not whole, and holds what it is being made for.
    """
    if folder.is_symlink():
        message = f"The folder {str(folder)!r} is a link."
        raise InvalidSettings(message, remedy="Remove it, or name another workspace by BUILDER_WORKSPACE.")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    mark = unfinished / "identity"
    begun = mark.is_file() and not unfinished.is_symlink() and mark.read_text() == identity
    folder.mkdir(parents=True, exist_ok=True)
    if not begun:
        for child in folder.iterdir():
            _remove(child)
    _remove(unfinished)
    unfinished.mkdir(mode=0o700)
    mark.write_text(identity)
    return unfinished


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _kept(folder: Path, artifacts: Sequence[Artifact]) -> set[str]:
    """Return the paths of the files that are here already, and remove whatever else there is."""
    sizes = {artifact.path: artifact.size for artifact in artifacts}
    kept = set()
    for path, status in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if stat.S_ISREG(status.st_mode) and sizes.get(name) == status.st_size:
            kept.add(name)
        else:
            path.unlink()
    return kept


def _check_space(folder: Path, version: ModelVersion, missing: Sequence[Artifact]) -> None:
    """Raise TryAgain if the files cannot fit; files whose size is not known count as a block."""
    needed = sum(max(artifact.size or 0, _BLOCK) for artifact in missing) + _SPARE
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = f"{version} needs {needed >> 20} MiB in {str(folder)!r}, and {free >> 20} MiB are free."
        raise TryAgain(message, remedy="Free space, or name a larger disk by BUILDER_WORKSPACE.")


def _reporter(
    progress: Callable[[Progress], None] | None, artifacts: Sequence[Artifact], kept: set[str], unfinished: Path
) -> Callable[[Sequence[Artifact]], None]:
    """Return a function that reports how far a download is, given the artifacts that have arrived by now."""
    known = sum(artifact.size or 0 for artifact in artifacts)
    before = sum(artifact.size or 0 for artifact in artifacts if artifact.path in kept)

    def report(arrived: Sequence[Artifact]) -> None:
        if progress:
            size = before + sum(artifact.size or 0 for artifact in arrived) + _arriving(unfinished)
            progress(Progress(len(kept) + len(arrived), len(artifacts), min(size, known), known))

    return report


def _arriving(unfinished: Path) -> int:
    """Return the bytes of the files that are on their way; they come and go while they are counted."""
    size = 0
    with contextlib.suppress(OSError):
        for path in unfinished.glob(".part-*/*"):
            size += path.stat().st_size
    return size


def _fetch(
    catalog: Catalog,
    missing: Sequence[Artifact],
    folder: Path,
    unfinished: Path,
    report: Callable[[Sequence[Artifact]], None],
) -> None:
    """Download artifacts side by side, the largest first; the first error ends it."""

    def one(index: int, artifact: Artifact) -> Artifact:
        part = unfinished / str(index)
        catalog.download(artifact, part)
        destination = folder / artifact.path
        destination.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(destination):
            message = f"The artifact {artifact.path!r} and another one have the same name on this file system."
            raise InvalidVersion(message, remedy="Log one of them under another name, and register again.")
        part.rename(destination)
        return artifact

    arrived: list[Artifact] = []
    report(arrived)
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch")
    try:
        order = sorted(missing, key=lambda artifact: -(artifact.size or 0))
        waiting: set[Future[Artifact]] = {pool.submit(one, index, item) for index, item in enumerate(order)}
        while waiting:
            done, waiting = wait(waiting, timeout=_REPORT_SECONDS, return_when=FIRST_COMPLETED)
            arrived += [future.result() for future in done]
            report(arrived)
    finally:
        pool.shutdown(cancel_futures=True)


def _settle(folder: Path, created_ms: int) -> None:
    """Give every file and folder the same mode and time, whatever the store gave it."""
    when = (created_ms * 1_000_000, created_ms * 1_000_000)
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(root, name)
            path.chmod(0o644)
            os.utime(path, ns=when)
        Path(root).chmod(0o755)
        os.utime(root, ns=when)


def _walk(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield everything below a folder that is not a folder itself, links not followed."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=refuse):
        for name in files + [name for name in folders if Path(root, name).is_symlink()]:
            path = Path(root, name)
            yield path, path.lstat()


def content_digest(folder: Path) -> Digest:
    """Return a digest of a folder's files: their paths, sizes and content, nothing of times or modes.

    Raises:
        InvalidVersion: there is something that is neither a file nor a folder, such as a link.
    """
    lines = []
    with on_disk(f"read {str(folder)!r}"):
        for path, status in _walk(folder):
            name = path.relative_to(folder).as_posix()
            if not stat.S_ISREG(status.st_mode):
                message = f"{name!r} in the context is neither a file nor a folder."
                raise InvalidVersion(message, remedy="Fetch the version again.")
            # Opened so that a link put there meanwhile is an error, and is not followed.
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as content:  # noqa: PTH123
                lines.append([name, status.st_size, hashlib.file_digest(content, "sha256").hexdigest()])
    return Digest.of(json.dumps(sorted(lines)).encode())


def python_version(context: Path, model_folder: str) -> str | None:
    """Return the Python version a model was saved with, as `3.11`; None where it does not say.

    Args:
        context: the folder that holds the version's files.
        model_folder: the model's folder in it.

    Raises:
        InvalidVersion: the model names a version that is not one of Python 3.
    """
    for name, pattern in _PYTHON:
        found = pattern.search(_text(context / model_folder / name))
        if found:
            if not _PYTHON_VERSION.fullmatch(found[1]):
                message = f"{model_folder}/{name} asks for Python {found[1]!r}."
                raise InvalidVersion(message, remedy="A model needs Python 3, such as 3.11.")
            return found[1]
    return None


def has_requirements(context: Path, model_folder: str) -> bool:
    """Return whether the model comes with a requirements.txt."""
    path = context / model_folder / REQUIREMENTS
    return path.is_file() and not path.is_symlink()


def _text(path: Path) -> str:
    """Return the beginning of a text file; the empty string where there is none."""
    if not path.is_file() or path.is_symlink():
        return ""
    with path.open("rb") as content:
        return content.read(_MOST_TEXT).decode("utf-8", "replace")
