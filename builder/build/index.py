"""Asks package indexes: which files a project has, and the files themselves, verified while they are written."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

from builder.build.address import origin_of
from builder.build.index_download import Progress, WheelNotFound, digest, fetch, save, tail
from builder.build.index_http import ABSENT, Session, check, chunks, host_of, strange
from builder.build.index_page import ACCEPT, IndexFile, NoPage, of_project, parse_page
from builder.build.indexes import FIRST_INDEX, Indexes, IndexUrl, built_in_index
from builder.build.locked import LockedWheel
from builder.errors import InvalidSettings
from builder.images.retry import Patience, patiently

_MOST_PAGE_BYTES = 64 << 20


class IndexClient:
    """Asks the indexes of one resolution, over one pool of connections; a context manager. For several threads.

    Args:
        indexes: who is asked, with which credential.
        patience: how long to try.
    """

    def __init__(self, indexes: Indexes, *, patience: Patience | None = None) -> None:
        self._indexes = indexes
        self._patience = patience or Patience()
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
            save(self._session, wheel, file, destination, patience=self._patience, progress=progress)
        except WheelNotFound:
            if wheel.url is None or wheel.origin != "index":
                raise
            # The address came with a resolution; the index may have moved the file since.
            moved = wheel.model_copy(update={"url": None})
            file = self.find(moved)
            save(self._session, moved, file, destination, patience=self._patience, progress=progress)

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
        fetch(self._session, filename, url, destination, patience=self._patience)

    def digest(self, filename: str, url: str) -> tuple[str, int]:
        """Return the SHA-256 and the size of a file, which is read for that and not kept.

        Args:
            filename: its name, for messages.
            url: where it is.

        Raises:
            WheelNotFound, ServiceUnavailable, PermissionRefused, InvalidSettings: it cannot be had.
        """
        return digest(self._session, filename, url, patience=self._patience)

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

        return patiently(f"a request to the package index {host_of(url)}", ask, patience=self._patience)


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
