"""Credentials of registries: from the settings, a Docker config.json and its credential helpers."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import math
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from builder.errors import InvalidSettings, PermissionRefused
from builder.http import DOCKER_HUB, DOCKER_HUB_KEY, canonical
from builder.masking import in_json, mask, mask_secrets, one_line

_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MOST_CONFIG_BYTES = 4 << 20
# The user that a helper names where it has an identity token, not a password.
_TOKEN_USER = "<token>"  # noqa: S105 -- a marker of the protocol, no secret


@dataclass(frozen=True, slots=True, repr=False)
class Credential:
    """A user and a password, or an identity token that stands for both. Its repr shows nothing of them.

    Attributes:
        user: the user.
        password: the password.
        identity_token: stands for both.
        ends: when another one is needed, as of `time.monotonic`.
    """

    user: str = ""
    password: str = ""
    identity_token: str = ""
    ends: float = math.inf

    def __repr__(self) -> str:
        """Return what kind of credential this is."""
        return f"<{'identity token' if self.identity_token else 'user and password'}>"

    @property
    def basic(self) -> str:
        """The value of an Authorization header for basic authentication."""
        return f"Basic {base64.b64encode(f'{self.user}:{self.password}'.encode()).decode()}"

    def masked(self) -> Self:
        """Return this, after it was made known as what nothing may show."""
        mask([self.password, self.identity_token], user=self.user)
        return self


class Credentials:
    """The credentials of registry hosts, each looked up at the registry's first challenge.

    Args:
        explicit: the only host that `credential` is for; empty without one.
        credential: from the settings.
        docker_config: folder of a Docker config.json; a folder without one holds no credentials.
        helper_timeout: seconds that a credential helper may take.
        identity: gives the credential of a cloud's registry where nothing else names one; None for none.
    """

    def __init__(
        self,
        *,
        explicit: str = "",
        credential: Credential | None = None,
        docker_config: Path | None = None,
        helper_timeout: float = 30,
        identity: Callable[[str], Credential | None] | None = None,
    ) -> None:
        self._explicit = canonical(explicit) if credential else ""
        self._credential = credential.masked() if credential else None
        self._docker_config = docker_config
        self._helper_timeout = helper_timeout
        self._identity = identity or (lambda _: None)

    def for_host(self, host: str) -> Credential | None:
        """Return the credential for a registry host, or None where there is none for it.

        A credential helper comes first, as with Docker, and then the entries of the file itself.

        Raises:
            InvalidSettings: config.json is not Docker's, or the helper that it names is not installed.
            PermissionRefused: the helper failed, or the cloud refuses the identity.
            ServiceUnavailable: the cloud does not answer.
        """
        host = canonical(host)
        if host == self._explicit:
            return self._credential
        return self._configured(host) or self._identity(host)

    def source(self, host: str) -> str:
        """Return what names a credential for a registry host, for people; empty where nothing does. Nothing is run.

        Raises:
            InvalidSettings: config.json is not Docker's.
        """
        host = canonical(host)
        if host == self._explicit:
            return "REGISTRY_USER"
        config = _read(self._docker_config / "config.json") if self._docker_config else {}
        if helper := _entry(config.get("credHelpers"), host) or config.get("credsStore"):
            return f"docker-credential-{one_line(str(helper), 64)}"
        return "config.json" if _entry(config.get("auths"), host) else ""

    def _configured(self, host: str) -> Credential | None:
        """Return the credential that DOCKER_CONFIG has for a host."""
        if not self._docker_config:
            return None
        config = _read(self._docker_config / "config.json")
        helper = _entry(config.get("credHelpers"), host) or config.get("credsStore")
        if helper:
            found = self._from_helper(str(helper), DOCKER_HUB_KEY if host == DOCKER_HUB else host)
            if found:
                return found
        entry = _entry(config.get("auths"), host)
        return _from_file(entry, host) if isinstance(entry, dict) else None

    def _from_helper(self, helper: str, server: str) -> Credential | None:
        """Return the credential that a helper has for a server, or None where it has none."""
        program = f"docker-credential-{helper}"
        if not _HELPER.fullmatch(helper):
            message = "DOCKER_CONFIG's config.json names a credential helper that cannot be a program's name."
            raise InvalidSettings(message, remedy="credHelpers and credsStore hold the part after docker-credential-.")
        try:
            code, output, complaint = _run([program, "get"], server, self._helper_timeout)
        except TimeoutError as error:
            message = f"The credential helper {program!r} took more than {self._helper_timeout:g} s for {server}."
            raise PermissionRefused(message, remedy=f"Run `{program} get` to see what it waits for.") from error
        except OSError as error:
            message = f"DOCKER_CONFIG's config.json names the credential helper {program!r}, which cannot be run."
            raise InvalidSettings(message, remedy="Install it on PATH, or name no helper for this host.") from error
        if code and "credentials not found" in output:
            return None
        # What it printed may be half of a credential.
        said = one_line(complaint if "Secret" in output else f"{complaint} {output}", 300)
        remedy = f"Try it: echo {server} | {program} get"
        if code:
            message = f"The credential helper {program!r} failed for {server}: {said}."
            raise PermissionRefused(message, remedy=remedy)
        try:
            answer = json.loads(output)
            user, secret = answer["Username"], answer["Secret"]
        except (ValueError, KeyError, TypeError):
            message = f"The credential helper {program!r} did not answer with JSON of Username and Secret for {server}."
            # The cause holds what the helper printed.
            raise PermissionRefused(message, remedy=remedy) from None
        if not isinstance(user, str) or not isinstance(secret, str) or not secret:
            return None
        found = Credential(identity_token=secret) if user == _TOKEN_USER else Credential(user, secret)
        return found.masked()


def _run(argv: list[str], text: str, timeout: float) -> tuple[int, str, str]:
    """Return a program's exit code and what it printed; nothing of it is left when the time is over.

    Raises:
        OSError: it cannot be run.
        TimeoutError: it took too long.
    """
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, complaint = process.communicate(text, timeout=timeout)
        except BaseException as error:
            # Its children hold the pipes open, so they have to go as well.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError from None
            raise
    return process.returncode, output, complaint


def _read(path: Path) -> dict[str, Any]:
    """Return a config.json's content; an absent one is empty."""
    remedy = "It is the folder of a config.json as `docker login` writes it."
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        message = f"DOCKER_CONFIG's file {str(path)!r} cannot be read: {error.strerror}."
        raise InvalidSettings(message, remedy=remedy) from error
    with _parsing(f"DOCKER_CONFIG's file {str(path)!r} is not a Docker config.json.", remedy):
        config = json.loads(content)
        if not isinstance(config, dict) or not all(
            isinstance(config.get(name) or {}, dict) for name in ("auths", "credHelpers")
        ):
            raise ValueError
    mask_secrets(in_json(config))
    return config


