"""The publishing of one version: plan, fetch, build, push, record. Read it from top to bottom.

`publish` is the three phases in order, in one process. In a Pod each phase is a container of its own; they hand over
through the workspace alone. Each phase is a function of settings and of the clients it talks through, returns typed
values, prints nothing and exits nowhere, so that a notebook or an Airflow task can call it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from builder.log import get_logger, safe_line, stage, taken, transfers
from builder.models import TAG_PLATFORMS, ModelVersion
from builder.models.context import Progress, content_digest, sketch_context, write_context
from builder.plan import Build, Plan
from builder.process import remove_leftovers
from builder.publish.inspect import (
    Prepared,
    artifacts_changed,
    changes,
    find,
    reference_of,
    same_version,
    survey,
)
from builder.publish.log_link import log_link
from builder.publish.record import Record
from builder.reference import Platform, Reference
from builder.settings import BuildSettings, CommonSettings, Settings, network
from builder.workspace import BuildResult, Workspace

log = get_logger("publish")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The result of a publish.

    Attributes:
        version: the model version.
        tag: the reference people use.
        reference: the digest reference; None if the tag holds an image that is not ours.
        platforms: what the image runs on, as `os/architecture[/variant]`.
        changed: whether the registry was changed.
        size: bytes of the images that were made, compressed, all platforms together; 0 if nothing was made.
        method: how they were made: `wheels`, `dockerfile`, both separated by a comma, or empty if nothing was made.
        seconds: that each phase took which ran in this process: `fetch`, `build`, `push`.
        sent: bytes that were sent to the registry.
        saved: bytes of the images that were not sent, since the registry had them.
    """

    version: ModelVersion
    tag: Reference
    reference: Reference | None
    platforms: tuple[str, ...]
    changed: bool
    size: int = 0
    method: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    sent: int = 0
    saved: int = 0


def publish(
    settings: Settings, *, force: bool = False, rebuild: bool = False, progress: Progress | None = None
) -> Published:
    """Publish MODEL_NAME's MODEL_VERSION: fetch, build and push in this process.

    Args:
        settings: those of the environment.
        force: replace an image of another source, or of somebody else, under the tag.
        rebuild: make the image again even if it is present.
        progress: receives the number of bytes downloaded.

    Raises:
        BuilderError: what failed; it is recorded on the version as well, if that was found.
    """
    if settings.build_method != "wheels":
        refuse_untrusted(settings)
    with connected(settings) as services, workspace_of(settings) as workspace:
        version = find(services)
        return publish_version(services, workspace, version, force=force, rebuild=rebuild, progress=progress)


def plan(settings: Settings, *, force: bool = False, rebuild: bool = False, check_push: bool = False) -> Plan:
    """Return the whole plan of MODEL_NAME and MODEL_VERSION, as far as it can be known beforehand; change nothing.

    Only the files that describe the model are downloaded, into a temporary folder: templates, requirements and wheels.

    Args:
        settings: those of the environment.
        force: as for a publish.
        rebuild: as for a publish.
        check_push: also open an upload in the repository and cancel it.

    Raises:
        BuilderError: the error that a publish would end with, as far as it can be known beforehand.
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
    """Publish a version that was found already, through open clients, for `publish` and for a sweep.

    Both call `refuse_untrusted` before any request, unless no Dockerfile is to be run.
    """
    taken()
    began = time.monotonic()
    # One for both phases: push has what fetch leaves. An engine has bounds of its own.
    deadline = Deadline(Budget.of(services.settings), version)
    plan = fetch(services, workspace, version, force=force, rebuild=rebuild, progress=progress, deadline=deadline)
    seconds = {"fetch": _since(began)}
    if plan.made_by("dockerfile"):
        built = time.monotonic()
        with stage("build"):
            build(services.settings, workspace)
        seconds["build"] = _since(built)
    published = push(services, workspace, deadline=deadline)
    _log_published(plan, published, began)
    return replace(published, seconds={**seconds, **published.seconds})


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)


def _methods(plan: Plan) -> str:
    return ",".join(sorted({step.method for step in plan.platforms if isinstance(step, Build)}))


def _log_end(plan: Plan, event: str, began: float, **facts: str | int) -> None:
    """Log the end of a publish, or of one of its phases, in one line.

    Args:
        plan: the plan that was carried out.
        event: the text of the line.
        began: the start, by `time.monotonic`.
        facts: further fields of the line.
    """
    with _lines_of(plan.version, "end"):
        if plan.builds:
            log.info("timings", **taken())
        log.info(
            event,
            image=str(plan.reference),
            **facts,
            method=_methods(plan),
            platforms=sorted(str(step.platform) for step in plan.platforms),
            seconds=_since(began),
        )


def _log_published(plan: Plan, published: Published, began: float) -> None:
    if published.reference is not None:
        event = "published" if published.changed else "already published"
        _log_end(plan, event, began, digest=str(published.reference.digest), bytes=published.size)


@contextmanager
def _lines_of(version: ModelVersion, phase: str) -> Iterator[None]:
    """Add the version and the phase to every line of the log, of threads started here as well."""
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
    """Yield the workspace that the settings name, or else a temporary folder, which is removed afterwards.

    Args:
        settings: BUILDER_WORKSPACE is used.
        shared: whether other processes have to find it as well, so that it must have a name.

    Raises:
        InvalidSettings: it is to be shared and has no name, or it cannot be made.
        TryAgain: another process is using it.
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


