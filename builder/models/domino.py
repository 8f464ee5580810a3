"""Domino: the headers by which its MLflow knows a user and a run, through MLflow's own plug-in point.

MLflow finds `DominoAuth` by the entry point `mlflow.request_auth_provider` of this package, asks it only where
MLFLOW_TRACKING_AUTH is `domino`, and applies what it gives to each request of its own, so that the request's address is
known: a header provider would be asked without one, and its headers go to whatever server a client talks to. The
classes do not derive from MLflow's or requests' own: MLflow loads this module while it is itself being imported.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import Any, Final
from urllib.parse import urlsplit

from builder.errors import InvalidSettings

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
        InvalidSettings: there is an API key, MLFLOW_TRACKING_AUTH names another authentication, and MLflow knows one at
            a time.
    """
    key, run_id, token = _variables()
    servers = _servers()
    if not (key or (run_id and token)) or (servers and not _elsewhere(servers)):
        return
    # A run's number is in every run's environment: it is no reason against what somebody has chosen.
    chosen = os.environ.setdefault(_CHOICE, _NAME)
    if key and chosen != _NAME:
        message = f"{_CHOICE} is {chosen!r}, and DOMINO_USER_API_KEY is set: MLflow takes one of them."
        raise InvalidSettings(message, remedy=f"Unset {_CHOICE}, or DOMINO_USER_API_KEY.")
    # requests takes only Authorization off a request that is redirected to another host, not Domino's key.
    os.environ.setdefault("MLFLOW_ALLOW_HTTP_REDIRECTS", "false")


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
    from builder.images.hosts import is_loopback

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
        # The word is shorter than a key should be; that it is no key is said above.
        warnings.filterwarnings("ignore", message=".*HMAC key is .* bytes long", category=UserWarning)
        return jwt.encode({"execution_id": run_id}, _SIGNED_WITH, algorithm="HS256")
