"""One wheel on its way from an index to a file: hashed while it is written, and taken up again where it broke."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import httpx

from builder.build.index_http import ABSENT, Later, Session, away, check, chunks, host_of
from builder.build.index_page import IndexFile
from builder.build.locked import LockedWheel
from builder.errors import BuildFailed, InvalidVersion, ServiceUnavailable, TryAgain
from builder.images.retry import Patience, patiently

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
    patience: Patience,
    progress: Progress | None = None,
) -> None:
    """Write a wheel to `destination`, which appears when it is whole and verified.

    Args:
        session: makes requests.
        wheel: what it has to be.
        file: where it is.
        destination: the file; its folder is there.
        patience: how long to try.
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
                patiently(
                    f"the download of {wheel.filename}",
                    lambda until: _receive(session, file.url, target, until),
                    patience=patience,
                    seconds=patience.seconds_for(target.size or 0),
                )
        part.replace(destination)
    finally:
        part.unlink(missing_ok=True)


def digest(session: Session, filename: str, url: str, *, patience: Patience) -> tuple[str, int]:
    """Return the SHA-256 (64 hexadecimal digits) and the size of a file, which is read for that and not kept.

    Raises:
        WheelNotFound, ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had.
    """
    with Path(os.devnull).open("rb+", buffering=0) as nowhere:
        target = _Target(filename, nowhere)
        if url.startswith("file:"):
            _copy(url, target)
        else:
            patiently(f"reading {filename}", lambda until: _receive(session, url, target, until), patience=patience)
        return target.digest, target.written


def fetch(session: Session, filename: str, url: str, destination: Path, *, patience: Patience) -> None:
    """Write a file of which only the address is known to `destination`, which is not there yet.

    Raises:
        WheelNotFound, ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had.
        InvalidVersion: it is larger than any wheel.
        TryAgain: the disk is full.
    """
    with _on_disk(filename), destination.open("xb", buffering=0) as content:
        target = _Target(filename, content, most=_MOST_BYTES)
        patiently(
            f"the download of {filename}",
            lambda until: _receive(session, url, target, until),
            patience=patience,
            seconds=patience.seconds_for(_MOST_BYTES >> 3),
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
        Again: it broke off, in a way that may pass.
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


def _continues(answer: httpx.Response, begun: int) -> bool:
    return str(answer.headers.get("Content-Range", "")).replace(" ", "").startswith(f"bytes{begun}-")