def record_of(services: Services, version: ModelVersion) -> Record:
    """Return the record of a version, for the target and the attempt of the settings."""
    settings = services.settings
    return Record(
        services.catalog,
        version,
        settings.target,
        version.source_id(),
        attempt=settings.attempt_id,
        log=log_link(settings, version) if settings.log_url else "",
    )


# ---- preflight: MLflow read and write, registry push


def preflight(services: Services, version: ModelVersion) -> None:
    """Open an upload where the version's image and its candidate will go, and cancel it: before an hour's build.

    Raises:
        PermissionRefused: the credential may not push there; it is recorded on the version as well.
        ServiceUnavailable: the registry is unavailable.
    """
    with _lines_of(version, "preflight"), record_of(services, version).failures():
        candidate = services.settings.smoke_test_candidate
        for reference in (reference_of(services.settings, version), *([candidate] if candidate else [])):
            repository = reference.repository
            services.registries.for_host(repository.host).check_push(repository)
            log.info("the credential may push", repository=str(repository))


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

    The files that describe the model are downloaded and checked, so that a version that cannot be published is refused
    before its weights are downloaded.

    Args:
        services: the clients to work through.
        workspace: made ready for the plan; the description of the model is in it until the context is left.
        version: which.
        force: replace an image of another source, or of somebody else, under the tag.
        rebuild: make the image again even if it is present.
        record: records the start before anything is downloaded; then locks, and facts about base images, are kept in
            the registry too. With None, nothing is changed anywhere.

    Raises:
        InvalidVersion: the version cannot be published as it is.
        ServiceUnavailable: a server is unavailable.
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
        message = f"The artifacts of {version} have changed since its image was made: a new platform would differ."
        remedy = "Use --rebuild, which makes all platforms again."
        raise InvalidVersion(message, remedy=remedy)
    log.info("fetching", files=len(plan.artifacts), reason=plan.reason)
    # The code for requirements and package indexes takes a while to import, and most runs have nothing to do.
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
        force: replace an image of another source, or of somebody else, under the tag.
        rebuild: make the image again even if it is present.
        progress: receives the number of bytes downloaded.
        deadline: bounds the work; None for the settings' budget.

    Returns:
        The plan, which is in the workspace too; if nothing has to be built, there is no context.

    Raises:
        BuilderError: what failed; it is recorded on the version as well.
    """
    record = record_of(services, version)
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

    Weights may name modules too: files that were too large to be read with the description are read once downloaded.
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
    """Refuse to run untrusted Dockerfiles with Kaniko beside a credential.

    A RUN step under Kaniko can read the environment and the files of the whole container.

    Raises:
        InvalidSettings: the container holds a credential, and TRUST_DOCKERFILE_AUTHORS is not set.
    """
    if settings.trust_dockerfile_authors or not settings.holds_credential:
        return
    try:
        engine = select_engine(settings)
    except InvalidSettings:
        return  # build reports it, and push records it
    if engine.name == "kaniko":
        message = "This container holds a credential, and a Dockerfile that Kaniko runs in it could read it."
        remedy = (
            "Run fetch, build and push as containers of their own (k8s/dockerfile), or set "
            "TRUST_DOCKERFILE_AUTHORS=true if everybody who can register a model may have the credential."
        )
        raise InvalidSettings(message, remedy=remedy)


def build(settings: BuildSettings, workspace: Workspace) -> BuildResult:
    """Run the Dockerfile once for each platform, into layouts.

    A failure is written to result.json and not raised: push records it on the version, and raises it.

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
        log.exception("the build failed unexpectedly")
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
        raise BuildFailed(message, remedy="Check the disk, and what the Dockerfile's RUN steps leave.") from error
    lines.info("built", seconds=round(time.monotonic() - began, 1))


# ---- candidate, in a Pod that tests the image: registry push


def candidate(services: Services, workspace: Workspace, *, deadline: Deadline | None = None) -> None:
    """Push the images, and put one where the kubelet takes the Pod's sidecar from, so that push can ask it.

    If there is nothing to test, that is an image that runs nothing: the sidecar has to start in any case.

    Args:
        services: the clients to work through, in a Pod.
        workspace: with the output of fetch and build.
        deadline: bounds the work; None for the settings' budget.

    Raises:
        BuilderError: what failed, the build phase's own failure included; it is recorded on the version as well.
    """
    plan = _plan(services, workspace)
    with _lines_of(plan.version, "candidate"):
        deadline = deadline or Deadline(Budget.of(services.settings), plan.version)
        _, record = _begun(services, plan, deadline)
        with record.failures(), deadline.running():
            if plan.builds:
                with stage("imports"):
                    from builder.publish.assemble import push_candidate
                push_candidate(services, workspace, plan, record)
            elif services.sidecar is not None:
                services.sidecar.offer(None, [])


