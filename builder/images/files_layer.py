"""Layers made from files on disk: not compressed, written nowhere, made again from the files whenever they are read.

A model's weights do not compress, so the archive stands in the gzip format as it is, in stored blocks: that takes what
a checksum takes, and there are tools that read no other layers (docs/decisions/0026-stored-layers.md). What is in it is
a function of paths, contents and which files are programs: not of times, owners, modes or the order in which a folder
lists them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from builder.errors import InvalidVersion, TryAgain
from builder.images import files
from builder.images.layer import Layer, LayerWriter, Plain
from builder.reference import Digest

# A file of this size is worth a layer of its own: the requests for one take as long as sending so much.
LARGE = 256 << 10
# The files that have no layer of their own stay in one layer until they are larger than this together.
BUCKET = 32 << 20
# The longest name of a file, in bytes, on every file system of Linux that images are unpacked to.
_LONGEST_NAME = 255
# A file of such a name says that another is deleted: image specification, layer.md, "Whiteouts".
_WHITEOUT = ".wh."


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of an image, and where its content is.

    Attributes:
        path: in the image: relative to its root, with forward slashes, `app/mymodel/model.pkl`.
        source: the file on disk. It may not be a link, nor may its folder; the folders above that are trusted.
        size: bytes.
        executable: whether its mode in the image is 0755, not 0644.
    """

    path: str
    source: Path
    size: int
    executable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesLayer:
    """A layer of files, and a blob: `stream` reads the files again.

    Attributes:
        entries: the files in the archive's order, by path.
        layer: its digests, sizes and media type.
    """

    entries: tuple[FileEntry, ...]
    layer: Layer
    _times: dict[str, int] = field(repr=False, compare=False)

    @classmethod
    def of(cls, entries: Iterable[FileEntry]) -> FilesLayer:
        """Return the layer of some files, which are read once for it, a piece at a time.

        Args:
            entries: at least one, in any order.

        Raises:
            InvalidVersion: a path cannot stand in a layer, or twice; a file is missing, unreadable or a link.
            TryAgain: a file has another size than its entry says.
            ValueError: there is no entry, so there should be no layer.
        """
        ordered = _ordered(entries)
        if not ordered:
            message = "a layer of no files"
            raise ValueError(message)
        writer, times = LayerWriter(), dict[str, int]()
        for _ in _archive(writer, ordered, times):
            pass
        return cls(entries=ordered, layer=writer.layer, _times=times)

    @property
    def digest(self) -> Digest:
        """The blob's digest."""
        return self.layer.digest

    @property
    def size(self) -> int:
        """The blob's length in bytes."""
        return self.layer.size

    def stream(self) -> Iterator[bytes]:
        """Yield the blob's bytes, in chunks of about 256 KiB.

        Raises:
            TryAgain: a file has another size or modification time than when it was hashed, or cannot be read any more.
                A change that shows in neither is found by whoever checks the digest, as a push does.
        """
        yield from _archive(LayerWriter(measures=False), self.entries, self._times)


