"""A base image: what stands under the reference that a FROM names, for one platform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from builder.errors import InvalidVersion
from builder.images.answers import unexpected
from builder.images.descriptor import (
    INDEXES,
    LAYERS,
    MANIFESTS,
    MOST_JSON_BYTES,
    Descriptor,
    Malformed,
    from_bytes,
    refuse,
    sequence,
)
from builder.images.manifest import config_of, engine_config, images_of, read_config
from builder.images.registry import FetchedManifest, Registry
from builder.reference import Digest, Platform, Reference, Repository

# The newest first: each runs the programs of those behind it.
_ARM_VARIANTS = ("v8", "v7", "v6", "v5")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundImage:
    """An image for one platform, as a registry has it.

    Attributes:
        digest: of what the reference names, an index or a manifest.
        manifest: the platform's image manifest.
        config: the image config's bytes.
        diff_ids: digests of its layers when not compressed, first to last.
    """

    digest: Digest
    manifest: FetchedManifest
    config: bytes = field(repr=False)
    diff_ids: tuple[Digest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseImage:
    """A base image whose layers can be joined with others.

    Attributes:
        reference: as it was asked for.
        digest: of what the reference names, an index or a manifest.
        manifest: of the platform's image manifest.
        platform: as it was asked for; the config may name an older variant of it.
        layers: name the layers, first to last, by OCI's media types.
        diff_ids: digests of the layers when not compressed, in the same order.
        config: the whole image config.
    """

    reference: Reference
    digest: Digest
    manifest: Digest
    platform: Platform
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[Digest, ...]
    config: Mapping[str, Any] = field(repr=False, hash=False)

    @property
    def environ(self) -> Mapping[str, str]:
        """The environment that the config sets; of a name that is set twice, the last."""
        entries = (self.config.get("config") or {}).get("Env") or []
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def base_image(registry: Registry, reference: Reference, platform: Platform) -> BaseImage | None:
    """Return a base image as it stands for a platform, or None where the registry says that there is none.

    Raises:
        InvalidVersion: it is no image, has none for the platform, or has layers that nothing can be joined with.
        BuilderError: it cannot be told; see `Registry`.
    """
    found = find_image(registry, reference, platform)
    if found is None:
        return None
    try:
        layers, config = _layers(found.manifest.content), _config(found.config)
        if len(layers) != len(found.diff_ids):
            refuse(f"it has {len(layers)} layers, and its config tells of {len(found.diff_ids)}")
    except Malformed as error:
        raise _no_image(reference, error) from error
    return BaseImage(
        reference=reference,
        digest=found.digest,
        manifest=found.manifest.digest,
        platform=platform,
        layers=layers,
        diff_ids=found.diff_ids,
        config=config,
    )


def find_image(registry: Registry, reference: Reference, platform: Platform) -> FoundImage | None:
    """Return the image for a platform that a reference leads to, or None where the registry says that there is none.

    Raises:
        InvalidVersion: it is no image, or has none for the platform.
        BuilderError: it cannot be told; see `Registry`.
    """
    fetched = registry.manifest(reference)
    if fetched is None:
        return None
    manifest = fetched
    try:
        if fetched.media_type in INDEXES:
            entry = _entry(images_of(fetched.content), platform, reference)
            inner = registry.manifest(replace(reference, tag="", digest=entry.digest))
            if inner is None or inner.media_type not in MANIFESTS:
                what = f"Reading {reference}"
                raise unexpected(what, f"without its image for {platform}")
            manifest = inner
        config = config_bytes(registry, reference.repository, manifest)
        own, diff_ids = read_config(config)
    except Malformed as error:
        raise _no_image(reference, error) from error
    _entry({own: config_of(manifest.content)}, platform, reference)
    return FoundImage(digest=fetched.digest, manifest=manifest, config=config, diff_ids=diff_ids)


def config_bytes(registry: Registry, repository: Repository, manifest: FetchedManifest) -> bytes:
    """Return the config that an image manifest names.

    Raises:
        Malformed: it names none.
        BuilderError: it cannot be read; see `Registry`.
    """
    return registry.blob_bytes(repository, config_of(manifest.content), MOST_JSON_BYTES)


def _layers(manifest: bytes) -> tuple[Descriptor, ...]:
    layers = [Descriptor.from_json(entry) for entry in sequence(from_bytes(manifest).get("layers"), "layers")]
    for layer in layers:
        if layer.media_type not in LAYERS:
            refuse(f"it has a layer of the unknown kind {layer.media_type}")
    return tuple(replace(layer, media_type=LAYERS[layer.media_type]) for layer in layers)


def _config(content: bytes) -> dict[str, Any]:
    config = engine_config(content)
    environ = sequence((config.get("config") or {}).get("Env") or [], "Env")
    if not all(isinstance(entry, str) for entry in environ):
        refuse("Env is not a list of strings")
    return config


def _no_image(reference: Reference, error: Malformed) -> InvalidVersion:
    return InvalidVersion(f"The base image {reference} is not an image: {error}.", remedy="Name an image in FROM.")


def _entry(images: Mapping[Platform, Descriptor], platform: Platform, reference: Reference) -> Descriptor:
    """Return the image for a platform; an older variant of arm runs on a newer one, as engines take it too."""
    known = platform.architecture == "arm" and platform.variant in _ARM_VARIANTS
    older = _ARM_VARIANTS[_ARM_VARIANTS.index(platform.variant) + 1 :] if known else ()
    for variant in (platform.variant, *older):
        if found := images.get(replace(platform, variant=variant)):
            return found
    there = ", ".join(str(each) for each in sorted(images)) or "no platform that it names"
    message = f"The base image {reference} has no image for {platform}; it has {there}."
    raise InvalidVersion(message, remedy="Take another base image, or leave the platform out of MODEL_PLATFORMS.")
