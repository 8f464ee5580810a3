"""Requests to one registry: authenticated, redirected without the credential, and what the answers mean.

Error codes are the distribution specification's: https://github.com/opencontainers/distribution-spec, "Error Codes".
"""

from __future__ import annotations

import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import urlencode

import httpx2

from builder.errors import BuilderError, InvalidSettings, PermissionRefused, ServiceUnavailable, cause_of
from builder.http import (
    Client,
    Response,
    Retry,
    RetryPolicy,
    ServerKind,
    api_host,
    is_named,
    is_transient,
    resumed,
    retried,
)
from builder.masking import mask_token, masked, one_line
from builder.oci import MOST_JSON_BYTES, Blob, BytesBlob, Malformed, from_bytes, verified
from builder.oci.authn import Credential, Credentials
from builder.reference import is_loopback

REGISTRY = ServerKind(
    name="registry",
    unreachable="Check that its name is right, that it runs, and that the network and proxy settings lead to it.",
    unexpected="No registry answers so. Check what is at this address, or talk to its operator.",
    plain="If that is intended, name {host} in INSECURE_REGISTRIES.",
)

# Media types of web pages.
_PAGES = frozenset({"text/html", "application/xhtml+xml"})
_ABSENT = frozenset({"MANIFEST_UNKNOWN", "NAME_UNKNOWN", "NOT_FOUND"})
# The registry of the distribution project gives errno alone: ENOSPC.
_DISK = ("'err': 28", "no space left", "disk quota", "insufficient storage", "disk full", "storage quota")
_LONGEST_REASON = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A registry's whole answer to a request.

    Attributes:
        status: HTTP's status.
        headers: its headers.
        content: its body.
        url: what answered, after redirects; never shown, since a query may be signed.
        host: that of `url`, with its port.
        media_type: of the body, without parameters, lower-case.
    """

    status: int
    headers: httpx2.Headers = field(repr=False)
    content: bytes = field(repr=False)
    url: httpx2.URL = field(repr=False)
    host: str
    media_type: str

    @classmethod
    def of(cls, response: Response, limit: int = MOST_JSON_BYTES) -> Answer:
        """Return a response with its body of at most `limit` bytes; it is closed.

        Raises:
            Retry: it broke off.
            ServiceUnavailable: the body is too large, or took too long.
        """
        return cls(
            content=response.content(limit),
            status=response.status,
            headers=response.headers,
            url=response.url,
            host=response.host,
            media_type=response.media_type,
        )

    @property
    def is_page(self) -> bool:
        """Whether it is a web page, which no registry answers with."""
        return self.media_type in _PAGES

    def errors(self) -> tuple[tuple[str, str], ...]:
        """Return the errors in the body as codes and messages; empty where it has not the specification's form."""
        try:
            entries = from_bytes(self.content).get("errors")
        except Malformed:
            return ()
        if not isinstance(entries, list):
            return ()
        return tuple(
            (str(entry.get("code", "")).upper(), " ".join(str(entry[k]) for k in ("message", "detail") if entry.get(k)))
            for entry in entries
            if isinstance(entry, dict)
        )

    @property
    def codes(self) -> frozenset[str]:
        """The error codes in the body."""
        return frozenset(code for code, _ in self.errors())

    @property
    def text(self) -> str:
        """Everything that the registry says: the reason may come after a long path of its own."""
        text = "; ".join(f"{code} {message}".strip() for code, message in self.errors())
        if not text and self.is_page:
            return "a web page"
        if not text and self.media_type.startswith(("text/", "application/json")):
            return self.content[:_LONGEST_REASON].decode("utf-8", "replace")
        return text

    @property
    def reason(self) -> str:
        """The status, and the beginning of what the registry says about it, on one line that people may see."""
        line = one_line(masked(self.text), _LONGEST_REASON)
        return f"{self.status} ({line})" if line else str(self.status)

    @property
    def says_absent(self) -> bool:
        """Whether the registry, and not something in front of it, says that what was asked for does not exist."""
        api = self.headers.get("Docker-Distribution-Api-Version", "").startswith("registry/2")
        return self.status == HTTPStatus.NOT_FOUND and not self.is_page and (bool(self.codes & _ABSENT) or api)

    def error(self, what: str, *, repository: str = "", credential: bool = False) -> BuilderError:
        """Return the error for an answer that means failure.

        Args:
            what: what failed and on what, the beginning of a sentence: "Pushing to quay.io/domino/x".
            repository: where something was to be written; empty where something was read.
            credential: whether a credential was used.
        """
        # After a redirect, or from a token server, it is not the host that `what` names.
        by = "" if self.host in what else f" by {self.host}"
        error, remedy = self._denial(credential=credential) or self._obstacle(repository)
        return error(f"{what} was answered {self.reason}{by}.", remedy=remedy)

    def _denial(self, *, credential: bool) -> tuple[type[BuilderError], str] | None:
        """Return the error and the remedy where the registry refuses; None where it does not."""
        if self.status == HTTPStatus.UNAUTHORIZED or "UNAUTHORIZED" in self.codes:
            remedy = "Set REGISTRY_USER and REGISTRY_TOKEN, or DOCKER_CONFIG with an entry for the host."
            if credential:
                remedy = "The credential is not accepted for this. Check that it is right, and what it may do."
            return PermissionRefused, remedy
        if self.status == HTTPStatus.FORBIDDEN or "DENIED" in self.codes:
            return PermissionRefused, "Give the credential the right to do this, or use another one."
        if self.status == HTTPStatus.METHOD_NOT_ALLOWED or "UNSUPPORTED" in self.codes:
            remedy = "The registry is read-only, a mirror perhaps. Name one in REGISTRY_URL that can be pushed to."
            return PermissionRefused, remedy
        return None

    def _obstacle(self, repository: str) -> tuple[type[BuilderError], str]:
        """Return the error and the remedy where the registry cannot do it, or where no registry answered."""
        codes, status = self.codes, self.status
        if self.is_page and status < HTTPStatus.INTERNAL_SERVER_ERROR:
            remedy = "No registry answers so. Check that REGISTRY_URL names one, and no website or login page."
        elif repository and (status == HTTPStatus.NOT_FOUND or "NAME_UNKNOWN" in codes):
            remedy = (
                f"This registry (ECR, for one) does not create a repository by itself: create {repository}, "
                f"or name another REGISTRY_URL."
            )
            return InvalidSettings, remedy
        elif "NAME_INVALID" in codes:
            return InvalidSettings, "The registry does not take this repository's name. Change REGISTRY_URL."
        elif status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return InvalidSettings, "Raise the limit of the registry or of the proxy before it."
        elif status == HTTPStatus.INSUFFICIENT_STORAGE or any(sign in self.text.lower() for sign in _DISK):
            remedy = "The registry's disk is full. Free space there."
        elif status == HTTPStatus.TOO_MANY_REQUESTS:
            remedy = "The registry limits the rate of requests. Retry later, or with a credential."
        elif status == HTTPStatus.NOT_FOUND:
            remedy = "Something else than a registry says so. Check that this is a registry's host."
        elif HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
            remedy = "This redirect is not followed. Check that REGISTRY_URL names the registry itself."
        else:
            remedy = "Retry later. The registry's log has the cause."
        return ServiceUnavailable, remedy


