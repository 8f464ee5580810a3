"""Blobs: content that is known by its digest, and is checked while it is read."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from builder.errors import BuildFailed
from builder.images.files import Unsafe, chunks, opened
from builder.reference import Digest
from builder.stages import moved

_CHUNK = 1 << 18


class Blob(Protocol):
    """Content of known digest and size that can be read more than once."""

    @property
    def digest(self) -> Digest:
        """The digest it must have."""
        ...

    @property
    def size(self) -> int:
        """The bytes it must have."""
        ...

    def stream(self) -> Iterator[bytes]:
        """Yield its bytes from the beginning; the whole is never in memory."""
        ...


@dataclass(frozen=True, slots=True)
class BytesBlob:
    """A small blob in memory, such as a config."""

    content: bytes = field(repr=False)

    @property
    def digest(self) -> Digest:
        """The content's digest."""
        return Digest.of(self.content)

    @property
    def size(self) -> int:
        """The content's length in bytes."""
        return len(self.content)

    def stream(self) -> Iterator[bytes]:
        """Yield the content."""
        yield self.content


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutBlob:
    """A blob of an OCI image layout that a hostile process may have written.

    It is opened again at each reading, without following links; what is read is checked by whoever reads it.
    """

    layout: Path
    digest: Digest
    size: int

    def stream(self) -> Iterator[bytes]:
        """Yield the file's bytes, at most one more than its size.

        Raises:
            BuildFailed: the file is not there, or is not a regular file.
        """
        with contextlib.ExitStack() as stack:
            try:
                file, _ = stack.enter_context(opened(self.layout, "blobs", "sha256", self.digest.hex))
            except Unsafe as error:
                message = f"The image layout {self.layout.name!r} cannot be read: {error}."
                raise BuildFailed(message, remedy="Build again.") from error
            yield from chunks(file, self.size)


class Around:
    """A blob that reads another one, whose digest and size it has; `blob` is that."""

    __slots__ = ()
    blob: Blob

    @property
    def digest(self) -> Digest:
        """The blob's."""
        return self.blob.digest

    @property
    def size(self) -> int:
        """The blob's."""
        return self.blob.size


@dataclass(slots=True)
class Counted(Around):
    """A blob whose bytes are counted while they are read.

    Attributes:
        blob: the blob.
        read: how many were read, in all its readings.
    """

    blob: Blob
    read: int = 0

    def stream(self) -> Iterator[bytes]:
        """Yield the blob's bytes."""
        for chunk in self.blob.stream():
            yield chunk
            self.read += len(chunk)
            moved("uploads", len(chunk))


def verified(blob: Blob) -> Iterator[bytes]:
    """Yield a blob's bytes, the last of them only when digest and size are what they must be.

    So nobody who waits for `blob.size` bytes ever gets them all of a blob that is not what it says.

    Raises:
        BuildFailed: the content is not what its digest says.
    """
    state, size, held = hashlib.sha256(), 0, b""
    for chunk in blob.stream():
        state.update(chunk)
        size += len(chunk)
        if size > blob.size:
            break
        if held:
            yield held
        held = chunk
    if size != blob.size or state.hexdigest() != blob.digest.hex:
        message = f"Blob {blob.digest} of {blob.size} bytes holds something else."
        raise BuildFailed(message, remedy="The engine wrote it so, or it was changed after the build: build again.")
    if held:
        yield held


def check(blob: Blob) -> None:
    """Read a blob to its end; raises `BuildFailed` where it is not what its digest says."""
    for _ in verified(blob):
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class FileBlob:
    """A file of this process's own; it must not change while it is in use."""

    path: Path
    digest: Digest
    size: int

    def stream(self) -> Iterator[bytes]:
        """Yield the file's bytes."""
        with self.path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
