"""Assemble and push images, run one as a test, join all, and move the tag last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from builder.clients import Registries, Services
from builder.errors import InvalidVersion, TryAgain, UsageError
from builder.log import get_logger, stage, transferred
from builder.masking import one_line
from builder.models.context import listing_digest
from builder.oci import OCI_INDEX, OCI_MANIFEST, Blob, BytesBlob, Descriptor, from_bytes, to_bytes
from builder.oci import manifest as manifests
from builder.oci.base_image import Addition, BaseImage, Runtime, assembled, base_image
from builder.oci.files_layer import FileEntry, FilesLayer, split
from builder.oci.layer import Layer
from builder.oci.manifest import (
    LOCK_DIGEST,
    MOST_BYTES,
    REQUIREMENTS_DIGEST,
    Image,
    LayoutImage,
    finished_image,
    open_layout,
)
from builder.oci.registry import Registry, RemoteBlob, Stoppable, move_tag, push_image
from builder.oci.store import LayerStore, attach
from builder.oci.target_rules import check_target, target_rules
from builder.plan import Base, Build, Plan
from builder.process import in_background
from builder.publish.inspect import existing_image, same_version
from builder.publish.record import Record
from builder.reference import Digest, Platform, Reference, Repository
from builder.smoke import Candidate
from builder.smoke.runtime import Content
from builder.wheels.inputs import PORT
from builder.wheels.install import venv_layer
from builder.wheels.recipe import HOME, PlatformRecipe, Recipe, WheelsMethod, check_wheels
from builder.wheels.resolve import LOCK_FILE, LOCK_TYPE
from builder.wheels.wheel import ENVIRONMENT
from builder.workspace import Workspace

_log = get_logger("assemble")
_THREADS = 4
USER = "10001:0"


def push_images(services: Services, plan: Plan, recipe: Recipe, context: Path) -> list[Image]:
    """Push the image of every platform that is made of wheel layers, by its digest; no tag is touched.

    Args:
        services: the clients to work through.
        plan: which images to make.
        recipe: what they are made from.
        context: the folder the version's artifacts are in.

    Returns:
        The images, in the plan's order.

    Raises:
        BuilderError: a wheel cannot be found or installed, a file has changed, an image breaks the target's rules, or
            a registry refuses.
    """
    steps = plan.made_by("wheels")
    recipe = recipe.within(context)
    parts = [recipe.for_platform(step.platform) for step in steps]
    target = _Target(services.registries, plan.reference.repository, services.wheels.store)
    bases = [_base(services.wheels, step) for step in steps]
    shares = _shares(context, recipe, parts, target_rules(plan.target).most_layer_bytes)
    # Platforms have all or most of them in common.
    each = list(dict.fromkeys(files for share in shares for files in share))
    tasks: list[Callable[[], list[Addition]]] = [
        *(partial(target.files, files, _title(recipe, files)) for files in each),
        *(partial(target.base, base) for base in bases),
    ]
    # After a failure uploads end within a chunk, or with the answer that they wait for.
    with in_background(tasks, threads=_THREADS, stop=target.stop) as results:
        wheels = _wheel_layers(services.wheels, target, recipe, parts)
        for step, part in zip(steps, parts, strict=True):
            for warning in check_wheels(part, step.base.name if step.base else "", wheels):
                _log.warning("a library is missing", platform=str(part.platform), why=warning)
        made = dict(zip(each, results(), strict=False))
    images = []
    with stage("manifests"):
        for step, part, base, share in zip(steps, parts, bases, shares, strict=True):
            venv, content = venv_layer(part.interpreter, recipe.python)
            target.push(content)
            lock = part.lock.to_text().encode()
            labels = _annotations(plan, step) | (_of_base(step.base) if step.base else {})
            labels |= {LOCK_DIGEST: str(Digest.of(lock)), REQUIREMENTS_DIGEST: str(recipe.requirements)}
            image = assembled(
                base,
                [
                    Addition(layer=venv, history=f"environment on {part.interpreter}"),
                    *(Addition(layer=wheels[group.source], history=f"wheel {group.title}") for group in part.groups),
                    *(addition for files in share for addition in made[files]),
                ],
                _runtime(recipe, part),
                labels=labels,
                annotations=labels,
                created=plan.version.created,
            )
            _check_profile(plan, [image])
            target.push(BytesBlob(image.config))
            target.registry.put_manifest(
                target.repository, image.manifest, image.descriptor.media_type, image.descriptor.digest
            )
            attach(target.registry, target.repository, image.descriptor, lock, kind=LOCK_TYPE, title=LOCK_FILE)
            _log.info("assembled", platform=str(step.platform), layers=len(image.layers), size=image.size)
            images.append(image)
        for text in recipe.unkept:
            target.store.keep_text(text.key, text.content.encode(), kind=text.kind, title=text.title)
    return images


class _Target:
    """The repository that images go to."""

    def __init__(self, registries: Registries, repository: Repository, store: LayerStore) -> None:
        self.registries = registries
        self.registry = registries.for_host(repository.host)
        self.repository = repository
        self.store = store
        self.stop = threading.Event()

    def push(self, blob: Blob, mount_from: Sequence[Repository] = ()) -> int:
        """Push a blob unless it is present; return the bytes that were sent."""
        return self.registry.push_blob(self.repository, Stoppable(blob, self.stop), mount_from)

    def base(self, base: BaseImage) -> list[Addition]:
        """Put a base's layers into the repository; those of another registry are kept beside the wheel layers.

        Returns:
            Nothing that would be added to the base.
        """
        home = base.reference.repository
        source = self.registries.for_host(home.host)
        for layer in base.layers:
            blob = RemoteBlob(registry=source, repository=home, descriptor=layer)
            if home.host == self.registry.host:
                self.push(blob, (home,))
            elif self.registry.has_blob(self.repository, layer.digest):
                transferred(str(layer.digest), layer.size, sent=0)
            else:
                _log.info("copying a layer of the base image", base=str(base.reference), size=layer.size)
                self.registry.push_blob(self.store.repository, Stoppable(blob, self.stop))
                kept = RemoteBlob(registry=self.registry, repository=self.store.repository, descriptor=layer)
                self.push(kept, (self.store.repository,))
        return []

    def files(self, entries: Sequence[FileEntry], history: str) -> list[Addition]:
        """Push the layer of some files, and return it."""
        with stage("model layers"):
            layer = FilesLayer.of(entries)
            sent = self.push(layer)
        _log.debug("model layer", files=len(entries), size=layer.size, sent=sent)
        return [Addition(layer=layer.layer, history=history)]


def _shares(
    context: Path, recipe: Recipe, parts: Sequence[PlatformRecipe], limit: int | None
) -> list[list[tuple[FileEntry, ...]]]:
    """Return the files of each layer that holds the version's own, for each platform."""
    model = _files(context, recipe.model_folder)
    if not model:
        message = f"The folder {recipe.model_folder!r} of the model is empty."
        raise InvalidVersion(message, remedy="Log the model again.")
    client = _files(context, recipe.client_folder) if recipe.client_folder else []
    # One folder may be within the other, and a file is in one layer.
    inner, outer = (client, model) if len(client) < len(model) else (model, client)
    own = {entry.path for entry in inner}
    outer[:] = [entry for entry in outer if entry.path not in own]
    return [split(model, client, most=part.model_layers, limit=limit) for part in parts]


