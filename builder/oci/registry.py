"""A registry: manifests, blobs, mounts and uploads, as the distribution specification has them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus

import httpx2

from builder.errors import BuilderError, BuildFailed, PermissionRefused, TryAgain
from builder.log import get_logger, moved, transferred
from builder.oci import (
    CONFIGS,
    INDEXES,
    MANIFESTS,
    MOST_JSON_BYTES,
    Around,
    Blob,
    BytesBlob,
    Counted,
    Descriptor,
    Malformed,
    verified,
)
from builder.oci.manifest import (
    Image,
    LayoutImage,
    Published,
    config_of,
    images_of,
    media_type_of,
    read_config,
    read_published,
)
from builder.oci.transport import Answer, Transport, scope, unexpected
from builder.process import in_background
from builder.reference import Digest, Platform, Reference, Repository

_log = get_logger("registry")
_ACCEPT = ", ".join(sorted(MANIFESTS | INDEXES))
_BINARY = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedManifest:
    """A manifest or an index as a registry keeps it; `digest` is that of `content`."""

    content: bytes = field(repr=False)
    media_type: str
    digest: Digest


class Registry:
    """One registry. May be used by several threads.

    Every operation raises, beside its own errors:
        PermissionRefused: the credential is missing, wrong, or may not do this; or the registry is read-only.
        ServiceUnavailable: the registry cannot be reached, limits requests, or gives an invalid answer.
        InvalidSettings: its certificate is not trusted, or the repository has to be created first.

    Args:
        transport: sends requests to it.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def host(self) -> str:
        """The registry's host, as references name it."""
        return self._transport.host

    def manifest(self, reference: Reference) -> FetchedManifest | None:
        """Return the manifest or index that a reference names, or None where the registry says there is none.

        Only the registry's own word gives None. An ambiguous answer is an error: some registries answer 401 or 403 both
        for a repository that does not exist and for one that may not be seen.
        """
        what = f"Reading {reference}"
        path = self._path(reference.repository, f"manifests/{reference.target}")
        scopes = _pull(reference.repository)
        answer = self._transport.retried(
            what,
            lambda until: self._transport.send("GET", path, until=until, scopes=scopes, headers={"Accept": _ACCEPT}),
        )
        if answer.says_absent:
            return None
        if answer.status != HTTPStatus.OK or answer.is_page:
            raise self._refusal(what, answer)
        digest = Digest.of(answer.content)
        _check_digest(what, answer, digest)
        if reference.digest and reference.digest != digest:
            raise unexpected(what, f"with the content of {digest}")
        try:
            media_type = media_type_of(answer.content, answer.media_type)
        except Malformed as error:
            raise unexpected(what, f"with an invalid manifest: {error}") from error
        return FetchedManifest(content=answer.content, media_type=media_type, digest=digest)

    def blob_bytes(self, repository: Repository, descriptor: Descriptor, limit: int) -> bytes:
        """Return the content of a small blob, checked against its descriptor.

        Args:
            repository: where it is.
            descriptor: names it.
            limit: bytes that it may have.
        """
        what = _reading(repository, descriptor)
        if descriptor.size > limit:
            raise unexpected(what, f"with a size of more than {limit} bytes")
        path, scopes = self._path(repository, f"blobs/{descriptor.digest}"), _pull(repository)
        answer = self._transport.retried(
            what, lambda until: self._transport.send("GET", path, until=until, scopes=scopes, limit=limit)
        )
        if answer.status != HTTPStatus.OK:
            raise self._refusal(what, answer)
        if Digest.of(answer.content) != descriptor.digest:
            raise unexpected(what, "with something else")
        return answer.content

    def blob_stream(self, repository: Repository, descriptor: Descriptor) -> Generator[bytes, None, None]:
        """Yield a blob's bytes, the last of them only when digest and size are what the descriptor says.

        The whole is never in memory. A connection that breaks is resumed where it broke, as often as a request may be
        tried; all of it together may take as long as an upload of that size.

        Args:
            repository: where it is.
            descriptor: names it.
        """
        what = _reading(repository, descriptor)
        path, scopes = self._path(repository, f"blobs/{descriptor.digest}"), _pull(repository)

        def refusal(answer: Answer) -> BuilderError:
            return self._refusal(what, answer)

        def stream() -> Iterator[bytes]:
            return self._transport.stream(what, path, scopes=scopes, size=descriptor.size, refusal=refusal)

        download = _Download(descriptor.digest, descriptor.size, stream)
        try:
            yield from verified(download)
        except BuildFailed as error:
            raise unexpected(what, "with something else") from error

    def has_blob(self, repository: Repository, digest: Digest) -> bool:
        """Return whether a repository holds a blob."""
        what = f"Looking for blob {digest} in {repository}"
        path, scopes = self._path(repository, f"blobs/{digest}"), _push(repository)
        answer = self._transport.retried(
            what, lambda until: self._transport.send("HEAD", path, until=until, scopes=scopes)
        )
        if answer.status == HTTPStatus.NOT_FOUND:
            return False
        if answer.status != HTTPStatus.OK or answer.is_page:
            raise self._refusal(what, answer)
        _check_digest(what, answer, digest)
        return True

    def mount_blob(self, repository: Repository, digest: Digest, from_repository: Repository) -> bool:
        """Make a blob of another repository of this registry one of `repository` as well.

        Returns:
            Whether the registry did so. If not (it cannot, may not, or has no such blob), nothing is left behind, and
            the blob has to be pushed.
        """

        def mount(until: float) -> bool:
            upload = self._begin(repository, until, digest, from_repository)
            if upload is not None:
                self._cancel(repository, upload, until)
            return upload is None

        return self._transport.retried(f"Mounting blob {digest} in {repository}", mount)

    def push_blob(self, repository: Repository, blob: Blob, mount_from: Sequence[Repository] = ()) -> int:
        """Put a blob into a repository, unless it is there.

        It is streamed in bounded memory and checked while it is read: a blob that contradicts its digest is never sent
        to its end.

        Args:
            repository: where to.
            blob: what.
            mount_from: repositories of this registry that may hold it.

        Returns:
            How many bytes were sent: none where it was there, or could be mounted.

        Raises:
            BuildFailed: the blob does not have the content that its digest says.
        """
        sent = 0 if self.has_blob(repository, blob.digest) else self._push_blob(repository, blob, mount_from)
        transferred(str(blob.digest), blob.size, sent=sent)
        return sent

    def _push_blob(self, repository: Repository, blob: Blob, mount_from: Sequence[Repository]) -> int:
        """Mount or send a blob that is not there; return how many bytes were sent."""
        what = f"Pushing blob {blob.digest} to {repository}"

        def push(until: float) -> int:
            upload = None
            for source in [each for each in mount_from if each != repository]:
                if upload is not None:
                    self._cancel(repository, upload, until)
                upload = self._begin(repository, until, blob.digest, source)
                if upload is None:
                    return 0
            upload = upload or self._started(repository, until)
            counted = Counted(blob)
            moved("uploads", more=blob.size)
            try:
                self._put(what, repository, blob if isinstance(blob, BytesBlob) else counted, upload, until)
            except BaseException:
                moved("uploads", -counted.read, more=-blob.size)
                self._cancel(repository, upload, until)
                raise
            moved("uploads", blob.size - counted.read)
            return blob.size

        return self._transport.retried(what, push, size=blob.size)

    def put_manifest(self, repository: Repository, content: bytes, media_type: str, target: str | Digest) -> Digest:
        """Put a manifest or an index into a repository.

        Args:
            repository: where to.
            content: its bytes; what it names has to be there.
            media_type: what it is.
            target: the tag to move to it, or its own digest.

        Returns:
            Its digest.
        """
        return self._put_manifest(repository, content, media_type, target)[0]

    def put_referrer(self, repository: Repository, content: bytes, media_type: str, digest: Digest) -> bool:
        """Put a manifest that has a subject into a repository, by its own digest.

        Returns:
            Whether the registry lists it among its subject's referrers; where it does not, the caller has to.
        """
        return "OCI-Subject" in self._put_manifest(repository, content, media_type, digest)[1].headers

    def _put_manifest(
        self, repository: Repository, content: bytes, media_type: str, target: str | Digest
    ) -> tuple[Digest, Answer]:
        what = f"Pushing {repository}{'@' if isinstance(target, Digest) else ':'}{target}"
        digest = Digest.of(content)
        path, scopes = self._path(repository, f"manifests/{target}"), _push(repository)
        headers = {"Content-Type": media_type}
        body = BytesBlob(content)
        answer = self._transport.retried(
            what,
            lambda until: self._transport.send("PUT", path, until=until, scopes=scopes, headers=headers, body=body),
        )
        if answer.status not in {HTTPStatus.CREATED, HTTPStatus.OK, HTTPStatus.ACCEPTED} or answer.is_page:
            raise self._refusal(what, answer, repository)
        _check_digest(what, answer, digest)
        return digest, answer

    def check_push(self, repository: Repository) -> None:
        """Open an upload and cancel it, to see whether the credential may push to a repository."""

        def check(until: float) -> None:
            self._cancel(repository, self._started(repository, until), until)

        self._transport.retried(f"Opening an upload to {repository}", check)

    def _started(self, repository: Repository, until: float) -> httpx2.URL:
        """Return the URL of a new upload."""
        path, scopes = self._path(repository, "blobs/uploads/"), _push(repository)
        answer = self._transport.send("POST", path, until=until, scopes=scopes, body=BytesBlob(b""))
        return self._upload(repository, answer)

    def _begin(self, repository: Repository, until: float, digest: Digest, source: Repository) -> httpx2.URL | None:
        """Return None where the registry mounted a blob, and else the URL of the upload that it opened instead."""
        path = self._path(repository, f"blobs/uploads/?mount={digest}&from={source.path}")
        scopes = _push(repository) | _pull(source)
        try:
            answer = self._transport.send("POST", path, until=until, scopes=scopes, body=BytesBlob(b""))
        except PermissionRefused:
            answer = None  # a token server that refuses the whole where it could grant a part
        if answer is not None and answer.status == HTTPStatus.CREATED and not answer.is_page:
            return None
        if answer is None or answer.status != HTTPStatus.ACCEPTED:
            # It may be the other repository that may not be read: without it the answer is about this one.
            return self._started(repository, until)
        return self._upload(repository, answer)

    def _upload(self, repository: Repository, answer: Answer) -> httpx2.URL:
        what = f"Opening an upload to {repository}"
        if answer.status != HTTPStatus.ACCEPTED or answer.is_page:
            raise self._refusal(what, answer, repository)
        if "Location" not in answer.headers:
            raise unexpected(what, "without the place to upload to")
        return self._transport.location(answer)

    def _put(self, what: str, repository: Repository, blob: Blob, upload: httpx2.URL, until: float) -> None:
        # Joined by hand: the registry's own query may be signed, and must stay as it is.
        joined = f"{upload}{'&' if upload.query else '?'}digest=sha256%3A{blob.digest.hex}"
        answer = self._transport.send("PUT", joined, until=until, scopes=_push(repository), headers=_BINARY, body=blob)
        if answer.status not in {HTTPStatus.CREATED, HTTPStatus.NO_CONTENT} or answer.is_page:
            # Not about the repository: a 404 here is of an upload that the registry has forgotten.
            raise self._refusal(what, answer)
        _check_digest(what, answer, blob.digest)

    def _cancel(self, repository: Repository, upload: httpx2.URL, until: float) -> None:
        """Tell the registry that an upload will not be finished; it forgets it sooner or later anyway."""
        try:
            self._transport.send("DELETE", upload, until=until, scopes=_push(repository))
        except Exception as error:  # noqa: BLE001 -- what happened before matters, not this
            _log.debug("an upload was not cancelled", repository=str(repository), why=type(error).__name__)

    def _refusal(self, what: str, answer: Answer, repository: Repository | None = None) -> BuilderError:
        return answer.error(what, repository=str(repository or ""), credential=self._transport.has_credential)

    def _path(self, repository: Repository, rest: str) -> str:
        if repository.host != self.host:
            message = f"{repository} is not at {self.host}"
            raise ValueError(message)
        return f"/v2/{repository.path}/{rest}"


