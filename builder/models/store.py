"""Artifact stores: list what is in a folder, and bring one file here, whole.

MLflow's artifact repositories do the reading, so that every kind of store works, those of plug-ins too.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import file_digest
from inspect import signature
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from builder.errors import Defect, InvalidVersion, ServiceUnavailable, one_line
from builder.models.answers import answering, on_disk
from builder.models.artifacts import MOST_FILES, MOST_FOLDERS_DEEP, checked_path
from builder.models.catalog import Artifact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_LISTERS = 8
_SHOWN = 200
_DOWNLOAD = ["remote_file_path", "local_path"]
# Each time MLflow's client has already tried thrice.
_attempts = retry(
    retry=retry_if_exception_type(ServiceUnavailable),
    stop=stop_after_attempt(3),
    wait=wait_random_exponential(multiplier=0.5, max=5),
    reraise=True,
)


@dataclass(frozen=True, slots=True)
class Root:
    """A folder of an artifact store, and the folder of the context its files are placed in (empty for its top)."""

    uri: str
    folder: str

    def artifact(self, remote: str, size: int | None) -> Artifact:
        """Return the artifact for a file below this root.

        Raises:
            InvalidVersion: its path may not stand in a context.
        """
        path = checked_path(remote)
        return Artifact(path=f"{self.folder}/{path}" if self.folder else path, size=size, root=self.uri, remote=remote)


class ArtifactStore:
    """Reads artifact folders of any kind by MLflow's artifact repositories.

    Args:
        tracking_uri: the server that hands `mlflow-artifacts:` folders on.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._tracking_uri = tracking_uri
        self._repositories: dict[str, Any] = {}
        self._lock = Lock()

    def _repository(self, uri: str) -> Any:
        """Return MLflow's artifact repository for an artifact folder; one for each URI."""
        with self._lock, answering(f"open the artifact store {_shown(uri)}", server="the artifact store"):
            if uri not in self._repositories:
                from mlflow.store.artifact import artifact_repository_registry

                self._repositories[uri] = artifact_repository_registry.get_artifact_repository(
                    uri, tracking_uri=self._tracking_uri
                )
            return self._repositories[uri]

    def files(self, root: Root) -> list[Artifact]:
        """Return the files of an artifact folder, in no order; its folders are listed side by side.

        Raises:
            InvalidVersion: a path may not stand in a context, a link leaves the folder, or there are too many files.
        """
        # The first listing makes connections and clients, which not every store does safely in several threads.
        entries = self._list(root.uri, "")
        files: list[Artifact] = []
        waiting: set[Future[list[Any]]] = set()
        pool = ThreadPoolExecutor(_LISTERS, thread_name_prefix="list")
        try:
            while True:
                for entry in entries:
                    if entry.is_dir:
                        waiting.add(pool.submit(self._list, root.uri, _folder(entry.path)))
                    else:
                        files.append(root.artifact(entry.path, _size(entry)))
                if len(files) + len(waiting) > MOST_FILES:
                    message = f"{_shown(root.uri)} has more than {MOST_FILES} files."
                    raise InvalidVersion(message, remedy="Pack them into an archive before they are logged.")
                if not waiting:
                    return files
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                entries = [entry for future in done for entry in future.result()]
        finally:
            pool.shutdown(cancel_futures=True)

    @_attempts
    def _list(self, uri: str, folder: str) -> list[Any]:
        repository = self._repository(uri)
        with answering(f"list the artifacts in {folder!r}", server=_shown(uri), gone=InvalidVersion):
            entries = list(repository.list_artifacts(folder or None))
            _check_links(repository, (entry.path for entry in entries))
        # Some stores list a folder within itself.
        return [entry for entry in entries if entry.path not in {folder, ".", ""}]

    def download(self, artifact: Artifact, destination: Path) -> None:
        """Write one artifact's bytes to the file `destination`, whose folder exists: whole, or not at all.

        It is tried again where the store is away, and its size is compared with the one that was listed.

        Raises:
            InvalidVersion: the file is no longer in the store, or it is a link that leaves the artifact folder.
            ServiceUnavailable, PermissionRefused, TryAgain: as in `answers.answering`.
        """
        # S3's client writes to names of its own beside the one it is given, so they get a folder.
        with (
            on_disk(f"write the artifact {artifact.path!r}"),
            tempfile.TemporaryDirectory(dir=destination.parent, prefix=".part-") as folder,
        ):
            part = Path(folder, "file")
            self._download(artifact, part)
            part.replace(destination)

    @_attempts
    def _download(self, artifact: Artifact, part: Path) -> None:
        repository = self._repository(artifact.root)
        what = f"download the artifact {artifact.path!r}"
        with answering(what, server=_shown(artifact.root), gone=InvalidVersion):
            _check_links(repository, (artifact.remote,))
            _downloader(repository)(artifact.remote, str(part))
            size = part.stat().st_size
        if artifact.size is not None and size != artifact.size:
            message = f"The artifact {artifact.path!r} came with {size} bytes instead of {artifact.size}."
            raise ServiceUnavailable(message, remedy="It was cut short, or has changed meanwhile: try again.")

    def same(self, one: Artifact, other: Artifact) -> bool:
        """Return whether two artifacts have the same content; no store tells hashes, so both are read."""
        if None not in {one.size, other.size} and one.size != other.size:
            return False
        digests = []
        with tempfile.TemporaryDirectory(prefix="builder-same-") as folder:
            for artifact in (one, other):
                path = Path(folder, "file")
                self.download(artifact, path)
                with path.open("rb") as content:
                    digests.append(file_digest(content, "sha256").digest())
        return digests[0] == digests[1]


def _shown(uri: str) -> str:
    return one_line(uri, _SHOWN)


def _size(entry: Any) -> int | None:
    return None if entry.file_size is None else int(entry.file_size)


def _folder(path: str) -> str:
    """Return a folder's path as it is asked for.

    Raises:
        InvalidVersion: a file in it could not stand in a context either.
    """
    checked_path(path.rstrip("/"))
    if path.count("/") >= MOST_FOLDERS_DEEP - 1:
        message = f"The folder {path[:_SHOWN]!r} is more than {MOST_FOLDERS_DEEP} folders deep."
        raise InvalidVersion(message, remedy="Log fewer folders within each other, or an archive.")
    return path


def _downloader(repository: Any) -> Callable[[str, str], None]:
    """Return what MLflow asks of every kind of store, plug-ins included; `download_artifacts` would list it first.

    Raises:
        Defect: this release of MLflow asks something else.
    """
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

    name = "_download_file"
    asked = vars(ArtifactRepository).get(name)
    if not getattr(asked, "__isabstractmethod__", False) or list(signature(asked).parameters)[1:] != _DOWNLOAD:
        message = f"The MLflow that is installed here does not read files by {name}({', '.join(_DOWNLOAD)})."
        raise Defect(message, remedy="Install the release of mlflow-skinny that requirements/builder.txt names.")
    found: Callable[[str, str], None] = getattr(repository, name)
    return found


def _check_links(repository: Any, remotes: Iterable[str]) -> None:
    """Refuse a link that leaves the artifact folder, where that folder is on this machine.

    Links within it are read as the files they lead to.
    """
    folder = getattr(repository, "artifact_dir", None)
    if folder is None:
        return
    base = os.path.realpath(folder)
    for remote in remotes:
        if os.path.commonpath([base, os.path.realpath(Path(base, remote))]) != base:
            message = f"The artifact {remote[:_SHOWN]!r} is a link that leaves the artifact folder."
            raise InvalidVersion(message, remedy="Log the file itself and register the model again.")
