"""What stands in a registry already: under a tag that we may move, and as a base image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from builder.errors import InvalidVersion
from builder.images.answers import unexpected
from builder.images.descriptor import CONFIGS, INDEXES, MANIFESTS, MOST_JSON_BYTES, Descriptor, Malformed
from builder.images.manifest import Published, config_of, images_of, read_config, read_published
from builder.images.registry import FetchedManifest, Registry
from builder.reference import Digest, Platform, Reference, Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedBase:
    """A base image as it stands for one platform.

    Attributes:
        digest: of what the reference names, an index or a manifest.
        diff_ids: digests of its layers when not compressed, first to last.
    """

    digest: Digest
    diff_ids: tuple[Digest, ...]


def published(registry: Registry, reference: Reference) -> Published | None:
    """Return what stands under a reference, or None where the registry says that nothing does.

    What is no image of ours (a chart, an artifact, an index of an unknown form) is there all the same, with no source
    id and perhaps without platforms.

    Raises:
        BuilderError: it cannot be told; see `Registry`.
    """
    fetched = registry.manifest(reference)
    if fetched is None:
        return None
    try:
        platforms = _platforms(registry, reference.repository, fetched)
        return read_published(fetched.content, fetched.media_type, platforms)
    except Malformed:
        return Published(
            digest=fetched.digest, media_type=fetched.media_type, source_id=None, platforms={}, annotations={}
        )


def resolve_base(registry: Registry, reference: Reference, platform: Platform) -> ResolvedBase | None:
    """Return a base image as it stands for a platform, or None where the registry says that there is none.

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
        found, diff_ids = read_config(_config(registry, reference.repository, manifest))
    except Malformed as error:
        message = f"The base image {reference} is not an image: {error}."
        raise InvalidVersion(message, remedy="Name an image in FROM.") from error
    _entry({found: config_of(manifest.content)}, platform, reference)
    return ResolvedBase(digest=fetched.digest, diff_ids=diff_ids)


def _platforms(registry: Registry, repository: Repository, fetched: FetchedManifest) -> dict[Platform, Descriptor]:
    if fetched.media_type in INDEXES:
        return images_of(fetched.content)
    if fetched.media_type not in MANIFESTS or config_of(fetched.content).media_type not in CONFIGS:
        return {}
    platform, _ = read_config(_config(registry, repository, fetched))
    return {platform: Descriptor.of(fetched.content, fetched.media_type, platform)}


def _config(registry: Registry, repository: Repository, fetched: FetchedManifest) -> bytes:
    return registry.blob_bytes(repository, config_of(fetched.content), MOST_JSON_BYTES)


def _entry(images: Mapping[Platform, Descriptor], platform: Platform, reference: Reference) -> Descriptor:
    """Return the image for a platform; an older variant of arm runs on a newer one, as engines take it too."""
    older = (
        [f"v{number}" for number in range(int(platform.variant[1:] or "0") - 1, 4, -1)]
        if (platform.architecture == "arm" and platform.variant[1:].isdigit())
        else []
    )
    for variant in (platform.variant, *older):
        if found := images.get(replace(platform, variant=variant)):
            return found
    there = ", ".join(str(each) for each in sorted(images)) or "no platform that it names"
    message = f"The base image {reference} has no image for {platform}; it has {there}."
    raise InvalidVersion(message, remedy="Take another base image, or leave the platform out of MODEL_PLATFORMS.")
