"""A cache of layers and small texts in a registry's repository, each under a tag that is its key."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from builder.errors import BuilderError
from builder.log import get_logger
from builder.oci import (
    LAYERS,
    MOST_JSON_BYTES,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Blob,
    BytesBlob,
    Descriptor,
    Malformed,
    descriptors,
    digest_of,
    from_bytes,
    refuse,
    sequence,
    strings,
    to_bytes,
)
from builder.oci.layer import Layer
from builder.oci.manifest import PREFIX, TITLE, manifest_of
from builder.oci.registry import FetchedManifest, Registry
from builder.reference import Repository

_log = get_logger("layers")
T = TypeVar("T")

SOURCE = f"{PREFIX}layer.source"
DIFF_ID = f"{PREFIX}layer.diff-id"
NOTE = f"{PREFIX}layer.note"
UNCOMPRESSED = f"{PREFIX}layer.uncompressed-size"
_SIZE = re.compile(r"[0-9]{1,18}")
# The empty config of an artifact (image-spec, manifest.md, "Guidance for an Empty Descriptor").
EMPTY = BytesBlob(b"{}")
EMPTY_CONFIG = Descriptor.of(EMPTY.content, "application/vnd.oci.empty.v1+json")


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallArtifact:
    """A text for the cache.

    Attributes:
        key: its tag.
        kind: its media type.
        title: its name for people who browse the registry.
        content: the text.
    """

    key: str
    kind: str
    title: str
    content: str


@dataclass(frozen=True, slots=True)
class LayerStore:
    """A repository of cached layers and texts. Several threads may use it.

    Attributes:
        registry: where it is.
        repository: the repository.
        refused: texts that the registry did not accept, as from a user who may only read.
    """

    registry: Registry
    repository: Repository
    refused: list[SmallArtifact] = field(default_factory=list, compare=False, repr=False)

    def layer(self, key: str, *, source: str) -> Layer | None:
        """Return the layer cached under a key; None where there is none, or an invalid one.

        One request. Whether the registry still holds the layer's content shows when it is mounted.

        Args:
            key: the tag.
            source: what the layer must have been made from, by its annotation.

        Raises:
            BuilderError: the registry does not answer; see `Registry`.
        """
        return self._cached(key, "layer", lambda fetched: _layer(fetched.content, fetched.media_type, source))

    def keep(self, key: str, layer: Layer, blob: Blob, *, source: str, title: str) -> None:
        """Cache a layer under a key, in place of what is there.

        Args:
            key: the tag.
            layer: the layer.
            blob: its content.
            source: what it was made from.
            title: its name for people who browse the registry.
        """
        self.registry.push_blob(self.repository, blob)
        config = BytesBlob(
            to_bytes(
                {
                    "architecture": "unknown",
                    "config": {},
                    "os": "linux",
                    "rootfs": {"type": "layers", "diff_ids": [str(layer.diff_id)]},
                }
            )
        )
        self.registry.push_blob(self.repository, config)
        manifest = manifest_of(
            Descriptor.of(config.content, OCI_CONFIG),
            [layer.descriptor],
            {
                SOURCE: source,
                DIFF_ID: str(layer.diff_id),
                UNCOMPRESSED: str(layer.uncompressed),
                TITLE: title,
                **({NOTE: layer.note} if layer.note else {}),
            },
        )
        self.registry.put_manifest(self.repository, manifest, OCI_MANIFEST, key)

    def text(self, key: str, *, kind: str) -> bytes | None:
        """Return the text cached under a key; None where there is none, or an invalid one.

        Args:
            key: the tag.
            kind: the text's media type.

        Raises:
            BuilderError: the registry does not answer; see `Registry`.
        """
        text = self._cached(key, "text", lambda fetched: _text(fetched.content, kind))
        if text is None:
            return None
        if not self.registry.has_blob(self.repository, text.digest):
            _log.warning("the cached text has lost its content; rebuilding it", tag=key)
            return None
        return self.registry.blob_bytes(self.repository, text, MOST_JSON_BYTES)

    def keep_text(self, key: str, content: bytes, *, kind: str, title: str) -> None:
        """Cache a text under a key. A refusal of the registry is only logged, since the text can be made again.

        A refused text is added to `refused`, for a user who may write.

        Args:
            key: the tag.
            content: the text, at most 4 MiB.
            kind: its media type.
            title: its name for people who browse the registry.
        """
        try:
            manifest = pushed_text(self.registry, self.repository, content, kind=kind, title=title)
            self.registry.put_manifest(self.repository, manifest, OCI_MANIFEST, key)
        except BuilderError as error:
            self.refused.append(SmallArtifact(key=key, kind=kind, title=title, content=content.decode()))
            _log.warning("the registry does not accept a text for the cache", tag=key, error=error.what)

    def _cached(self, key: str, what: str, read: Callable[[FetchedManifest], T]) -> T | None:
        """Return what `read` makes of the manifest under a key; None where there is none, or `read` refuses it."""
        fetched = self.registry.manifest(self.repository.tag(key))
        if fetched is None:
            return None
        try:
            return read(fetched)
        except Malformed as error:
            _log.warning(f"the cached {what} is invalid; rebuilding it", tag=key, why=str(error))
            return None


def pushed_text(
    registry: Registry,
    repository: Repository,
    content: bytes,
    *,
    kind: str,
    title: str,
    subject: Descriptor | None = None,
) -> bytes:
    """Push the blobs of a text's artifact, and return its manifest, which is the caller's to push.

    The form is the image specification's: manifest.md, "Guidelines for Artifact Usage".

    Args:
        registry: where to.
        repository: the repository there.
        content: the text, at most 4 MiB.
        kind: its media type, and the artifact's type.
        title: its name for people.
        subject: the manifest that it refers to; None for none.
    """
    registry.push_blob(repository, EMPTY)
    registry.push_blob(repository, BytesBlob(content))
    return manifest_of(EMPTY_CONFIG, [Descriptor.of(content, kind)], {TITLE: title}, kind=kind, subject=subject)


def _text(content: bytes, kind: str) -> Descriptor:
    """Return the descriptor of the text of a manifest in the cache.

    Raises:
        Malformed: it is not as `keep_text` writes it.
    """
    texts = descriptors(from_bytes(content).get("layers"), "layers")
    if len(texts) != 1 or texts[0].media_type != kind or texts[0].size > MOST_JSON_BYTES:
        refuse(f"it does not hold one {kind} of at most {MOST_JSON_BYTES} bytes")
    return texts[0]


def _layer(content: bytes, media_type: str, source: str) -> Layer:
    """Return the layer of a manifest in the cache.

    Raises:
        Malformed: it is not as `keep` writes it.
    """
    if media_type != OCI_MANIFEST:
        refuse(f"it is a {media_type}")
    value = from_bytes(content)
    annotations = strings(value.get("annotations"), "annotations")
    layers = descriptors(value.get("layers"), "layers")
    if len(layers) != 1 or LAYERS.get(layers[0].media_type) != layers[0].media_type:
        refuse("it has not exactly one layer of a known kind")
    if annotations.get(SOURCE) != source:
        refuse("it was made from something else")
    uncompressed = annotations.get(UNCOMPRESSED, "")
    if not _SIZE.fullmatch(uncompressed):
        refuse("it has no size of the uncompressed layer")
    return Layer(
        digest=layers[0].digest,
        size=layers[0].size,
        diff_id=digest_of(annotations.get(DIFF_ID)),
        uncompressed=int(uncompressed),
        media_type=layers[0].media_type,
        note=annotations.get(NOTE, ""),
    )


_referrers_log = get_logger("referrers")


def attach(
    registry: Registry, repository: Repository, subject: Descriptor, content: bytes, *, kind: str, title: str
) -> Descriptor | None:  # fmt: skip
    """Push a text as a referrer of an image. A refusal of the registry is only logged.

    Where the registry has no referrers API, the tag `sha256-<digest>` lists the image's referrers, as the specification
    asks of clients.

    Args:
        registry: where the image is.
        repository: its repository.
        subject: the image.
        content: the text.
        kind: its type, a media type.
        title: its file name.

    Returns:
        The referrer's descriptor; None where the registry does not accept it.
    """
    bare = Descriptor(media_type=subject.media_type, digest=subject.digest, size=subject.size)
    try:
        manifest = pushed_text(registry, repository, content, kind=kind, title=title, subject=bare)
        entry = Descriptor.of(manifest, OCI_MANIFEST)
        if not registry.put_referrer(repository, manifest, OCI_MANIFEST, entry.digest):
            _list(registry, repository, bare, {**entry.to_json(), "artifactType": kind, "annotations": {TITLE: title}})
    except BuilderError as error:
        _referrers_log.warning("the registry does not accept a referrer of the image", type=kind, error=error.what)
        return None
    return entry


def _list(registry: Registry, repository: Repository, subject: Descriptor, entry: dict[str, object]) -> None:
    """Add a referrer to the index under the fallback tag."""
    tag = repository.tag(f"sha256-{subject.digest.hex}")
    current = registry.manifest(tag)
    there: list[object] = []
    if current is not None and current.media_type == OCI_INDEX:
        try:
            there = sequence(from_bytes(current.content).get("manifests"), "manifests")
        except Malformed as error:
            _referrers_log.warning(
                "the list of referrers is invalid; making it again", reference=str(tag), why=str(error)
            )
    others = [each for each in there if not (isinstance(each, dict) and each.get("digest") == entry["digest"])]
    index = to_bytes({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*others, entry]})
    if current is None or current.content != index:
        registry.put_manifest(repository, index, OCI_INDEX, tag.tag)
