"""The secrets in credential files, so that no program that quotes such a file gets one of them shown.

MLflow's client, boto3, pip, uv and credential helpers read files that this program never opens for itself. They are
read here once, for masking alone: what cannot be read, or is in no form known here, is nothing to mask and no error.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from builder.masking import mask, url_credentials

_MOST_BYTES = 4 << 20
# What a key of JSON or of an INI file is called where its value is a secret.
_SECRET_KEY = re.compile(
    r"token|password|passwd|secret|private_?key|access_?key|api_?key|account_?key|signature|auth|pwd",
    re.IGNORECASE,
)
_IN_HOME = (
    ".aws/credentials",
    ".aws/config",
    ".config/gcloud/application_default_credentials.json",
    ".config/pip/pip.conf",
    ".config/uv/uv.toml",
    ".databrickscfg",
    ".mlflow/credentials",
    ".netrc",
    "_netrc",
    ".pip/pip.conf",
)
_IN_SYSTEM = (
    "/etc/pip.conf",
    "/etc/uv/uv.toml",
    "/etc/xdg/pip/pip.conf",
    "/run/secrets/kubernetes.io/serviceaccount/token",
    "/var/run/secrets/kubernetes.io/serviceaccount/token",
)
# Variables that name a file that holds credentials.
_FILE_VARIABLES = (
    "AWS_CONFIG_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AZURE_CLIENT_CERTIFICATE_PATH",
    "AZURE_FEDERATED_TOKEN_FILE",
    "DATABRICKS_CONFIG_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "NETRC",
    "PIP_CONFIG_FILE",
    "REGISTRY_AUTH_FILE",
    "UV_CONFIG_FILE",
)
_DOCKER_VARIABLES = ("DOCKER_CONFIG", "BUILD_DOCKER_CONFIG")
# What these hold is the path of a secret, and none itself.
PATH_VARIABLES = frozenset({*_FILE_VARIABLES, *_DOCKER_VARIABLES, "SECRETS_DIR"})


class Secret(NamedTuple):
    """A secret, and the user it belongs to; empty where that is not told."""

    value: str
    user: str = ""


def mask_files(variables: Mapping[str, Any], home: str) -> None:
    """Mask the secrets of every credential file that this process or a library in it may read.

    Args:
        variables: the settings by the names of their variables.
        home: the user's home; empty for none.
    """
    paths = [Path(path) for path in _IN_SYSTEM]
    paths += [Path(home) / name for name in _IN_HOME] if home else []
    paths += [Path(str(variables[name])) for name in _FILE_VARIABLES if variables.get(name)]
    paths += [Path(str(variables[name])) / "config.json" for name in _DOCKER_VARIABLES if variables.get(name)]
    if variables.get("SECRETS_DIR"):
        # What is named as a variable is a setting, and masked as one.
        paths += [path for path in _files(Path(str(variables["SECRETS_DIR"]))) if not path.name.isupper()]
    for path in paths:
        mask_secrets(in_text(_content(path)))


def mask_secrets(secrets: Iterator[Secret]) -> None:
    """Mask secrets, each with its user."""
    for secret in secrets:
        mask([secret.value], user=secret.user)


def in_text(text: str) -> Iterator[Secret]:
    """Yield the secrets in a file's text, whatever its form: JSON, INI, TOML, netrc, a key, a bare token."""
    yield from in_urls(text)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):
        yield from in_json(parsed)
        return
    words = text.split()
    if len(words) == 1 or "PRIVATE KEY-----" in text:
        yield Secret(text)
    elif "machine" in words or "default" in words:
        yield from _in_netrc(words)
    yield from _in_lines(text)


def in_urls(text: str, *, quotes: bool = True) -> Iterator[Secret]:
    """Yield the passwords of a text's URLs, and users without one: either may be a token.

    Args:
        text: any text.
        quotes: whether a quotation mark ends a URL; in a variable it is part of one.
    """
    from urllib.parse import unquote

    for begin, end in url_credentials(text, quotes=quotes):
        user, _, password = text[begin : end - 1].partition(":")
        for form in {password or user, unquote(password or user)}:
            yield Secret(form, unquote(user) if password else "")


def in_json(entry: Mapping[str, Any]) -> Iterator[Secret]:
    """Yield the secrets of an object, such as a Docker config.json or a cloud's key, and of the objects in it."""
    waiting: list[Any] = [entry]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            user = next((one[name] for name in ("username", "Username") if isinstance(one.get(name), str)), "")
            for name, value in one.items():
                if isinstance(value, str) and (_SECRET_KEY.search(str(name)) or one is entry.get("HttpHeaders")):
                    yield Secret(value, user)
                    yield from _decoded(value) if name == "auth" else ()
                elif isinstance(value, dict | list):
                    waiting.append(value)
        else:
            waiting += [each for each in one if isinstance(each, dict | list)]


def in_connection_string(text: str) -> Iterator[Secret]:
    """Yield the secrets of `name=value;name=value`, as Azure writes it."""
    for part in text.split(";"):
        name, _, value = part.partition("=")
        if value and (_SECRET_KEY.search(name) or name.lower().endswith("key")):
            yield Secret(value)


def _decoded(auth: str) -> Iterator[Secret]:
    """Yield the password of Docker's `auth`, the base64 of `user:password`."""
    try:
        user, colon, password = base64.b64decode(auth).decode().partition(":")
    except ValueError:
        return
    if colon:
        yield Secret(password.strip("\0"), user)


def _in_netrc(words: list[str]) -> Iterator[Secret]:
    user = ""
    for name, value in pairwise(words):
        if name == "login":
            user = value.strip("\"'")
        elif name in {"password", "account"}:
            yield Secret(value, user)
            yield Secret(value.strip("\"'"), user)


def _in_lines(text: str) -> Iterator[Secret]:
    """Yield the values of `name = value` lines whose name says that they are secret."""
    for line in text.splitlines():
        name, equals, value = line.partition("=") if "=" in line else line.partition(":")
        value = value.strip().strip("\"'")
        if equals and value and "://" not in value and _SECRET_KEY.search(name.strip()):
            yield Secret(value)


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []


def _content(path: Path) -> str:
    """Return a regular file's text; empty where there is none that can be read."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode(errors="surrogateescape")
    except OSError:
        return ""
