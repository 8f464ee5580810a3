"""Manifests, configs and indexes: how ours are written, how others are read; layouts of an untrusted process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from builder import safe_open
from builder.errors import BuildFailed
from builder.masking import one_line
from builder.oci import (
    CONFIGS,
    INDEXES,
    LAYERS,
    MANIFESTS,
    MOST_JSON_BYTES,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    LayoutBlob,
    Malformed,
    check,
    descriptors,
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

# Standard annotations: https://github.com/opencontainers/image-spec/blob/main/annotations.md
CREATED = "org.opencontainers.image.created"
TITLE = "org.opencontainers.image.title"
VERSION = "org.opencontainers.image.version"
BASE_NAME = "org.opencontainers.image.base.name"
BASE_DIGEST = "org.opencontainers.image.base.digest"
# Ours. Labels and annotations of others must not begin so.
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
    """What a tag names.

    Attributes:
        digest: of the manifest or index.
        media_type: which of the two it is.
        source_id: what it was published from; None for an image that is not ours.
        platforms: the images in it.
        annotations: its annotations.
    """

    digest: Digest
    media_type: str
    source_id: str | None
    platforms: Mapping[Platform, Descriptor]
    annotations: Mapping[str, str]


def image_of(
    platform: Platform, config: Mapping[str, Any], layers: tuple[Descriptor, ...], annotations: Mapping[str, str]
) -> Image:
    """Return the image of a config and its layers.

    Args:
        platform: what it runs on.
        config: the image config.
        layers: name the layers, first to last, by OCI's media types.
        annotations: of the manifest.
    """
    content = to_bytes(config)
    descriptor = Descriptor.of(content, OCI_CONFIG)
    manifest = manifest_of(descriptor, layers, annotations)
    return Image(
        platform=platform,
        manifest=manifest,
        config=content,
        descriptor=Descriptor.of(manifest, OCI_MANIFEST, platform),
        config_descriptor=descriptor,
        layers=layers,
        annotations=dict(annotations),
    )


def manifest_of(
    config: Descriptor,
    layers: Sequence[Descriptor],
    annotations: Mapping[str, str],
    *,
    kind: str = "",
    subject: Descriptor | None = None,
) -> bytes:
    """Return the bytes of a manifest.

    Args:
        config: names the config.
        layers: name the layers, first to last.
        annotations: of the manifest.
        kind: the type of an artifact, a media type; empty for an image.
        subject: the manifest that it refers to; None for none.
    """
    return to_bytes(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            **({"artifactType": kind} if kind else {}),
            "config": config.to_json(),
            "layers": [layer.to_json() for layer in layers],
            "annotations": dict(annotations),
            **({"subject": subject.to_json()} if subject else {}),
        }
    )


def stamped(config: Mapping[str, Any], platform: Platform, created: datetime) -> dict[str, Any]:
    """Return an image config with our time and the planned platform."""
    variant = {"variant": platform.variant} if platform.variant else {}
    time = timestamp(created)
    return {**config, "created": time, "os": platform.os, "architecture": platform.architecture, **variant}


def labelled(labels: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """Return labels together with ours; others that begin with our prefix are left out."""
    return {**{name: text for name, text in labels.items() if not name.startswith(PREFIX)}, **ours}


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


def media_type_of(content: bytes, declared: str = "") -> str:
    """Return the media type that a manifest or an index has in it, or the declared one where it has none.

    Raises:
        Malformed: it is not JSON, or the two differ.
    """
    inside = from_bytes(content).get("mediaType")
    known = MANIFESTS | INDEXES
    if inside is not None and declared in known and inside != declared:
        # CVE-2021-41190: one document that is two things, depending on the reader.
        refuse("its mediaType is not the declared one")
    return inside if isinstance(inside, str) else declared


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
    entries = descriptors(from_bytes(content).get("manifests"), "manifests")
    images: dict[Platform, Descriptor] = {}
    for entry in entries:
        if entry.platform and entry.media_type in MANIFESTS and not entry.is_attestation:
            images.setdefault(entry.platform, entry)
    return images


def read_published(content: bytes, media_type: str, platforms: Mapping[Platform, Descriptor]) -> Published:
    """Return a manifest or an index with what its annotations say.

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
    """Return an engine's image config, in a form that `finished_image` can work on.

    Raises:
        Malformed: `config` or its labels are malformed.
    """
    value = from_bytes(content)
    runtime = mapping(value.get("config") or {}, "config")
    strings(runtime.get("Labels"), "labels")
    return value


