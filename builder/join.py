"""From layouts and recipes to one tag: each platform's image pushed, one of them run, the tag moved last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from builder.errors import TryAgain, VersionNotFound, one_line
from builder.images import manifest as manifests
from builder.images.base import base_image
from builder.images.blob import Blob
from builder.images.descriptor import OCI_INDEX, OCI_MANIFEST, Descriptor, from_bytes, to_bytes
from builder.images.layout import MOST_BYTES, LayoutImage, open_layout
from builder.images.profile import check, profile_for
from builder.images.push import move_tag, push_image
from builder.images.registry import Registry, RemoteBlob
from builder.log import get_logger
from builder.models.context import listing_digest
from builder.models.version import ModelVersion
from builder.plan import Base, Plan, PlatformPlan
from builder.record import Record
from builder.reference import Digest, Platform, Reference, Repository
from builder.services import Services
from builder.settings import Settings
from builder.smoke.content import Content
from builder.smoke.policy import Candidate
from builder.stages import stage
from builder.survey import existing_image
from builder.workspace import Workspace

log = get_logger("join")


def push_and_tag(
    settings: Settings, services: Services, workspace: Workspace, plan: Plan, record: Record
) -> tuple[Digest, int]:  # fmt: skip
    """Push every platform's image, and move the tag to them last, so that nobody pulls a half-published version.

    Args:
        settings: what the environment says.
        services: the registry, and MLflow, which is asked whether the version is still there.
        workspace: holds layouts, and the recipe.
        plan: what is to be pushed where; nothing else is believed.
        record: knows what was run already, and takes what came of it.

    Returns:
        The digest that the tag names now, and the bytes of the images that were made, compressed.

    Raises:
        BuilderError: what failed, the build phase's own failure included.
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
        images += _push_assembled(settings, services, workspace, plan)
    with stage("smoke test"):
        local = {blob.digest: blob for layout, _, _ in built for blob in layout.blobs()}
        services.smoke_tests.run(
            _candidates(registry, plan.reference.repository, images, kept, local),
            before=record.smoke_test,
            folder=workspace.folder,
            record=record.smoke_tested,
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
        digest = move_tag(registry, plan.reference, content, media_type, expected=plan.observed)
    return digest, sum(image.size for image in images)


def _candidates(
    registry: Registry,
    repository: Repository,
    images: Sequence[manifests.Image],
    kept: Mapping[Platform, Descriptor],
    local: Mapping[Digest, Blob],
) -> list[Candidate]:
    """Return what may be run of all that will stand under the tag; layers that are not here are downloaded."""

    def blobs(layers: Sequence[Descriptor]) -> list[tuple[Descriptor, Blob]]:
        remote = (RemoteBlob(registry=registry, repository=repository, descriptor=layer) for layer in layers)
        return [(blob.descriptor, local.get(blob.digest, blob)) for blob in remote]

    def made(image: manifests.Image) -> Content:
        return Content(config=image.config, layers=blobs(image.layers))

    def found(platform: Platform, digest: Digest) -> Content:
        image = base_image(registry, repository.digest(digest), platform)
        if image is None:
            message = f"{repository.digest(digest)} was removed while another platform was being published."
            raise TryAgain(message, remedy="Publish it again: it starts from what is there then.")
        return Content(config=to_bytes(image.config), layers=blobs(image.layers))

    return [
        *(Candidate(image.platform, image.descriptor.digest, partial(made, image)) for image in images),
        *(Candidate(platform, each.digest, partial(found, platform, each.digest)) for platform, each in kept.items()),
    ]


def _base_note(bases: set[tuple[str, str]]) -> dict[str, str]:
    """Return the annotations of the base that all images of an index stand on; none where they differ."""
    if len(bases) != 1 or ("", "") in bases:
        return {}
    ((name, digest),) = bases
    return {manifests.BASE_NAME: name, manifests.BASE_DIGEST: digest}


def _finished(
    workspace: Workspace, plan: Plan, step: PlatformPlan, *, most_bytes: int
) -> tuple[LayoutImage, manifests.Image, tuple[Repository, ...]]:
    """Return what an engine left for a platform, what is made of it, and where some of its layers may be."""
    layout = open_layout(workspace.layout(step.platform), step.platform, most_bytes=most_bytes)
    notes = _annotations(plan, step)
    mount_from: tuple[Repository, ...] = ()
    if step.base is not None and layout.diff_ids[: len(step.base.diff_ids)] == step.base.diff_ids:
        # Said only of an image that begins with the base's layers: the base may have moved since the plan.
        notes |= _of_base(step.base)
        mount_from = (Reference.parse(step.base.name).repository,)
    image = manifests.finished_image(layout, labels=notes, annotations=notes, created=plan.version.created)
    return layout, image, mount_from


def _check_profile(plan: Plan, images: Sequence[manifests.Image]) -> None:
    """Refuse images that break the target's rules, and a plan of which no image could keep them."""
    check(
        profile_for(plan.target),
        reference=plan.reference,
        platforms=[step.platform for step in plan.platforms],
        images=[(image.platform, from_bytes(image.config), image.layers) for image in images],
    )


def _push_assembled(settings: Settings, services: Services, workspace: Workspace, plan: Plan) -> list[manifests.Image]:
    """Push the images that are made of wheel layers; nothing names them yet."""
    with stage("imports"):
        from builder.assemble import push_images
        from builder.recipe import Recipe

    def notes(step: PlatformPlan) -> dict[str, str]:
        return _annotations(plan, step) | (_of_base(step.base) if step.base else {})

    recipe = Recipe.from_json(workspace.recipe())
    return push_images(
        settings,
        services.registries,
        plan,
        recipe,
        workspace.context,
        notes=notes,
        check=lambda image: _check_profile(plan, [image]),
    )


def _kept(services: Services, plan: Plan) -> dict[Platform, Descriptor]:
    """Return the images that stay as they are in the registry, as it has them now.

    Raises:
        TryAgain: the tag is not what the plan saw.
    """
    keep = {step.platform: step.kept for step in plan.platforms if step.action == "keep"}
    if not keep:
        return {}
    existing = existing_image(services, plan.reference)
    images = existing.platforms if existing else {}
    if any(platform not in images or images[platform].digest != digest for platform, digest in keep.items()):
        message = f"{plan.reference} was moved by somebody else while this version was being published."
        raise TryAgain(message, remedy="Publish it again: it starts from what is there then.")
    return {platform: images[platform] for platform in keep}


def _of_base(base: Base) -> dict[str, str]:
    return {manifests.BASE_NAME: base.name, manifests.BASE_DIGEST: str(base.digest)}


def _annotations(plan: Plan, step: PlatformPlan | None = None) -> dict[str, str]:
    """Return what an image says of where it comes from; no tracking URI, registry or user is among it.

    Args:
        plan: the plan.
        step: of the plan, for one platform's image; None for the index.
    """
    # What is true of the index alone: an image's bytes are the same whatever stands beside it.
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


def same_version(services: Services, plan: Plan) -> ModelVersion:
    """Return the plan's version as MLflow has it now.

    Raises:
        VersionNotFound: it was deleted, and perhaps another has its number.
    """
    now = services.catalog.find(plan.version.name, plan.version.version)
    if now.created_ms != plan.version.created_ms:
        message = f"{plan.version} was deleted and registered again while it was being published."
        raise VersionNotFound(message, remedy="Publish it again.")
    return now
