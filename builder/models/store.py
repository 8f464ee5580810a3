"""Artifact stores: which folders may be read, what is in one, and one file brought here whole."""

from __future__ import annotations

import os
import stat
import tempfile
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import file_digest
from inspect import signature
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from builder.errors import Defect, InvalidVersion, RootRefused, ServiceUnavailable, StoreNotSupported
from builder.log import get_logger
from builder.masking import one_line
from builder.models import Artifact
from builder.models.context import MOST_FILES
from builder.models.errors import answering, naming_refused, on_disk
from builder.safe_open import MOST_FOLDERS_DEEP, checked_path, open_beneath
from builder.urls import ArtifactUri, NotAnArtifactUri, of_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


_SETTING = "ALLOWED_ARTIFACT_ROOTS"
_PROXY = ("api", "2.0", "mlflow-artifacts", "artifacts")
_DEFAULT_EXPERIMENT = "0"
_WEB = frozenset({"http", "https"})
# MLflow looks up the folder behind these, and takes any answer.
_INDIRECT = frozenset({"runs", "models"})
_PORTS = {"http": 80, "https": 443}
_log = get_logger("models")


@dataclass(frozen=True, slots=True)
class Folder:
    """An artifact folder that may be read.

    Attributes:
        uri: what MLflow's artifact repository is given, written from checked parts.
        base: the allowed folder above it, where it is on this machine; links on the way there are the operator's.
        beneath: the path from `base`, with forward slashes; empty for `base` itself.
        over_http: whether its files are requested by their names in a URL.
    """

    uri: str
    base: str = ""
    beneath: str = ""
    over_http: bool = False


@dataclass(frozen=True, slots=True)
class _Server:
    """A web server: its origin, and the path of its root."""

    scheme: str
    host: str
    port: int
    prefix: tuple[str, ...]

    @classmethod
    def of(cls, uri: str) -> _Server | None:
        """Return the server of a tracking or registry URI; None for a URI of anything else."""
        try:
            split = urlsplit(uri)
            if split.scheme not in _WEB or not split.hostname:
                return None
            return cls(split.scheme, split.hostname, split.port or _PORTS[split.scheme], _path(split.path))
        except ValueError:
            return None

    def serves(self, scheme: str, authority: str) -> bool:
        """Return whether an authority is this server's; MLflow asks `mlflow-artifacts://` by the tracking scheme."""
        if scheme not in {self.scheme, "mlflow-artifacts"} or "@" in authority:
            return False
        try:
            split = urlsplit(f"//{authority}")
            return (split.hostname, split.port or _PORTS[self.scheme]) == (self.host, self.port)
        except ValueError:
            return False


