"""Package indexes over HTTP: which files a project has, and the files themselves, verified while they are written."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from html.parser import HTMLParser
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import httpx2
from packaging.utils import canonicalize_name, parse_sdist_filename
from packaging.version import Version

from builder import __version__
from builder.errors import (
    BuildFailed,
    InvalidSettings,
    InvalidVersion,
    PermissionRefused,
    ServiceUnavailable,
    TryAgain,
    cause_of,
)
from builder.http import Retry, RetryPolicy, passes, proxy_for, retried, retry_after
from builder.masking import one_line
from builder.package_index.config import FIRST_INDEX, Indexes, IndexUrl, built_in_index
from builder.package_index.wheel_file import LockedWheel, parse_wheel_name
from builder.urls import linked, origin_of

ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_JSON = "application/vnd.pypi.simple.v1+json"
# Of a file; a wheel's name of some kB can stand for billions of tags.
_LONGEST_NAME = 255
_SHA256 = re.compile(r"(?:^|&)sha256=([0-9a-fA-F]{64})(?:&|$)")


class NoPage(ValueError):
    """A page is not in a form that an index answers with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexFile:
    """One file of a project, as an index lists it.

    Attributes:
        filename: its name.
        url: where it is; no credential.
        sha256: 64 hexadecimal digits; empty where the index does not say.
        size: in bytes; None where the index does not say.
        uploaded: when it was uploaded; None where the index does not say.
    """

    filename: str
    url: str
    sha256: str = ""
    size: int | None = None
    uploaded: datetime | None = None

    @property
    def release(self) -> tuple[str, Version] | None:
        """The project's normal name and the version, as the file's name has them; None where it has neither."""
        if len(self.filename) > _LONGEST_NAME:
            return None
        try:
            if self.filename.endswith(".whl"):
                return parse_wheel_name(self.filename)[:2]
            return parse_sdist_filename(self.filename)
        except ValueError:
            return None


def parse_page(content: bytes, media_type: str, url: str) -> tuple[IndexFile, ...]:
    """Return the files that a page lists, in its order; links that are not http are left out.

    Args:
        content: the page.
        media_type: of the answer, without parameters, lower-case.
        url: the page's own address, after redirects.

    Raises:
        NoPage: it is neither JSON of PEP 691 nor HTML.
    """
    if media_type in {_JSON, "application/json"}:
        return _from_json(content, url)
    if media_type in {"text/html", "application/vnd.pypi.simple.v1+html", "application/xhtml+xml"}:
        return _from_html(content.decode(errors="replace"), url)
    message = f"an answer of the type {media_type!r}"
    raise NoPage(message)


def _from_json(content: bytes, url: str) -> tuple[IndexFile, ...]:
    try:
        files = json.loads(content)["files"]
        found = [_from_entry(entry, url) for entry in files]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = "an answer that is not the JSON of PEP 691"
        raise NoPage(message) from error
    return tuple(file for file in found if file)


