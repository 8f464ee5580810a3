"""The story: plan, fetch, build, push, record. Read it from top to bottom.

`publish` is the three phases in order, in one process. In a Pod each phase is a container of its own; they hand over
through the workspace alone. Each phase is a function of settings and of the clients it talks through, returns typed
values, prints nothing and exits nowhere, so that a notebook or an Airflow task can call it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from structlog.contextvars import bound_contextvars

from builder.budget import Budget, Deadline, check_listing
from builder.clients import Services, connected
from builder.dockerfile import select_engine
from builder.dockerfile.engine import BuildJob, Engine
from builder.errors import (
    BuilderError,
    BuildFailed,
    Defect,
    EngineKilled,
    InvalidSettings,
    InvalidVersion,
    TryAgain,
    UsageError,
)
from builder.log import get_logger, safe_line, stage, taken
from builder.models import TAG_PLATFORMS, ModelVersion
from builder.models.context import Progress, content_digest, sketch_context, write_context
from builder.plan import Build, Plan
from builder.process import remove_leftovers
from builder.publish.inspect import Prepared, artifacts_changed, changes, find, same_version, survey
from builder.publish.record import Record
from builder.reference import Platform, Reference
from builder.settings import BuildSettings, CommonSettings, Settings, network
from builder.workspace import BuildResult, Workspace

log = get_logger("publish")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What a publish came to.

    Attributes:
        version: the model version.
        tag: the reference people use.
        reference: the digest reference; None where the tag holds an image that is not ours.
        platforms: what the image runs on, as `os/architecture[/variant]`.
        changed: whether the registry was changed.
        size: bytes of the images that were made, compressed, all platforms together; 0 where nothing was made.
    """

    version: ModelVersion
    tag: Reference
    reference: Reference | None
    platforms: tuple[str, ...]
    changed: bool
    size: int = 0


def publish(
    settings: Settings, *, force: bool = False, rebuild: bool = False, progress: Progress | None = None
) -> Published:
    """Publish MODEL_NAME's MODEL_VERSION: fetch, build and push in this process.

    Args:
        settings: what the environment says.
        force: replace an image that another source, or somebody else, left under the tag.
        rebuild: make the image again although it is there.
        progress: told of the bytes downloaded.

    Raises:
        BuilderError: what failed; where the version was found, it is recorded there as well.
    """
    if settings.build_method != "wheels":
        refuse_untrusted(settings)
    with connected(settings) as services, workspace_of(settings) as workspace:
        version = find(services)
        return publish_version(services, workspace, version, force=force, rebuild=rebuild, progress=progress)


def plan(settings: Settings, *, force: bool = False, rebuild: bool = False, check_push: bool = False) -> Plan:
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
    with connected(settings) as services, tempfile.TemporaryDirectory(prefix="builder-plan-") as folder:
        version = find(services)
        with planned(services, Workspace(Path(folder)), version, force=force, rebuild=rebuild) as prepared:
            plan = prepared.plan
            if prepared.recipe is not None:
                from builder.publish.prepare import with_layers

                plan = with_layers(services, prepared)
        if check_push:
            services.registries.for_host(plan.reference.repository.host).check_push(plan.reference.repository)
    return plan


def publish_version(
    services: Services,
    workspace: Workspace,
    version: ModelVersion,
    *,
    force: bool = False,
    rebuild: bool = False,
    progress: Progress | None = None,
) -> Published:
    """Publish a version that was found already, through clients that are there; `publish` and a sweep end here.

    Both have called `refuse_untrusted` before they asked anybody anything, unless no Dockerfile is to be run.
    """
    taken()
    began = time.monotonic()
    # One for both: what fetch takes is no longer there for push. An engine has bounds of its own.
    deadline = Deadline(Budget.of(services.settings), version)
    plan = fetch(services, workspace, version, force=force, rebuild=rebuild, progress=progress, deadline=deadline)
    if plan.made_by("dockerfile"):
        with stage("build"):
            build(services.settings, workspace)
    published = push(services, workspace, deadline=deadline)
    _tell_published(workspace.plan(), published, began)
    return published


def _tell_end(plan: Plan, event: str, began: float, **facts: str | int) -> None:
    """Say in one line of the log what a publish, or a phase of one, came to.

    Args:
        plan: what was done.
        event: what that was.
        began: when, as of `time.monotonic`.
        facts: what is known beside the plan.
    """
    with _lines_of(plan.version, "end"):
        if plan.builds:
            log.info("timings", **taken())
        log.info(
            event,
            image=str(plan.reference),
            **facts,
            method=",".join(sorted({step.method for step in plan.platforms if isinstance(step, Build)})),
            platforms=sorted(str(step.platform) for step in plan.platforms),
            seconds=round(time.monotonic() - began, 3),
        )


