"""Requests to one registry: authenticated, over pooled connections, redirects followed without the credential."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import TypeVar

import httpx

from builder.errors import InvalidSettings, ServiceUnavailable, cause_of
from builder.images.answers import Answer, unexpected
from builder.images.auth import Authorizer
from builder.images.blob import Blob, BytesBlob, verified
from builder.images.credentials import Credentials
from builder.images.descriptor import MOST_JSON_BYTES
from builder.images.exchange import Body, answer_of, failure, request_to, sent, whole_answer
from builder.images.hosts import api_host, is_loopback, is_named
from builder.images.retry import Patience, patiently

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# These two keep method and body (RFC 9110, section 15.4); the others are for reading only.
_KEEPING = frozenset({307, 308})
_MOST_STEPS = 8
_READ = frozenset({"GET", "HEAD"})
_CONTENT = frozenset({HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT})
# A registry may take its time over a large blob before it answers.
_UPLOAD_TIMEOUT = httpx.Timeout(60, connect=15, read=300)

Result = TypeVar("Result")
Origin = tuple[str, str, int | None]


class Transport:
    """Sends requests to one registry; may be used by several threads.

    Args:
        host: the registry, as references name it.
        client: pooled connections; follows no redirects and reads no environment.
        credentials: asked when the registry asks.
        insecure: hosts reached over plain HTTP beside this machine's own.
        patience: how long to try.
    """

    def __init__(
        self,
        host: str,
        *,
        client: httpx.Client,
        credentials: Credentials,
        insecure: frozenset[str] = frozenset(),
        patience: Patience,
    ) -> None:
        self.host = host
        self._client = client
        self._insecure = insecure
        self._patience = patience
        self._lock = threading.Lock()
        self._base: httpx.URL | None = None
        self._authorizer = Authorizer(
            host,
            credential=lambda: credentials.for_host(host),
            may_ask=self._allowed,
            send=lambda request: self._exchange(request, time.monotonic() + patience.deadline, MOST_JSON_BYTES),
        )

    @property
    def attempts(self) -> int:
        """How often something may be tried."""
        return self._patience.attempts

    @property
    def has_credential(self) -> bool:
        """Whether there is a credential for this registry, as far as it asked for one."""
        return self._authorizer.has_credential

    def patiently(self, what: str, act: Callable[[float], Result], *, size: int = 0) -> Result:
        """Return what `act` returns, trying again as long as it may pass.

        Args:
            what: what is done and on what, the beginning of a sentence.
            act: does it with `send`; is given the time by which it has to be over.
            size: bytes that it moves.

        Raises:
            BuilderError: it did not pass.
        """
        return patiently(what, act, patience=self._patience, seconds=self._patience.seconds_for(size))

    def send(
        self,
        method: str,
        where: str | httpx.URL,
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
            Again: it failed in a way that may pass.
            BuilderError: it failed for good: a certificate, a token server, an answer that is too large.
        """

        def exchange(url: httpx.URL, authorization: str | None) -> Answer:
            return self._exchange(self._request(method, url, headers, authorization, body), until, limit)

        return self._answered(method, where, scopes, exchange)

    def open(
        self,
        where: str,
        *,
        until: float,
        scopes: frozenset[str] = frozenset(),
        headers: Mapping[str, str] | None = None,
    ) -> tuple[Answer, Body | None]:
        """Return the registry's answer to a GET, after challenges and redirects, and what reads its body.

        The arguments and errors are those of `send`. An answer that is no success is read whole and has no `Body`;
        whoever gets a `Body` closes it.
        """
        body: Body | None = None

        def exchange(url: httpx.URL, authorization: str | None) -> Answer:
            nonlocal body
            request = self._request("GET", url, headers, authorization, None)
            response = sent(self._client, request, until)
            if response.status_code not in _CONTENT:
                return whole_answer(response, until, MOST_JSON_BYTES)
            body = Body(response, until)
            return answer_of(response, b"")

        return self._answered("GET", where, scopes, exchange), body

    def _answered(
        self,
        method: str,
        where: str | httpx.URL,
        scopes: frozenset[str],
        exchange: Callable[[httpx.URL, str | None], Answer],
    ) -> Answer:
        """Return the last answer that `exchange`, given a URL and an authorization, has on the way there."""
        base = self._origin()
        url = self._joined(base, where)
        home = _origin(url) == _origin(base)
        authorization = self._authorizer.header(scopes) if home else None
        challenged = False
        for _ in range(_MOST_STEPS):
            answer = exchange(url, authorization)
            if answer.status == HTTPStatus.UNAUTHORIZED and home and not challenged:
                challenged = True
                offered = answer.headers.get_list("WWW-Authenticate")
                authorization = self._authorizer.answer(offered, scopes, authorization)
                if authorization is None:
                    return answer
            elif _followed(method, answer):
                url = self._joined(answer.url, answer.headers["Location"])
                # Once away, nothing leads back to the credential.
                home = home and _origin(url) == _origin(base)
                authorization = authorization if home else None
            else:
                return answer
        raise unexpected(request_to(self.host), "with too many redirects")

    def location(self, answer: Answer) -> httpx.URL:
        """Return the URL that an answer's Location header names: perhaps relative, perhaps at another host.

        Raises:
            ServiceUnavailable: there is none, or it is over plain HTTP where that is not allowed.
        """
        return self._joined(answer.url, answer.headers.get("Location", ""))

    def _joined(self, base: httpx.URL, where: str | httpx.URL) -> httpx.URL:
        try:
            url = base.join(where) if where else None
        except (httpx.InvalidURL, ValueError):
            url = None
        if url is None or not self._allowed(url):
            name = url.host if url else "an address that is none"
            message = f"Registry {self.host} leads to {name}, and that not over HTTPS."
            raise ServiceUnavailable(
                message,
                remedy="A registry behind a proxy has to be told its own address (X-Forwarded-Proto); a host that is "
                "meant to be reached over plain HTTP has to be named in INSECURE_REGISTRIES.",
            )
        return url

    def _allowed(self, url: httpx.URL) -> bool:
        """Return whether a registry may lead to `url`: HTTPS, or, from plain HTTP, plain HTTP to a host that may."""
        if not url.host or url.userinfo:
            return False
        plain = self._base is not None and self._base.scheme == "http"
        host = url.netloc.decode("ascii", "replace")
        return url.scheme == "https" or (
            url.scheme == "http" and plain and (is_loopback(host) or is_named(host, self._insecure))
        )

    def _request(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str] | None,
        authorization: str | None,
        body: Blob | None,
    ) -> httpx.Request:
        fields = {"Accept-Encoding": "identity", **(headers or {})}
        if authorization:
            fields["Authorization"] = authorization
        if body is None:
            return self._client.build_request(method, url, headers=fields)
        fields["Content-Length"] = str(body.size)
        content = body.content if isinstance(body, BytesBlob) else verified(body)
        return self._client.build_request(method, url, headers=fields, content=content, timeout=_UPLOAD_TIMEOUT)

    def _exchange(self, request: httpx.Request, until: float, limit: int) -> Answer:
        return whole_answer(sent(self._client, request, until), until, limit)

    def _origin(self) -> httpx.URL:
        """Return the registry's base URL; whether this machine's own speak TLS is found out once."""
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
                    self._base = httpx.URL(f"{scheme}://{host}/")
                except httpx.InvalidURL as error:
                    message = f"{host!r} is not a registry's host."
                    raise InvalidSettings(message, remedy="A host is a name and perhaps a port.") from error
            return self._base

    def _spoken(self, host: str) -> str:
        """Return what a server on this machine speaks, `http` or `https`; no credential is sent to find out."""
        try:
            with self._client.stream("GET", f"http://{host}/v2/") as response:
                # What servers answer to plain HTTP at a TLS port.
                if response.status_code != HTTPStatus.BAD_REQUEST:
                    return "http"
        except (httpx.RemoteProtocolError, httpx.ReadError):
            pass
        except httpx.TransportError as error:
            raise failure(host, error) from error
        try:
            with self._client.stream("GET", f"https://{host}/v2/"):
                return "https"
        except httpx.TransportError as error:
            return "https" if cause_of(error, ssl.SSLCertVerificationError) else "http"


def _followed(method: str, answer: Answer) -> bool:
    if "Location" not in answer.headers or answer.status not in _REDIRECTS:
        return False
    return method in _READ or answer.status in _KEEPING


def _origin(url: httpx.URL) -> Origin:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)