def _files(context: Path, folder: str) -> list[FileEntry]:
    return [
        FileEntry(path=f"{HOME[1:]}/{path.relative_to(context).as_posix()}", source=path, size=path.lstat().st_size)
        for path in sorted((context / folder).rglob("*"))
        if not path.is_dir() or path.is_symlink()
    ]


def _title(recipe: Recipe, files: Sequence[FileEntry]) -> str:
    """Return a layer's line of history."""
    client = f"{HOME[1:]}/{recipe.client_folder}/"
    what = "client" if recipe.client_folder and files[0].path.startswith(client) else "model"
    return f"{what} {files[0].path}" if len(files) == 1 else f"{what}, {len(files)} files"


def _base(wheels: WheelsMethod, step: Build) -> BaseImage:
    """Return the base image as the plan saw it.

    Raises:
        TryAgain: it is gone.
    """
    if step.base is None:
        message = f"The plan has no base image for {step.platform}."
        raise UsageError(message, remedy="Run 'builder fetch' again.")
    named = Reference.parse(step.base.name)
    reference = named.repository.digest(step.base.digest)
    base = wheels.base(reference, step.platform)
    if base is None:
        message = f"The base image {named} no longer exists as {step.base.digest}."
        raise TryAgain(message, remedy="Publish again, with the current base image.")
    return base


def _wheel_layers(
    wheels: WheelsMethod, target: _Target, recipe: Recipe, parts: Sequence[PlatformRecipe]
) -> dict[str, Layer]:  # fmt: skip
    """Return the layers of groups of wheels by their sources, placed in the repository."""
    groups = [group for part in parts for group in part.groups]
    with wheels.layers(recipe) as layers:
        placed = layers.placed(groups, target.repository)
        _log.info("wheel layers are in place", **asdict(layers.transfers))
    return placed


