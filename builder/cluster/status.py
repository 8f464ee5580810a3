"""What is known of versions: their own tags, and their Jobs where there is a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from builder.cluster import Jobs
from builder.cluster.follow import hindered, pods_of
from builder.cluster.job import METHOD, created, is_of_source, selector, state_of
from builder.cluster.pods import begun, ending, exit_code
from builder.cluster.reconcile import next_try
from builder.publish.record import Outcome

if TYPE_CHECKING:
    from builder.cluster.api_server import Cluster, Object
    from builder.models import Catalog, ModelVersion
    from builder.settings import Settings

BY_HAND = "builder retry"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What is known of one version, for one target. Texts are empty where nothing is known.

    Attributes:
        model: the registered model.
        version: its version.
        state: `new`, `pending`, `running`, `published`, `failed` or `foreign`.
        method: `wheels` or `dockerfile`, as its Job has it.
        platforms: of the image, `os/architecture[/variant]`.
        digest: of the image.
        attempts: that have failed since the last success.
        since: when it got into this state, RFC 3339 in UTC.
        next_try: when a sweep tries it again, RFC 3339 in UTC; `builder retry` if only a hand does.
        job: the name of its Job, if that is still there.
        error: what went wrong last, or why its Pod does not start.
        log: address of the last attempt's log, where LOG_URL says it.
    """

    model: str
    version: str
    state: str
    method: str = ""
    platforms: tuple[str, ...] = ()
    digest: str = ""
    attempts: int = 0
    since: str = ""
    next_try: str = ""
    job: str = ""
    error: str = ""
    log: str = ""


def status(
    settings: Settings, catalog: Catalog, cluster: Cluster | None, name: str = "", version: str = ""
) -> list[Status]:
    """Return what is known of every tagged version, of those of one model, or of one version, by name and number.

    Args:
        settings: what the environment says.
        catalog: where the versions are.
        cluster: where their Jobs are; None where there is no cluster.
        name: of a model; empty for all.
        version: of that model, tagged or not; empty for all tagged.

    Raises:
        BuilderError: MLflow or the cluster is away, or there is no such version.
    """
    if version:
        versions: Iterator[ModelVersion] = iter([catalog.find(name, version)])
    else:
        versions = (each for each in catalog.tagged(settings.target_tag) if name in {"", each.name})
    if cluster is None:
        return [by_tags(settings, each) for each in versions]
    jobs = Jobs(settings=settings, cluster=cluster, catalog=catalog)
    there = {job["metadata"]["name"]: job for job in cluster.jobs(selector(settings.target))}
    return [with_job(jobs, each, there.get(jobs.name_of(each))) for each in versions]


def by_tags(settings: Settings, version: ModelVersion) -> Status:
    """Return what a version's own tags tell."""
    outcome = Outcome.of(version, settings.target)
    same = outcome.source_id in {"", version.source_id()}
    state, since, error = (outcome.state if same else "") or "new", outcome.finished, outcome.error
    when = next_try(settings, outcome) if state in {"failed", "published"} else ""
    if state == "failed" and not when and outcome.attempts >= settings.sweep_attempts:
        when = BY_HAND
    return Status(
        model=version.name,
        version=version.version,
        state=state,
        platforms=outcome.platforms,
        digest=outcome.image.partition("@")[2],
        attempts=outcome.attempts,
        since=since,
        next_try=when,
        error=error,
        log=outcome.log,
    )


def with_job(jobs: Jobs, version: ModelVersion, job: Object | None) -> Status:
    """Return what a version's tags and its Job tell; a Job that has not ended is asked for its Pods.

    Args:
        jobs: the Jobs it is one of.
        version: the version.
        job: its Job; None where it has none.

    Raises:
        BuilderError: the cluster is away.
    """
    found = by_tags(jobs.settings, version)
    if job is None:
        return found
    name = str(job["metadata"]["name"])
    found = replace(found, job=name, method=str((job["metadata"].get("labels") or {}).get(METHOD, "")))
    if state_of(job) == "active":
        pods = pods_of(jobs.cluster, job)
        if pods and exit_code(pods[-1]) == 0:
            # The Job tells so some seconds later.
            return found
        error = hindered(jobs.cluster, job, pods)
        state = "running" if any(map(begun, pods)) else "pending"
        said = error.one_line() if error else ""
        return replace(found, state=state, since=created(job), next_try="", error=said)
    if state_of(job) == "failed" and is_of_source(job, version) and jobs.unrecorded(version, job):
        pods = pods_of(jobs.cluster, job)
        return replace(found, state="failed", since=created(job), error=ending(job, pods).one_line())
    return found
