"""One HTTP client for registries and package indexes: hosts, proxies, TLS, retries, resumed downloads."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import itertools
import logging
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlsplit

import httpx2

from builder import __version__, reference
from builder.errors import BuilderError, InvalidSettings, ServiceUnavailable, cause_of
from builder.log import get_logger
from builder.masking import one_line
from builder.reference import is_loopback, split

DOCKER_HUB = reference.DOCKER_HUB
# The host that serves Docker Hub's API, and the name under which Docker keeps its credential.
_DOCKER_HUB_API = "registry-1.docker.io"
DOCKER_HUB_KEY = "https://index.docker.io/v1/"
canonical = reference.canonical_host


def api_host(host: str) -> str:
    """Return the host, with its port, that serves a registry's API."""
    return _DOCKER_HUB_API if canonical(host) == DOCKER_HUB else host


def is_named(host: str, names: Iterable[str]) -> bool:
    """Return whether `names` holds `host`, with its port or without."""
    name, _ = split(host)
    return any(host.lower() == entry.lower() or entry.lower() == name for entry in names)


def proxy_for(scheme: str, name: str, port: int, proxies: Mapping[str, str]) -> str:
    """Return the URL of the proxy to reach a host through; empty for a direct connection.

    NO_PROXY's entries are hosts, domains (with or without a leading dot, and all below them), addresses and networks,
    each perhaps with a port, or `*` for everything. This machine is never reached through a proxy.

    Args:
        scheme: `http` or `https`.
        name: the host's name or address, without brackets.
        port: the port.
        proxies: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, those that are set.
    """
    if is_loopback(f"[{name}]" if ":" in name else name):
        return ""
    if any(_excepts(entry.strip().lower(), name.lower(), port) for entry in proxies.get("NO_PROXY", "").split(",")):
        return ""
    return proxies.get("HTTPS_PROXY" if scheme == "https" else "HTTP_PROXY", "")


def _excepts(entry: str, name: str, port: int) -> bool:
    if not entry:
        return False
    if entry == "*":
        return True
    try:
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        pass
    else:
        try:
            return ipaddress.ip_address(name) in network
        except ValueError:
            return False
    domain, entry_port = split(entry)
    if entry_port and entry_port != str(port):
        return False
    domain = domain.removeprefix("*").lstrip(".")
    return name == domain or name.endswith(f".{domain}")


_log = get_logger("http")
# A server that does not implement a request does not implement it later either.
_FINAL = frozenset({HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.HTTP_VERSION_NOT_SUPPORTED})

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how long a request is tried.

    Attributes:
        attempts: how often a request is made at most.
        first: seconds before the second attempt; they double with each further one, and some chance is added.
        longest: seconds between two attempts at most; a server's Retry-After is heard up to this.
        deadline: seconds for an operation with all its attempts, unless it is of a large file.
        unanswered: how often a request is made at most that is accepted and not answered at all.
        slowest: bytes per second below which the transfer of a large file is given up.
        sleep: waits for some seconds.
    """

    attempts: int = 6
    first: float = 0.5
    longest: float = 60
    deadline: float = 300
    unanswered: int = 2
    slowest: float = 100_000
    sleep: Callable[[float], None] = time.sleep

    def seconds_for(self, size: int) -> float:
        """Return the seconds that an operation on `size` bytes may take, with all its attempts."""
        return self.deadline + size / self.slowest

    def pause(self, attempt: int, wanted: float | None = None) -> float:
        """Return the seconds to wait after an attempt, counted from 1; `wanted` is what the server asks for."""
        if wanted is None:
            return min(self.first * 2.0 ** (attempt - 1), self.longest) + random.uniform(0, self.first)  # noqa: S311
        return min(wanted, self.longest)


class Retry(Exception):
    """An attempt failed in a way that may pass; `retried` turns it into its error when no attempt is left.

    Args:
        error: that error, or a function that makes it of what was done: the beginning of a sentence.
        retry_after: the seconds that the server asks to wait; None where it does not say.
        unanswered: whether the request was accepted, and an answer did not begin in time.
    """

    def __init__(
        self,
        error: BuilderError | Callable[[str], BuilderError],
        *,
        retry_after: float | None = None,
        unanswered: bool = False,
    ) -> None:
        super().__init__("an attempt failed")
        self._error = error
        self.retry_after = retry_after
        self.unanswered = unanswered

    def error(self, what: str) -> BuilderError:
        """Return the error for when no attempt is left; `what` is the beginning of a sentence."""
        return self._error if isinstance(self._error, BuilderError) else self._error(what)


def is_transient(status: int) -> bool:
    """Return whether the same request may have another answer than `status` later."""
    server_error = status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _FINAL
    return server_error or status == HTTPStatus.TOO_MANY_REQUESTS


def retry_after(value: str) -> float | None:
    """Return the seconds that a Retry-After header (RFC 9110, section 10.2.3) asks to wait; None if it is malformed."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        moment = parsedate_to_datetime(value)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None


