"""Layers made from files on disk: not compressed, and made again from the files at each reading.

A model's weights do not compress, so the archive is in the gzip format without compression, in stored blocks: that
costs no more than a checksum, and some tools read no other layers (docs/decisions/0026-stored-layers.md). A layer is a
function of paths, contents and which files are programs: not of times, owners, modes, the order in which a folder lists
them, or zlib.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeAlias

from builder import safe_open
from builder.errors import InvalidVersion, TryAgain
from builder.oci.layer import Layer, LayerWriter, Plain
from builder.reference import Digest

# A file of this size is worth a layer of its own: the requests for one take as long as sending so much.
LARGE = 256 << 10
# Smaller files stay in one layer until they are larger than this together.
BUCKET = 32 << 20
_HASH_BITS = 256
_MAGNITUDE_BITS = 4
# More urgent than any size, and larger than any layer.
_FIRST = 1 << 20
_NO_LIMIT = 1 << 100
# The longest name of a file, in bytes, on every file system of Linux that images are unpacked to.
_LONGEST_NAME = 255
# A file with such a name deletes another one: image specification, layer.md, "Whiteouts".
_WHITEOUT = ".wh."


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of an image, and its source on disk.

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


# Files with the keys of `_key`, in the order of those.
_Group: TypeAlias = list[tuple[int, FileEntry]]


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
            InvalidVersion: a path is not allowed in a layer, or twice there; a file is missing, unreadable or a link.
            TryAgain: a file has another size than its entry.
            ValueError: there is no entry, so there should be no layer.
        """
        ordered = _ordered(entries)
        if not ordered:
            message = "a layer of no files"
            raise ValueError(message)
        writer, times = LayerWriter(compresses=False), dict[str, int]()
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
                A check of the digest, as in a push, finds all other changes.
        """
        yield from _archive(LayerWriter(compresses=False, measures=False), self.entries, self._times)


def split(*folders: Iterable[FileEntry], most: int, limit: int | None = None) -> list[tuple[FileEntry, ...]]:
    """Return the files in groups, one for each layer: a function of paths and sizes, whatever their order.

    A group is sent again as a whole when one of its files has changed. So one of all files is divided in two, and then
    always the largest that there is, while layers are left and it pays: first the folders are divided from each other,
    and files below 256 KiB, which change most often, from larger ones; then files of other magnitudes; then files of
    one magnitude, by the hashes of their paths. A file of 256 KiB or more has a layer to itself where there are enough
    of them, and the small files of a folder share one of up to 32 MiB.

    Where a group is divided depends on its own files alone. A file that changes within its size changes no layer but
    its own; a file more, or a layer less, changes a few.

    Large files come first, small ones last. What unpacks an image knows a layer by all that are below it, too, and the
    small files are those that always change: MLmodel names its run.

    Args:
        folders: the files of each folder.
        most: layers there may be.
        limit: every layer must be smaller than so many bytes, as it is sent; None for no limit.

    Raises:
        InvalidVersion: a path is not allowed in a layer, two files have the same, one is a folder of another; or the
            files do not fit into so many layers of that size.
    """
    members = [[*folder] for folder in folders]
    ordered = _ordered(entry for folder in members for entry in folder)
    if not ordered:
        return []
    if most < 1:
        message = f"There is no layer left in the image for {len(ordered)} files, {ordered[0].path!r} the first."
        raise InvalidVersion(message, remedy="Use a base image that has fewer layers.")
    limit = _NO_LIMIT if limit is None else limit
    whole = sorted((_key(number, entry), entry) for number, folder in enumerate(members) for entry in folder)
    groups = _divided([whole], most, limit)
    if any(_sent(group) >= limit for group in groups):
        groups = _divided(_packed(whole, most, limit), most, limit)
    found = [tuple(sorted((entry for _, entry in group), key=lambda entry: entry.path)) for group in groups]
    return sorted(found, key=lambda group: (-min(_magnitude(entry) for entry in group), group[0].path))


def _key(folder: int, entry: FileEntry) -> int:
    """Return a file's sort key as bits: its folder, whether it is large, its magnitude, its path's hash.

    Files are divided at the highest bit in which they differ, so that the first of these counts most.
    """
    place = (folder << 1 | (entry.size >= LARGE)) << _MAGNITUDE_BITS | _magnitude(entry)
    return place << _HASH_BITS | int.from_bytes(hashlib.sha256(entry.path.encode()).digest(), "big")


def _magnitude(entry: FileEntry) -> int:
    """Return 0 for a small file, 1 from 256 KiB on, 2 from 4 MiB on, 3 from 64 MiB on, and so forth."""
    return min(((entry.size // LARGE).bit_length() + 3) // 4, (1 << _MAGNITUDE_BITS) - 1)


def _divided(groups: list[_Group], most: int, limit: int) -> list[_Group]:
    """Return the groups, the most urgent divided until there are `most` of them, or no more is worth it."""
    # No two files have the same key, so that groups themselves are never compared.
    heap = [(-_urgency(group, limit), group[0][0], group) for group in groups]
    heapq.heapify(heap)
    while len(heap) < most and heap[0][0] < 0:
        _, _, group = heapq.heappop(heap)
        bit = 1 << (_spread(group).bit_length() - 1)
        middle = next(number for number, (key, _) in enumerate(group) if key & bit)
        for half in (group[:middle], group[middle:]):
            heapq.heappush(heap, (-_urgency(half, limit), half[0][0], half))
    return [group for _, _, group in heap]


def _urgency(group: _Group, limit: int) -> int:
    """Return the priority of a group for being divided; 0 where it does not pay.

    It is the size of the group in steps of 19 %: files of about one size should not change places for a few bytes.
    """
    if len(group) == 1:
        return 0
    if _spread(group) >> (_MAGNITUDE_BITS + _HASH_BITS) or _sent(group) >= limit:
        return _FIRST
    size = sum(entry.size for _, entry in group)
    return 0 if group[0][1].size < LARGE and size <= BUCKET else (size**4).bit_length()


def _spread(group: _Group) -> int:
    """Return bits, the highest of which is the highest in which files of a group differ."""
    return group[0][0] ^ group[-1][0]


def _packed(files: _Group, most: int, limit: int) -> list[_Group]:
    """Return the files in groups below the limit: the largest first, each in the first group with room for it.

    Raises:
        InvalidVersion: they do not fit.
    """
    groups: list[_Group] = []
    filled: list[int] = []
    for key, entry in sorted(files, key=lambda each: (-each[1].size, each[1].path)):
        size = _sent([(key, entry)])
        if size >= limit:
            message = f"The file {entry.path!r} of {entry.size} bytes cannot be in a layer of less than {limit} bytes."
            raise InvalidVersion(message, remedy="Save the weights in shards.")
        number = next((number for number, used in enumerate(filled) if used + size < limit), len(groups))
        if number == most:
            total = sum(each.size for _, each in files)
            message = f"{len(files)} files of {total} bytes do not fit into {most} layers of less than {limit} bytes."
            raise InvalidVersion(message, remedy="Save the weights in smaller shards, or use a base of fewer layers.")
        if number == len(groups):
            groups.append([])
            filled.append(0)
        groups[number].append((key, entry))
        filled[number] += size
    return [sorted(group) for group in groups]


def _sent(group: _Group) -> int:
    """Return bytes that a group's layer never exceeds: contents, headers of files and of folders, and the end."""
    return 2048 + sum(
        entry.size + (entry.size >> 13) + (1 + entry.path.count("/")) * (2100 + 2 * len(entry.path.encode()))
        for _, entry in group
    )


