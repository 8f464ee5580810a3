"""The plan of one version, read from MLflow and the registry; nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from builder.clients import Services
from builder.dockerfile import select_engine
from builder.errors import BuilderError, InvalidSettings, VersionNotFound
from builder.log import get_logger
from builder.models import Artifact, Inputs, ModelVersion, check_version_text, wanted_platforms
from builder.models.context import Described, listing_digest
from builder.oci.manifest import ARTIFACTS_DIGEST, BASE_DIGEST, BASE_NAME, Published
from builder.oci.registry import published as read_published
from builder.oci.target_rules import check_target, target_rules
from builder.plan import Plan, decide
from builder.reference import Reference
from builder.settings import Settings

if TYPE_CHECKING:
    from builder.wheels.imports import NamedModules
    from builder.wheels.recipe import Recipe

log = get_logger("survey")


def find(services: Services) -> ModelVersion:
    """Return the version that MODEL_NAME and MODEL_VERSION name.

    Raises:
        VersionNotFound: it does not exist.
    """
    settings = services.settings
    return services.catalog.find(settings.model_name, check_version_text(settings.model_version))


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


def survey(
    services: Services, version: ModelVersion, *, force: bool = False, rebuild: bool = False
) -> tuple[Plan, Published | None]:
    """Return the plan, as far as the version and the registry's tag decide it, and the image under the tag.

    Args:
        services: the clients to work through.
        version: the version.
        force: as for a publish.
        rebuild: as for a publish.

    Raises:
        InvalidVersion: the version's tags cannot be used, the registry's tag holds another source's image, or the
            target does not accept the platforms.
        ServiceUnavailable: the registry is unavailable.
        PermissionRefused: the registry refuses the credential, which is not the same as an absent image.
    """
    settings = services.settings
    reference = reference_of(settings, version)
    wanted = wanted_platforms(version, settings.target_platforms)
    Inputs.of(version)
    source_id = version.source_id()
    existing = existing_image(services, reference)
    decision = decide(
        wanted=wanted, existing=existing, source_id=source_id, reference=reference, force=force, rebuild=rebuild
    )
    if decision.action in {"publish", "extend"}:
        # As far as it can be checked before anything is made; push checks the images too.
        check_target(
            target_rules(settings.target),
            reference=reference,
            platforms=[step.platform for step in decision.platforms],
            images=(),
        )
    plan = Plan(
        version=version,
        target=settings.target,
        source_id=source_id,
        reference=reference,
        action=decision.action,
        reason=decision.reason,
        observed=existing.digest if existing else None,
        observed_annotations=dict(existing.annotations) if existing else {},
        wanted=wanted,
        platforms=decision.platforms,
    )
    return plan, existing


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A whole plan, and the inputs to carry it out.

    Attributes:
        plan: the plan; a rendered Dockerfile and the bases are in it.
        existing: the image under the tag when the plan was made; None if there was none.
        dockerfile: the Dockerfile's bytes; empty if none is run.
        recipe: of the images that are made of wheel layers; None if there are none.
        needed: the artifacts that the images are made from: all for a Dockerfile of the version's own, else those of
            the model and of the client.
        changed: the new content of the model's files that differ in the image from what was logged, by path.
        names: the modules that the version's files name, as far as they were read.
        unread: paths of files that may name modules, and that could not be read yet.
        described: downloads the artifacts, except for those that planning has downloaded.
    """

    plan: Plan
    existing: Published | None
    needed: tuple[Artifact, ...] = ()
    dockerfile: bytes = b""
    recipe: Recipe | None = None
    changed: Mapping[str, bytes] = field(default_factory=dict)
    names: NamedModules | None = None
    unread: tuple[str, ...] = ()
    described: Described | None = None


def changes(services: Services, plan: Plan) -> list[str]:
    """Return what has changed since the image was made although its source is the same: its artifacts, its base."""
    was = plan.observed_annotations
    found = []
    try:
        if artifacts_changed(plan, services.catalog.artifacts(plan.version)):
            found.append("the artifacts have changed since this version was published; --rebuild uses the new ones")
    except BuilderError as error:
        # The image exists, whether or not its artifacts still do.
        log.warning("the artifacts could not be listed", version=str(plan.version), error=error.one_line())
    name, digest = was.get(BASE_NAME), was.get(BASE_DIGEST)
    if not name or not digest:
        return found
    try:
        reference = Reference.parse(name)
        base = services.bases.for_host(reference.repository.host).manifest(reference)
    except BuilderError as error:
        log.info("the base image could not be looked up", base=name, error=error.one_line())
        return found
    if base is not None and str(base.digest) != digest:
        found.append(f"the base image {name} has moved since this version was published; --rebuild uses the new one")
    return found


def artifacts_changed(plan: Plan, artifacts: Sequence[Artifact]) -> bool:
    """Return whether the artifacts differ from those that the image under the tag was made from."""
    listed = str(listing_digest(artifacts))
    return plan.same_source and plan.observed_annotations.get(ARTIFACTS_DIGEST, listed) != listed


def engine_here(settings: Settings) -> str:
    """Return the name of the engine that would build on this machine."""
    try:
        return select_engine(settings).name
    except InvalidSettings:
        return f"{settings.build_engine}, which is not on this machine"


def reference_of(settings: Settings, version: ModelVersion) -> Reference:
    """Return the tag that a version is published under: `<REGISTRY_URL>/<model>:v<version>`."""
    return settings.repository_of(version.name).tag(f"v{version.version}")


def existing_image(services: Services, reference: Reference) -> Published | None:
    """Return the image under a tag; None if the registry says that there is none."""
    return read_published(services.registries.for_host(reference.repository.host), reference)