def retried(what: str, act: Callable[[float], Result], *, policy: RetryPolicy, seconds: float | None = None) -> Result:
    """Return what `act` returns, trying again while it raises `Retry`.

    Args:
        what: what is done and on what, the beginning of a sentence for the log and the error.
        act: does it; its argument is the time, as of `time.monotonic`, at which it has to end.
        policy: how often and how long to try.
        seconds: for all attempts together, where it is not `policy.deadline`.

    Raises:
        BuilderError: no attempt succeeded.
    """
    until = time.monotonic() + (policy.deadline if seconds is None else seconds)
    unanswered = 0
    for attempt in itertools.count(1):
        try:
            return act(until)
        except Retry as failure:
            unanswered += failure.unanswered
            error, pause = failure.error(what), policy.pause(attempt, failure.retry_after)
            over = attempt >= policy.attempts or unanswered >= policy.unanswered
            if over or time.monotonic() + pause >= until:
                raise error from failure.__cause__
        _log.warning("trying again", what=what, why=error.what, attempt=attempt, seconds=round(pause, 1))
        policy.sleep(pause)
    raise AssertionError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKind:
    """What errors say of the servers of a client.

    Attributes:
        name: what they are: `registry`.
        unreachable: what to do where one cannot be reached.
        unexpected: what to do where one answers what none of them should.
        plain: what to do where one speaks plain HTTP on purpose; `{host}` is its host.
    """

    name: str
    unreachable: str
    unexpected: str
    plain: str

    def unreachable_error(self, host: str, why: str) -> ServiceUnavailable:
        """Return the error for a server that cannot be reached; `why` is a clause."""
        return ServiceUnavailable(f"The {self.name} at {host} cannot be reached: {why}.", remedy=self.unreachable)

    def unexpected_error(self, host: str, detail: str) -> ServiceUnavailable:
        """Return the error for an answer that no such server gives; `detail` says `with` what."""
        return ServiceUnavailable(f"The {self.name} at {host} answered {detail}.", remedy=self.unexpected)