# ---- push: registry push, MLflow write


def push(services: Services, workspace: Workspace, *, deadline: Deadline | None = None) -> Published:
    """Push what build made, join the platforms, move the tag, and record the outcome.

    Names, tags and platforms come from the plan alone; the layouts are untrusted.

    Args:
        services: the clients to work through.
        workspace: with the output of fetch and build.
        deadline: bounds the work; None for the settings' budget.

    Raises:
        BuilderError: what failed, the build phase's own failure included; it is recorded on the version as well.
    """
    plan = _plan(services, workspace)
    with _lines_of(plan.version, "push"):
        return _push(services, workspace, plan, deadline or Deadline(Budget.of(services.settings), plan.version))


def _plan(services: Services, workspace: Workspace) -> Plan:
    """Return the workspace's plan, which has to be that of MODEL_NAME, if this is set."""
    plan = workspace.plan()
    name = services.settings.model_name
    if name not in {"", plan.version.name}:
        message = f"The workspace holds a plan for {plan.version}, but MODEL_NAME is {name!r}."
        raise UsageError(message, remedy="Run fetch for that model, in a workspace of its own.")
    return plan


def _begun(services: Services, plan: Plan, deadline: Deadline) -> tuple[ModelVersion, Record]:
    """Return the plan's version with the tags that it has now, and its record."""
    attempt = services.settings.attempt_id
    record = Record.of_plan(services.catalog, plan.version, plan, attempt=attempt)
    with record.failures(), deadline.running():
        now = same_version(services, plan)
    return now, Record.of_plan(services.catalog, now, plan, attempt=attempt)


def _push(services: Services, workspace: Workspace, plan: Plan, deadline: Deadline) -> Published:
    began = time.monotonic()
    transfers()
    now, record = _begun(services, plan, deadline)
    tag = plan.reference
    if plan.action == "foreign":
        log.warning("left alone", reference=str(tag), reason=plan.reason)
        record.left_alone(plan)
        return Published(version=now, tag=tag, reference=None, platforms=(), changed=False)
    with record.failures(), deadline.running():
        if now.source_id() != plan.source_id:
            message = f"The tags of {now} were changed while it was being published."
            raise TryAgain(message, remedy="Publish it again, with its new tags.")
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
    sent, saved = transfers()
    return Published(
        version=now,
        tag=tag,
        reference=pinned,
        platforms=platforms,
        changed=plan.action != "nothing",
        size=size,
        method=_methods(plan),
        seconds={"push": _since(began)},
        sent=sent,
        saved=saved,
    )


# ---- the phases, each for a container of its own


def run_preflight(settings: Settings) -> None:
    """Run the preflight of MODEL_NAME's MODEL_VERSION."""
    with connected(settings) as services:
        preflight(services, find(services))


def run_fetch(
    settings: Settings, *, force: bool = False, rebuild: bool = False, progress: Progress | None = None
) -> Plan:
    """Run the fetch phase on the workspace that the settings name."""
    with workspace_of(settings, shared=True) as workspace, connected(settings, in_pod=True) as services:
        began = time.monotonic()
        workspace.clear_plan()
        version = find(services)
        plan = fetch(services, workspace, version, force=force, rebuild=rebuild, progress=progress)
        size = sum(artifact.size or 0 for artifact in plan.artifacts)
        _log_end(plan, "fetched", began, action=plan.action, reason=plan.reason, bytes=size)
        return plan


def run_build(settings: BuildSettings) -> BuildResult:
    """Run the build phase on the workspace that the settings name.

    Raises:
        EngineKilled: the engine was killed from outside. The kubelet counts that as this container's end: if it
            reported success all the same, no other container of the Pod would start.
    """
    with workspace_of(settings, shared=True) as workspace:
        result = build(settings, workspace)
    if result.failure == EngineKilled.__name__:
        result.check()
    return result


def run_candidate(settings: Settings) -> None:
    """Run the candidate phase on the workspace that the settings name.

    Raises:
        InvalidSettings: SMOKE_TEST_CANDIDATE is missing.
    """
    if settings.smoke_test_candidate is None:
        message = "SMOKE_TEST_CANDIDATE is missing: the sidecar's image has that name."
        raise InvalidSettings(message, remedy="Set it, as the component k8s/smoke-test does.")
    with workspace_of(settings, shared=True) as workspace, connected(settings, in_pod=True) as services:
        candidate(services, workspace)


def run_push(settings: Settings) -> Published:
    """Run the push phase on the workspace that the settings name."""
    with workspace_of(settings, shared=True) as workspace, connected(settings, in_pod=True) as services:
        began = time.monotonic()
        published = push(services, workspace)
        _log_published(workspace.plan(), published, began)
        return published
