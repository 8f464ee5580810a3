"""Requests to one registry: authenticated, over pooled connections, redirects followed without the credential."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import TypeVar

import httpx

from builder.errors import InvalidSettings, ServiceUnavailable, one_line
from builder.images.answers import Answer, unexpected
from builder.images.auth import Authorizer
from builder.images.blob import Blob, BytesBlob, verified
from builder.images.credentials import Credentials
from builder.images.descriptor import MOST_JSON_BYTES
from builder.images.hosts import api_host, is_loopback, is_named
from builder.images.retry import Again, Patience, passes, patiently

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# These two keep method and body (RFC 9110, section 15.4); the others are for reading only.
_KEEPING = frozenset({307, 308})
_MOST_STEPS = 8
_READ = frozenset({"GET", "HEAD"})
_CONTENT = frozenset({HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT})
# A registry may take its time over a large blob before it answers.
_UPLOAD_TIMEOUT = httpx.Timeout(60, connect=15, read=300)
_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"})

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
            name = _name(request)
            response = self._sent(request, name, until)
            if response.status_code not in _CONTENT:
                return _whole(response, name, until, MOST_JSON_BYTES)
            body = Body(response, name, until)
            return _answer(response, b"")

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
        raise unexpected(_request_to(self.host), "with too many redirects")

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
        """Return the whole answer to one request.

        Raises:
            Again: there was no answer, or one that may be another later.
            BuilderError: TLS cannot be made, the answer is too large, or it took too long.
        """
        name = _name(request)
        return _whole(self._sent(request, name, until), name, until, limit)

    def _sent(self, request: httpx.Request, name: str, until: float) -> httpx.Response:
        """Return the response to a request, its body not read yet."""
        if not isinstance(request.stream, httpx.ByteStream) and isinstance(request.stream, httpx.SyncByteStream):
            request.stream = _Timed(request.stream, name, until)
        with _ours(name):
            return self._client.send(request, stream=True)

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
            raise _failure(host, error) from error
        try:
            with self._client.stream("GET", f"https://{host}/v2/"):
                return "https"
        except httpx.TransportError as error:
            return "https" if _cause(error, ssl.SSLCertVerificationError) else "http"


class Body:
    """The body of an answer, read once, piece by piece, as it was sent: nothing is decoded.

    Args:
        response: not read yet.
        name: the host that answered.
        until: when it has to be over, as of `time.monotonic`.
    """

    def __init__(self, response: httpx.Response, name: str, until: float) -> None:
        self._response, self._name, self._until = response, name, until

    def __iter__(self) -> Iterator[bytes]:
        """Yield the pieces.

        Raises:
            Again: the connection broke.
            ServiceUnavailable: it took too long.
        """
        with _ours(self._name):
            for chunk in self._response.iter_raw():
                _in_time(self._name, self._until)
                yield chunk

    def close(self) -> None:
        """Give the connection back; one that was not read to its end is closed."""
        self._response.close()


class _Timed(httpx.SyncByteStream):
    """A request's body that ends when the time is over."""

    def __init__(self, stream: httpx.SyncByteStream, name: str, until: float) -> None:
        self._stream, self._name, self._until = stream, name, until

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            _in_time(self._name, self._until)
            yield chunk


def _name(request: httpx.Request) -> str:
    return request.url.netloc.decode("ascii", "replace")


@contextlib.contextmanager
def _ours(name: str) -> Iterator[None]:
    """Turn what fails on the way to or from the host `name` into errors of ours."""
    try:
        yield
    except httpx.TransportError as error:
        raise _failure(name, error) from error
    except (httpx.InvalidURL, httpx.DecodingError) as error:
        raise unexpected(_request_to(name), "in a form that HTTP does not have") from error


def _whole(response: httpx.Response, name: str, until: float, limit: int) -> Answer:
    """Return a response with its body; raises `Again` where it may be another later."""
    with _ours(name), contextlib.closing(response):
        content = b"".join(_bounded(response, name, until, limit))
    answer = _answer(response, content)
    if passes(answer.status):
        raise Again(answer)
    return answer


def _answer(response: httpx.Response, content: bytes) -> Answer:
    return Answer(
        status=response.status_code,
        headers=response.headers,
        content=content,
        url=response.request.url,
        method=response.request.method,
    )


def _bounded(response: httpx.Response, name: str, until: float, limit: int) -> Iterator[bytes]:
    size = 0
    for chunk in response.iter_bytes():
        size += len(chunk)
        if size > limit:
            raise unexpected(_request_to(name), f"with more than {limit} bytes")
        _in_time(name, until)
        yield chunk


def _request_to(name: str) -> str:
    return f"A request to {name}"


def _in_time(name: str, until: float) -> None:
    if time.monotonic() > until:
        message = f"{name} is too slow: a request took longer than it may."
        raise ServiceUnavailable(message, remedy="See to the network, or try again later.")


def _followed(method: str, answer: Answer) -> bool:
    if "Location" not in answer.headers or answer.status not in _REDIRECTS:
        return False
    return method in _READ or answer.status in _KEEPING


def _origin(url: httpx.URL) -> Origin:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _cause(error: BaseException, kind: type[ssl.SSLError]) -> ssl.SSLError | None:
    """Return the first error of a kind among what an error came from."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, kind):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _failure(name: str, error: httpx.TransportError) -> Exception:
    """Return what a request that had no answer raises."""
    certificate = _cause(error, ssl.SSLCertVerificationError)
    if isinstance(certificate, ssl.SSLCertVerificationError):
        message = f"The certificate of {name} is not trusted: {one_line(certificate.verify_message, 200)}."
        return InvalidSettings(
            message, remedy="Name a bundle with the authority that signed it in SSL_CERT_FILE, or mend the certificate."
        )
    tls = _cause(error, ssl.SSLError)
    if tls and tls.reason in _NOT_TLS:
        message = f"{name} does not speak TLS."
        return InvalidSettings(message, remedy=f"If it is meant so, name {name} in INSECURE_REGISTRIES.")
    said = one_line(str(error), 200) or type(error).__name__
    return Again(
        ServiceUnavailable(
            f"Registry {name} cannot be reached: {said}.",
            remedy="See that its name is right, that it runs, and that the network and proxy settings lead to it.",
        )
    )