def _from_entry(entry: Any, url: str) -> IndexFile | None:  # JSON holds anything
    hashes, size, uploaded = entry.get("hashes") or {}, entry.get("size"), entry.get("upload-time")
    address = linked(url, entry["url"])
    if address is None:
        return None
    digest = str(hashes.get("sha256", "")).lower()
    return IndexFile(
        filename=str(entry["filename"]),
        url=address,
        sha256=digest if re.fullmatch(r"[0-9a-f]{64}", digest) else "",
        size=size if isinstance(size, int) and size >= 0 else None,
        uploaded=_moment(uploaded) if isinstance(uploaded, str) else None,
    )


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class _Links(HTMLParser):
    """Collects the links of a page, and the base that they are relative to."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.base = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if href and tag == "base" and not self.base:
            self.base = href
        elif href and tag == "a":
            self.links.append(href)


def _from_html(text: str, url: str) -> tuple[IndexFile, ...]:
    parser = _Links()
    parser.feed(text)
    base = (linked(url, parser.base) if parser.base else None) or url
    found = []
    for link in parser.links:
        address = linked(base, link)
        if address is None:
            continue
        digest = _SHA256.search(link.partition("#")[2])
        filename = unquote(urlsplit(address).path.rpartition("/")[2])
        found.append(IndexFile(filename=filename, url=address, sha256=digest[1].lower() if digest else ""))
    return tuple(found)


def of_project(files: tuple[IndexFile, ...], project: str) -> tuple[IndexFile, ...]:
    """Return the files whose names are of a project, by its normal name: a page may link those of several."""
    name = canonicalize_name(project)
    return tuple(file for file in files if (release := file.release) and release[0] == name)


ABSENT = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
_TIMEOUT = httpx2.Timeout(60, connect=15)
_LIMITS = httpx2.Limits(max_connections=24, max_keepalive_connections=24, keepalive_expiry=30)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_STEPS = 6
_REFUSED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
_REMEDY = "See that its address is right and that the network and proxy settings lead to it, or try again later."


class Session:
    """Sends GET requests; may be used by several threads.

    Args:
        indexes: their credentials, CA bundle and proxies.
    """

    def __init__(self, indexes: Indexes) -> None:
        self._indexes = indexes
        for name in ("httpx2", "httpcore2"):
            # They log whole URLs, and that of a redirect may be signed.
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = httpx2.Client(
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
    def answer(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
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
            auth = httpx2.BasicAuth(*credential) if credential else None
            try:
                request = self._client.build_request("GET", url, headers=dict(headers))
                response = self._client.send(request, stream=True, auth=auth)
            except httpx2.TransportError as error:
                raise _failure(url, error, unanswered=isinstance(error, httpx2.ReadTimeout)) from error
            except (httpx2.InvalidURL, ValueError) as error:
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


class Later(Retry):
    """An attempt failed in a way that may pass.

    Args:
        error: for when it does not.
        seconds: that the server asks to wait; None where it does not say.
        unanswered: as for `Retry`.
    """

    def __init__(self, error: ServiceUnavailable, seconds: float | None = None, *, unanswered: bool = False) -> None:
        super().__init__(error, unanswered=unanswered)
        self._seconds = seconds

    @property
    def retry_after(self) -> float | None:
        """The seconds that the server asks to wait."""
        return self._seconds


class _Routes(httpx2.BaseTransport):
    """Sends each request directly, or through the proxy that the settings name for its host."""

    def __init__(self, indexes: Indexes) -> None:
        self._indexes = indexes
        self._lock = threading.Lock()
        self._transports: dict[tuple[str, bool], httpx2.HTTPTransport] = {}

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        port = url.port or (443 if url.scheme == "https" else 80)
        proxy = proxy_for(url.scheme, url.host, port, self._indexes.proxies)
        return self._through(proxy, self._indexes.trusts(url.netloc.decode("ascii", "replace"))).handle_request(request)

    def _through(self, proxy: str, trusted: bool) -> httpx2.HTTPTransport:
        with self._lock:
            if (proxy, trusted) not in self._transports:
                context = _context(self._indexes.ca_bundle, trusted)
                self._transports[proxy, trusted] = httpx2.HTTPTransport(
                    verify=context, trust_env=False, limits=_LIMITS, proxy=_proxy(proxy) if proxy else None
                )
            return self._transports[proxy, trusted]

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()


def _proxy(address: str) -> httpx2.Proxy:
    try:
        return httpx2.Proxy(address if "://" in address else f"http://{address}")
    except (ValueError, httpx2.InvalidURL):
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


def chunks(url: str, answer: httpx2.Response, *, decoded: bool = False) -> Iterator[bytes]:
    """Yield an answer's body, as it came or unpacked.

    Raises:
        Later: the connection broke.
        ServiceUnavailable: it does not unpack.
    """
    try:
        yield from answer.iter_bytes(_CHUNK) if decoded else answer.iter_raw(_CHUNK)
    except httpx2.TransportError as error:
        raise _failure(url, error) from error
    except httpx2.DecodingError as error:
        raise strange(url, "with a body that does not unpack") from error


def check(url: str, answer: httpx2.Response, what: str) -> None:
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


def _failure(url: str, error: httpx2.TransportError, *, unanswered: bool = False) -> Exception:
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


_CHUNK = 1 << 18
# Of a wheel of which no index says the size; the largest that people install have two thirds of it.
_MOST_BYTES = 4 << 30

_PART = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")

# Told how many bytes have arrived since it was told last; fewer than none where a download begins again.
Progress = Callable[[int], None]


class WheelNotFound(BuildFailed):
    """No index has the wheel that a lock names."""


class WheelMismatch(BuildFailed):
    """What came under a wheel's name is not the wheel that the lock names."""