class ArtifactRoots:
    """The list of artifact roots.

    Args:
        tracking_uri: MLFLOW_TRACKING_URI.
        registry_uri: MLFLOW_REGISTRY_URI; empty where the registry is the tracking server's.
        named: ALLOWED_ARTIFACT_ROOTS; empty for the server's own.
        default_experiment: returns the artifact location of MLflow's experiment 0; the empty string for none.
    """

    def __init__(
        self,
        tracking_uri: str,
        registry_uri: str = "",
        *,
        named: Sequence[ArtifactUri] = (),
        default_experiment: Callable[[], str] = lambda: "",
    ) -> None:
        self._tracking = _Server.of(tracking_uri)
        self._registry = _Server.of(registry_uri)
        self._registry_uri = registry_uri.rstrip("/")
        self._named = tuple(named)
        self._default_experiment = default_experiment
        self._own: tuple[ArtifactUri, ...] | None = None
        self._lock = Lock()

    def folder(self, uri: str) -> Folder:
        """Return the artifact folder at an address, if it may be read.

        Raises:
            RootRefused: it is not below an allowed root, or the address can be read in two ways.
            InvalidVersion: it is a folder of another machine.
            ServiceUnavailable: MLflow is away, so its own root is unknown.
        """
        if of_windows(uri):
            raise _elsewhere(uri)
        try:
            address = ArtifactUri.parse(uri)
        except NotAnArtifactUri as error:
            raise RootRefused(error.what, remedy="Register the model from its run or its logged model.") from error
        if address.scheme in _INDIRECT:
            message = f"The artifacts are said to be in {_shown_root(uri)}, which names no folder of an artifact store."
            raise RootRefused(message, remedy="Register the model from its run or its logged model.")
        return self._proxied(address) or self._listed(address) or self._refuse(address)

    def _proxied(self, address: ArtifactUri) -> Folder | None:
        """Return a folder that the MLflow server hands on; None for any other."""
        if address.scheme == "mlflow-artifacts":
            parts = address.parts
            if not parts or parts == _PROXY:  # MLflow reads the latter as the former
                return None
            if self._tracking and (not address.authority or self._tracking.serves(address.scheme, address.authority)):
                return Folder(str(ArtifactUri("mlflow-artifacts", "", parts)), over_http=True)
        elif address.scheme not in _WEB:
            return None
        if self._tracking and (parts := _handed_on(self._tracking, address)):
            return Folder(str(ArtifactUri("mlflow-artifacts", "", parts)), over_http=True)
        if self._registry and (parts := _handed_on(self._registry, address)):
            return Folder("/".join((self._registry_uri, *_PROXY, *parts)), over_http=True)
        return None

    def _listed(self, address: ArtifactUri) -> Folder | None:
        """Return a folder below a root of the list; None for any other."""
        for root in self._roots():
            parts = address.below(root)
            # The server's own root holds everybody's artifacts, and is no version's own folder.
            if parts is None or not (parts or self._named):
                continue
            if address.scheme == "file":
                return Folder(str(address), base=root.path, beneath="/".join(parts))
            return Folder(str(address), over_http=address.scheme in {*_WEB, "mlflow-artifacts"})
        return None

    def _roots(self) -> tuple[ArtifactUri, ...]:
        """Return the list, beside what the server hands on."""
        if self._named:
            return self._named
        with self._lock:
            if self._own is None:
                self._own = _own_root(self._default_experiment())
            return self._own

    def _refuse(self, address: ArtifactUri) -> Folder:
        """Raise the error for a folder that is not on the list."""
        if address.scheme == "file" and not any(root.scheme == "file" for root in self._roots()):
            raise _elsewhere(str(address))
        named = ", ".join(_shown_root(str(root)) for root in self._named)
        allowed = f"{_SETTING} ({named})" if named else f"the server's own artifact root ({_SETTING} is not set)"
        message = f"The artifacts are in {_shown_root(str(address))}, which is not below {allowed}."
        raise RootRefused(
            message,
            remedy="Log the model to the MLflow server and register it from there; or, if everybody who can register a "
            f"model may have what the publisher can read there, name the folder in {_SETTING}.",
        )


def _handed_on(server: _Server, address: ArtifactUri) -> tuple[str, ...]:
    """Return the path below the artifacts that a server hands on, as its artifact API has it; empty for another."""
    above = server.prefix + _PROXY
    if address.scheme in _WEB and server.serves(address.scheme, address.authority):
        return address.parts[len(above) :] if address.parts[: len(above)] == above else ()
    return ()


def _own_root(location: str) -> tuple[ArtifactUri, ...]:
    """Return the root that the location of the Default experiment is in; none where that does not tell.

    What is handed on by a web server is allowed at our own server's origin, and at no other that MLflow names.
    """
    try:
        address = ArtifactUri.parse(location)
    except NotAnArtifactUri:
        return ()
    if address.scheme in {*_WEB, *_INDIRECT, "mlflow-artifacts"} or address.parts[-1:] != (_DEFAULT_EXPERIMENT,):
        return ()
    root = ArtifactUri(address.scheme, address.authority, address.parts[:-1])
    if not root.parts and not root.authority:
        _log.warning("the server's own artifact root is a whole machine, and is not taken", root=str(root))
        return ()
    return (root,)


def _path(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split("/") if part)


