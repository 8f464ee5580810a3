"""Credentials of registries, and how a registry's challenge is answered with them."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import httpx2

from builder.errors import InvalidSettings, PermissionRefused, ServiceUnavailable
from builder.http import DOCKER_HUB, DOCKER_HUB_KEY, canonical
from builder.masking import in_json, mask, mask_secrets, mask_token, one_line
from builder.oci.descriptor import Malformed, from_bytes
from builder.oci.errors import Answer, refusal, told

_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MOST_CONFIG_BYTES = 4 << 20
# The user that a helper names where it has an identity token, not a password.
_TOKEN_USER = "<token>"  # noqa: S105 -- a marker of the protocol, no secret


@dataclass(frozen=True, slots=True, repr=False)
class Credential:
    """A user and a password, or an identity token that stands for both. Its repr shows nothing of them."""

    user: str = ""
    password: str = ""
    identity_token: str = ""

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
    """Finds the credential for a registry host, when a registry asks for one and not before.

    Args:
        explicit: the host that `credential` is for, and no other is; "" for none.
        credential: what goes with it.
        docker_config: folder of a Docker config.json; a folder without one holds no credentials.
        helper_timeout: seconds that a credential helper may take.
    """

    def __init__(
        self,
        *,
        explicit: str = "",
        credential: Credential | None = None,
        docker_config: Path | None = None,
        helper_timeout: float = 30,
    ) -> None:
        self._explicit = canonical(explicit) if credential else ""
        self._credential = credential.masked() if credential else None
        self._docker_config = docker_config
        self._helper_timeout = helper_timeout

    def for_host(self, host: str) -> Credential | None:
        """Return the credential for a registry host, or None where there is none for it.

        A credential helper is asked first, as Docker does, and then what stands in the file itself.

        Raises:
            InvalidSettings: config.json is not Docker's, or the helper that it names is not there.
            PermissionRefused: the helper failed.
        """
        host = canonical(host)
        if host == self._explicit:
            return self._credential
        if not self._docker_config:
            return None
        config = _read(self._docker_config / "config.json")
        helper = _entry(config.get("credHelpers"), host) or config.get("credsStore")
        if helper:
            found = self._ask(str(helper), DOCKER_HUB_KEY if host == DOCKER_HUB else host)
            if found:
                return found
        entry = _entry(config.get("auths"), host)
        return _from_file(entry, host) if isinstance(entry, dict) else None

    def _ask(self, helper: str, server: str) -> Credential | None:
        """Return what a credential helper has for a server, or None where it has nothing."""
        program = f"docker-credential-{helper}"
        if not _HELPER.fullmatch(helper):
            message = "DOCKER_CONFIG's config.json names a credential helper that cannot be a program's name."
            raise InvalidSettings(message, remedy="credHelpers and credsStore hold the part after docker-credential-.")
        try:
            code, output, complaint = _run([program, "get"], server, self._helper_timeout)
        except TimeoutError as error:
            message = f"The credential helper {program!r} took more than {self._helper_timeout:g} s for {server}."
            raise PermissionRefused(message, remedy=f"See what `{program} get` waits for.") from error
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
            message = f"The credential helper {program!r} did not answer for {server} as it should."
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
    with _of_form(f"DOCKER_CONFIG's file {str(path)!r} is not a Docker config.json.", remedy):
        config = json.loads(content)
        if not isinstance(config, dict) or not all(
            isinstance(config.get(name) or {}, dict) for name in ("auths", "credHelpers")
        ):
            raise ValueError
    mask_secrets(in_json(config))
    return config


def _entry(entries: Any, host: str) -> Any:  # JSON that others wrote
    """Return what a section of config.json holds for a host, which may be written as a URL there."""
    if not entries:
        return None
    named = [name for name in entries if _host_of(name) == host]
    # What is written exactly as Docker writes it wins over what only means the same.
    exact = DOCKER_HUB_KEY if host == DOCKER_HUB else host
    return entries[min(named, key=lambda name: name != exact)] if named else None


def _host_of(key: str) -> str:
    """Return the registry host that a key of `auths` names; empty for one of a namespace within a registry."""
    host, _, path = key.partition("://")[2].partition("/") if "://" in key else key.partition("/")
    return canonical(host) if path.strip("/") in {"", "v1", "v2"} else ""


def _from_file(entry: dict[str, Any], host: str) -> Credential | None:
    user, password, token = entry.get("username"), entry.get("password"), entry.get("identitytoken")
    with _of_form(f"DOCKER_CONFIG's config.json has a malformed entry for {host}.", "`docker login` writes it again."):
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
def _of_form(what: str, remedy: str) -> Iterator[None]:
    """Turn what a parser raises into an error that does not show what was parsed: it holds credentials."""
    try:
        yield
    except (ValueError, TypeError, RecursionError, binascii.Error):
        raise InvalidSettings(what, remedy=remedy) from None


_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# A scheme, perhaps with a value of its own (Negotiate's), and then its parameters or the next scheme.
_SCHEME = re.compile(rf"[\s,]*({_WORD})(?:\s+[A-Za-z0-9._~+/-]+=*(?=\s*(?:,|$))|(?=\s+{_WORD}\s*=|\s*,|\s*$))")
_PARAMETER = re.compile(rf'[\s,]*({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))')
_CLIENT = "model-image-builder"
# A token that says nothing of its end holds 60 s by the specification; one is renewed before it ends.
_LIFETIME = 60.0
_MARGIN = 10.0
_LONGEST = 3600.0

# Sends a request to a token server, with retries, and never follows a redirect.
Send = Callable[[httpx2.Request], Answer]


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate that a server offers: `Basic` or `Bearer` (lower-case here), and its parameters."""

    scheme: str
    parameters: Mapping[str, str]