def split(entries: Iterable[FileEntry], *, most: int) -> list[tuple[FileEntry, ...]]:
    """Return the files in groups, one for each layer: a function of paths and sizes, whatever their order.

    A file of 256 KiB or more has a layer to itself, so that it is sent again only when itself it has changed. Where
    there are too many of those, the largest get half of the layers, one each. All other files are in one layer, or,
    where they are larger than 32 MiB together, in a number of layers that is a power of two; the hash of its path says
    in which one a file is. Files that have their own layer do not depend on small ones, and a file that changes within
    its size changes no layer but its own.

    The files with a layer of their own come first, by path. What unpacks an image knows a layer by all that are below
    it, too, and the small files are those that always change: MLmodel names its run.

    Args:
        entries: the files of one folder, or of several.
        most: layers there may be.

    Raises:
        InvalidVersion: a path cannot stand in a layer, two files have the same, one is a folder of another; or there
            are files, and no layer is left for them.
    """
    ordered = _ordered(entries)
    if not ordered:
        return []
    if most < 1:
        message = f"{len(ordered)} files, {ordered[0].path!r} the first, are to be put into an image that is full."
        raise InvalidVersion(message, remedy="Use a base image that has fewer layers.")
    large = sorted((entry for entry in ordered if entry.size >= LARGE), key=lambda entry: (-entry.size, entry.path))
    alone = {entry.path for entry in (large if len(large) < most else large[: most // 2])}
    rest = [entry for entry in ordered if entry.path not in alone]
    count = _buckets(sum(entry.size for entry in rest), most - len(alone))
    buckets: list[list[FileEntry]] = [[] for _ in range(count)]
    for entry in rest:
        digest = hashlib.sha256(entry.path.encode()).digest()
        buckets[int.from_bytes(digest[:4], "big") % count].append(entry)
    return [
        *((entry,) for entry in ordered if entry.path in alone),
        *(tuple(bucket) for bucket in buckets if bucket),
    ]


def _buckets(size: int, most: int) -> int:
    """Return how many layers `size` bytes of files are divided into.

    Powers of two, so that when the number doubles, each layer is divided into two, and when files come and go it
    seldom changes at all.
    """
    count = 1
    while count * BUCKET < size and count * 2 <= most:
        count *= 2
    return count


def _archive(writer: LayerWriter, entries: tuple[FileEntry, ...], times: dict[str, int]) -> Iterator[bytes]:
    for entry in entries:
        content = Plain(chunks=_content(entry, times), size=entry.size)
        yield from writer.file(entry.path, content, executable=entry.executable)
    yield from writer.finish()


def _content(entry: FileEntry, times: dict[str, int]) -> Iterator[bytes]:
    """Yield a file's content; its modification time is put into `times`, or has to be the one that is there."""
    again, got = entry.path in times, 0
    try:
        with files.opened(entry.source.parent, entry.source.name) as (file, size):
            time = os.fstat(file).st_mtime_ns
            if size != entry.size or times.setdefault(entry.path, time) != time:
                _changed(entry)
            for chunk in files.chunks(file, entry.size):
                got += len(chunk)
                if got > entry.size:
                    _changed(entry)
                yield chunk
    except (files.Unsafe, OSError) as error:
        if again:
            _changed(entry, error)
        why = error.strerror if isinstance(error, OSError) else error
        message = f"The file {entry.path!r} cannot be put into a layer: {why}."
        raise InvalidVersion(message, remedy="It must be a regular file that this program may read.") from error
    if got != entry.size:
        _changed(entry)


def _changed(entry: FileEntry, cause: Exception | None = None) -> NoReturn:
    message = f"The file {entry.path!r} of {entry.size} bytes has changed since it was looked at first."
    raise TryAgain(message, remedy="Something else writes into the workspace: stop that, and publish again.") from cause


def _ordered(entries: Iterable[FileEntry]) -> tuple[FileEntry, ...]:
    """Return the files by path, all of which can stand in one image."""
    ordered = tuple(sorted(entries, key=lambda entry: entry.path))
    paths: set[str] = set()
    for entry in ordered:
        _check(entry.path)
        if entry.path in paths:
            message = f"Two files have the path {entry.path!r} in the image."
            raise InvalidVersion(message, remedy="Rename one of them.")
        paths.add(entry.path)
    for entry in ordered:
        for directory in _above(entry.path):
            if directory in paths:
                message = f"{directory!r} is a file in the image, and also the folder of {entry.path!r}."
                raise InvalidVersion(message, remedy="Rename one of them.")
    return ordered


def _check(path: str) -> None:
    why = ""
    if any(part in {"", ".", ".."} for part in path.split("/")) or "\0" in path:
        why = "it is not a relative path without '.', '..' and empty parts"
    elif any(part.startswith(_WHITEOUT) for part in path.split("/")):
        why = f"in a layer, a name that begins with {_WHITEOUT!r} deletes another file"
    else:
        try:
            if any(len(part.encode()) > _LONGEST_NAME for part in path.split("/")):
                why = f"a part of it is longer than {_LONGEST_NAME} bytes"
        except UnicodeEncodeError:
            why = "it cannot be written as UTF-8"
    if why:
        message = f"The path {path[:1000]!r} cannot stand in an image: {why}."
        raise InvalidVersion(message, remedy="Rename the file.")


def _above(path: str) -> Iterator[str]:
    """Yield the folders above a path, the outermost first."""
    end = path.find("/")
    while end > 0:
        yield path[:end]
        end = path.find("/", end + 1)