def save(
    session: Session,
    wheel: LockedWheel,
    file: IndexFile,
    destination: Path,
    *,
    policy: RetryPolicy,
    progress: Progress | None = None,
) -> None:
    """Write a wheel to `destination`, which appears when it is whole and verified.

    Args:
        session: makes requests.
        wheel: what it has to be.
        file: where it is.
        destination: the file; its folder is there.
        policy: how long to try.
        progress: told of bytes as they arrive.

    Raises:
        WheelNotFound, WheelMismatch: as their names say.
        ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had.
        TryAgain: the disk is full.
    """
    part = destination.with_name(f".{destination.name[:80]}.{uuid4().hex}.part")
    try:
        with _on_disk(wheel.filename), part.open("xb+", buffering=0) as content:
            size = file.size if file.size is not None else wheel.size
            target = _Target(wheel.filename, content, size=size, sha256=wheel.sha256, progress=progress)
            if file.url.startswith("file:"):
                _copy(file.url, target)
                target.finish()
            else:
                retried(
                    f"the download of {wheel.filename}",
                    lambda until: _receive(session, file.url, target, until),
                    policy=policy,
                    seconds=policy.seconds_for(target.size or 0),
                )
        part.replace(destination)
    finally:
        part.unlink(missing_ok=True)


def digest(session: Session, filename: str, url: str, *, policy: RetryPolicy) -> tuple[str, int]:
    """Return the SHA-256 (64 hexadecimal digits) and the size of a file, which is read for that and not kept.

    Raises:
        WheelNotFound, ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had.
    """
    with Path(os.devnull).open("rb+", buffering=0) as nowhere:
        target = _Target(filename, nowhere)
        if url.startswith("file:"):
            _copy(url, target)
        else:
            retried(f"reading {filename}", lambda until: _receive(session, url, target, until), policy=policy)
        return target.digest, target.written


def fetch(session: Session, filename: str, url: str, destination: Path, *, policy: RetryPolicy) -> None:
    """Write a file of which only the address is known to `destination`, which is not there yet.

    Raises:
        WheelNotFound, ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had.
        InvalidVersion: it is larger than any wheel.
        TryAgain: the disk is full.
    """
    with _on_disk(filename), destination.open("xb", buffering=0) as content:
        target = _Target(filename, content, most=_MOST_BYTES)
        retried(
            f"the download of {filename}",
            lambda until: _receive(session, url, target, until),
            policy=policy,
            seconds=policy.seconds_for(_MOST_BYTES >> 3),
        )


def tail(session: Session, filename: str, url: str, size: int) -> tuple[bytes, int]:
    """Return the last bytes of a file, at most `size`, and how many it has; asked for once.

    Raises:
        WheelNotFound: it is not there.
        ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had, or not in part.
    """
    if url.startswith("file:"):
        with _local(url, filename) as content:
            whole = os.fstat(content.fileno()).st_size
            content.seek(max(0, whole - size))
            return content.read(size), whole
    try:
        with session.answer(url, {"Accept-Encoding": "identity", "Range": f"bytes=-{size}"}) as answer:
            check(url, answer, filename)
            part = _PART.fullmatch(str(answer.headers.get("Content-Range", "")))
            if answer.status_code != HTTPStatus.PARTIAL_CONTENT or part is None:
                raise away(url, "it gives no part of a file")
            begin, end, whole = map(int, part.groups())
            received = bytearray()
            for chunk in chunks(url, answer):
                received += chunk
                if len(received) > size:
                    break
            if len(received) != end + 1 - begin or end + 1 != whole:
                raise away(url, "it sent another part than it was asked for")
            return bytes(received), whole
    except Later as error:
        failure = error.error(f"the end of {filename}")
        raise failure from error