def _archive(writer: LayerWriter, entries: tuple[FileEntry, ...], times: dict[str, int]) -> Iterator[bytes]:
    for entry in entries:
        content = Plain(chunks=_content(entry, times), size=entry.size)
        yield from writer.file(entry.path, content, executable=entry.executable)
    yield from writer.finish()


def _content(entry: FileEntry, times: dict[str, int]) -> Iterator[bytes]:
    """Yield a file's content; its modification time is put into `times`, or has to be the one that is there."""
    again, got = entry.path in times, 0
    try:
        with safe_open.opened(entry.source.parent, entry.source.name) as (file, size):
            time = os.fstat(file).st_mtime_ns
            if size != entry.size or times.setdefault(entry.path, time) != time:
                _changed(entry)
            for chunk in safe_open.chunks(file, entry.size):
                got += len(chunk)
                if got > entry.size:
                    _changed(entry)
                yield chunk
    except (safe_open.Unsafe, OSError) as error:
        if again:
            _changed(entry, error)
        why = error.strerror if isinstance(error, OSError) else error
        message = f"The file {entry.path!r} cannot be put into a layer: {why}."
        raise InvalidVersion(message, remedy="It must be a regular file that this program may read.") from error
    if got != entry.size:
        _changed(entry)


def _changed(entry: FileEntry, cause: Exception | None = None) -> NoReturn:
    message = f"The file {entry.path!r} of {entry.size} bytes has changed while it was being published."
    raise TryAgain(message, remedy="Another program writes into the workspace. Stop it, and publish again.") from cause


def _ordered(entries: Iterable[FileEntry]) -> tuple[FileEntry, ...]:
    """Return the files by path, all of which are allowed in one image."""
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
        message = f"The path {path[:1000]!r} is not allowed in an image: {why}."
        raise InvalidVersion(message, remedy="Rename the file.")


def _above(path: str) -> Iterator[str]:
    """Yield the folders above a path, the outermost first."""
    end = path.find("/")
    while end > 0:
        yield path[:end]
        end = path.find("/", end + 1)