def challenges(values: Iterable[str]) -> tuple[Challenge, ...]:
    """Return the challenges in the values of WWW-Authenticate headers; what is malformed is left out."""
    found = []
    for value in values:
        position = 0
        while match := _SCHEME.match(value, position):
            position, parameters = match.end(), {}
            while not _SCHEME.match(value, position) and (pair := _PARAMETER.match(value, position)):
                quoted, plain = pair[2], pair[3]
                parameters[pair[1].lower()] = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                position = pair.end()
            found.append(Challenge(match[1].lower(), parameters))
    return tuple(found)


def scope(repository: str, *actions: str) -> str:
    """Return the scope of actions (`pull`, `push`) on a repository's path."""
    return f"repository:{repository}:{','.join(actions)}"


@dataclass(slots=True)
class _Token:
    value: str = field(repr=False)
    ends: float


class Authorizer:
    """Answers one registry's challenges, and remembers the answers.

    Args:
        host: the registry.
        credential: finds its credential; called once, when the registry first asks.
        may_ask: says whether a token server's URL may be asked: never over plain HTTP for a registry over TLS.
        send: sends a request to a token server.
    """

    def __init__(
        self,
        host: str,
        *,
        credential: Callable[[], Credential | None],
        may_ask: Callable[[httpx2.URL], bool],
        send: Send,
    ) -> None:
        self._host = host
        self._find = credential
        self._may_ask = may_ask
        self._send = send
        # Of several threads that need the same token one asks for it, and the others wait.
        self._lock = threading.Lock()
        self._asked = False
        self._credential: Credential | None = None
        self._challenge: Challenge | None = None
        self._tokens: dict[frozenset[str], _Token] = {}

    @property
    def has_credential(self) -> bool:
        """Whether there is a credential for this registry, as far as it was asked for."""
        return self._credential is not None

    def header(self, scopes: frozenset[str]) -> str | None:
        """Return the Authorization header of a request that needs `scopes`, or None before the first challenge.

        Raises:
            PermissionRefused: the token server refuses the credential.
            ServiceUnavailable: the token server is away.
        """
        with self._lock:
            if self._challenge is None:
                return None
            return self._header(self._challenge, scopes)

    def answer(self, values: Iterable[str], scopes: frozenset[str], refused: str | None) -> str | None:
        """Return another Authorization header for a request that was answered 401, or None where there is none.

        Args:
            values: the WWW-Authenticate headers of the answer.
            scopes: what the request needs.
            refused: the header that the request carried.

        Raises:
            PermissionRefused: there is no credential, or the token server refuses it.
            ServiceUnavailable: the token server is away.
        """
        offered = {challenge.scheme: challenge for challenge in reversed(challenges(values))}
        with self._lock:
            if not self._asked:
                self._credential, self._asked = self._find(), True
            challenge = offered.get("bearer") or offered.get("basic")
            if challenge is None:
                return None
            self._challenge = challenge
            held = self._tokens.get(scopes)
            if held and f"Bearer {held.value}" == refused:
                del self._tokens[scopes]
            header = self._header(challenge, scopes, challenge.parameters.get("scope", ""))
            return header if header != refused else None

    def _header(self, challenge: Challenge, scopes: frozenset[str], more: str = "") -> str | None:
        # `more` is what the answer to one request asked for, and is of no use to the next.
        if challenge.scheme == "basic":
            if self._credential is None or self._credential.identity_token:
                return None
            return self._credential.basic
        held = self._tokens.get(scopes)
        if held is None or held.ends <= time.monotonic():
            held = self._tokens[scopes] = self._token(challenge, _joined(scopes, more))
        return f"Bearer {held.value}"

    def _token(self, challenge: Challenge, scopes: list[str]) -> _Token:
        asked = time.monotonic()
        answer = self._send(self._request(challenge, scopes))
        server = f"The token server {answer.host} of registry {self._host}"
        # A token server says 400 for a refresh token that is no longer good (RFC 6749, section 5.2).
        if answer.status in {400, 401, 403}:
            raise self._refused(server, answer)
        if answer.status != httpx2.codes.OK:
            raise refusal(server, answer)
        try:
            content = from_bytes(answer.content)
        except Malformed as error:
            message = f"{server} does not answer with a token: {error}."
            raise ServiceUnavailable(message, remedy="See what stands there.") from error
        value, lifetime = content.get("token") or content.get("access_token"), content.get("expires_in")
        if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]+", value):
            message = f"{server} does not answer with a token."
            raise ServiceUnavailable(message, remedy="See what stands there.")
        mask_token(value)
        if isinstance(refresh := content.get("refresh_token"), str):
            mask_token(refresh)
        # Bounded before it is a float: an integer of JSON may be too large for one.
        seconds = float(min(lifetime, _LONGEST)) if isinstance(lifetime, int | float) and lifetime > 0 else _LIFETIME
        return _Token(value, asked + max(seconds - _MARGIN, seconds / 2))

    def _request(self, challenge: Challenge, scopes: list[str]) -> httpx2.Request:
        realm = self._realm(challenge)
        parameters = [(name, challenge.parameters[name]) for name in ("service",) if name in challenge.parameters]
        credential = self._credential
        if credential and credential.identity_token:
            form = {
                **dict(parameters),
                "grant_type": "refresh_token",
                "client_id": _CLIENT,
                "scope": " ".join(scopes),
                "refresh_token": credential.identity_token,
            }
            return httpx2.Request("POST", realm, data=form)
        headers = {"Authorization": credential.basic} if credential else {}
        query = urlencode([*parameters, *(("scope", each) for each in scopes)])
        joined = "&".join(part for part in (realm.query.decode(), query) if part)
        return httpx2.Request("GET", realm.copy_with(query=joined.encode()), headers=headers)

    def _realm(self, challenge: Challenge) -> httpx2.URL:
        try:
            realm = httpx2.URL(challenge.parameters.get("realm", ""))
        except httpx2.InvalidURL as error:
            message = f"Registry {self._host} names a token server by an address that is none."
            raise ServiceUnavailable(message, remedy="Ask whoever runs it.") from error
        if not self._may_ask(realm):
            message = f"Registry {self._host} names a token server ({realm.host}) that is not reached over HTTPS."
            raise PermissionRefused(
                message,
                remedy="No credential is sent there. Where it is meant so, name both in INSECURE_REGISTRIES.",
            )
        return realm

    def _refused(self, server: str, answer: Answer) -> PermissionRefused:
        if self._credential:
            message = f"{server} refuses the credential: {told(answer)}."
            remedy = f"See that the credential for {self._host} is right and has not expired."
        else:
            message = f"{server} gives no token without a credential: {told(answer)}."
            remedy = f"Set REGISTRY_USER and REGISTRY_TOKEN, or DOCKER_CONFIG with an entry for {self._host}."
        return PermissionRefused(message, remedy=remedy)


def _joined(scopes: Iterable[str], more: str) -> list[str]:
    """Return scopes, with those that a challenge asks for, each resource once."""
    actions: dict[str, dict[str, None]] = {}
    for each in [*sorted(scopes), *more.split()]:
        resource, _, wanted = each.rpartition(":")
        actions.setdefault(resource, {}).update(dict.fromkeys(wanted.split(",")))
    return [f"{resource}:{','.join(wanted)}" for resource, wanted in actions.items()]
