"""Requests to one registry: in time, in bounds, authenticated, resumed, redirected without the credential."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

import httpx2

from builder.errors import BuilderError, InvalidSettings, ServiceUnavailable, cause_of
from builder.http import Retry, RetryPolicy, api_host, is_loopback, is_named, passes, retried
from builder.log import get_logger
from builder.masking import one_line
from builder.oci.authn import Authorizer, Credentials
from builder.oci.descriptor import MOST_JSON_BYTES, Blob, BytesBlob, verified
from builder.oci.errors import Answer, unexpected
from builder.reference import Digest

_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"})


class Body:
    """The body of an answer, read once, piece by piece, as it was sent: nothing is decoded.

    Args:
        response: not read yet.
        until: when it has to be over, as of `time.monotonic`.
    """

    def __init__(self, response: httpx2.Response, until: float) -> None:
        self._response, self._until = response, until

    def __iter__(self) -> Iterator[bytes]:
        """Yield the pieces.

        Raises:
            Retry: the connection broke.
            ServiceUnavailable: it took too long.
        """
        name = _host(self._response.request)
        with _ours(name, answered=True):
            for chunk in self._response.iter_raw():
                _in_time(name, self._until)
                yield chunk

    def close(self) -> None:
        """Give the connection back; one that was not read to its end is closed."""
        self._response.close()


class _Timed(httpx2.SyncByteStream):
    """A request's body that ends when the time is over."""

    def __init__(self, stream: httpx2.SyncByteStream, name: str, until: float) -> None:
        self._stream, self._name, self._until = stream, name, until

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            _in_time(self._name, self._until)
            yield chunk


def sent(client: httpx2.Client, request: httpx2.Request, until: float) -> httpx2.Response:
    """Return the response to a request, its body not read yet.

    Args:
        client: follows no redirects.
        request: its body ends with an error when the time is over.
        until: when that is, as of `time.monotonic`.

    Raises:
        Retry: there was none.
        BuilderError: TLS cannot be made.
    """
    name = _host(request)
    if not isinstance(request.stream, httpx2.ByteStream) and isinstance(request.stream, httpx2.SyncByteStream):
        request.stream = _Timed(request.stream, name, until)
    with _ours(name):
        return client.send(request, stream=True)


def _host(request: httpx2.Request) -> str:
    return request.url.netloc.decode("ascii", "replace")


@contextlib.contextmanager
def _ours(name: str, *, answered: bool = False) -> Iterator[None]:
    """Turn what fails on the way to or from the host `name`, before or after its answer began, into errors of ours."""
    try:
        yield
    except httpx2.TransportError as error:
        raise failure(name, error, answered=answered) from error
    except (httpx2.InvalidURL, httpx2.DecodingError) as error:
        raise unexpected(request_to(name), "in a form that HTTP does not have") from error


def whole_answer(response: httpx2.Response, until: float, limit: int) -> Answer:
    """Return a response with its body.

    Args:
        response: not read yet; it is closed.
        until: when it has to be over, as of `time.monotonic`.
        limit: bytes that the body may have.

    Raises:
        Retry: it broke off, or says what may be otherwise later.
        ServiceUnavailable: the body is too large, or it took too long.
    """
    name = _host(response.request)
    with _ours(name, answered=True), contextlib.closing(response):
        content = b"".join(_bounded(response, name, until, limit))
    answer = answer_of(response, content)
    if passes(answer.status):
        raise Retry(answer)
    return answer


def answer_of(response: httpx2.Response, content: bytes) -> Answer:
    """Return a response whose body is `content`, as far as it was read."""
    return Answer(
        status=response.status_code,
        headers=response.headers,
        content=content,
        url=response.request.url,
        method=response.request.method,
    )


def _bounded(response: httpx2.Response, name: str, until: float, limit: int) -> Iterator[bytes]:
    size = 0
    for chunk in response.iter_bytes():
        size += len(chunk)
        if size > limit:
            raise unexpected(request_to(name), f"with more than {limit} bytes")
        _in_time(name, until)
        yield chunk


