"""Domino's headers, and the environment that MLflow's client, requests and boto3 read."""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from builder.errors import InvalidSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from builder.settings import CatalogSettings


# Not a secret: Domino's public examples sign with this word. The token names a run; what proves the user is the key.
_SIGNED_WITH: Final = "secret"
_NAME: Final = "domino"
_CHOICE: Final = "MLFLOW_TRACKING_AUTH"
_SERVERS: Final = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_PORTS: Final = {"http": 80, "https": 443}


class DominoAuth:
    """MLflow's request authentication `domino`."""

    def get_name(self) -> str:
        """Return the value of MLFLOW_TRACKING_AUTH that chooses this."""
        return _NAME

    def get_auth(self) -> DominoHeaders:
        """Return what adds the headers to a request."""
        return DominoHeaders()


class DominoHeaders:
    """X-Domino-Api-Key of DOMINO_USER_API_KEY, and X-Domino-Execution of DOMINO_RUN_ID beside it or a bearer token.

    They go to the server of MLFLOW_TRACKING_URI or MLFLOW_REGISTRY_URI, and to no other. One on loopback is the
    proxy that Domino has in each run, which adds its own. The token is MLFLOW_TRACKING_TOKEN, which MLflow sends
    itself: where Domino has taken its API keys away, it proves the user.
    """

    def __call__(self, request: Any) -> Any:  # requests.PreparedRequest, which must not be imported to be named
        """Return the request, with the headers if it goes to that server."""
        key, run_id, token = _variables()
        if not (key or token) or _origin(request.url) not in _elsewhere(_servers()):
            return request
        if key:
            request.headers["X-Domino-Api-Key"] = key
        if run_id:
            request.headers["X-Domino-Execution"] = _execution(run_id)
        return request


def use_domino() -> None:
    """Have MLflow's clients of this process send the headers, if the environment has what they are made of.

    Raises:
        InvalidSettings: there is an API key, and MLFLOW_TRACKING_AUTH names another authentication.
    """
    key, run_id, token = _variables()
    servers = _servers()
    if not (key or (run_id and token)) or (servers and not _elsewhere(servers)):
        return
    # A run's number is in every run's environment, so it does not override an explicit choice.
    chosen = _set_default(_CHOICE, _NAME)
    if key and chosen != _NAME:
        message = f"{_CHOICE} is {chosen!r}, and DOMINO_USER_API_KEY is set. MLflow takes one authentication."
        raise InvalidSettings(message, remedy=f"Unset {_CHOICE}, or DOMINO_USER_API_KEY.")
    # requests takes only Authorization off a request that is redirected to another host, not Domino's key.
    _set_default("MLFLOW_ALLOW_HTTP_REDIRECTS", "false")


def _origin(uri: str) -> tuple[str, str, int] | None:
    """Return scheme, host and port of a web server's address; None for any other."""
    try:
        split = urlsplit(uri)
        if split.scheme not in _PORTS or not split.hostname:
            return None
        return split.scheme, split.hostname, split.port or _PORTS[split.scheme]
    except ValueError:
        return None


def _servers() -> set[tuple[str, str, int]]:
    """Return the origins of the servers that the environment names."""
    return {origin for name in _SERVERS if (origin := _origin(os.environ.get(name, "")))}


def _elsewhere(origins: set[tuple[str, str, int]]) -> set[tuple[str, str, int]]:
    """Return those origins that are not on loopback."""
    # Imported here, since MLflow loads this module in every process that imports MLflow.
    from builder.reference import is_loopback

    return {origin for origin in origins if not is_loopback(f"[{origin[1]}]" if ":" in origin[1] else origin[1])}


def _variables() -> tuple[str, str, str]:
    """Return API key, run and bearer token; empty where there is none."""
    key, run_id, token = (
        os.environ.get(name, "").strip() for name in ("DOMINO_USER_API_KEY", "DOMINO_RUN_ID", "MLFLOW_TRACKING_TOKEN")
    )
    return key, run_id, token


