"""Find the files of a project in package indexes, and download them, verified while they are written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from html.parser import HTMLParser
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from packaging.utils import canonicalize_name, parse_sdist_filename
from packaging.version import Version

from builder.errors import BuildFailed, InvalidSettings, InvalidVersion, PermissionRefused, ServiceUnavailable, TryAgain
from builder.http import Client, Response, Retry, RetryPolicy, ServerKind, is_transient, resumed, retried
from builder.package_index import FIRST_INDEX, Indexes, IndexUrl, built_in_index
from builder.package_index.wheel_file import LockedWheel, parse_wheel_name
from builder.urls import linked, origin_of

_REMEDY = "Check that its address is right and that the network and proxy settings lead to it, or retry later."
INDEX = ServerKind(
    name="package index",
    unreachable=_REMEDY,
    unexpected=_REMEDY,
    plain="If that is intended, write its address with http, and name {host} in PIP_TRUSTED_HOST.",
)
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_JSON = "application/vnd.pypi.simple.v1+json"
# The largest project of PyPI has some 20,000 files; each link takes time to check.
_MOST_FILES = 200_000
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
        if len(files) > _MOST_FILES:
            raise _too_many()
        found = [_from_entry(entry, url) for entry in files]
    except NoPage:
        raise
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


def _too_many() -> NoPage:
    return NoPage(f"more than {_MOST_FILES:,} files")


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
            if len(self.links) > _MOST_FILES:
                raise _too_many()


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


_ABSENT = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.GONE})
_REFUSED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
_MOST_STEPS = 6
_MOST_PAGE_BYTES = 64 << 20
# Of a wheel of which no index says the size; the largest that people install have two thirds of it.
_MOST_BYTES = 4 << 30
_CHUNK = 1 << 18
_PART = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")

# Called with the number of bytes that have arrived since the last call.
Progress = Callable[[int], None]


class WheelNotFound(BuildFailed):
    """No index has the wheel that a lock names."""


class WheelMismatch(BuildFailed):
    """What came under a wheel's name is not the wheel that the lock names."""


class _Target:
    """A file that is being downloaded: hashed and counted as it is written.

    Args:
        name: the file's, for messages.
        content: where it is written.
        size: that it has to have; None where that is not known.
        sha256: that it has to have; empty where that is not known.
        most: bytes that it may have; None for any number.
        progress: called as bytes arrive.
    """

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
    def is_verified(self) -> bool:
        """Whether it is known which hash it has to have."""
        return bool(self._sha256)

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

    def finish(self) -> None:
        """Raise WheelMismatch unless what was written is the wheel."""
        if self.size is not None and self.written != self.size:
            how = f"has {self.written:,} bytes, not {self.size:,}"
            raise self._mismatch(how)
        if self._sha256 and self.digest != self._sha256:
            how = f"has the sha256 {self.digest}, not {self._sha256}"
            raise self._mismatch(how)

    def _mismatch(self, how: str) -> WheelMismatch:
        message = f"The wheel {self.name} is not the one of the lock: it {how}."
        remedy = "It was changed on its way. Find out by whom before you publish; --rebuild makes a new lock."
        return WheelMismatch(message, remedy=remedy)


@contextmanager
def _on_disk(filename: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"The wheel {filename} cannot be written: {error.strerror or error}."
        raise TryAgain(message, remedy="Free space in the temporary folder, or name a larger one in TMPDIR.") from error


def _local(url: str, filename: str) -> BinaryIO:
    """Return the wheel at an address of a file, open for reading."""
    path = unquote(urlsplit(url).path)
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0)
    except OSError as error:
        message = f"The wheel {filename} cannot be read: {error.strerror}."
        raise WheelNotFound(message, remedy="Fetch the version again.") from error


