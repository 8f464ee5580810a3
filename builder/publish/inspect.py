"""The plan of one version, as MLflow and the registry have it now. Servers are asked; nothing is changed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from builder.clients import Services, connected
from builder.dockerfile import select_engine
from builder.errors import BuilderError, InvalidSettings
from builder.log import get_logger
from builder.models.context import listing_digest, sketch_context
from builder.models.version import Artifact, Inputs, ModelVersion, check_version_text, wanted_platforms
from builder.oci.base_image import published as read_published
from builder.oci.manifest import ARTIFACTS_DIGEST, BASE_DIGEST, BASE_NAME, Published, check_target, target_rules
from builder.plan import Plan, decide
from builder.reference import Reference
from builder.settings import Settings

log = get_logger("survey")


def find(settings: Settings, services: Services) -> ModelVersion:
    """Return the version that MODEL_NAME and MODEL_VERSION name.

    Raises:
        VersionNotFound: there is none.
    """
    return services.catalog.find(settings.model_name, check_version_text(settings.model_version))


def survey(
    settings: Settings, services: Services, version: ModelVersion, *, force: bool = False, rebuild: bool = False
) -> Plan:
    """Return what would happen, as far as the version and the registry's tag tell; nothing is downloaded.

    Raises:
        InvalidVersion: the version's tags cannot be used, the registry's tag holds another source's image, or the
            target takes no such platforms.
        ServiceUnavailable: the registry is away, so nobody can tell what stands there.
        PermissionRefused: the registry refuses the credential, which is not the same as an absent image.
    """
    reference = reference_of(settings, version)
    wanted = wanted_platforms(version, settings.target_platforms)
    Inputs.of(version)
    source_id = version.source_id()
    existing = existing_image(services, reference)
    decision = decide(
        wanted=wanted, existing=existing, source_id=source_id, reference=reference, force=force, rebuild=rebuild
    )
    if decision.action in {"publish", "extend"}:
        # What can be told before anything is made; push looks at the images, too.
        check_target(
            target_rules(settings.target),
            reference=reference,
            platforms=[step.platform for step in decision.platforms],
            images=(),
        )
    return Plan(
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


def preview(settings: Settings, *, force: bool = False, rebuild: bool = False, check_push: bool = False) -> Plan:
    """Return the whole plan of MODEL_NAME and MODEL_VERSION, with all that can be known beforehand; touch nothing.

    Only what describes the model is downloaded, into a temporary folder: templates, requirements and local wheels.

    Args:
        settings: what the environment says.
        force: as for a publish.
        rebuild: as for a publish.
        check_push: also open an upload in the repository and cancel it.

    Raises:
        BuilderError: what a publish would fail with, as far as it can be seen from here.
    """
    # What reads requirements and asks package indexes takes a while to import, and most runs have nothing to do.
    from builder.publish.fetch import by_methods, with_layers

    with connected(settings) as services:
        version = find(settings, services)
        plan = survey(settings, services, version, force=force, rebuild=rebuild)
        plan = plan.model_copy(update={"artifacts": services.catalog.artifacts(version)})
        if plan.builds:
            with tempfile.TemporaryDirectory(prefix="builder-plan-") as folder:
                sketch_context(services.catalog, version, plan.artifacts, Path(folder))
                made = by_methods(settings, services, plan, Path(folder), keep=False)
                plan = made.plan if made.recipe is None else with_layers(settings, services, made.plan, made.recipe)
        if check_push:
            services.registries.for_host(plan.reference.repository.host).check_push(plan.reference.repository)
    return plan


def changes(services: Services, plan: Plan) -> list[str]:
    """Return what has changed since the image was made although its source is the same: its artifacts, its base."""
    was = plan.observed_annotations
    found = []
    try:
        if artifacts_changed(plan, services.catalog.artifacts(plan.version)):
            found.append("the artifacts have changed since this version was published; --rebuild takes them up")
    except BuilderError as error:
        # The image stands, whether or not what it was made from still does.
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
        found.append(f"the base image {name} has moved since this version was published; --rebuild takes it up")
    return found


def artifacts_changed(plan: Plan, artifacts: Sequence[Artifact]) -> bool:
    """Return whether the artifacts are others than those that the image under the tag was made from."""
    listed = str(listing_digest(artifacts))
    return plan.stands and plan.observed_annotations.get(ARTIFACTS_DIGEST, listed) != listed


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
    """Return what stands under a tag; None where the registry says that nothing does."""
    return read_published(services.registries.for_host(reference.repository.host), reference)
