"""OCI image layouts that an untrusted process wrote.

An author's Dockerfile ran as root beside the engine that wrote the layout, so nothing in it is believed: files are
opened without following links, exactly one image of the planned platform is accepted, and every blob is compared with
its digest, here and again while it is sent.

The layout is specified in https://github.com/opencontainers/image-spec/blob/main/image-layout.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
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
    Descriptor,
    LayoutBlob,
    Malformed,
    check,
    descriptors,
    from_bytes,
    refuse,
)
from builder.oci.manifest import Image, engine_config, image_of, labelled, media_type_of, read_config, stamped
from builder.reference import Digest, Platform


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


_MOST_LAYERS = 1000
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
    if len(layers) > _MOST_LAYERS:
        refuse(f"it has more than {_MOST_LAYERS} layers")
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
