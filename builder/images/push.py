"""From a layout to a registry: blobs, then the config, then the manifest; tags are moved by a call of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from builder.crew import in_background
from builder.errors import TryAgain
from builder.images.blob import Around, Blob, BytesBlob
from builder.images.descriptor import Descriptor
from builder.images.layout import LayoutImage
from builder.images.manifest import Image
from builder.images.registry import Registry
from builder.reference import Digest, Reference, Repository

_THREADS = 4


def push_image(
    registry: Registry,
    repository: Repository,
    layout: LayoutImage,
    image: Image,
    *,
    mount_from: Sequence[Repository] = (),
    progress: Callable[[Digest, int], None] | None = None,
) -> Descriptor:
    """Push one platform's image by its digest; no tag is touched.

    Args:
        registry: where to.
        repository: the repository there.
        layout: holds the layers.
        image: what is made of it.
        mount_from: repositories that may hold some of the layers already: the base's, an earlier version's. Those of
            other registries are left out.
        progress: called once for each layer that is there, with the bytes that were sent for it; from any thread.

    Returns:
        The image's descriptor, with its platform.

    Raises:
        BuildFailed: a layer is no longer what it was when the layout was opened.
        BuilderError: see `Registry`.
    """
    sources = [source for source in dict.fromkeys(mount_from) if source.host == registry.host and source != repository]
    stop = threading.Event()

    def push(blob: Blob) -> None:
        if not stop.is_set():
            sent = registry.push_blob(repository, Stoppable(blob, stop), sources)
            if progress:
                progress(blob.digest, sent)

    # After a failure the others end within a chunk, or with the answer that they wait for.
    with in_background([partial(push, blob) for blob in layout.blobs()], threads=_THREADS, stop=stop) as results:
        results()
    registry.push_blob(repository, BytesBlob(image.config))
    registry.put_manifest(repository, image.manifest, image.descriptor.media_type, image.descriptor.digest)
    return image.descriptor


def move_tag(
    registry: Registry, reference: Reference, content: bytes, media_type: str, expected: Digest | None
) -> Digest:
    """Move a tag to a manifest or an index, if it still stands where the plan saw it.

    Args:
        registry: where it is.
        reference: the tag.
        content: what to move it to; what it names has been pushed.
        media_type: what that is.
        expected: what the tag named when the plan was made; None where it was not there.

    Returns:
        The digest that the tag names now.

    Raises:
        TryAgain: somebody else has moved the tag meanwhile.
        BuilderError: see `Registry`.
    """
    standing = registry.manifest(reference)
    found, digest = standing.digest if standing else None, Digest.of(content)
    if found == digest:
        return digest
    if found != expected:
        message = f"{reference} was {expected or 'not there'} when the plan was made, and is {found or 'gone'} now."
        raise TryAgain(message, remedy="Somebody else has published it: publish again, which plans anew.")
    return registry.put_manifest(reference.repository, content, media_type, reference.tag)


@dataclass(frozen=True, slots=True)
class Stoppable(Around):
    """A blob that is no longer read once another has failed.

    Attributes:
        blob: the blob.
        stop: set when it shall not be read any more.
    """

    blob: Blob
    stop: threading.Event

    def stream(self) -> Iterator[bytes]:
        """Yield the blob's bytes.

        Raises:
            TryAgain: it was stopped.
        """
        for chunk in self.blob.stream():
            if self.stop.is_set():
                message = "Another upload of the same image failed, so this one was ended."
                raise TryAgain(message)
            yield chunk