def _receive(session: Session, url: str, target: _Target, until: float) -> None:
    """Receive the rest of a file.

    Raises:
        Retry: it broke off, in a way that may pass.
    """
    begun = target.written
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={begun}-"} if begun else {})}
    with session.answer(url, headers) as answer:
        status = answer.status_code
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            target.restart()
            raise Later(away(url, "it takes no ranges"))
        if status in ABSENT:
            message = f"{target.name} is not at the address that the package index gave (HTTP {status})."
            raise WheelNotFound(message, remedy="Try again, or make a new lock with --rebuild.")
        check(url, answer, target.name)
        if answer.headers.get("Content-Encoding", "identity").lower() not in {"identity", ""}:
            message = f"{host_of(url)} sends {target.name} in an encoding that it was not asked for."
            raise ServiceUnavailable(message, remedy="See what stands between this machine and the index.")
        if begun and (status != HTTPStatus.PARTIAL_CONTENT or not _continues(answer, begun)):
            target.restart()
            if status == HTTPStatus.PARTIAL_CONTENT:
                raise Later(away(url, "it sent another part than it was asked for"))
        for chunk in chunks(url, answer):
            target.write(chunk)
            if time.monotonic() > until:
                raise Later(away(url, "it is too slow"))
        # A body that ends early is an error of the connection where the length was told.
        if target.size is not None and target.written < target.size:
            raise Later(away(url, f"it ended {target.name} after {target.written:,} of {target.size:,} bytes"))
    target.finish()


