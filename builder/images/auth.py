"""Authentication at a registry: what it challenges with, and how that is answered.

Challenges are those of RFC 9110, section 11.6.1; tokens those of the distribution project
(https://distribution.github.io/distribution/spec/auth/token/ and …/spec/auth/oauth/).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode

import httpx

from builder.errors import PermissionRefused, ServiceUnavailable
from builder.images.answers import Answer, refusal, told
from builder.images.credentials import Credential
from builder.images.descriptor import Malformed, from_bytes
from builder.masking import mask_token

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
Send = Callable[[httpx.Request], Answer]


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
        may_ask: Callable[[httpx.URL], bool],
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
        if answer.status != httpx.codes.OK:
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

    def _request(self, challenge: Challenge, scopes: list[str]) -> httpx.Request:
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
            return httpx.Request("POST", realm, data=form)
        headers = {"Authorization": credential.basic} if credential else {}
        query = urlencode([*parameters, *(("scope", each) for each in scopes)])
        joined = "&".join(part for part in (realm.query.decode(), query) if part)
        return httpx.Request("GET", realm.copy_with(query=joined.encode()), headers=headers)

    def _realm(self, challenge: Challenge) -> httpx.URL:
        try:
            realm = httpx.URL(challenge.parameters.get("realm", ""))
        except httpx.InvalidURL as error:
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
