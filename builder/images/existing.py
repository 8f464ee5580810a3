"""What stands in a registry already: under a tag that we may move, and as a base image."""

from __future__ import annotations

from dataclasses import dataclass

from builder.images.base import config_bytes, find_image
from builder.images.descriptor import CONFIGS, INDEXES, MANIFESTS, Descriptor, Malformed
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
    found = find_image(registry, reference, platform)
    return ResolvedBase(digest=found.digest, diff_ids=found.diff_ids) if found else None


def _platforms(registry: Registry, repository: Repository, fetched: FetchedManifest) -> dict[Platform, Descriptor]:
    if fetched.media_type in INDEXES:
        return images_of(fetched.content)
    if fetched.media_type not in MANIFESTS or config_of(fetched.content).media_type not in CONFIGS:
        return {}
    platform, _ = read_config(config_bytes(registry, repository, fetched))
    return {platform: Descriptor.of(fetched.content, fetched.media_type, platform)}