def _tell_published(plan: Plan, published: Published, began: float) -> None:
    if published.reference is not None:
        event = "published" if published.changed else "already published"
        _tell_end(plan, event, began, digest=str(published.reference.digest), bytes=published.size)


@contextmanager
def _lines_of(version: ModelVersion, phase: str) -> Iterator[None]:
    """Have every line of the log name the version and the phase, those of threads begun here as well."""
    about = {"model": version.name, "version": version.version, "phase": phase}
    with bound_contextvars(**about):
        try:
            yield
        except BuilderError as error:
            # It is logged where the command ends.
            error.about = about
            raise


@contextmanager
def workspace_of(settings: CommonSettings, *, shared: bool = False) -> Iterator[Workspace]:
    """Give the workspace; one that nobody named is a temporary folder, removed afterwards.

    Args:
        settings: BUILDER_WORKSPACE is used.
        shared: other processes have to find it as well, so somebody must have named it.

    Raises:
        InvalidSettings: it is to be shared, and nobody has named it; or it cannot be made.
        TryAgain: another process is at work in it.
    """
    folder, temporary = settings.workspace_or_temporary()
    workspace = Workspace(folder)
    if temporary and (left := remove_leftovers()):
        log.info("removed what a killed publisher left", folders=left)
    try:
        if temporary and shared:
            message = "BUILDER_WORKSPACE is missing: the phases hand over through that folder."
            raise InvalidSettings(message, remedy="Name the same folder for fetch, build and push.")
        with workspace.locked():
            yield workspace
    finally:
        if temporary:
            workspace.remove()


# ---- fetch: MLflow read and write, registry pull


@contextmanager
def planned(
    services: Services,
    workspace: Workspace,
    version: ModelVersion,
    *,
    force: bool = False,
    rebuild: bool = False,
    record: Record | None = None,
) -> Iterator[Prepared]:
    """Make the whole plan of one version: `builder plan` prints it, and fetch carries it out.

    What describes the model is downloaded and judged, so that a version that cannot be published is refused before its
    weights are here.

    Args:
        services: the clients to work through.
        workspace: made ready for the plan; the description of the model is in it until the context is left.
        version: which.
        force: replace an image that another source, or somebody else, left under the tag.
        rebuild: make the image again although it is there.
        record: records that work begins, before anything is downloaded; then locks, and what is found out about base
            images, are kept in the registry too. None changes nothing anywhere.

    Raises:
        InvalidVersion: the version cannot be published as it is.
        ServiceUnavailable: a server is away, so that nobody can tell.
        PermissionRefused: a server refuses a credential, which is not the same as an absent image.
        BuilderError: another reason for which a publish would fail.
    """
    with stage("survey"):
        plan, existing = survey(services, version, force=force, rebuild=rebuild)
    workspace.prepare(keep_context=bool(plan.builds))
    if not plan.builds:
        found = changes(services, plan) if plan.action == "nothing" else []
        yield Prepared(plan=plan.model_copy(update={"changes": tuple(found)}), existing=existing)
        return
    if record is not None:
        record.started(plan)
    services.smoke_tests.refuse(plan.all_platforms, asked_by_version=bool(version.tags.get(TAG_PLATFORMS)))
    plan = plan.model_copy(update={"artifacts": services.catalog.artifacts(version)})
    check_listing(services.settings, version, plan.artifacts)
    if plan.action == "extend" and artifacts_changed(plan, plan.artifacts):
        message = f"{version} has other artifacts now than its image was made from."
        remedy = "A platform made from them would not belong to the others: --rebuild makes all of them again."
        raise InvalidVersion(message, remedy=remedy)
    log.info("fetching", files=len(plan.artifacts), reason=plan.reason)
    # What reads requirements and asks package indexes takes a while to import, and most runs have nothing to do.
    with stage("imports"):
        from builder.publish.prepare import prepare

    with workspace.describing() as folder:
        with stage("description"):
            described = sketch_context(services.catalog, version, plan.artifacts, folder)
        prepared = prepare(services, plan, folder, existing=existing, keep=record is not None)
        yield replace(prepared, described=described)


