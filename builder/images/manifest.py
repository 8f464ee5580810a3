"""Image configs, manifests and indexes: how ours are written, and how those under a tag are read. All of it is pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from builder.images.descriptor import (
    INDEXES,
    LAYERS,
    MANIFESTS,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    digest_of,
    from_bytes,
    mapping,
    platform_of,
    refuse,
    sequence,
    strings,
    to_bytes,
)
from builder.reference import Digest, Platform

if TYPE_CHECKING:
    from builder.images.layout import LayoutImage

# Standard annotations: https://github.com/opencontainers/image-spec/blob/main/annotations.md
CREATED = "org.opencontainers.image.created"
TITLE = "org.opencontainers.image.title"
VERSION = "org.opencontainers.image.version"
BASE_NAME = "org.opencontainers.image.base.name"
BASE_DIGEST = "org.opencontainers.image.base.digest"
# Ours. Nobody else's label or annotation may begin so.
PREFIX = "io.modelimage."
SOURCE_ID = f"{PREFIX}source-id"
CONTENT_DIGEST = f"{PREFIX}content-digest"
PLATFORMS = f"{PREFIX}platforms"
ARTIFACTS_DIGEST = f"{PREFIX}artifacts-digest"
LOCK_DIGEST = f"{PREFIX}lock-digest"
REQUIREMENTS_DIGEST = f"{PREFIX}requirements-digest"
METHOD = f"{PREFIX}method"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One platform's image, ready to be pushed.

    Attributes:
        platform: what it runs on.
        manifest: the manifest's bytes.
        config: the config's bytes.
        descriptor: names the manifest, with its platform: an entry of an index.
        config_descriptor: names the config.
        layers: name the layers, first to last.
        annotations: of the manifest.
    """

    platform: Platform
    manifest: bytes = field(repr=False)
    config: bytes = field(repr=False)
    descriptor: Descriptor
    config_descriptor: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of all layers, compressed: what a first pull moves."""
        return sum(layer.size for layer in dict.fromkeys(self.layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What stands under a tag.

    Attributes:
        digest: of the manifest or index that the tag names.
        media_type: what of the two it is.
        source_id: what it was published from; None where we did not make it.
        platforms: the images in it.
        annotations: its annotations.
    """

    digest: Digest
    media_type: str
    source_id: str | None
    platforms: Mapping[Platform, Descriptor]
    annotations: Mapping[str, str]

    @property
    def is_index(self) -> bool:
        """Whether the tag names an index, not a single image."""
        return self.media_type in INDEXES


def finished_image(
    image: LayoutImage, *, labels: Mapping[str, str], annotations: Mapping[str, str], created: datetime
) -> Image:
    """Return an engine's image as we publish it: OCI media types, our labels and annotations, our time.

    The engine's own annotations go, and so do labels of the Dockerfile that begin with our prefix: nobody but us says
    what an image was published from.

    Args:
        image: what the engine left.
        labels: to set in the config; others of the Dockerfile stay.
        annotations: of the manifest.
        created: when the image was made, with a time zone.
    """
    config = dict(image.config)
    config["created"] = timestamp(created)
    config["os"], config["architecture"] = image.platform.os, image.platform.architecture
    if image.platform.variant:
        config["variant"] = image.platform.variant
    runtime = dict(config.get("config") or {})
    kept = {name: text for name, text in (runtime.get("Labels") or {}).items() if not name.startswith(PREFIX)}
    runtime["Labels"] = {**kept, **labels}
    config["config"] = runtime
    config_bytes = to_bytes(config)
    config_descriptor = Descriptor.of(config_bytes, OCI_CONFIG)
    layers = tuple(
        Descriptor(media_type=LAYERS[layer.media_type], digest=layer.digest, size=layer.size) for layer in image.layers
    )
    manifest = to_bytes(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config_descriptor.to_json(),
            "layers": [layer.to_json() for layer in layers],
            "annotations": dict(annotations),
        }
    )
    return Image(
        platform=image.platform,
        manifest=manifest,
        config=config_bytes,
        descriptor=Descriptor.of(manifest, OCI_MANIFEST, image.platform),
        config_descriptor=config_descriptor,
        layers=layers,
        annotations=dict(annotations),
    )


def index(images: Iterable[Descriptor], *, annotations: Mapping[str, str]) -> bytes:
    """Return the bytes of an index of images, ordered by platform, so that the same images give the same index.

    Args:
        images: descriptors with a platform, each platform once.
        annotations: of the index.

    Raises:
        ValueError: a descriptor has no platform, or two have the same.
    """
    by_platform: dict[Platform, Descriptor] = {}
    for image in images:
        if image.platform is None or image.platform in by_platform:
            message = f"{image.digest} has no platform, or that of another image of the index"
            raise ValueError(message)
        by_platform[image.platform] = image
    return to_bytes(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [by_platform[platform].to_json() for platform in sorted(by_platform)],
            "annotations": dict(annotations),
        }
    )


def timestamp(time: datetime) -> str:
    """Return a time with a time zone as RFC 3339 in UTC."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def media_type_of(content: bytes, told: str = "") -> str:
    """Return what a manifest or an index says it is, or what it was served as where it says nothing.

    Raises:
        Malformed: it is not JSON, or says something else than what it was served as.
    """
    inside = from_bytes(content).get("mediaType")
    known = MANIFESTS | INDEXES
    if inside is not None and told in known and inside != told:
        # CVE-2021-41190: one document that is two things, depending on who reads it.
        refuse("it says to be something else than what it was served as")
    return inside if isinstance(inside, str) else told


def read_config(content: bytes) -> tuple[Platform, tuple[Digest, ...]]:
    """Return an image config's platform and the diff ids of its layers.

    Raises:
        Malformed: it is not an image config.
    """
    value = from_bytes(content)
    rootfs = mapping(value.get("rootfs"), "rootfs")
    return platform_of(value), tuple(digest_of(entry) for entry in sequence(rootfs.get("diff_ids"), "diff_ids"))


def config_of(manifest: bytes) -> Descriptor:
    """Return the descriptor of the config that an image manifest names; raises `Malformed` where it names none."""
    return Descriptor.from_json(from_bytes(manifest).get("config"))


def images_of(content: bytes) -> dict[Platform, Descriptor]:
    """Return an index's images by platform; entries of no platform, and attestations, are left out.

    Raises:
        Malformed: it is not an index.
    """
    entries = [Descriptor.from_json(entry) for entry in sequence(from_bytes(content).get("manifests"), "manifests")]
    images: dict[Platform, Descriptor] = {}
    for entry in entries:
        if entry.platform and entry.media_type in MANIFESTS and not entry.is_attestation:
            images.setdefault(entry.platform, entry)
    return images


def read_published(content: bytes, media_type: str, platforms: Mapping[Platform, Descriptor]) -> Published:
    """Return what a manifest or an index says of itself.

    Args:
        content: its bytes.
        media_type: what it is.
        platforms: the images in it: those of `images_of` for an index.

    Raises:
        Malformed: its annotations are not strings.
    """
    annotations = strings(from_bytes(content).get("annotations"), "annotations")
    return Published(
        digest=Digest.of(content),
        media_type=media_type,
        source_id=annotations.get(SOURCE_ID) or None,
        platforms=dict(platforms),
        annotations=annotations,
    )


def engine_config(content: bytes) -> dict[str, Any]:
    """Return an engine's image config if it is one that `finished_image` can work on.

    Raises:
        Malformed: `config` or its labels are not of the form they should have.
    """
    value = from_bytes(content)
    runtime = mapping(value.get("config") or {}, "config")
    strings(runtime.get("Labels"), "labels")
    return value
