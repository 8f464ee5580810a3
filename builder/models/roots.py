"""Which artifact folders may be read: every address is held against a list before anything is asked of a store.

Source, run and logged model of a version are what its author wrote, and the credentials that a store is read with are
the publisher's. So an address is taken where it is below one of these, and nowhere else:

* what the MLflow server hands on itself (`mlflow-artifacts:`), at the origin of MLFLOW_TRACKING_URI or
  MLFLOW_REGISTRY_URI;
* ALLOWED_ARTIFACT_ROOTS; where that is not set, the server's own artifact root. MLflow has no call for it, but the
  Default experiment is made by the server itself, in its root, and no call can change where it is; what any other
  experiment, run or logged model says of its folder is its author's word.

See docs/decisions/0040-artifact-roots.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from builder.artifact_uri import ArtifactUri, NotAnArtifactUri, of_windows
from builder.errors import InvalidVersion, RootRefused, one_line
from builder.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SETTING = "ALLOWED_ARTIFACT_ROOTS"
_PROXY = ("api", "2.0", "mlflow-artifacts", "artifacts")
_DEFAULT_EXPERIMENT = "0"
_WEB = frozenset({"http", "https"})
# MLflow finds the folder behind these by asking, and takes whatever it is told.
_INDIRECT = frozenset({"runs", "models"})
_PORTS = {"http": 80, "https": 443}
_SHOWN = 200
_log = get_logger("models")


@dataclass(frozen=True, slots=True)
class Folder:
    """An artifact folder that may be read.

    Attributes:
        uri: what MLflow's artifact repository is given, written from checked parts.
        base: the allowed folder above it, where it is on this machine; links on the way there are the operator's.
        beneath: the path from `base`, with forward slashes; empty for `base` itself.
        over_http: whether its files are asked for by their names in a URL.
    """

    uri: str
    base: str = ""
    beneath: str = ""
    over_http: bool = False


@dataclass(frozen=True, slots=True)
class _Server:
    """A web server: its origin, and the path that it stands under."""

    scheme: str
    host: str
    port: int
    prefix: tuple[str, ...]

    @classmethod
    def of(cls, uri: str) -> _Server | None:
        """Return the server of a tracking or registry URI; None where that is none."""
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
            ServiceUnavailable: MLflow is away, so that nobody can tell its own root.
        """
        if of_windows(uri):
            raise _elsewhere(uri)
        try:
            address = ArtifactUri.parse(uri)
        except NotAnArtifactUri as error:
            raise RootRefused(error.what, remedy="Register the model from its run or its logged model.") from error
        if address.scheme in _INDIRECT:
            message = f"The artifacts are said to be in {_shown(uri)}, which names no folder of an artifact store."
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
            # The server's own root holds everybody's artifacts: nobody's model is the whole of it.
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
        named = ", ".join(_shown(str(root)) for root in self._named)
        allowed = f"{_SETTING} ({named})" if named else f"the server's own artifact root ({_SETTING} is not set)"
        message = f"The artifacts are in {_shown(str(address))}, which is not below {allowed}."
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
        f"The artifacts are in the folder {_shown(uri)}: it is on the machine that logged the model, not on this one.",
        remedy="Log the model to the MLflow server and register it again. Where this machine has the same folder, name "
        f"it in {_SETTING}.",
    )


def _shown(uri: str) -> str:
    return repr(one_line(uri, _SHOWN))