def _check(response: Response, what: str) -> None:
    """Raise what a status means that is not success; `what` was requested, in words."""
    status = response.status
    if is_transient(status):
        error = INDEX.unreachable_error(response.host, f"it answers HTTP {status}")
        raise Retry(error, retry_after=response.retry_after)
    if status in _REFUSED:
        message = f"The package index at {response.host} refuses {what} (HTTP {status})."
        remedy = "Put the credential into the index's address (PIP_INDEX_URL, UV_INDEX, pip.conf) or into netrc."
        raise PermissionRefused(message, remedy=remedy)
    if status not in {HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT}:
        raise INDEX.unexpected_error(response.host, f"with HTTP {status} for {what}")


class IndexClient(Client):
    """The indexes of one resolution, over one pool of connections; a context manager. For several threads.

    Args:
        indexes: where to look, and with which credential.
        policy: how often and how long to try.
    """

    def __init__(self, indexes: Indexes, *, policy: RetryPolicy | None = None) -> None:
        self._indexes = indexes
        self._policy = policy or RetryPolicy()
        self._lock = threading.Lock()
        self._pages: dict[tuple[str, str], tuple[IndexFile, ...] | None] = {}
        super().__init__(INDEX, ca_bundle=indexes.ca_bundle, proxies=indexes.proxies, trusts=indexes.trusts)

    @property
    def search_order(self) -> tuple[IndexUrl, ...]:
        """The indexes in the order in which they are searched, the built-in one named."""
        indexes = self._indexes
        if indexes.no_index:
            return indexes.find_links
        return (*indexes.extra, indexes.default or built_in_index(), *indexes.find_links)

    def files(self, project: str) -> tuple[IndexFile, ...]:
        """Return a project's files, as the resolver sees them: of the first index that has it, or of all.

        Args:
            project: the project's normal name.

        Raises:
            ServiceUnavailable, PermissionRefused, InvalidSettings: an index cannot be queried.
        """
        found: list[IndexFile] = []
        for index in self.search_order:
            files = self.page(index, project)
            found += files or ()
            if files and self._indexes.strategy == FIRST_INDEX and index not in self._indexes.find_links:
                links = (self.page(link, project) or () for link in self._indexes.find_links)
                return (*found, *(file for files in links for file in files))
        return tuple(found)

    def page(self, index: IndexUrl, project: str) -> tuple[IndexFile, ...] | None:
        """Return a project's files in one index, or None where the index does not have it.

        It is requested once, until a download of one of its files fails.

        Raises:
            ServiceUnavailable, PermissionRefused, InvalidSettings: the index cannot be queried.
        """
        key = self._page_key(index, project)
        with self._lock:
            is_known, files = key in self._pages, self._pages.get(key)
        if not is_known:
            if index.is_file:
                files = _folder(index)
            else:
                files = self._page(index.url if index in self._indexes.find_links else f"{index.url}/{project}/")
            with self._lock:
                self._pages[key] = files
        if files and index.of_model:
            # Its links may lead to where a credential of ours would be sent, and the content into the author's image.
            files = tuple(file for file in files if self._is_own(index, file.url))
        return files if files is None else of_project(files, project)

    def _page_key(self, index: IndexUrl, project: str) -> tuple[str, str]:
        return index.url, "" if index in self._indexes.find_links else project

    def _forget(self, project: str) -> None:
        """Drop what is known of a project's pages, so that they are requested again."""
        with self._lock:
            for index in self.search_order:
                self._pages.pop(self._page_key(index, project), None)

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
            ServiceUnavailable, PermissionRefused, InvalidSettings: an index cannot be queried.
        """
        url = wheel.url or ""
        if not any(index.of_model for index in self.search_order) or self._indexes.credential(url) is None:
            return True
        return any(
            origin_of(url) == origin_of(index.url)
            if index.of_model
            else any(
                file.filename == wheel.filename and origin_of(file.url) == origin_of(url)
                for file in self.page(index, wheel.name) or ()
            )
            for index in self.search_order
        )

    def _is_own(self, index: IndexUrl, url: str) -> bool:
        return origin_of(url) == origin_of(index.url) or self._indexes.credential(url) is None

    def find(self, wheel: LockedWheel) -> IndexFile:
        """Return where a wheel is, and what the index says of it.

        Args:
            wheel: of a lock; not searched for if it has an address.

        Raises:
            WheelNotFound: no index has a file of this name and hash.
            ServiceUnavailable, PermissionRefused, InvalidSettings: an index cannot be queried.
        """
        if wheel.url is not None:
            return IndexFile(filename=wheel.filename, url=wheel.url, sha256=wheel.sha256, size=wheel.size)
        if wheel.origin != "index":
            message = f"The wheel {wheel.filename} is not from an index, and the model no longer names it."
            raise WheelNotFound(message, remedy="Register the model again with its wheel.")
        named = False
        for index in self.search_order:
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
            progress: called as bytes arrive.

        Raises:
            WheelNotFound: it is not there.
            WheelMismatch: what came is larger or of another hash than the lock says.
            ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had.
            TryAgain: the disk is full.
        """
        try:
            self._save(wheel, self.find(wheel), destination, progress)
        except (WheelNotFound, PermissionRefused):
            if wheel.origin != "index":
                raise
            # The address came with a resolution, or with a page that may have been read long ago. Since then the index
            # may have moved the file, or the link may have expired.
            self._forget(wheel.name)
            moved = wheel.model_copy(update={"url": None})
            self._save(moved, self.find(moved), destination, progress)

    def _save(self, wheel: LockedWheel, file: IndexFile, destination: Path, progress: Progress | None) -> None:
        part = destination.with_name(f".{destination.name[:80]}.{uuid4().hex}.part")
        try:
            with _on_disk(wheel.filename), part.open("xb+", buffering=0) as content:
                size = file.size if file.size is not None else wheel.size
                target = _Target(wheel.filename, content, size=size, sha256=wheel.sha256, progress=progress)
                self._receive(file.url, target, size or 0)
            part.replace(destination)
        finally:
            part.unlink(missing_ok=True)

    def tail(self, wheel: LockedWheel, size: int) -> tuple[bytes, int]:
        """Return the last bytes of a wheel, at most `size`, and how many it has; they are not verified.

        Raises:
            WheelNotFound, ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had, or not in part.
        """
        filename, url = wheel.filename, self.find(wheel).url
        if url.startswith("file:"):
            with _local(url, filename) as content:
                whole = os.fstat(content.fileno()).st_size
                content.seek(max(0, whole - size))
                return content.read(size), whole
        until = time.monotonic() + self._policy.deadline
        try:
            with self._answer(url, {"Range": f"bytes=-{size}"}, until) as response:
                _check(response, filename)
                part = _PART.fullmatch(str(response.headers.get("Content-Range", "")))
                if response.status != HTTPStatus.PARTIAL_CONTENT or part is None:
                    raise INDEX.unreachable_error(response.host, "it gives no part of a file")
                begin, end, whole = map(int, part.groups())
                received = bytearray()
                for chunk in response.chunks():
                    received += chunk
                    if len(received) > size:
                        break
                if len(received) != end + 1 - begin or end + 1 != whole:
                    raise INDEX.unreachable_error(response.host, "it sent another part than was requested")
                return bytes(received), whole
        except Retry as failure:
            raise failure.error(filename) from failure

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
        with _on_disk(filename), destination.open("xb", buffering=0) as content:
            self._receive(url, _Target(filename, content, most=_MOST_BYTES), _MOST_BYTES >> 3)

    def digest(self, filename: str, url: str) -> tuple[str, int]:
        """Return the SHA-256 and the size of a file, which is read for that and not kept.

        Args:
            filename: its name, for messages.
            url: where it is.

        Raises:
            WheelNotFound, ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had.
        """
        with Path(os.devnull).open("rb+", buffering=0) as nowhere:
            target = _Target(filename, nowhere)
            self._receive(url, target, 0)
            return target.digest, target.written

    def _page(self, url: str) -> tuple[IndexFile, ...] | None:
        def ask(until: float) -> tuple[IndexFile, ...] | None:
            with self._answer(url, {"Accept": ACCEPT, "Accept-Encoding": "gzip"}, until) as response:
                if response.status in _ABSENT:
                    return None
                _check(response, "a project's page")
                content = response.content(_MOST_PAGE_BYTES)
                try:
                    return parse_page(content, response.media_type, str(response.url))
                except NoPage as error:
                    raise INDEX.unexpected_error(response.host, f"with {error} for a project's page") from error

        return retried(f"A request to the package index at {host_of(url)}", ask, policy=self._policy)

    def _receive(self, url: str, target: _Target, expected: int) -> None:
        """Write a file's content into `target`; time is given for `expected` bytes."""
        if url.startswith("file:"):
            with _local(url, target.name) as content:
                while chunk := content.read(_CHUNK):
                    target.write(chunk)
        else:
            what, seconds = f"The download of {target.name}", self._policy.seconds_for(expected)

            def open_at(position: int, until: float) -> tuple[Response, int]:
                return self._opened(url, target.name, position, until)

            chunks = resumed(
                what,
                open_at,
                policy=self._policy,
                size=target.size,
                seconds=seconds,
                verified=target.is_verified,
            )
            for chunk in chunks:
                target.write(chunk)
        target.finish()

    def _opened(self, url: str, name: str, position: int, until: float) -> tuple[Response, int]:
        """Return the answer with a file's content from `position` on, and where it begins: 0 if ranges are unknown."""
        with ExitStack() as stack:
            headers = {"Range": f"bytes={position}-"} if position else {}
            response = stack.enter_context(self._answer(url, headers, until))
            misplaced = response.status == HTTPStatus.PARTIAL_CONTENT and not response.starts_at(position)
            if position and (misplaced or response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
                return self._opened(url, name, 0, until)
            if response.status in _ABSENT:
                message = f"{name} is not at the address that the package index gave (HTTP {response.status})."
                raise WheelNotFound(message, remedy="Retry, or make a new lock with --rebuild.")
            _check(response, name)
            if response.headers.get("Content-Encoding", "identity").lower() not in {"identity", ""}:
                message = f"{response.host} sends {name} in an encoding that was not requested."
                raise ServiceUnavailable(message, remedy="Check what is between this machine and the index.")
            stack.pop_all()
            return response, position if response.status == HTTPStatus.PARTIAL_CONTENT else 0

    def _answer(self, url: str, headers: Mapping[str, str], until: float) -> Response:
        """Return the answer to a GET after redirects; the credential goes to its own origin and nowhere else.

        Where the first address is not at an origin of the settings, a redirect to another origin gets none at all: its
        server would otherwise decide what is requested elsewhere with our credential.

        Raises:
            Retry: there was none, in a way that may pass.
            ServiceUnavailable, InvalidSettings: there was none, or a redirect that is not followed.
        """
        begun, own = origin_of(url), self._indexes.is_settings_own(url)
        for _ in range(_MOST_STEPS):
            self._indexes.check(url)
            credential = self._indexes.credential(url) if own or origin_of(url) == begun else None
            response = self.send("GET", url, until=until, headers=headers, basic=credential)
            if not response.is_redirect:
                return response
            with response:
                target = linked(str(response.url), response.headers["Location"])
            if target is None or urlsplit(target).scheme not in {"https", urlsplit(url).scheme}:
                how = "with a redirect away from HTTPS, or to an address that can be read in two ways"
                raise INDEX.unexpected_error(response.host, how)
            url = target
        raise INDEX.unexpected_error(host_of(url), "with too many redirects")


def host_of(url: str) -> str:
    """Return an address's host and port."""
    return urlsplit(url).netloc.rpartition("@")[2]


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
