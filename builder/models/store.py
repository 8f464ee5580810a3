"""Artifact stores: list what is in a folder, and bring one file here, whole.

MLflow's artifact repositories do the reading, so that every kind of store works, those of plug-ins too; only a folder
on this machine is read by `local_store`. Every folder is on the list of `roots` before anything is asked.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import file_digest
from inspect import signature
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from builder.errors import Defect, InvalidVersion, ServiceUnavailable, StoreNotSupported, one_line
from builder.models.answers import answering, on_disk
from builder.models.artifacts import MOST_FILES, MOST_FOLDERS_DEEP, checked_path
from builder.models.catalog import Artifact
from builder.models.http_names import naming_refused
from builder.models.local_store import copy_file, list_folder, there
from builder.models.roots import ArtifactRoots

if TYPE_CHECKING:
    from collections.abc import Callable

    from builder.models.roots import Folder

_LISTERS = 8
_SHOWN = 200
_DOWNLOAD = ["remote_file_path", "local_path"]
# Where a plug-in of MLflow's reads a kind of store: the package that brings it.
_PLUG_INS = {"azureml": "azureml-mlflow", "oss": "aliyunstoreplugin"}
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
    """Reads artifact folders of any kind, if they are on the list.

    Args:
        tracking_uri: the server that hands `mlflow-artifacts:` folders on.
        roots: the list; without one there is what that server hands on, and nothing else.
    """

    def __init__(self, tracking_uri: str, roots: ArtifactRoots | None = None) -> None:
        self._tracking_uri = tracking_uri
        self._roots = roots or ArtifactRoots(tracking_uri)
        self._folders: dict[str, Folder] = {}
        self._repositories: dict[str, Any] = {}
        self._lock = Lock()

    def folder(self, uri: str) -> Folder:
        """Return the artifact folder at an address; nothing is asked of its store.

        Raises:
            RootRefused: it is not on the list, or the address can be read in two ways.
            InvalidVersion: it is a folder of another machine.
            StoreNotSupported: nothing is installed that reads this kind of store.
            ServiceUnavailable: MLflow is away, so that nobody can tell its own root.
        """
        if uri not in self._folders:
            scheme = uri.partition(":")[0].lower()
            if scheme in _PLUG_INS:
                _check_supported(scheme, uri)
            folder = self._roots.folder(uri)
            if not folder.base:
                _check_supported(scheme, uri)
            self._folders[uri] = folder
        return self._folders[uri]

    def is_missing(self, root: Root) -> bool:
        """Return whether an artifact folder on this machine is not there; False for every other store."""
        folder = self.folder(root.uri)
        return bool(folder.base) and not there(folder)

    def _repository(self, folder: Folder) -> Any:
        """Return MLflow's artifact repository for an artifact folder; one for each URI."""
        with self._lock, answering(f"open the artifact store {_shown(folder.uri)}", server="the artifact store"):
            if folder.uri not in self._repositories:
                from mlflow.store.artifact import artifact_repository_registry

                self._repositories[folder.uri] = artifact_repository_registry.get_artifact_repository(
                    folder.uri, tracking_uri=self._tracking_uri
                )
            return self._repositories[folder.uri]

    def files(self, root: Root) -> list[Artifact]:
        """Return the files of an artifact folder, in no order; its folders are listed side by side.

        Raises:
            InvalidVersion: a path may not stand in a context, a folder on this machine holds a link, or there are too
                many files.
            RootRefused: the folder is not on the list of roots.
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
    def _list(self, uri: str, path: str) -> list[Any]:
        folder = self.folder(uri)
        repository = None if folder.base else self._repository(folder)
        with (
            answering(f"list the artifacts in {path!r}", server=_shown(uri), gone=InvalidVersion),
            naming_refused(repository, path) if folder.over_http else nullcontext(),
        ):
            entries = list(repository.list_artifacts(path or None)) if repository else list_folder(folder, path)
        # Some stores list a folder within itself.
        return [entry for entry in entries if entry.path not in {path, ".", ""}]

    def download(self, artifact: Artifact, destination: Path) -> None:
        """Write one artifact's bytes to the file `destination`, whose folder exists: whole, or not at all.

        It is tried again where the store is away, and its size is compared with the one that was listed.

        Raises:
            InvalidVersion: the file is no longer in the store, or it is a link.
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
        folder = self.folder(artifact.root)
        repository = None if folder.base else self._repository(folder)
        what = f"download the artifact {artifact.path!r}"
        with answering(what, server=_shown(artifact.root), gone=InvalidVersion):
            if repository is None:
                copy_file(folder, artifact.remote, part, most=(artifact.size or 0) + 1)
            else:
                # A name is data: MLflow puts it into the URL as it is, where `%2e%2e` and `?` would mean something.
                remote = quote(artifact.remote) if folder.over_http else artifact.remote
                _downloader(repository)(remote, str(part))
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


def _check_supported(scheme: str, uri: str) -> None:
    """Raise StoreNotSupported unless MLflow knows who reads this kind of store; it is imported for that."""
    with answering(f"open the artifact store {_shown(uri)}", server="the artifact store"):
        from mlflow.store.artifact import artifact_repository_registry

        known = artifact_repository_registry.get_registered_artifact_repositories()
    if scheme not in known:
        package = _PLUG_INS.get(scheme)
        message = f"The artifacts are in {_shown(uri)}, and nothing is installed that reads {scheme}: addresses."
        remedy = f"Install the package {package}" if package else "Install the plug-in of MLflow that does"
        raise StoreNotSupported(message, remedy=f"{remedy} beside model-image-builder, or log the model elsewhere.")