@lru_cache(maxsize=1)
def _execution(run_id: str) -> str:
    """Return the JWT `{"execution_id": run_id}`, HS256."""
    # Imported here, since MLflow loads this module in every process that imports MLflow.
    import jwt

    with warnings.catch_warnings():
        # The word is shorter than a key should be, and it is no key: see above.
        warnings.filterwarnings("ignore", message=".*HMAC key is .* bytes long", category=UserWarning)
        return jwt.encode({"execution_id": run_id}, _SIGNED_WITH, algorithm="HS256")


# MLflow's own defaults are seven retries of 120 seconds each: a server that is away would take minutes to be away.
# With these, a refused connection is reported after some 5 seconds, a server that never answers after 90.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # Progress is ours to show, and a publisher in a cluster sends no telemetry.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # Its warnings quote what servers and authors wrote: they go the way of our own log, which shows nothing hidden.
    "MLFLOW_CONFIGURE_LOGGING": "false",
    # Standard output is for what a command has to say.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


# What was set here: the value, and the one it replaced.
_exported: dict[str, tuple[str, str | None]] = {}


def _set(name: str, value: str) -> None:
    _exported[name] = value, _exported[name][1] if name in _exported else os.environ.get(name)
    os.environ[name] = value


def _set_default(name: str, value: str) -> str:
    if name not in os.environ:
        _set(name, value)
    return os.environ[name]


def _take_back() -> None:
    """Undo what was set here; a variable that somebody has changed since is left alone."""
    for name, (value, before) in _exported.items():
        if os.environ.get(name) == value:
            _restore(name, before)
    _exported.clear()


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def restored() -> Iterator[None]:
    """Give the variables that are set here, at the end of the context, the values that they had at its beginning."""
    exported = dict(_exported)
    before = dict(os.environ)
    try:
        yield
    finally:
        for name, (value, _) in {**exported, **_exported}.items():
            if os.environ.get(name) in {value, None}:
                _restore(name, before.get(name))
        _exported.clear()
        _exported.update(exported)


def quiet_client() -> None:
    """Set what MLflow's client should do by itself, unless the user has set it.

    Raises:
        InvalidSettings: as `use_domino`.
    """
    for name, value in _DEFAULTS.items():
        _set_default(name, value)
    use_domino()


def export(settings: CatalogSettings) -> None:
    """Put into `os.environ` what MLflow's client, requests and boto3 read there.

    That is MLFLOW_TRACKING_URI; every MLFLOW_, AWS_, AZURE_ and DATABRICKS_ variable that the settings hold, from the
    environment or from SECRETS_DIR; Domino's two; SSL_CERT_FILE, also as REQUESTS_CA_BUNDLE and AWS_CA_BUNDLE unless
    they are set, since neither requests nor boto3 knows it by that name; and the proxies.

    MLflow reads them at each request, and from nowhere else. Whatever an earlier call has set, of other settings, is
    taken back first: their credentials are not sent with these.
    """
    _take_back()
    values = {name: secret.get_secret_value() for name, secret in settings.mlflow_variables.items()}
    values["MLFLOW_TRACKING_URI"] = settings.mlflow_tracking_uri
    values.update(settings.proxies)
    if settings.domino_user_api_key:
        values["DOMINO_USER_API_KEY"] = settings.domino_user_api_key.get_secret_value()
    if settings.domino_run_id:
        values["DOMINO_RUN_ID"] = settings.domino_run_id.get_secret_value()
    for name, value in values.items():
        _set(name, value)
    if settings.ssl_cert_file:
        bundle = str(settings.ssl_cert_file)
        _set("SSL_CERT_FILE", bundle)
        _set_default("REQUESTS_CA_BUNDLE", bundle)
        _set_default("AWS_CA_BUNDLE", bundle)
    quiet_client()