def finished_image(
    image: LayoutImage, *, labels: Mapping[str, str], annotations: Mapping[str, str], created: datetime
) -> Image:
    """Return an engine's image as we publish it: OCI media types, our labels and annotations, our time.

    The engine's own annotations are removed, and so are labels of the Dockerfile that begin with our prefix: only ours
    say what an image was published from.

    Args:
        image: the engine's image.
        labels: to set in the config; others of the Dockerfile stay.
        annotations: of the manifest.
        created: when the image was made, with a time zone.
    """
    config = stamped(image.config, image.platform, created)
    runtime = config.get("config") or {}
    config["config"] = {**runtime, "Labels": labelled(runtime.get("Labels") or {}, labels)}
    layers = tuple(
        Descriptor(media_type=LAYERS[layer.media_type], digest=layer.digest, size=layer.size) for layer in image.layers
    )
    return image_of(image.platform, config, layers, annotations)


_MOST_LAYOUT_LAYERS = 1000
# Of the layers of all images of a version.
MOST_BYTES = 256 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutImage:
    """The one image of a layout, checked.

    Attributes:
        folder: the layout.
        platform: the planned platform, which is the image's.
        config: the image config's JSON.
        layers: descriptors of the layers, first to last, with the engine's media types.
        diff_ids: digests of the layers when not compressed, as the config says; as many as layers.
    """

    folder: Path
    platform: Platform
    config: Mapping[str, Any] = field(repr=False)
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[Digest, ...]

    @property
    def size(self) -> int:
        """Bytes of the layers, each counted once."""
        return sum(blob.size for blob in self.blobs())

    def blobs(self) -> tuple[LayoutBlob, ...]:
        """Return the layers' blobs, each once."""
        return tuple(_blob(self.folder, layer) for layer in {layer.digest: layer for layer in self.layers}.values())


def open_layout(folder: Path, platform: Platform, *, most_bytes: int = MOST_BYTES) -> LayoutImage:
    """Return the one image that an engine left in a layout, every blob of it read and checked.

    Args:
        folder: the layout; the folders above it are trusted.
        platform: the planned platform.
        most_bytes: the most that the layers may have together, by their sizes, whatever a file takes on the disk. A
            file that is mostly holes costs its author nothing and is refused.

    Raises:
        BuildFailed: there is no layout, it does not hold exactly one image, the image is not for the platform, or
            a blob does not match its descriptor.
    """
    try:
        return _open(folder, platform, most_bytes)
    except (safe_open.Unsafe, Malformed) as error:
        message = f"The image that was built for {platform} cannot be used: {one_line(str(error))}."
        raise BuildFailed(message, remedy="Build again; the build's log may say why.") from error