def fetch(
    services: Services,
    workspace: Workspace,
    version: ModelVersion,
    *,
    force: bool = False,
    rebuild: bool = False,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> Plan:
    """Download the version's artifacts, render its Dockerfile, and write the plan.

    Args:
        services: the clients to work through.
        workspace: where it is written to.
        version: which.
        force: replace an image that another source, or somebody else, left under the tag.
        rebuild: make the image again although it is there.
        progress: told of the bytes downloaded.
        deadline: what it may take; the settings' budget where there is none.

    Returns:
        The plan, which is in the workspace too; where nothing has to be built there is no context.

    Raises:
        BuilderError: what failed; it is recorded on the version as well.
    """
    record = Record(services.catalog, version, services.settings.target, version.source_id())
    deadline = deadline or Deadline(Budget.of(services.settings), version)
    with _lines_of(version, "fetch"), record.failures(), deadline.running():
        with planned(services, workspace, version, force=force, rebuild=rebuild, record=record) as prepared:
            plan = _written(services, workspace, prepared, progress) if prepared.plan.builds else prepared.plan
        for change in plan.changes:
            log.warning(change, reference=str(plan.reference))
        workspace.write_plan(plan)
    return plan


def _written(services: Services, workspace: Workspace, prepared: Prepared, progress: Progress | None) -> Plan:
    """Write the context, the Dockerfile and the recipe; return the plan with the digest of the context.

    Weights may name modules, too: what was too large to be read with the description is read when it is here.
    """
    from builder.publish.prepare import lacks, prepare

    with stage("artifacts"):
        catalog = prepared.described or services.catalog
        write_context(catalog, prepared.needed, workspace.context, progress=progress)
        workspace.change_context(prepared.changed)
    if lacks(prepared, workspace.context):
        prepared = prepare(services, prepared.plan, workspace.context, existing=prepared.existing, keep=True)
    with stage("artifacts"):
        content = content_digest(workspace.context)
    if prepared.dockerfile:
        workspace.write_dockerfile(prepared.dockerfile)
    if prepared.recipe is not None:
        workspace.write_recipe(prepared.recipe.model_dump_json().encode())
    return prepared.plan.model_copy(update={"content_digest": content})


# ---- build: no credential


def refuse_untrusted(settings: BuildSettings) -> None:
    """Refuse to run strangers' Dockerfiles with Kaniko beside a credential.

    A RUN step under Kaniko can read the environment and the files of the whole container.

    Raises:
        InvalidSettings: the container holds a credential, and nobody said that the authors are trusted with it.
    """
    if settings.trust_dockerfile_authors or not settings.holds_credential:
        return
    try:
        engine = select_engine(settings)
    except InvalidSettings:
        return  # build says so, and push records it
    if engine.name == "kaniko":
        message = "This container holds a credential, and a Dockerfile that Kaniko runs in it could read it."
        remedy = (
            "Run fetch, build and push as three containers (k8s/job.yaml), or set TRUST_DOCKERFILE_AUTHORS=true if "
            "everybody who can register a model may have the credential."
        )
        raise InvalidSettings(message, remedy=remedy)


def build(settings: BuildSettings, workspace: Workspace) -> BuildResult:
    """Run the Dockerfile once for each platform, into layouts.

    What fails is written to result.json and not raised: push records it on the version, and raises it.

    Raises:
        UsageError: fetch has not run.
    """
    plan = workspace.plan()
    with _lines_of(plan.version, "build"):
        return _build(settings, workspace, plan)


def _build(settings: BuildSettings, workspace: Workspace, plan: Plan) -> BuildResult:
    steps = plan.made_by("dockerfile")
    if not steps:
        log.info("nothing to build", reason="no image is made by a Dockerfile" if plan.builds else plan.reason)
        return BuildResult()
    result = BuildResult()
    try:
        refuse_untrusted(settings)
        engine = select_engine(settings)
        result = BuildResult(engine=engine.name)
        for step in steps:
            _build_platform(settings, workspace, engine, step.platform)
            result = result.model_copy(update={"built": (*result.built, step.platform)})
    except BuilderError as error:
        log.error("the build failed", error=error.one_line())
        result = result.failing(error)
    except Exception as error:
        log.exception("the build failed in a way that nobody foresaw")
        result = result.failing(Defect(f"{type(error).__name__} in the build phase.", remedy="See its log."))
    workspace.write_result(result)
    return result


def _build_platform(settings: BuildSettings, workspace: Workspace, engine: Engine, platform: Platform) -> None:
    began = time.monotonic()
    lines = log.bind(platform=str(platform), engine=engine.name)
    lines.info("building")
    job = BuildJob(
        context=workspace.context,
        dockerfile=workspace.dockerfile,
        platform=platform,
        layout=workspace.layout(platform),
        timeout=settings.build_timeout,
        network=network(settings),
        docker_config=settings.build_docker_config,
        cache=settings.build_cache,
    )
    try:
        engine.build(job, lambda line: lines.info(safe_line(line)))
    except OSError as error:
        # A RUN step of an earlier platform can have put anything into the folder of layouts.
        message = f"The layout for {platform} could not be written: {error.strerror or error}."
        raise BuildFailed(message, remedy="See what the Dockerfile's RUN steps leave behind, and the disk.") from error
    lines.info("built", seconds=round(time.monotonic() - began, 1))


# ---- push: registry push, MLflow write


def push(services: Services, workspace: Workspace, *, deadline: Deadline | None = None) -> Published:
    """Push what build made, join the platforms, move the tag, and record the outcome.

    Names, tags and platforms come from the plan alone; the layouts are a stranger's.

    Args:
        services: the clients to work through.
        workspace: what fetch and build have left.
        deadline: what it may take; the settings' budget where there is none.

    Raises:
        BuilderError: what failed, the build phase's own failure included; it is recorded on the version as well.
    """
    plan = workspace.plan()
    name = services.settings.model_name
    if name not in {"", plan.version.name}:
        message = f"The workspace holds a plan for {plan.version}, and MODEL_NAME is {name!r}."
        raise UsageError(message, remedy="Run fetch for the model that is to be pushed, in a workspace of its own.")
    with _lines_of(plan.version, "push"):
        return _push(services, workspace, plan, deadline or Deadline(Budget.of(services.settings), plan.version))


def _push(services: Services, workspace: Workspace, plan: Plan, deadline: Deadline) -> Published:
    record = Record.of_plan(services.catalog, plan.version, plan)
    with record.failures(), deadline.running():
        now = same_version(services, plan)
    record = Record.of_plan(services.catalog, now, plan)
    tag = plan.reference
    if plan.action == "foreign":
        log.warning("left alone", reference=str(tag), reason=plan.reason)
        record.left_alone(plan)
        return Published(version=now, tag=tag, reference=None, platforms=(), changed=False)
    with record.failures(), deadline.running():
        if now.source_id() != plan.source_id:
            message = f"The tags of {now} were changed while it was being published."
            raise TryAgain(message, remedy="Publish it again: it starts from what they are then.")
        if plan.action == "nothing" and plan.observed is not None:
            log.info("nothing to do", reference=str(tag), reason=plan.reason)
            digest, size = plan.observed, 0
        else:
            with stage("imports"):
                from builder.publish.assemble import push_and_tag
            digest, size = push_and_tag(services, workspace, plan, record)
    pinned = tag.repository.digest(digest)
    record.succeeded(plan, pinned)
    platforms = tuple(str(step.platform) for step in plan.platforms)
    changed = plan.action != "nothing"
    return Published(version=now, tag=tag, reference=pinned, platforms=platforms, changed=changed, size=size)


# ---- the phases, each for a container of its own


def run_fetch(
    settings: Settings, *, force: bool = False, rebuild: bool = False, progress: Progress | None = None
) -> Plan:
    """Run the fetch phase on the workspace that the settings name."""
    with workspace_of(settings, shared=True) as workspace, connected(settings) as services:
        began = time.monotonic()
        workspace.clear_plan()
        version = find(services)
        plan = fetch(services, workspace, version, force=force, rebuild=rebuild, progress=progress)
        size = sum(artifact.size or 0 for artifact in plan.artifacts)
        _tell_end(plan, "fetched", began, action=plan.action, reason=plan.reason, bytes=size)
        return plan


def run_build(settings: BuildSettings) -> BuildResult:
    """Run the build phase on the workspace that the settings name.

    Raises:
        EngineKilled: the engine was killed from outside. The kubelet counts that as this container's end, and starts
            no other container of a Pod that says nevertheless that all is well.
    """
    with workspace_of(settings, shared=True) as workspace:
        result = build(settings, workspace)
    if result.failure == EngineKilled.__name__:
        result.check()
    return result


def run_push(settings: Settings) -> Published:
    """Run the push phase on the workspace that the settings name."""
    with workspace_of(settings, shared=True) as workspace, connected(settings) as services:
        began = time.monotonic()
        published = push(services, workspace)
        _tell_published(workspace.plan(), published, began)
        return published