def _runtime(recipe: Recipe, part: PlatformRecipe) -> Runtime:
    """Return how a container is started, as in the built-in Dockerfile.j2."""
    served = {
        "__pyfunc_model_path__": f"{HOME}/{recipe.model_folder}",
        # MLflow sets up its tracking anew after an error; if it cannot write, that hides the error from the log.
        "MLFLOW_TRACKING_URI": "file:///tmp/mlruns",
    }
    return Runtime(
        environment={
            "HOME": "/tmp",  # noqa: S108  # the one folder that any user may write
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "GIT_PYTHON_REFRESH": "quiet",
            # The user has no name of its own in a base image, and getpass.getuser() wants one.
            "USER": "model",
            "LOGNAME": "model",
            **({} if recipe.client_folder else served),
        },
        path=[f"/{ENVIRONMENT}/bin"],
        user=USER,
        workdir=HOME,
        command=part.command,
        ports=[f"{PORT}/tcp"],
    )


log = get_logger("join")


def push_and_tag(services: Services, workspace: Workspace, plan: Plan, record: Record) -> tuple[Digest, int]:
    """Push every platform's image, and move the tag to them last, so that nobody pulls a half-published version.

    Args:
        services: the registry; and MLflow, to check that the version still exists.
        workspace: holds layouts, and the recipe.
        plan: what is to be pushed where; nothing else is believed.
        record: has the result of an earlier smoke test, and takes the new one.

    Returns:
        The digest that the tag names now, and the bytes of the images that were made, compressed.

    Raises:
        BuilderError: what failed, the build phase's own failure included.
    """
    images, kept, candidates = _pushed(services, workspace, plan)
    with stage("smoke test"):
        services.smoke_tests.run(
            candidates, before=record.smoke_test, folder=workspace.folder, record=record.smoke_tested
        )
    descriptors = [*kept.values(), *(image.descriptor for image in images)]
    if len(descriptors) == 1:
        (image,) = images
        content, media_type = image.manifest, OCI_MANIFEST
    else:
        notes = [image.annotations for image in images] + ([plan.observed_annotations] if kept else [])
        bases = {(note.get(manifests.BASE_NAME, ""), note.get(manifests.BASE_DIGEST, "")) for note in notes}
        content = manifests.index(descriptors, annotations=_annotations(plan) | _base_note(bases))
        media_type = OCI_INDEX
    with stage("tag"):
        same_version(services, plan)
        digest = move_tag(
            services.registries.for_host(plan.reference.repository.host),
            plan.reference,
            content,
            media_type,
            expected=plan.observed,
        )
    return digest, sum(image.size for image in images)


def push_candidate(services: Services, workspace: Workspace, plan: Plan, record: Record) -> None:
    """Push every platform's image, and put this machine's where the Pod's sidecar takes it from; move no tag.

    Args:
        services: the registry, and the sidecar.
        workspace: holds layouts, and the recipe.
        plan: what is to be pushed where; nothing else is believed.
        record: has the result of an earlier smoke test.

    Raises:
        BuilderError: what failed, the build phase's own failure included.
    """
    _, _, candidates = _pushed(services, workspace, plan)
    image = services.smoke_tests.untested(candidates, before=record.smoke_test)
    if services.sidecar is not None:
        with stage("candidate"):
            services.sidecar.offer(image.content() if image else None, [plan.reference.repository])


def _pushed(
    services: Services, workspace: Workspace, plan: Plan
) -> tuple[list[manifests.Image], dict[Platform, Descriptor], list[Candidate]]:  # fmt: skip
    """Push every platform's image by its digest; no tag is touched.

    Returns:
        The images that were made, those that stay as they are, and all of them for the smoke test.
    """
    by_engine = plan.made_by("dockerfile")
    if by_engine:
        workspace.result().check()
    registry = services.registries.for_host(plan.reference.repository.host)
    kept = _kept(services, plan)
    built = []
    left = MOST_BYTES
    for step in by_engine:
        built.append(_finished(workspace, plan, step, most_bytes=left))
        left -= built[-1][0].size
    _check_profile(plan, [image for _, image, _ in built])
    for layout, image, mount_from in built:
        log.info("pushing", platform=str(image.platform), layers=len(image.layers), digest=str(image.descriptor.digest))
        push_image(registry, plan.reference.repository, layout, image, mount_from=mount_from)
    images = [image for _, image, _ in built]
    if plan.made_by("wheels"):
        recipe = Recipe.from_json(workspace.recipe())
        images += push_images(services, plan, recipe, workspace.context)
    local = {blob.digest: blob for layout, _, _ in built for blob in layout.blobs()}
    return images, kept, _candidates(registry, plan.reference.repository, images, kept, local)