def _elsewhere(uri: str) -> InvalidVersion:
    return InvalidVersion(
        f"The artifacts are in the folder {_shown_root(uri)}: it is on the machine that logged the model, not on this "
        "one.",
        remedy="Log the model to the MLflow server and register it again. Where this machine has the same folder, name "
        f"it in {_SETTING}.",
    )


def _shown_root(uri: str) -> str:
    return repr(one_line(uri, _SHOWN))


_CHUNK = 1 << 20
_SHOWN = 200
# What MLflow names a file that is still being written.
_UNFINISHED = ".artifact.uploading."


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder, as MLflow's repositories list them.

    Attributes:
        path: below the artifact folder.
        is_dir: whether it is a folder.
        file_size: bytes; None for a folder.
    """

    path: str
    is_dir: bool
    file_size: int | None


def there(folder: Folder) -> bool:
    """Return whether the artifact folder exists; OSError where its base cannot be opened is let through."""
    try:
        with open_beneath(folder.base, folder.beneath or ".") as descriptor:
            return descriptor is not None
    except FileNotFoundError:
        return False


def list_folder(folder: Folder, path: str) -> list[Entry]:
    """Return what is in a folder: nothing where there is no such folder.

    Args:
        folder: the artifact folder.
        path: of a folder below it; empty for itself.

    Raises:
        InvalidVersion: there is a link, or something that is neither a file nor a folder.
        OSError: the folder may not be read.
    """
    try:
        with open_beneath(folder.base, _joined(folder.beneath, path) or ".") as descriptor:
            if descriptor is None or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                return []
            names = [name for name in os.listdir(descriptor) if not name.startswith(_UNFINISHED)]  # noqa: PTH208 - a descriptor
            return [
                _entry(_joined(path, name), os.stat(name, dir_fd=descriptor, follow_symlinks=False)) for name in names
            ]
    except FileNotFoundError:
        # A run without artifacts has no folder; and a file that went while it was listed is not there.
        return []


def copy_file(folder: Folder, path: str, destination: Path, *, most: int) -> None:
    """Copy a file of an artifact folder.

    Args:
        folder: the artifact folder.
        path: of the file below it.
        destination: where to.
        most: bytes after which to stop, in case the file grows.

    Raises:
        InvalidVersion: there is a link on the way, or something else than a file.
        OSError: FileNotFoundError, or the file may not be read.
    """
    with open_beneath(folder.base, _joined(folder.beneath, path)) as descriptor:
        if descriptor is None:
            raise FileNotFoundError(2, os.strerror(2), path)
        _entry(path, os.fstat(descriptor), folders=False)
        with destination.open("wb") as copy:
            left = most
            while left > 0 and (chunk := os.read(descriptor, min(_CHUNK, left))):
                copy.write(chunk)
                left -= len(chunk)


def _entry(path: str, status: os.stat_result, *, folders: bool = True) -> Entry:
    if stat.S_ISREG(status.st_mode):
        return Entry(path, is_dir=False, file_size=status.st_size)
    if folders and stat.S_ISDIR(status.st_mode):
        return Entry(path, is_dir=True, file_size=None)
    what = "a link, and links are not followed" if stat.S_ISLNK(status.st_mode) else "neither a file nor a folder"
    message = f"The artifact {path[:_SHOWN]!r} is {what}."
    raise InvalidVersion(message, remedy="Log the file itself and register the model again.")


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


_LISTERS = 8
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
            InvalidVersion: its path is not allowed in a context.
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
        """Return the artifact folder at an address; no request is sent to its store.

        Raises:
            RootRefused: it is not on the list, or the address can be read in two ways.
            InvalidVersion: it is a folder of another machine.
            StoreNotSupported: nothing is installed that reads this kind of store.
            ServiceUnavailable: MLflow is away, so its own root is unknown.
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
            InvalidVersion: a path is not allowed in a context, a folder on this machine holds a link, or there are too
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
    """Return a folder's path as it is requested.

    Raises:
        InvalidVersion: no file in it would be allowed in a context.
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
    method = vars(ArtifactRepository).get(name)
    if not getattr(method, "__isabstractmethod__", False) or list(signature(method).parameters)[1:] != _DOWNLOAD:
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