def request_to(name: str) -> str:
    """Return the beginning of a sentence on a request to a host."""
    return f"A request to {name}"


def _in_time(name: str, until: float) -> None:
    if time.monotonic() > until:
        message = f"{name} is too slow: a request took longer than it may."
        raise ServiceUnavailable(message, remedy="See to the network, or try again later.")


def failure(name: str, error: httpx2.TransportError, *, answered: bool = False) -> Exception:
    """Return what a request that had no answer raises, or, where it had, one that broke off."""
    certificate = cause_of(error, ssl.SSLCertVerificationError)
    if certificate:
        message = f"The certificate of {name} is not trusted: {one_line(certificate.verify_message, 200)}."
        return InvalidSettings(
            message, remedy="Name a bundle with the authority that signed it in SSL_CERT_FILE, or mend the certificate."
        )
    tls = cause_of(error, ssl.SSLError)
    if tls and tls.reason in _NOT_TLS:
        message = f"{name} does not speak TLS."
        return InvalidSettings(message, remedy=f"If it is meant so, name {name} in INSECURE_REGISTRIES.")
    said = one_line(str(error), 200) or type(error).__name__
    return Retry(
        ServiceUnavailable(
            f"Registry {name} cannot be reached: {said}.",
            remedy="See that its name is right, that it runs, and that the network and proxy settings lead to it.",
        ),
        unanswered=not answered and isinstance(error, httpx2.ReadTimeout),
    )


_log = get_logger("registry")


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """A `Blob` as a registry sends it, not checked yet.

    Attributes:
        what: what is done and on what, the beginning of a sentence.
        transport: leads to the registry.
        path: of the blob there.
        scopes: what a token has to be good for.
        refusal: gives the error that an answer stands for.
        digest: that the blob should have.
        size: that it should have, bytes.
    """

    what: str
    transport: Transport
    path: str
    scopes: frozenset[str]
    refusal: Callable[[Answer], BuilderError]
    digest: Digest
    size: int

    def stream(self) -> Iterator[bytes]:
        """Yield its bytes from the beginning.

        Raises:
            BuilderError: see `Registry`.
        """
        position, broken = 0, 0
        until: float | None = None
        while True:
            body, skipped, until = self._opened(position, until)
            try:
                with contextlib.closing(body):
                    for chunk in body:
                        rest = chunk[skipped:]
                        skipped -= len(chunk) - len(rest)
                        position += len(rest)
                        if rest:
                            yield rest
                if position >= self.size:
                    return
                # Without a length, an end too early looks like an end.
                message = f"{self.what} ended after {position} of {self.size} bytes."
                raise Retry(ServiceUnavailable(message, remedy="Try again later."))  # noqa: TRY301 -- as if it broke
            except Retry as again:
                broken += 1
                if broken >= self.transport.attempts:
                    raise again.error(self.what) from again.__cause__
                _log.warning("taking up again", what=self.what, at=position, attempt=broken)

    def _opened(self, position: int, until: float | None) -> tuple[Body, int, float]:
        """Return the content from `position` on, how much of it comes before that, and when all has to be over."""

        def begin(limit: float) -> tuple[Body, int, float]:
            over = limit if until is None else min(limit, until)
            headers = {"Range": f"bytes={position}-"} if position else {}
            answer, body = self.transport.open(self.path, until=over, scopes=self.scopes, headers=headers)
            if body is None:
                raise self.refusal(answer)
            try:
                return body, position - self._start(answer, position), over
            except BaseException:
                body.close()
                raise

        return self.transport.retried(self.what, begin, size=self.size)

    def _start(self, answer: Answer, position: int) -> int:
        """Return where an answer's content begins: where it was asked to, or at the beginning."""
        if answer.is_page:
            raise self.refusal(answer)
        if answer.status == HTTPStatus.OK:
            return 0
        if not answer.headers.get("Content-Range", "").startswith(f"bytes {position}-"):
            raise unexpected(self.what, "with another part than was asked for")
        return position


