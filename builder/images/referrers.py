"""What belongs to an image and is kept beside it: referrers (distribution-spec, "Pushing Manifests with Subject")."""

from __future__ import annotations

from builder.errors import BuilderError
from builder.images.descriptor import (
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Malformed,
    from_bytes,
    sequence,
    to_bytes,
)
from builder.images.layer_store import pushed_text
from builder.images.manifest import TITLE
from builder.images.registry import Registry
from builder.log import get_logger
from builder.reference import Repository

_log = get_logger("referrers")


def attach(
    registry: Registry, repository: Repository, subject: Descriptor, content: bytes, *, kind: str, title: str
) -> Descriptor | None:  # fmt: skip
    """Keep a text as a referrer of an image, if the registry takes it; one that does not is only logged.

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
        The referrer's descriptor; None where the registry does not take it.
    """
    bare = Descriptor(media_type=subject.media_type, digest=subject.digest, size=subject.size)
    try:
        manifest = pushed_text(registry, repository, content, kind=kind, title=title, subject=bare)
        entry = Descriptor.of(manifest, OCI_MANIFEST)
        if not registry.put_referrer(repository, manifest, OCI_MANIFEST, entry.digest):
            _list(registry, repository, bare, {**entry.to_json(), "artifactType": kind, "annotations": {TITLE: title}})
    except BuilderError as error:
        _log.warning("the registry does not keep a referrer of the image", type=kind, error=error.what)
        return None
    return entry


def _list(registry: Registry, repository: Repository, subject: Descriptor, entry: dict[str, object]) -> None:
    """Name a referrer in the index under the fallback tag, beside those that are there."""
    tag = repository.tag(f"sha256-{subject.digest.hex}")
    standing = registry.manifest(tag)
    there: list[object] = []
    if standing is not None and standing.media_type == OCI_INDEX:
        try:
            there = sequence(from_bytes(standing.content).get("manifests"), "manifests")
        except Malformed as error:
            _log.warning("the list of referrers is none, and is made again", reference=str(tag), why=str(error))
    others = [each for each in there if not (isinstance(each, dict) and each.get("digest") == entry["digest"])]
    index = to_bytes({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*others, entry]})
    if standing is None or standing.content != index:
        registry.put_manifest(repository, index, OCI_INDEX, tag.tag)
