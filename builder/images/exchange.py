"""One request and its answer: in time, in bounds, and what fails as an error of ours."""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Iterator

import httpx

from builder.errors import InvalidSettings, ServiceUnavailable, cause_of, one_line
from builder.images.answers import Answer, unexpected
from builder.images.retry import Again, passes

_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"})


class Body:
    """The body of an answer, read once, piece by piece, as it was sent: nothing is decoded.

    Args:
        response: not read yet.
        until: when it has to be over, as of `time.monotonic`.
    """

    def __init__(self, response: httpx.Response, until: float) -> None:
        self._response, self._until = response, until

    def __iter__(self) -> Iterator[bytes]:
        """Yield the pieces.

        Raises:
            Again: the connection broke.
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


class _Timed(httpx.SyncByteStream):
    """A request's body that ends when the time is over."""

    def __init__(self, stream: httpx.SyncByteStream, name: str, until: float) -> None:
        self._stream, self._name, self._until = stream, name, until

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            _in_time(self._name, self._until)
            yield chunk


def sent(client: httpx.Client, request: httpx.Request, until: float) -> httpx.Response:
    """Return the response to a request, its body not read yet.

    Args:
        client: follows no redirects.
        request: its body ends with an error when the time is over.
        until: when that is, as of `time.monotonic`.

    Raises:
        Again: there was none.
        BuilderError: TLS cannot be made.
    """
    name = _host(request)
    if not isinstance(request.stream, httpx.ByteStream) and isinstance(request.stream, httpx.SyncByteStream):
        request.stream = _Timed(request.stream, name, until)
    with _ours(name):
        return client.send(request, stream=True)


def _host(request: httpx.Request) -> str:
    return request.url.netloc.decode("ascii", "replace")


@contextlib.contextmanager
def _ours(name: str, *, answered: bool = False) -> Iterator[None]:
    """Turn what fails on the way to or from the host `name`, before or after its answer began, into errors of ours."""
    try:
        yield
    except httpx.TransportError as error:
        raise failure(name, error, answered=answered) from error
    except (httpx.InvalidURL, httpx.DecodingError) as error:
        raise unexpected(request_to(name), "in a form that HTTP does not have") from error


def whole_answer(response: httpx.Response, until: float, limit: int) -> Answer:
    """Return a response with its body.

    Args:
        response: not read yet; it is closed.
        until: when it has to be over, as of `time.monotonic`.
        limit: bytes that the body may have.

    Raises:
        Again: it broke off, or says what may be otherwise later.
        ServiceUnavailable: the body is too large, or it took too long.
    """
    name = _host(response.request)
    with _ours(name, answered=True), contextlib.closing(response):
        content = b"".join(_bounded(response, name, until, limit))
    answer = answer_of(response, content)
    if passes(answer.status):
        raise Again(answer)
    return answer


def answer_of(response: httpx.Response, content: bytes) -> Answer:
    """Return a response whose body is `content`, as far as it was read."""
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


def failure(name: str, error: httpx.TransportError, *, answered: bool = False) -> Exception:
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
    return Again(
        ServiceUnavailable(
            f"Registry {name} cannot be reached: {said}.",
            remedy="See that its name is right, that it runs, and that the network and proxy settings lead to it.",
        ),
        unanswered=not answered and isinstance(error, httpx.ReadTimeout),
    )