def _entry(entries: Any, host: str) -> Any:  # JSON that others wrote
    """Return the entry of a host, perhaps written as a URL, in a section of config.json."""
    if not entries:
        return None
    named = [name for name in entries if _host_of(name) == host]
    # A name exactly as Docker writes it wins over another form of it.
    exact = DOCKER_HUB_KEY if host == DOCKER_HUB else host
    return entries[min(named, key=lambda name: name != exact)] if named else None


def _host_of(key: str) -> str:
    """Return the registry host that a key of `auths` names; empty for one of a namespace within a registry."""
    host, _, path = key.partition("://")[2].partition("/") if "://" in key else key.partition("/")
    return canonical(host) if path.strip("/") in {"", "v1", "v2"} else ""


def _from_file(entry: dict[str, Any], host: str) -> Credential | None:
    user, password, token = entry.get("username"), entry.get("password"), entry.get("identitytoken")
    with _parsing(f"DOCKER_CONFIG's config.json has a malformed entry for {host}.", "`docker login` writes it again."):
        if entry.get("auth"):
            text = base64.b64decode(entry["auth"], validate=True).decode()
            user, colon, password = text.partition(":")
            if not colon:
                raise ValueError
            password = password.strip("\0")
        if not all(isinstance(value, str | None) for value in (user, password, token)):
            raise ValueError
    if token:
        return Credential(identity_token=token)
    return Credential(user or "", password) if password else None


@contextlib.contextmanager
def _parsing(what: str, remedy: str) -> Iterator[None]:
    """Turn a parser's error into one that does not show the text: it holds credentials."""
    try:
        yield
    except (ValueError, TypeError, RecursionError, binascii.Error):
        raise InvalidSettings(what, remedy=remedy) from None