def unexpected(what: str, detail: str) -> ServiceUnavailable:
    """Return the error for an answer that breaks the specification.

    Args:
        what: what failed and on what, the beginning of a sentence.
        detail: what is wrong with the answer.
    """
    return ServiceUnavailable(f"{what} was answered {detail}.", remedy=REGISTRY.unexpected)


_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# A scheme, perhaps with a value of its own (Negotiate's), and then its parameters or the next scheme.
_SCHEME = re.compile(rf"[\s,]*({_WORD})(?:\s+[A-Za-z0-9._~+/-]+=*(?=\s*(?:,|$))|(?=\s+{_WORD}\s*=|\s*,|\s*$))")
_PARAMETER = re.compile(rf'[\s,]*({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))')
_CLIENT = "model-image-builder"
# A token without a lifetime is good for 60 s by the specification; one is renewed before it ends.
_LIFETIME = 60.0
_MARGIN = 10.0
_LONGEST = 3600.0
# 400 is for a refresh token that has expired (RFC 6749, section 5.2).
_REFUSED = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})


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
        credential: finds its credential; called at the first challenge, and again after what it gave has ended.
        allowed: whether a token server's URL may be asked: never over plain HTTP for a registry over TLS.
        send: sends a request (method, URL, headers, body) to a token server; follows no redirect.
    """

    def __init__(
        self,
        host: str,
        *,
        credential: Callable[[], Credential | None],
        allowed: Callable[[httpx2.URL], bool],
        send: Callable[[str, httpx2.URL, Mapping[str, str], bytes | None], Answer],
    ) -> None:
        self._host = host
        self._find = credential
        self._allowed = allowed
        self._send = send
        # Of several threads that need the same token one requests it, and the others wait.
        self._lock = threading.Lock()
        self._looked = False
        self._credential: Credential | None = None
        self._challenge: Challenge | None = None
        self._tokens: dict[frozenset[str], _Token] = {}

    @property
    def has_credential(self) -> bool:
        """Whether there is a credential for this registry; False before its first challenge."""
        return self._credential is not None

    def header(self, scopes: frozenset[str]) -> str | None:
        """Return the Authorization header of a request that needs `scopes`, or None before the first challenge.

        Raises:
            PermissionRefused: the token server refuses the credential.
            ServiceUnavailable: the token server cannot be reached.
        """
        with self._lock:
            return self._header(self._challenge, scopes) if self._challenge else None

    def answer(self, values: Iterable[str], scopes: frozenset[str], refused: str | None) -> str | None:
        """Return another Authorization header for a request that was answered 401, or None where there is no other.

        Args:
            values: the WWW-Authenticate headers of the answer.
            scopes: what the request needs.
            refused: the header that the request carried.

        Raises:
            PermissionRefused: there is no credential, or the token server refuses it.
            ServiceUnavailable: the token server cannot be reached.
        """
        offered = {challenge.scheme: challenge for challenge in reversed(challenges(values))}
        with self._lock:
            self._look()
            challenge = offered.get("bearer") or offered.get("basic")
            if challenge is None:
                return None
            self._challenge = challenge
            token = self._tokens.get(scopes)
            if token and f"Bearer {token.value}" == refused:
                del self._tokens[scopes]
            header = self._header(challenge, scopes, challenge.parameters.get("scope", ""))
            return header if header != refused else None

    def _look(self) -> None:
        """Find the credential, once, and again after it has ended."""
        if not self._looked or (self._credential and self._credential.ends <= time.monotonic()):
            self._credential, self._looked = self._find(), True

    def _header(self, challenge: Challenge, scopes: frozenset[str], more: str = "") -> str | None:
        self._look()
        # `more` is what the answer to one request asked for, and is of no use to the next.
        if challenge.scheme == "basic":
            if self._credential is None or self._credential.identity_token:
                return None
            return self._credential.basic
        token = self._tokens.get(scopes)
        if token is None or token.ends <= time.monotonic():
            token = self._tokens[scopes] = self._token(challenge, _merged(scopes, more))
        return f"Bearer {token.value}"

    def _token(self, challenge: Challenge, scopes: list[str]) -> _Token:
        begun = time.monotonic()
        answer = self._requested(challenge, scopes)
        server = f"The token server {answer.host} of registry {self._host}"
        if answer.status in _REFUSED:
            raise self._refusal(server, answer)
        if answer.status != HTTPStatus.OK:
            raise answer.error(server)
        message, remedy = f"{server} does not answer with a token.", "Check what is at this address."
        try:
            content = from_bytes(answer.content)
        except Malformed as error:
            raise ServiceUnavailable(message, remedy=remedy) from error
        value, lifetime = content.get("token") or content.get("access_token"), content.get("expires_in")
        if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]+", value):
            raise ServiceUnavailable(message, remedy=remedy)
        mask_token(value)
        if isinstance(refresh := content.get("refresh_token"), str):
            mask_token(refresh)
        # Bounded before it is a float: an integer of JSON may be too large for one.
        seconds = float(min(lifetime, _LONGEST)) if isinstance(lifetime, int | float) and lifetime > 0 else _LIFETIME
        return _Token(value, begun + max(seconds - _MARGIN, seconds / 2))

    def _requested(self, challenge: Challenge, scopes: list[str]) -> Answer:
        realm = self._realm(challenge)
        parameters = [(name, challenge.parameters[name]) for name in ("service",) if name in challenge.parameters]
        credential = self._credential
        if credential and credential.identity_token:
            form = [
                *parameters,
                ("grant_type", "refresh_token"),
                ("client_id", _CLIENT),
                ("scope", " ".join(scopes)),
                ("refresh_token", credential.identity_token),
            ]
            kind = {"Content-Type": "application/x-www-form-urlencoded"}
            return self._send("POST", realm, kind, urlencode(form).encode())
        headers = {"Authorization": credential.basic} if credential else {}
        query = urlencode([*parameters, *(("scope", each) for each in scopes)])
        joined = "&".join(part for part in (realm.query.decode(), query) if part)
        return self._send("GET", realm.copy_with(query=joined.encode()), headers, None)

    def _realm(self, challenge: Challenge) -> httpx2.URL:
        try:
            realm = httpx2.URL(challenge.parameters.get("realm", ""))
        except httpx2.InvalidURL as error:
            message = f"Registry {self._host} names a token server with a malformed address."
            raise ServiceUnavailable(message, remedy="Talk to its operator.") from error
        if not self._allowed(realm):
            message = f"Registry {self._host} names a token server ({realm.host}) that is not reached over HTTPS."
            raise PermissionRefused(
                message,
                remedy="No credential is sent there. If that is intended, name both in INSECURE_REGISTRIES.",
            )
        return realm

    def _refusal(self, server: str, answer: Answer) -> PermissionRefused:
        if self._credential:
            message = f"{server} refuses the credential: {answer.reason}."
            remedy = f"Check that the credential for {self._host} is right and has not expired."
        else:
            message = f"{server} gives no token without a credential: {answer.reason}."
            remedy = f"Set REGISTRY_USER and REGISTRY_TOKEN, or DOCKER_CONFIG with an entry for {self._host}."
        return PermissionRefused(message, remedy=remedy)


def _merged(scopes: Iterable[str], more: str) -> list[str]:
    """Return scopes, with those that a challenge asks for, each resource once."""
    actions: dict[str, dict[str, None]] = {}
    for each in [*sorted(scopes), *more.split()]:
        resource, _, wanted = each.rpartition(":")
        actions.setdefault(resource, {}).update(dict.fromkeys(wanted.split(",")))
    return [f"{resource}:{','.join(wanted)}" for resource, wanted in actions.items()]


# These two keep method and body (RFC 9110, section 15.4); the others are for reading only.
_KEEPING = frozenset({HTTPStatus.TEMPORARY_REDIRECT, HTTPStatus.PERMANENT_REDIRECT})
_MOST_STEPS = 8
_READ = frozenset({"GET", "HEAD"})
# A registry may take its time over a large blob before it answers.
_UPLOAD_TIMEOUT = httpx2.Timeout(60, connect=15, read=300)

Result = TypeVar("Result")


class Transport:
    """Sends requests to one registry; may be used by several threads.

    Args:
        host: the registry, as references name it.
        client: sends each request.
        credentials: asked at the registry's first challenge.
        insecure: hosts reached over plain HTTP beside this machine's own.
        policy: how often and how long to try.
    """

    def __init__(
        self,
        host: str,
        *,
        client: Client,
        credentials: Credentials,
        insecure: frozenset[str] = frozenset(),
        policy: RetryPolicy,
    ) -> None:
        self.host = host
        self._client = client
        self._insecure = insecure
        self._policy = policy
        self._lock = threading.Lock()
        self._base: httpx2.URL | None = None
        self._authorizer = Authorizer(
            host, credential=lambda: credentials.for_host(host), allowed=self._allowed, send=self._from_token_server
        )

    @property
    def has_credential(self) -> bool:
        """Whether there is a credential for this registry; False before its first challenge."""
        return self._authorizer.has_credential

    def retried(self, what: str, act: Callable[[float], Result], *, size: int = 0) -> Result:
        """Return what `act` returns, trying again while it may pass.

        Args:
            what: what is done and on what, the beginning of a sentence.
            act: does it with `send`; its argument is the time by which it has to be over.
            size: bytes that it moves.

        Raises:
            BuilderError: no attempt succeeded.
        """
        return retried(what, act, policy=self._policy, seconds=self._policy.seconds_for(size))

    def send(
        self,
        method: str,
        where: str | httpx2.URL,
        *,
        until: float,
        scopes: frozenset[str] = frozenset(),
        headers: Mapping[str, str] | None = None,
        body: Blob | None = None,
        limit: int = MOST_JSON_BYTES,
    ) -> Answer:
        """Return the registry's answer to one request, after challenges and redirects.

        The credential goes to the registry's own scheme, host and port, and nowhere else.

        Args:
            method: HTTP's.
            where: a path at the registry, or a whole URL that it gave.
            until: when it has to be over, as of `time.monotonic`.
            scopes: what a token has to be good for.
            headers: of the request.
            body: sent with its length, and checked while it is sent.
            limit: bytes that the answer may have.

        Raises:
            Retry: it failed in a way that may pass.
            BuilderError: it failed for good: a certificate, a token server, an answer that is too large.
        """
        return _final(self._open(method, where, until=until, scopes=scopes, headers=headers, body=body), limit)

    def stream(
        self, what: str, where: str, *, scopes: frozenset[str], size: int, refusal: Callable[[Answer], BuilderError]
    ) -> Iterator[bytes]:
        """Yield what is at a path of the registry, resumed where a connection breaks; the caller verifies it.

        Args:
            what: what is done and on what, the beginning of a sentence.
            where: the path.
            scopes: what a token has to be good for.
            size: bytes that it should have.
            refusal: gives the error for an answer that means failure.

        Raises:
            BuilderError: it cannot be had.
        """

        def open_at(position: int, until: float) -> tuple[Response, int]:
            headers = {"Range": f"bytes={position}-"} if position else {}
            response = self._open("GET", where, until=until, scopes=scopes, headers=headers)
            if response.starts_at(position):
                return response, position
            if response.status == HTTPStatus.PARTIAL_CONTENT:
                with response:
                    raise unexpected(what, "with another part than was requested")
            if response.status == HTTPStatus.OK and response.media_type not in _PAGES:
                return response, 0
            raise refusal(_final(response))

        seconds = self._policy.seconds_for(size)
        return resumed(what, open_at, policy=self._policy, size=size, seconds=seconds, verified=True)

    def _open(
        self,
        method: str,
        where: str | httpx2.URL,
        *,
        until: float,
        scopes: frozenset[str],
        headers: Mapping[str, str] | None = None,
        body: Blob | None = None,
    ) -> Response:
        """Return the last answer on the way of a request, its body not read yet; see `send`."""
        base = self._origin()
        url = self._joined(base, where)
        home = url.origin == base.origin
        authorization = self._authorizer.header(scopes) if home else None
        challenged = False
        for _ in range(_MOST_STEPS):
            response = self._exchange(method, url, until=until, headers=headers, authorization=authorization, body=body)
            challenge = response.status == HTTPStatus.UNAUTHORIZED and home and not challenged
            redirect = response.is_redirect and (method in _READ or response.status in _KEEPING)
            if not challenge and not redirect:
                return response
            response.content(MOST_JSON_BYTES)
            if challenge:
                challenged = True
                offered = response.headers.get_list("WWW-Authenticate")
                authorization = self._authorizer.answer(offered, scopes, authorization)
                if authorization is None:
                    return response
            else:
                url = self._joined(response.url, response.headers["Location"])
                # After another host, nothing leads back to the credential.
                home = home and url.origin == base.origin
                authorization = authorization if home else None
        raise REGISTRY.unexpected_error(self.host, "with too many redirects")

    def _exchange(
        self,
        method: str,
        url: httpx2.URL,
        *,
        until: float,
        headers: Mapping[str, str] | None,
        authorization: str | None,
        body: Blob | None,
    ) -> Response:
        fields = dict(headers or {})
        if authorization:
            fields["Authorization"] = authorization
        if body is None:
            return self._client.send(method, url, until=until, headers=fields)
        fields["Content-Length"] = str(body.size)
        content = body.content if isinstance(body, BytesBlob) else verified(body)
        return self._client.send(method, url, until=until, headers=fields, body=content, timeout=_UPLOAD_TIMEOUT)

    def _from_token_server(
        self, method: str, url: httpx2.URL, headers: Mapping[str, str], body: bytes | None
    ) -> Answer:
        until = time.monotonic() + self._policy.deadline
        return _final(self._client.send(method, url, until=until, headers=headers, body=body))

    def location(self, answer: Answer) -> httpx2.URL:
        """Return the URL that an answer's Location header names: perhaps relative, perhaps at another host.

        Raises:
            ServiceUnavailable: it has no such header, or it is over plain HTTP where that is not allowed.
        """
        return self._joined(answer.url, answer.headers.get("Location", ""))

    def _joined(self, base: httpx2.URL, where: str | httpx2.URL) -> httpx2.URL:
        try:
            url = base.join(where) if where else None
        except (httpx2.InvalidURL, ValueError):
            url = None
        if url is None or not self._allowed(url):
            plain = url is not None and url.scheme == "http" and not url.userinfo
            how = f"to {url.host} over plain HTTP" if url and plain else "to an address that is malformed or not HTTPS"
            message = f"Registry {self.host} redirects {how}, which is refused."
            raise ServiceUnavailable(
                message,
                remedy="A registry behind a proxy needs its own address from it (X-Forwarded-Proto). Name a host that "
                "is reached over plain HTTP on purpose in INSECURE_REGISTRIES.",
            )
        return url

    def _allowed(self, url: httpx2.URL) -> bool:
        """Return whether a registry may lead to `url`: HTTPS, or, from plain HTTP, plain HTTP to a host that may."""
        if not url.host or url.userinfo:
            return False
        plain = self._base is not None and self._base.scheme == "http"
        host = url.netloc.decode("ascii", "replace")
        return url.scheme == "https" or (
            url.scheme == "http" and plain and (is_loopback(host) or is_named(host, self._insecure))
        )

    def _origin(self) -> httpx2.URL:
        """Return the registry's base URL; whether one on this machine speaks TLS is found out once."""
        with self._lock:
            if self._base is None:
                host = api_host(self.host)
                if is_named(self.host, self._insecure):
                    scheme = "http"
                elif is_loopback(host):
                    scheme = self._spoken(host)
                else:
                    scheme = "https"
                try:
                    self._base = httpx2.URL(f"{scheme}://{host}/")
                except httpx2.InvalidURL as error:
                    message = f"{host!r} is not a registry's host."
                    raise InvalidSettings(message, remedy="A host is a name and perhaps a port.") from error
            return self._base

    def _spoken(self, host: str) -> str:
        """Return what a server on this machine speaks, `http` or `https`; no credential is sent to find out."""
        until = time.monotonic() + self._policy.deadline
        try:
            with self._client.send("GET", f"http://{host}/v2/", until=until) as response:
                # What servers answer to plain HTTP at a TLS port.
                if response.status != HTTPStatus.BAD_REQUEST:
                    return "http"
        except Retry as error:
            if not cause_of(error, httpx2.RemoteProtocolError, httpx2.ReadError):
                raise
        try:
            with self._client.send("GET", f"https://{host}/v2/", until=until):
                return "https"
        except (Retry, InvalidSettings) as error:
            return "https" if cause_of(error, ssl.SSLCertVerificationError) else "http"


def _final(response: Response, limit: int = MOST_JSON_BYTES) -> Answer:
    """Return a response with its body.

    Raises:
        Retry: it broke off, or another attempt may have another answer.
        ServiceUnavailable: the body is too large, or it took too long.
    """
    answer = Answer.of(response, limit)
    if is_transient(answer.status):
        raise Retry(answer.error, retry_after=response.retry_after)
    return answer