@dataclass(frozen=True, slots=True)
class _Download:
    """A `Blob` as a registry sends it, not checked yet.

    Attributes:
        digest: that the blob should have.
        size: that it should have, bytes.
        stream: yields its bytes from the beginning.
    """

    digest: Digest
    size: int
    stream: Callable[[], Iterator[bytes]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class RemoteBlob:
    """A `Blob` in a registry: each reading downloads it, with the errors of `Registry.blob_stream`.

    Attributes:
        registry: where it is.
        repository: where it is there.
        descriptor: names it.
    """

    registry: Registry = field(repr=False)
    repository: Repository
    descriptor: Descriptor

    @property
    def digest(self) -> Digest:
        """The digest it must have."""
        return self.descriptor.digest

    @property
    def size(self) -> int:
        """The bytes it must have."""
        return self.descriptor.size

    def stream(self) -> Iterator[bytes]:
        """Yield its bytes from the beginning; the last of them only when all are what they must be."""
        return self.registry.blob_stream(self.repository, self.descriptor)


def _reading(repository: Repository, descriptor: Descriptor) -> str:
    return f"Reading blob {descriptor.digest} of {repository}"


def _pull(repository: Repository) -> frozenset[str]:
    return frozenset({scope(repository.path, "pull")})


def _push(repository: Repository) -> frozenset[str]:
    return frozenset({scope(repository.path, "pull", "push")})


def _check_digest(what: str, answer: Answer, digest: Digest) -> None:
    """Refuse an answer about other content than `digest`; a registry need not name the content, or by this hash."""
    named = answer.headers.get("Docker-Content-Digest", "").strip()
    if named.startswith("sha256:") and named != str(digest):
        raise unexpected(what, f"for other content: {named[:80]!r} is not {digest}")


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
    """Move a tag to a manifest or an index, if it still names what it named when the plan was made.

    Args:
        registry: where it is.
        reference: the tag.
        content: what to move it to; what it names has been pushed.
        media_type: what that is.
        expected: what the tag named when the plan was made; None where it was not there.

    Returns:
        The digest that the tag names now.

    Raises:
        TryAgain: the tag was moved meanwhile.
        BuilderError: see `Registry`.
    """
    current = registry.manifest(reference)
    found, digest = current.digest if current else None, Digest.of(content)
    if found == digest:
        return digest
    if found != expected:
        message = f"{reference} was {expected or 'not there'} when the plan was made, and is {found or 'gone'} now."
        raise TryAgain(message, remedy="It was published meanwhile. Publish again, with a new plan.")
    return registry.put_manifest(reference.repository, content, media_type, reference.tag)


@dataclass(frozen=True, slots=True)
class Stoppable(Around):
    """A blob that is no longer read once another has failed.

    Attributes:
        blob: the blob.
        stop: set to end the reading.
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


def published(registry: Registry, reference: Reference) -> Published | None:
    """Return what a reference names, or None where the registry says that it names nothing.

    Something else than an image of ours (a chart, an artifact, an index of an unknown form) has no source id, and
    perhaps no platforms.

    Raises:
        BuilderError: the registry does not answer; see `Registry`.
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


def _platforms(registry: Registry, repository: Repository, fetched: FetchedManifest) -> dict[Platform, Descriptor]:
    if fetched.media_type in INDEXES:
        return images_of(fetched.content)
    if fetched.media_type not in MANIFESTS or config_of(fetched.content).media_type not in CONFIGS:
        return {}
    platform, _ = read_config(config_bytes(registry, repository, fetched))
    return {platform: Descriptor.of(fetched.content, fetched.media_type, platform)}


def config_bytes(registry: Registry, repository: Repository, manifest: FetchedManifest) -> bytes:
    """Return the config that an image manifest names.

    Raises:
        Malformed: it names none.
        BuilderError: the registry does not give it; see `Registry`.
    """
    return registry.blob_bytes(repository, config_of(manifest.content), MOST_JSON_BYTES)