_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# These two keep method and body (RFC 9110, section 15.4); the others are for reading only.
_KEEPING = frozenset({307, 308})
_MOST_STEPS = 8
_READ = frozenset({"GET", "HEAD"})
_CONTENT = frozenset({HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT})
# A registry may take its time over a large blob before it answers.
_UPLOAD_TIMEOUT = httpx2.Timeout(60, connect=15, read=300)

Result = TypeVar("Result")
Origin = tuple[str, str, int | None]


class Transport:
    """Sends requests to one registry; may be used by several threads.

    Args:
        host: the registry, as references name it.
        client: pooled connections; follows no redirects and reads no environment.
        credentials: asked when the registry asks.
        insecure: hosts reached over plain HTTP beside this machine's own.
        policy: how long to try.
    """

    def __init__(
        self,
        host: str,
        *,
        client: httpx2.Client,
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
            host,
            credential=lambda: credentials.for_host(host),
            may_ask=self._allowed,
            send=lambda request: self._exchange(request, time.monotonic() + policy.deadline, MOST_JSON_BYTES),
        )

    @property
    def attempts(self) -> int:
        """How often something may be tried."""
        return self._policy.attempts

    @property
    def has_credential(self) -> bool:
        """Whether there is a credential for this registry, as far as it asked for one."""
        return self._authorizer.has_credential

    def retried(self, what: str, act: Callable[[float], Result], *, size: int = 0) -> Result:
        """Return what `act` returns, trying again as long as it may pass.

        Args:
            what: what is done and on what, the beginning of a sentence.
            act: does it with `send`; is given the time by which it has to be over.
            size: bytes that it moves.

        Raises:
            BuilderError: it did not pass.
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

        def exchange(url: httpx2.URL, authorization: str | None) -> Answer:
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

        def exchange(url: httpx2.URL, authorization: str | None) -> Answer:
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
        where: str | httpx2.URL,
        scopes: frozenset[str],
        exchange: Callable[[httpx2.URL, str | None], Answer],
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

    def location(self, answer: Answer) -> httpx2.URL:
        """Return the URL that an answer's Location header names: perhaps relative, perhaps at another host.

        Raises:
            ServiceUnavailable: there is none, or it is over plain HTTP where that is not allowed.
        """
        return self._joined(answer.url, answer.headers.get("Location", ""))

    def _joined(self, base: httpx2.URL, where: str | httpx2.URL) -> httpx2.URL:
        try:
            url = base.join(where) if where else None
        except (httpx2.InvalidURL, ValueError):
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

    def _allowed(self, url: httpx2.URL) -> bool:
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
        url: httpx2.URL,
        headers: Mapping[str, str] | None,
        authorization: str | None,
        body: Blob | None,
    ) -> httpx2.Request:
        fields = {"Accept-Encoding": "identity", **(headers or {})}
        if authorization:
            fields["Authorization"] = authorization
        if body is None:
            return self._client.build_request(method, url, headers=fields)
        fields["Content-Length"] = str(body.size)
        content = body.content if isinstance(body, BytesBlob) else verified(body)
        return self._client.build_request(method, url, headers=fields, content=content, timeout=_UPLOAD_TIMEOUT)

    def _exchange(self, request: httpx2.Request, until: float, limit: int) -> Answer:
        return whole_answer(sent(self._client, request, until), until, limit)

    def _origin(self) -> httpx2.URL:
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
                    self._base = httpx2.URL(f"{scheme}://{host}/")
                except httpx2.InvalidURL as error:
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
        except (httpx2.RemoteProtocolError, httpx2.ReadError):
            pass
        except httpx2.TransportError as error:
            raise failure(host, error) from error
        try:
            with self._client.stream("GET", f"https://{host}/v2/"):
                return "https"
        except httpx2.TransportError as error:
            return "https" if cause_of(error, ssl.SSLCertVerificationError) else "http"


def _followed(method: str, answer: Answer) -> bool:
    if "Location" not in answer.headers or answer.status not in _REDIRECTS:
        return False
    return method in _READ or answer.status in _KEEPING


def _origin(url: httpx2.URL) -> Origin:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)
