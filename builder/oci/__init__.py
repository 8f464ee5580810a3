"""OCI: descriptors, media types, JSON and blobs that others wrote, checked while read. Nothing knows MLflow."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

from builder.errors import BuildFailed, InvalidVersion
from builder.log import moved
from builder.reference import Digest, Platform
from builder.safe_open import Unsafe, chunks, opened

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})
# Layers that others make, and what the same bytes are called in an OCI manifest.
LAYERS: Mapping[str, str] = {
    OCI_LAYER: OCI_LAYER,
    f"{OCI_LAYER}+gzip": f"{OCI_LAYER}+gzip",
    f"{OCI_LAYER}+zstd": f"{OCI_LAYER}+zstd",
    "application/vnd.docker.image.rootfs.diff.tar": OCI_LAYER,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": f"{OCI_LAYER}+gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": f"{OCI_LAYER}+zstd",
}

# The most bytes of a manifest, an index or a config; the distribution specification asks registries for 4 MiB at least.
MOST_JSON_BYTES = 4 << 20
_MOST_BLOB_BYTES = 1 << 50
# No document of the specifications is nested deeper than ten. What can be read must not be too deep to be written.
_DEEPEST = 50
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")


class Malformed(ValueError):
    """A document does not have the form of its specification; the caller adds which document and whose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """Names content: what it is, its digest, and its size in bytes.

    Attributes:
        media_type: what the content is.
        digest: of the content.
        size: bytes.
        platform: of an image in an index; None where it is unknown.
        annotations: of the descriptor, not of what it names.
    """

    media_type: str
    digest: Digest
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, content: bytes, media_type: str, platform: Platform | None = None) -> Descriptor:
        """Return the descriptor of `content`."""
        return cls(media_type=media_type, digest=Digest.of(content), size=len(content), platform=platform)

    @classmethod
    def from_json(cls, value: object) -> Descriptor:
        """Return the descriptor that a JSON value holds.

        Raises:
            Malformed: it is not a descriptor, or names other places than the repository.
        """
        entry = mapping(value, "a descriptor")
        media_type, digest, size = entry.get("mediaType"), entry.get("digest"), entry.get("size")
        if not isinstance(media_type, str) or not _MEDIA_TYPE.fullmatch(media_type):
            refuse("a descriptor has no valid mediaType")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MOST_BLOB_BYTES:
            refuse("a descriptor has no valid size")
        if entry.get("urls"):
            refuse("a descriptor names content at other addresses (urls)")
        return cls(
            media_type=media_type,
            digest=digest_of(digest),
            size=size,
            platform=platform_of(entry["platform"]) if entry.get("platform") is not None else None,
            annotations=strings(entry.get("annotations"), "a descriptor's annotations"),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the descriptor as the JSON value of a manifest or an index."""
        value: dict[str, Any] = {"mediaType": self.media_type, "digest": str(self.digest), "size": self.size}
        if self.platform:
            value["platform"] = {"architecture": self.platform.architecture, "os": self.platform.os}
            if self.platform.variant:
                value["platform"]["variant"] = self.platform.variant
        if self.annotations:
            value["annotations"] = dict(self.annotations)
        return value

    @property
    def is_attestation(self) -> bool:
        """Whether this is no image but a statement about one, as BuildKit puts into indexes."""
        unknown = self.platform is not None and "unknown" in {self.platform.os, self.platform.architecture}
        return unknown or "vnd.docker.reference.type" in self.annotations


def refuse(why: str, cause: Exception | None = None) -> NoReturn:
    """Raise `Malformed` with `why` as its message and `cause` as its cause."""
    raise Malformed(why) from cause


def to_bytes(value: Mapping[str, Any]) -> bytes:
    """Return `value` as JSON, the same bytes for the same value: sorted, no blanks, ASCII only.

    Raises:
        ValueError: it holds a number that JSON has no form for.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def from_bytes(content: bytes) -> dict[str, Any]:
    """Return the JSON object that `content` holds.

    Raises:
        Malformed: it holds none. The message never shows the content, which may be a file that a link led to.
    """
    try:
        value = json.loads(content, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        refuse("it is not JSON", error)
    if content.count(b"[") + content.count(b"{") > _DEEPEST:
        _check_depth(value)
    return mapping(value, "it")


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [child for each in level for child in _children(each)]
        if not level:
            return
    refuse("it is nested too deeply")


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def mapping(value: object, what: str) -> dict[str, Any]:
    """Return `value` if it is a JSON object; raises `Malformed`, which names it by `what`, where it is not."""
    if not isinstance(value, dict):
        refuse(f"{what} is not an object")
    return value


def sequence(value: object, what: str) -> list[Any]:
    """Return `value` if it is a JSON array; raises `Malformed`, which names it by `what`, where it is not."""
    if not isinstance(value, list):
        refuse(f"{what} is not a list")
    return value


def descriptors(value: object, what: str) -> list[Descriptor]:
    """Return the descriptors in a JSON array; raises `Malformed`, which names it by `what`, for another value."""
    return [Descriptor.from_json(entry) for entry in sequence(value, what)]


def strings(value: object, what: str) -> dict[str, str]:
    """Return `value` if it is a JSON object of strings, and an empty one for null; else raises `Malformed`."""
    entries = {} if value is None else mapping(value, what)
    if not all(isinstance(entry, str) for entry in entries.values()):
        refuse(f"{what} are not all strings")
    return entries


def digest_of(value: object) -> Digest:
    """Return the digest that a JSON value holds; raises `Malformed` where it holds none."""
    try:
        return Digest(value if isinstance(value, str) else "")
    except InvalidVersion as error:
        refuse("a digest is not 'sha256:' and 64 hexadecimal digits", error)


def platform_of(value: object) -> Platform:
    """Return the platform of an image config, or of a descriptor's `platform`; raises `Malformed` where it has none."""
    entry = mapping(value, "a platform")
    parts = [entry.get("os"), entry.get("architecture"), entry.get("variant") or None]
    if not all(isinstance(part, str) for part in parts[:2]) or not isinstance(parts[2], str | None):
        refuse("a platform has no os or no architecture")
    try:
        return Platform.parse("/".join(part for part in parts if part))
    except InvalidVersion as error:
        refuse("a platform is not os/architecture[/variant]", error)


def _no_number(_name: str) -> NoReturn:
    refuse("it holds a number that JSON does not have")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _no_number(text)
    return number


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

    It is opened again at each reading, without following links; `verified` checks its content.
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
    """A blob that reads another one, `blob`, and has its digest and size."""

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

    So a receiver that waits for `blob.size` bytes never gets all of a blob with another content.

    Raises:
        BuildFailed: the content does not match its digest.
    """
    state, size, last = hashlib.sha256(), 0, b""
    for chunk in blob.stream():
        state.update(chunk)
        size += len(chunk)
        if size > blob.size:
            break
        if last:
            yield last
        last = chunk
    if size != blob.size or state.hexdigest() != blob.digest.hex:
        message = f"The content of blob {blob.digest} of {blob.size} bytes does not match its digest."
        raise BuildFailed(message, remedy="The engine wrote it so, or it was changed after the build. Build again.")
    if last:
        yield last


def check(blob: Blob) -> None:
    """Read a blob to its end; raises `BuildFailed` where it does not match its digest."""
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
