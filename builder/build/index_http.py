"""Requests to package indexes: over pooled connections, with the credential of their origin and of no other."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from builder import __version__
from builder.build.address import linked, origin_of
from builder.build.indexes import Indexes
from builder.errors import InvalidSettings, PermissionRefused, ServiceUnavailable, cause_of, one_line
from builder.images.hosts import proxy_for
from builder.images.retry import Again, passes, retry_after

ABSENT = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
_TIMEOUT = httpx.Timeout(60, connect=15)
_LIMITS = httpx.Limits(max_connections=24, max_keepalive_connections=24, keepalive_expiry=30)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_STEPS = 6
_CHUNK = 1 << 18
_REFUSED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
_REMEDY = "See that its address is right and that the network and proxy settings lead to it, or try again later."


class Session:
    """Sends GET requests; may be used by several threads.

    Args:
        indexes: their credentials, CA bundle and proxies.
    """

    def __init__(self, indexes: Indexes) -> None:
        self._indexes = indexes
        for name in ("httpx", "httpcore"):
            # They log whole URLs, and that of a redirect may be signed.
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = httpx.Client(
            transport=_Routes(indexes),
            trust_env=False,
            follow_redirects=False,
            timeout=_TIMEOUT,
            headers={"User-Agent": f"model-image-builder/{__version__}", "Accept-Encoding": "gzip"},
        )

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    @contextmanager
    def answer(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """Yield the answer to a GET after redirects; the credential goes to its own origin and nowhere else.

        Where the first address is not at an origin of the settings, a redirect to another origin gets none at all: its
        server would otherwise say what is asked elsewhere with our credential.

        Raises:
            Later: there was none, in a way that may pass.
            ServiceUnavailable, InvalidSettings: there was none, or a redirect that is not followed.
        """
        begun, own = origin_of(url), self._indexes.is_settings_own(url)
        for _ in range(_MOST_STEPS):
            self._indexes.check(url)
            credential = self._indexes.credential(url) if own or origin_of(url) == begun else None
            auth = httpx.BasicAuth(*credential) if credential else None
            try:
                request = self._client.build_request("GET", url, headers=dict(headers))
                response = self._client.send(request, stream=True, auth=auth)
            except httpx.TransportError as error:
                raise _failure(url, error, unanswered=isinstance(error, httpx.ReadTimeout)) from error
            except (httpx.InvalidURL, ValueError) as error:
                raise strange(url, "with an address that is none") from error
            try:
                if response.status_code not in _REDIRECTS or "Location" not in response.headers:
                    yield response
                    return
                target = linked(str(response.url), response.headers["Location"])
            finally:
                response.close()
            if target is None or urlsplit(target).scheme not in {"https", urlsplit(url).scheme}:
                raise strange(url, "with a redirect away from https, or to an address that can be read in two ways")
            url = target
        raise strange(url, "with too many redirects")


class Later(Again):
    """An attempt failed in a way that may pass.

    Args:
        error: for when it does not.
        seconds: that the server asks to wait; None where it does not say.
        unanswered: as for `Again`.
    """

    def __init__(self, error: ServiceUnavailable, seconds: float | None = None, *, unanswered: bool = False) -> None:
        super().__init__(error, unanswered=unanswered)
        self._seconds = seconds

    @property
    def retry_after(self) -> float | None:
        """The seconds that the server asks to wait."""
        return self._seconds


class _Routes(httpx.BaseTransport):
    """Sends each request directly, or through the proxy that the settings name for its host."""

    def __init__(self, indexes: Indexes) -> None:
        self._indexes = indexes
        self._lock = threading.Lock()
        self._transports: dict[tuple[str, bool], httpx.HTTPTransport] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        port = url.port or (443 if url.scheme == "https" else 80)
        proxy = proxy_for(url.scheme, url.host, port, self._indexes.proxies)
        return self._through(proxy, self._indexes.trusts(url.netloc.decode("ascii", "replace"))).handle_request(request)

    def _through(self, proxy: str, trusted: bool) -> httpx.HTTPTransport:
        with self._lock:
            if (proxy, trusted) not in self._transports:
                context = _context(self._indexes.ca_bundle, trusted)
                self._transports[proxy, trusted] = httpx.HTTPTransport(
                    verify=context, trust_env=False, limits=_LIMITS, proxy=_proxy(proxy) if proxy else None
                )
            return self._transports[proxy, trusted]

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()


def _proxy(address: str) -> httpx.Proxy:
    try:
        return httpx.Proxy(address if "://" in address else f"http://{address}")
    except (ValueError, httpx.InvalidURL):
        # The address may hold a password, so neither it nor the cause is shown.
        message = "HTTP_PROXY or HTTPS_PROXY is not the address of a proxy that can be used."
        raise InvalidSettings(message, remedy="It is a URL such as http://proxy.example.com:3128.") from None


def _context(bundle: Path | None, trusted: bool) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(bundle) if bundle else None)
    except (OSError, ssl.SSLError) as error:
        message = f"{str(bundle)!r} holds no certificates that can be read."
        raise InvalidSettings(message, remedy="SSL_CERT_FILE is a file of authorities to trust, in PEM.") from error
    if trusted:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def chunks(url: str, answer: httpx.Response, *, decoded: bool = False) -> Iterator[bytes]:
    """Yield an answer's body, as it came or unpacked.

    Raises:
        Later: the connection broke.
        ServiceUnavailable: it does not unpack.
    """
    try:
        yield from answer.iter_bytes(_CHUNK) if decoded else answer.iter_raw(_CHUNK)
    except httpx.TransportError as error:
        raise _failure(url, error) from error
    except httpx.DecodingError as error:
        raise strange(url, "with a body that does not unpack") from error


def check(url: str, answer: httpx.Response, what: str) -> None:
    """Raise what a status means that is not success.

    Args:
        url: what was asked.
        answer: the answer.
        what: what was asked for, in words.

    Raises:
        Later: it may pass.
        PermissionRefused: a credential is missing or wrong.
        ServiceUnavailable: it is any other.
    """
    status = answer.status_code
    if passes(status):
        raise Later(away(url, f"it answers HTTP {status}"), retry_after(answer.headers.get("Retry-After", "")))
    if status in _REFUSED:
        message = f"The package index at {host_of(url)} does not give {what} to us (HTTP {status})."
        remedy = "Put the credential into the index's address (PIP_INDEX_URL, UV_INDEX, pip.conf) or into netrc."
        raise PermissionRefused(message, remedy=remedy)
    if status not in {HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT}:
        raise strange(url, f"with HTTP {status} for {what}")


def _failure(url: str, error: httpx.TransportError, *, unanswered: bool = False) -> Exception:
    certificate = cause_of(error, ssl.SSLCertVerificationError)
    if certificate:
        why = one_line(certificate.verify_message, 200)
        message = f"The certificate of the package index at {host_of(url)} is not trusted: {why}."
        return InvalidSettings(message, remedy="Name a bundle with the authority that signed it in SSL_CERT_FILE.")
    return Later(away(url, one_line(str(error), 200) or type(error).__name__), unanswered=unanswered)


def away(url: str, why: str) -> ServiceUnavailable:
    """Return the error for an index that cannot be reached; `why` is a clause."""
    return ServiceUnavailable(f"The package index at {host_of(url)} cannot be reached: {why}.", remedy=_REMEDY)


def strange(url: str, how: str) -> ServiceUnavailable:
    """Return the error for an index that answers what it should not; `how` begins with `with`."""
    return ServiceUnavailable(f"The package index at {host_of(url)} answers {how}.", remedy=_REMEDY)


def host_of(url: str) -> str:
    """Return an address's host and port."""
    return urlsplit(url).netloc.rpartition("@")[2]