class _Target:
    """A file on its way: hashed and counted as it is written."""

    def __init__(
        self,
        name: str,
        content: BinaryIO,
        *,
        size: int | None = None,
        sha256: str = "",
        most: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.name, self.size, self.written = name, size, 0
        self._most = most
        self._sha256, self._content, self._progress = sha256, content, progress
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """The SHA-256 of what was written."""
        return self._hash.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Add bytes.

        Raises:
            WheelMismatch: there are more than there should be.
            InvalidVersion: there are more than any wheel has.
        """
        self.written += len(chunk)
        if self._most is not None and self.written > self._most:
            message = f"The wheel {self.name} is larger than {self._most:,} bytes."
            raise InvalidVersion(message, remedy="Name another one in the model's requirements.")
        if self.size is not None and self.written > self.size:
            how = f"is larger than the {self.size:,} bytes that it should have"
            raise self._mismatch(how)
        self._hash.update(chunk)
        view = memoryview(chunk)
        while view:
            view = view[self._content.write(view) :]
        if self._progress:
            self._progress(len(chunk))

    def restart(self) -> None:
        """Forget what was written."""
        if self._progress:
            self._progress(-self.written)
        if self._content.seekable() and self.written:
            self._content.seek(0)
            self._content.truncate()
        self._hash, self.written = hashlib.sha256(), 0

    def finish(self) -> None:
        """Raise WheelMismatch unless what was written is the wheel."""
        if self.size is not None and self.written != self.size:
            how = f"has {self.written:,} bytes, not {self.size:,}"
            raise self._mismatch(how)
        if self._sha256 and self.digest != self._sha256:
            how = f"has the sha256 {self.digest}, not {self._sha256}"
            raise self._mismatch(how)

    def _mismatch(self, how: str) -> WheelMismatch:
        remedy = "Somebody or something changed it on its way; find out who before you publish. --rebuild makes a lock."
        return WheelMismatch(f"The wheel {self.name} is not the one of the lock: it {how}.", remedy=remedy)


def _copy(url: str, target: _Target) -> None:
    with _local(url, target.name) as content:
        while chunk := content.read(_CHUNK):
            target.write(chunk)


def _local(url: str, filename: str) -> BinaryIO:
    """Return the wheel at an address of a file, open for reading."""
    path = unquote(urlsplit(url).path)
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0)
    except OSError as error:
        message = f"The wheel {filename} cannot be read: {error.strerror}."
        raise WheelNotFound(message, remedy="Fetch the version again.") from error


@contextmanager
def _on_disk(filename: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"The wheel {filename} cannot be written: {error.strerror or error}."
        raise TryAgain(message, remedy="Free space in the temporary folder, or name a larger one in TMPDIR.") from error


def _continues(answer: httpx2.Response, begun: int) -> bool:
    return str(answer.headers.get("Content-Range", "")).replace(" ", "").startswith(f"bytes{begun}-")


_MOST_PAGE_BYTES = 64 << 20


class IndexClient:
    """Asks the indexes of one resolution, over one pool of connections; a context manager. For several threads.

    Args:
        indexes: who is asked, with which credential.
        policy: how long to try.
    """

    def __init__(self, indexes: Indexes, *, policy: RetryPolicy | None = None) -> None:
        self._indexes = indexes
        self._policy = policy or RetryPolicy()
        self._lock = threading.Lock()
        self._pages: dict[tuple[str, str], tuple[IndexFile, ...] | None] = {}
        self._session = Session(indexes)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._session.close()

    @property
    def asked(self) -> tuple[IndexUrl, ...]:
        """The indexes in the order in which they are asked, the built-in one named."""
        indexes = self._indexes
        if indexes.no_index:
            return indexes.find_links
        return (*indexes.extra, indexes.default or built_in_index(), *indexes.find_links)

    def files(self, project: str) -> tuple[IndexFile, ...]:
        """Return a project's files, as the resolver sees them: of the first index that has it, or of all.

        Args:
            project: the project's normal name.

        Raises:
            ServiceUnavailable, PermissionRefused, InvalidSettings: an index cannot be asked.
        """
        found: list[IndexFile] = []
        for index in self.asked:
            files = self.page(index, project)
            found += files or ()
            if files and self._indexes.strategy == FIRST_INDEX and index not in self._indexes.find_links:
                links = (self.page(link, project) or () for link in self._indexes.find_links)
                return (*found, *(file for files in links for file in files))
        return tuple(found)

    def page(self, index: IndexUrl, project: str) -> tuple[IndexFile, ...] | None:
        """Return a project's files in one index, or None where the index does not have it; asked once.

        Raises:
            ServiceUnavailable, PermissionRefused, InvalidSettings: the index cannot be asked.
        """
        links = index in self._indexes.find_links
        key = (index.url, "" if links else project)
        if key not in self._pages:
            if index.is_file:
                files: tuple[IndexFile, ...] | None = _folder(index)
            else:
                files = self._page(index.url if links else f"{index.url}/{project}/")
            with self._lock:
                self._pages[key] = files
        files = self._pages[key]
        if files and index.of_model:
            # Its links may lead to where a credential of ours would be sent, and the content into the author's image.
            files = tuple(file for file in files if self._is_own(index, file.url))
        return files if files is None else of_project(files, project)

    def is_of_this_machine(self, wheel: LockedWheel) -> bool:
        """Return whether a wheel is a file here that no find-links folder holds: resolvers follow a page's `file:`."""
        parts = urlsplit(wheel.url or "")
        if parts.scheme in {"http", "https"}:
            return False
        folder = Path(unquote(parts.path)).parent.resolve()
        return not any(link.is_file and link.folder.resolve() == folder for link in self._indexes.find_links)

    def is_listed(self, wheel: LockedWheel) -> bool:
        """Return whether an index may have said where a wheel is: one of a model may not say it of a place of ours.

        Raises:
            ServiceUnavailable, PermissionRefused, InvalidSettings: an index cannot be asked.
        """
        url = wheel.url or ""
        if not any(index.of_model for index in self.asked) or self._indexes.credential(url) is None:
            return True
        return any(
            origin_of(url) == origin_of(index.url)
            if index.of_model
            else any(
                file.filename == wheel.filename and origin_of(file.url) == origin_of(url)
                for file in self.page(index, wheel.name) or ()
            )
            for index in self.asked
        )

    def _is_own(self, index: IndexUrl, url: str) -> bool:
        return origin_of(url) == origin_of(index.url) or self._indexes.credential(url) is None

    def find(self, wheel: LockedWheel) -> IndexFile:
        """Return where a wheel is, and what the index says of it.

        Args:
            wheel: of a lock; asked nowhere if it has an address.

        Raises:
            WheelNotFound: no index has a file of this name and hash.
            ServiceUnavailable, PermissionRefused, InvalidSettings: an index cannot be asked.
        """
        if wheel.url is not None:
            return IndexFile(filename=wheel.filename, url=wheel.url, sha256=wheel.sha256, size=wheel.size)
        if wheel.origin != "index":
            message = f"The wheel {wheel.filename} is not from an index, and the model names it no more."
            raise WheelNotFound(message, remedy="Register the model again with its wheel.")
        named = False
        for index in self.asked:
            for file in self.page(index, wheel.name) or ():
                if file.filename == wheel.filename:
                    named = True
                    if file.sha256 in {wheel.sha256, ""}:
                        return file
        what = "has only another file of that name" if named else "does not have it"
        message = f"The wheel {wheel.filename} (sha256 {wheel.sha256[:12]}…) cannot be found: the package index {what}."
        remedy = "Configure the index that had it when the lock was made, or make a new lock with --rebuild."
        raise WheelNotFound(message, remedy=remedy)

    def download(self, wheel: LockedWheel, destination: Path, *, progress: Progress | None = None) -> None:
        """Write a wheel to `destination`, which appears when it is whole and verified.

        A download that breaks goes on where it broke, where the index can do that.

        Args:
            wheel: of a lock.
            destination: the file; its folder is there.
            progress: told of bytes as they arrive.

        Raises:
            WheelNotFound: it is not there.
            WheelMismatch: what came is larger or of another hash than the lock says.
            ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had.
            TryAgain: the disk is full.
        """
        try:
            file = self.find(wheel)
            save(self._session, wheel, file, destination, policy=self._policy, progress=progress)
        except WheelNotFound:
            if wheel.url is None or wheel.origin != "index":
                raise
            # The address came with a resolution; the index may have moved the file since.
            moved = wheel.model_copy(update={"url": None})
            file = self.find(moved)
            save(self._session, moved, file, destination, policy=self._policy, progress=progress)

    def tail(self, wheel: LockedWheel, size: int) -> tuple[bytes, int]:
        """Return the last bytes of a wheel, at most `size`, and how many it has; they are not verified.

        Raises:
            WheelNotFound, ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had, or not in part.
        """
        return tail(self._session, wheel.filename, self.find(wheel).url, size)

    def fetch(self, filename: str, url: str, destination: Path) -> None:
        """Write the wheel of an address, of which nothing is known, to `destination`.

        Args:
            filename: its name, for messages.
            url: where it is.
            destination: a file that is not there; its folder is.

        Raises:
            WheelNotFound, ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had.
            InvalidVersion: it is too large.
            TryAgain: the disk is full.
        """
        fetch(self._session, filename, url, destination, policy=self._policy)

    def digest(self, filename: str, url: str) -> tuple[str, int]:
        """Return the SHA-256 and the size of a file, which is read for that and not kept.

        Args:
            filename: its name, for messages.
            url: where it is.

        Raises:
            WheelNotFound, ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had.
        """
        return digest(self._session, filename, url, policy=self._policy)

    def _page(self, url: str) -> tuple[IndexFile, ...] | None:
        def ask(_until: float) -> tuple[IndexFile, ...] | None:
            with self._session.answer(url, {"Accept": ACCEPT}) as answer:
                if answer.status_code in ABSENT:
                    return None
                check(url, answer, "a project's page")
                content = bytearray()
                for chunk in chunks(url, answer, decoded=True):
                    content += chunk
                    if len(content) > _MOST_PAGE_BYTES:
                        raise strange(url, f"with more than {_MOST_PAGE_BYTES:,} bytes for a project's page")
                kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
                try:
                    return parse_page(bytes(content), kind, str(answer.url))
                except NoPage as error:
                    raise strange(url, f"with {error} for a project's page") from error

        return retried(f"a request to the package index {host_of(url)}", ask, policy=self._policy)


def _folder(index: IndexUrl) -> tuple[IndexFile, ...]:
    """Return the files of a folder; one that has gone has none."""
    folder = index.folder
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        message = f"The folder {str(folder)!r}, named as find-links, cannot be read: {error.strerror}."
        raise InvalidSettings(message, remedy="Make it readable, or name another.") from error
    return tuple(IndexFile(filename=path.name, url=path.as_uri(), size=path.stat().st_size) for path in files)