_TIMEOUT = httpx2.Timeout(60, connect=15)
_LIMITS = httpx2.Limits(max_connections=32, max_keepalive_connections=24, keepalive_expiry=30)
_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Closing:
    """A context manager that closes itself."""

    def close(self) -> None:
        """Give back what is open."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


class Client(Closing):
    """Pooled connections to servers of one kind; a context manager that closes them. For several threads.

    It follows no redirect, keeps no cookie, and reads nothing of the environment.

    Args:
        kind: what errors say of the servers.
        ca_bundle: file of the authorities to trust, in PEM; None for the system's.
        proxies: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, those that are set.
        trusts: whether a host, perhaps with its port, is believed without a certificate.

    Raises:
        InvalidSettings: the bundle or the address of a proxy cannot be used.
    """

    def __init__(
        self,
        kind: ServerKind,
        *,
        ca_bundle: Path | None = None,
        proxies: Mapping[str, str] | None = None,
        trusts: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.kind = kind
        for name in ("httpx2", "httpcore2"):
            # They log whole URLs, and that of a redirect may be signed.
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = httpx2.Client(
            transport=_Routes(ca_bundle, dict(proxies or {}), trusts),
            trust_env=False,
            follow_redirects=False,
            timeout=_TIMEOUT,
            headers={"User-Agent": f"model-image-builder/{__version__}", "Accept-Encoding": "identity"},
        )
        self._client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))

    def send(
        self,
        method: str,
        url: str | httpx2.URL,
        *,
        until: float,
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[bytes] | None = None,
        basic: tuple[str, str] | None = None,
        timeout: httpx2.Timeout | None = None,
    ) -> Response:
        """Return the answer to a request, its body not read yet.

        Args:
            method: HTTP's.
            url: whole.
            until: when everything has to be over, as of `time.monotonic`.
            headers: of the request; a body that is not bytes needs its Content-Length.
            body: of the request.
            basic: user and password for basic authentication.
            timeout: of each step, where it is not the usual one.

        Raises:
            Retry: there was no answer.
            BuilderError: there is no hope for one: a certificate that is not trusted, an address that is malformed.
        """
        host = urlsplit(str(url)).netloc.rpartition("@")[2]
        deadline = _Deadline(host, until)
        content = body if body is None or isinstance(body, bytes) else deadline.enforced(body)
        try:
            request = self._client.build_request(
                method, url, headers=headers, content=content, timeout=timeout or _TIMEOUT
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise self.kind.unexpected_error(host, "with a malformed address") from error
        with self.errors(host):
            return Response(self, self._client.send(request, stream=True, auth=basic), deadline)

    @contextlib.contextmanager
    def errors(self, host: str, *, answered: bool = False) -> Iterator[None]:
        """Turn what fails between here and `host`, before or after its answer began, into errors of ours."""
        try:
            yield
        except httpx2.TransportError as error:
            raise self._failure(host, error, answered=answered) from error
        except (httpx2.InvalidURL, httpx2.DecodingError) as error:
            raise self.kind.unexpected_error(host, "in a form that HTTP does not have") from error

    def _failure(self, host: str, error: httpx2.TransportError, *, answered: bool) -> Exception:
        certificate = cause_of(error, ssl.SSLCertVerificationError)
        if certificate:
            why = one_line(certificate.verify_message, 200)
            message = f"The certificate of the {self.kind.name} at {host} is not trusted: {why}."
            remedy = "Name a bundle with the authority that signed it in SSL_CERT_FILE, or renew the certificate."
            return InvalidSettings(message, remedy=remedy)
        tls = cause_of(error, ssl.SSLError)
        if tls and tls.reason in _NOT_TLS:
            message = f"The {self.kind.name} at {host} does not speak TLS."
            return InvalidSettings(message, remedy=self.kind.plain.format(host=host))
        return Retry(
            self.kind.unreachable_error(host, one_line(str(error), 200) or type(error).__name__),
            unanswered=not answered and isinstance(error, httpx2.ReadTimeout),
        )

    def close(self) -> None:
        """Close all connections."""
        self._client.close()


class Response(Closing):
    """The answer to a request, its body not read yet; a context manager that closes it.

    Args:
        client: asked.
        response: as it came.
        deadline: when the body has to be read.
    """

    def __init__(self, client: Client, response: httpx2.Response, deadline: _Deadline) -> None:
        self._client, self._response, self._deadline = client, response, deadline
        self.status = response.status_code
        self.headers = response.headers
        self.url = response.request.url
        self.host = deadline.host
        self._content: bytes | None = None

    @property
    def media_type(self) -> str:
        """The media type of the body, without parameters, lower-case."""
        return str(self.headers.get("Content-Type", "")).partition(";")[0].strip().lower()

    @property
    def is_redirect(self) -> bool:
        """Whether it names another place to ask."""
        return self.status in _REDIRECTS and "Location" in self.headers

    @property
    def retry_after(self) -> float | None:
        """The seconds that the server asks to wait; None where it does not say."""
        return retry_after(self.headers.get("Retry-After", ""))

    @property
    def version(self) -> str:
        """What the server says to tell versions of a file apart; empty where it says nothing."""
        return str(self.headers.get("ETag") or self.headers.get("Last-Modified") or "")

    def starts_at(self, position: int) -> bool:
        """Return whether it is the part of a file that begins at `position`."""
        part = str(self.headers.get("Content-Range", "")).replace(" ", "")
        return self.status == HTTPStatus.PARTIAL_CONTENT and part.startswith(f"bytes{position}-")

    def chunks(self, *, decoded: bool = False) -> Iterator[bytes]:
        """Yield the body piece by piece, as it was sent or without its Content-Encoding.

        Raises:
            Retry: the connection broke.
            ServiceUnavailable: it took too long, or cannot be decoded.
        """
        with self._client.errors(self.host, answered=True):
            for chunk in self._response.iter_bytes() if decoded else self._response.iter_raw():
                self._deadline.check()
                yield chunk

    def content(self, limit: int) -> bytes:
        """Return the whole body without its Content-Encoding, which is closed and kept.

        Raises:
            Retry: the connection broke.
            ServiceUnavailable: it has more than `limit` bytes, took too long, or cannot be decoded.
        """
        if self._content is None:
            content = bytearray()
            with self:
                for chunk in self.chunks(decoded=True):
                    content += chunk
                    if len(content) > limit:
                        raise self._client.kind.unexpected_error(self.host, f"with more than {limit:,} bytes")
            self._content = bytes(content)
        return self._content

    def close(self) -> None:
        """Give the connection back; one that was not read to its end is closed."""
        self._response.close()


class _Deadline:
    """When a request to `host` has to be over, as of `time.monotonic`."""

    def __init__(self, host: str, until: float) -> None:
        self.host = host
        self._begun, self._until = time.monotonic(), until

    def check(self) -> None:
        now = time.monotonic()
        if now > self._until:
            message = f"Request to {self.host} timed out after {now - self._begun:.0f} s."
            raise ServiceUnavailable(message, remedy="Check the network, or retry later.")

    def enforced(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.check()
            yield chunk


def resumed(
    what: str,
    open_at: Callable[[int, float], tuple[Response, int]],
    *,
    policy: RetryPolicy,
    size: int | None,
    seconds: float,
    verified: bool,
) -> Iterator[bytes]:
    """Yield a file's bytes. A connection that breaks is taken up where it broke, as often as a request may be tried.

    Args:
        what: what is done and on what, the beginning of a sentence.
        open_at: asks for the bytes from a position on, with a time at which all has to be over; gives the answer, and
            where its content begins: 0 where the server knows no ranges.
        policy: how often to try.
        size: bytes that the file has; None where that is not known.
        seconds: for all of it.
        verified: whether its hash is checked afterwards; if not, a file that changes on the way is refused here.

    Raises:
        BuilderError: it cannot be had.
    """
    position, broken, until = 0, 0, time.monotonic() + seconds
    version: str | None = None
    while True:
        begun = position
        response, start = retried(
            what,
            lambda limit: open_at(begun, min(limit, until)),  # noqa: B023 -- called before the loop goes on
            policy=policy,
            seconds=until - time.monotonic(),
        )
        skipped = position - start
        try:
            with response:
                if not verified and version not in {None, response.version}:
                    message = f"{what} broke off, and the file changed meanwhile."
                    raise ServiceUnavailable(message, remedy="Retry later.")
                version = response.version
                for chunk in response.chunks():
                    rest = chunk[skipped:]
                    skipped -= len(chunk) - len(rest)
                    position += len(rest)
                    if rest:
                        yield rest
            if size is None or position >= size:
                return
            # Without a length, an end too early looks like an end.
            message = f"{what} ended after {position:,} of {size:,} bytes."
            raise Retry(ServiceUnavailable(message, remedy="Retry later."))  # noqa: TRY301 -- as if it broke
        except Retry as failure:
            broken += 1
            if broken >= policy.attempts:
                raise failure.error(what) from failure.__cause__
            _log.warning("resuming", what=what, at=position, attempt=broken)
            if position == begun:
                policy.sleep(policy.pause(broken))


class _Routes(httpx2.BaseTransport):
    """Sends each request directly, or through the proxy that the settings name for its host."""

    def __init__(self, ca_bundle: Path | None, proxies: Mapping[str, str], trusts: Callable[[str], bool]) -> None:
        self._ca_bundle, self._proxies, self._trusts = ca_bundle, proxies, trusts
        self._lock = threading.Lock()
        self._transports: dict[tuple[str, bool], httpx2.HTTPTransport] = {}
        for address in ("", *(proxies[name] for name in ("HTTP_PROXY", "HTTPS_PROXY") if proxies.get(name))):
            self._through(address, trusted=False)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        port = url.port or (443 if url.scheme == "https" else 80)
        proxy = proxy_for(url.scheme, url.host, port, self._proxies)
        trusted = self._trusts(url.netloc.decode("ascii", "replace"))
        return self._through(proxy, trusted=trusted).handle_request(request)

    def _through(self, proxy: str, *, trusted: bool) -> httpx2.HTTPTransport:
        with self._lock:
            if (proxy, trusted) not in self._transports:
                authorities = _authorities(self._ca_bundle)
                self._transports[proxy, trusted] = httpx2.HTTPTransport(
                    # A context of our own, so httpx2 looks for no authorities by itself.
                    verify=_unverified() if trusted else authorities,
                    trust_env=False,
                    limits=_LIMITS,
                    # The settings trust the host behind the proxy; the proxy may be sent a password, so it is verified.
                    proxy=_proxy(proxy, authorities) if proxy else None,
                )
            return self._transports[proxy, trusted]

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()


def _proxy(address: str, context: ssl.SSLContext) -> httpx2.Proxy:
    try:
        url = httpx2.URL(address if "://" in address else f"http://{address}")
        if url.scheme in {"http", "https"} and re.fullmatch(r"[A-Za-z0-9._:-]+", url.host):
            return httpx2.Proxy(url, ssl_context=context if url.scheme == "https" else None)
    except (ValueError, httpx2.InvalidURL):
        pass
    # The address may hold a password, so neither it nor the cause is shown.
    message = "HTTP_PROXY or HTTPS_PROXY is not the address of a proxy that can be used."
    raise InvalidSettings(message, remedy="Give it as a URL such as http://proxy.example.com:3128.")


@functools.lru_cache(maxsize=4)
def _authorities(bundle: Path | None) -> ssl.SSLContext:
    """Return what connections trust; it is kept because reading the authorities takes 30 ms.

    Without a bundle these are OpenSSL's default paths, or what SSL_CERT_FILE and SSL_CERT_DIR name in their place.
    """
    try:
        return ssl.create_default_context(cafile=str(bundle) if bundle else None)
    except (OSError, ssl.SSLError) as error:
        message = f"SSL_CERT_FILE is {str(bundle)!r}, which holds no certificates that can be read."
        raise InvalidSettings(message, remedy="Name a file of the authorities to trust, in PEM.") from error


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