def _candidates(
    registry: Registry,
    repository: Repository,
    images: Sequence[manifests.Image],
    kept: Mapping[Platform, Descriptor],
    local: Mapping[Digest, Blob],
) -> list[Candidate]:
    """Return the images for the smoke test among those that the tag will hold; layers not here are downloaded."""

    def blobs(layers: Sequence[Descriptor]) -> list[tuple[Descriptor, Blob]]:
        remote = (RemoteBlob(registry=registry, repository=repository, descriptor=layer) for layer in layers)
        return [(blob.descriptor, local.get(blob.digest, blob)) for blob in remote]

    def made(image: manifests.Image) -> Content:
        return Content(config=image.config, layers=blobs(image.layers))

    def found(platform: Platform, digest: Digest) -> Content:
        image = base_image(registry, repository.digest(digest), platform)
        if image is None:
            message = f"{repository.digest(digest)} was removed while another platform was being published."
            raise TryAgain(message, remedy="Publish it again: missing platforms are made.")
        return Content(config=to_bytes(image.config), layers=blobs(image.layers))

    return [
        *(Candidate(image.platform, image.descriptor.digest, partial(made, image)) for image in images),
        *(Candidate(platform, each.digest, partial(found, platform, each.digest)) for platform, each in kept.items()),
    ]


def _base_note(bases: set[tuple[str, str]]) -> dict[str, str]:
    """Return the annotations of the base that all images of an index share; none if they differ."""
    if len(bases) != 1 or ("", "") in bases:
        return {}
    ((name, digest),) = bases
    return {manifests.BASE_NAME: name, manifests.BASE_DIGEST: digest}


def _finished(
    workspace: Workspace, plan: Plan, step: Build, *, most_bytes: int
) -> tuple[LayoutImage, manifests.Image, tuple[Repository, ...]]:
    """Return a platform's layout, the image made of it, and repositories that may have some of its layers."""
    layout = open_layout(workspace.layout(step.platform), step.platform, most_bytes=most_bytes)
    notes = _annotations(plan, step)
    mount_from: tuple[Repository, ...] = ()
    if step.base is not None and layout.diff_ids[: len(step.base.diff_ids)] == step.base.diff_ids:
        # Only for an image that begins with the base's layers: the base may have moved since the plan.
        notes |= _of_base(step.base)
        mount_from = (Reference.parse(step.base.name).repository,)
    image = finished_image(layout, labels=notes, annotations=notes, created=plan.version.created)
    return layout, image, mount_from


def _check_profile(plan: Plan, images: Sequence[manifests.Image]) -> None:
    """Refuse images that break the target's rules, and a plan whose images would have to."""
    check_target(
        target_rules(plan.target),
        reference=plan.reference,
        platforms=[step.platform for step in plan.platforms],
        images=[(image.platform, from_bytes(image.config), image.layers) for image in images],
    )


def _kept(services: Services, plan: Plan) -> dict[Platform, Descriptor]:
    """Return the images that stay as they are in the registry, as it has them now.

    Raises:
        TryAgain: the tag is not what the plan saw.
    """
    keep = {step.platform: step.kept for step in plan.keeps}
    if not keep:
        return {}
    existing = existing_image(services, plan.reference)
    images = existing.platforms if existing else {}
    if any(platform not in images or images[platform].digest != digest for platform, digest in keep.items()):
        message = f"{plan.reference} was moved by somebody else while this version was being published."
        raise TryAgain(message, remedy="Publish it again, from the new state of the tag.")
    return {platform: images[platform] for platform in keep}


def _of_base(base: Base) -> dict[str, str]:
    return {manifests.BASE_NAME: base.name, manifests.BASE_DIGEST: str(base.digest)}


def _annotations(plan: Plan, step: Build | None = None) -> dict[str, str]:
    """Return the annotations about an image's origin; no tracking URI, registry or user is among them.

    Args:
        plan: the plan.
        step: of the plan, for one platform's image; None for the index.
    """
    # For the index alone: an image's bytes do not depend on the platforms beside it.
    platforms = ",".join(sorted(str(step.platform) for step in plan.platforms))
    of_one = {manifests.METHOD: step.method} if step else {manifests.PLATFORMS: platforms}
    return of_one | {
        manifests.CREATED: manifests.timestamp(plan.version.created),
        manifests.TITLE: one_line(plan.version.name, 300),
        manifests.VERSION: plan.version.version,
        manifests.SOURCE_ID: plan.source_id,
        manifests.CONTENT_DIGEST: str(plan.content_digest),
        manifests.ARTIFACTS_DIGEST: str(listing_digest(plan.artifacts)),
    }