def _open(folder: Path, platform: Platform, most_bytes: int) -> LayoutImage:
    if from_bytes(safe_open.read(folder, "oci-layout", limit=1 << 12)).get("imageLayoutVersion") != "1.0.0":
        refuse("oci-layout has an unknown version")
    entry = _only_image(safe_open.read(folder, "index.json", limit=MOST_JSON_BYTES), platform)
    if entry.media_type in INDEXES:
        entry = _only_image(_json(folder, entry), platform)
    if entry.media_type not in MANIFESTS:
        refuse("it holds an index within an index, or something that is not an image")
    content = _json(folder, entry)
    if media_type_of(content, entry.media_type) not in MANIFESTS:
        refuse("its manifest is not an image's")
    manifest = from_bytes(content)
    config_descriptor = Descriptor.from_json(manifest.get("config"))
    layers = tuple(descriptors(manifest.get("layers"), "layers"))
    if config_descriptor.media_type not in CONFIGS:
        refuse("its config is not an image's")
    _check_layers(layers, most_bytes)
    config = _json(folder, config_descriptor)
    found, diff_ids = read_config(config)
    _check_platform(found, platform, said=bool(from_bytes(config).get("variant")))
    if len(diff_ids) != len(layers):
        refuse(f"it has {len(layers)} layers, and a config for {len(diff_ids)}")
    image = LayoutImage(
        folder=folder, platform=platform, config=engine_config(config), layers=layers, diff_ids=diff_ids
    )
    for blob in image.blobs():
        _check_file(blob)
    with ThreadPoolExecutor(2, thread_name_prefix="layout") as pool:
        list(pool.map(check, image.blobs()))
    return image


def _only_image(index: bytes, platform: Platform) -> Descriptor:
    """Return the one image, or index, of an index; attestations do not count."""
    entries = descriptors(from_bytes(index).get("manifests"), "manifests")
    # An engine that gave the image two names lists it twice.
    images = {entry.digest: entry for entry in entries if not entry.is_attestation}
    if len(images) != 1:
        refuse(f"it should hold one image, and holds {len(images)}")
    (entry,) = images.values()
    if entry.platform:
        _check_platform(entry.platform, platform, said=False)
    return entry


def _check_platform(found: Platform, planned: Platform, *, said: bool) -> None:
    """Refuse another platform than the planned one; an image without a variant of its own fits any."""
    # `Platform.parse` gives an arm without a variant v7.
    unsaid = {replace(planned, variant=""), Platform.parse(f"{planned.os}/{planned.architecture}")}
    if found != planned and (said or found not in unsaid):
        refuse(f"it is for {found}")


def _check_layers(layers: Sequence[Descriptor], most_bytes: int) -> None:
    if len(layers) > _MOST_LAYOUT_LAYERS:
        refuse(f"it has more than {_MOST_LAYOUT_LAYERS} layers")
    for layer in layers:
        if layer.media_type not in LAYERS:
            refuse(f"it has a layer of the media type {layer.media_type}, which registries need not accept")
    sizes: dict[Digest, int] = {}
    for layer in layers:
        if sizes.setdefault(layer.digest, layer.size) != layer.size:
            refuse(f"it names {layer.digest} with two sizes")
    if sum(sizes.values()) > most_bytes:
        refuse(f"its layers are larger than {most_bytes} bytes")


def _check_file(blob: LayoutBlob) -> None:
    """Refuse a blob's file that cannot be what it should be, before any byte of the layers is read."""
    with safe_open.opened(blob.layout, "blobs", "sha256", blob.digest.hex) as (file, size):
        if size != blob.size:
            refuse(f"{blob.digest} of {blob.size} bytes holds something else: {size} bytes")
        if safe_open.is_hollow(file, size):
            refuse(f"{blob.digest} of {size} bytes is mostly holes")


def _json(folder: Path, descriptor: Descriptor) -> bytes:
    """Return a small blob's bytes, read once and checked."""
    if descriptor.size > MOST_JSON_BYTES:
        refuse(f"{descriptor.digest} is larger than {MOST_JSON_BYTES} bytes")
    content = safe_open.read(folder, "blobs", "sha256", descriptor.digest.hex, limit=descriptor.size)
    if Digest.of(content) != descriptor.digest or len(content) != descriptor.size:
        refuse(f"{descriptor.digest} holds something else")
    return content


def _blob(folder: Path, layer: Descriptor) -> LayoutBlob:
    return LayoutBlob(layout=folder, digest=layer.digest, size=layer.size)
