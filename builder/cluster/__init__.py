"""One Job for each version: made from a template, and recorded where its Pods cannot do that themselves.

A template is a suspended CronJob in the cluster, and nothing of a Pod is made up here. `builder.cluster.follow` follows
a Job to its end, `builder.cluster.reconcile` is the sweep.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from builder.cluster.events import tell_failed, tell_hung, tell_submitted
from builder.cluster.job import (
    JOB_NAME,
    METHOD,
    TEMPLATES,
    WARM_TEMPLATE,
    created,
    is_of_source,
    job_name,
    job_of,
    state_of,
    uid,
    warm_job_of,
)
from builder.errors import BuilderError, InvalidSettings, TryAgain, VersionNotFound
from builder.log import get_logger
from builder.publish.record import Outcome, Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from builder.cluster.api_server import Cluster, Object
    from builder.models import Catalog, ModelVersion
    from builder.plan import Method
    from builder.settings import Settings

# Seconds until a Job that is being deleted is looked at again, if nothing is heard of it.
_LOOK = 2
_MOST_RACES = 5
# The kind of the error for a package without a wheel; its class takes a while to import.
_NO_WHEEL = "NoWheel"
_log = get_logger("cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A version's Job.

    Attributes:
        job: as the API server returned it.
        created: whether it was made now; else it was there, and runs.
    """

    job: Object = field(repr=False)
    created: bool

    @property
    def name(self) -> str:
        """The Job's name."""
        return str(self.job["metadata"]["name"])


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """The Jobs of one target in one namespace.

    Attributes:
        settings: what the environment says.
        cluster: the namespace they are in.
        catalog: where versions are found, and their outcome is recorded.
    """

    settings: Settings
    cluster: Cluster
    catalog: Catalog

    def name_of(self, version: ModelVersion) -> str:
        """Return the name of a version's Job."""
        return job_name(self.settings.target, version)

    def submit(
        self, version: ModelVersion, *, method: Method | None = None, force: bool = False, rebuild: bool = False
    ) -> Submitted:
        """Make the Job of a version, unless it has one that runs. One that has ended is deleted and made again.

        Args:
            version: the version.
            method: which template to copy; None for the one that the version's artifacts and BUILD_METHOD ask for.
            force: as for a publish.
            rebuild: as for a publish.

        Raises:
            InvalidVersion: the version cannot be published as it is; that is recorded.
            InvalidSettings: there is no such template.
            PermissionRefused: the account may not create the Job.
        """
        there = self.cluster.job(self.name_of(version))
        if there and state_of(there) == "active":
            return Submitted(job=there, created=False)
        with self.record(version).failures():
            template = self.template_of(method or self.method_of(version, there))
            body = job_of(template, version, target=self.settings.target, force=force, rebuild=rebuild)
            return self.replace(there, body, version)

    def retry(self, version: ModelVersion) -> Submitted:
        """Make the Job of a version, as `submit` does; earlier attempts no longer count."""
        there = self.cluster.job(self.name_of(version))
        if there and state_of(there) == "active":
            return Submitted(job=there, created=False)
        # What the attempts showed of the method is not forgotten.
        method = self.method_of(version, there)
        self.record(version).reset()
        return self.submit(self.catalog.find(version.name, version.version), method=method)

    def warm(self, version: ModelVersion) -> str:
        """Make the Job that makes a version's wheel layers ahead of time, unless it has one; return that name.

        Args:
            version: the version.

        Returns:
            The name of the Job that was made; empty if there was one.

        Raises:
            InvalidSettings: there is no template of such Jobs.
            PermissionRefused: the account may not create it.
        """
        template = self.cluster.template(WARM_TEMPLATE)
        if template is None:
            message = f"The namespace {self.cluster.namespace} has no template {WARM_TEMPLATE}."
            raise InvalidSettings(message, remedy="Add the component k8s/warm, or unset WARM_ON_CREATE.")
        made = self.cluster.create_job(warm_job_of(template, version, target=self.settings.target))
        return str(made["metadata"]["name"]) if made else ""

    def replace(self, there: Object | None, body: Object, version: ModelVersion) -> Submitted:
        """Create a Job; one of its name that has ended is deleted before.

        The name is the lock: however many call this at once, one Job is made, and all others get that one, which may
        have ended by then.

        Args:
            there: the Job of that name, as far as it is known; it has ended.
            body: the new one.
            version: the version, as it was found just now.
        """
        name = body["metadata"]["name"]
        known = uid(there) if there else ""
        for _ in range(_MOST_RACES):
            if there is not None:
                self.cluster.delete_job(there)
            made = self.cluster.create_job(body)
            if made is not None:
                # The name is ours, so nobody else has begun to record anything since the version was found.
                self.record(version).submitted()
                tell_submitted(self.cluster, made, version)
                _log.info("submitted", job=name, method=body["metadata"]["labels"].get(METHOD, ""))
                return Submitted(job=made, created=True)
            there = self.cluster.job(name)
            if there is not None and state_of(there) != "deleted" and uid(there) != known:
                return Submitted(job=there, created=False)
            if there is not None and state_of(there) == "deleted":
                self.cluster.await_change(f"{JOB_NAME}={name}", seconds=_LOOK)
        message = f"The Job {name} cannot be made: it is deleted and made again by somebody else all the time."
        raise TryAgain(message, remedy="See who deletes it: kubectl get jobs --watch.")

    def method_of(self, version: ModelVersion, last: Object | None = None) -> Method:
        """Return how a version is made, by the listing of its artifacts; none is needed where BUILD_METHOD tells.

        Where a package was found to have no wheel, the template with an engine is tried next, and from then on.

        Args:
            version: the version.
            last: its last Job, if that is still there.

        Raises:
            InvalidVersion: a file may have been meant as the Dockerfile, but has another name or place.
        """
        if self.settings.build_method != "auto":
            return self.settings.build_method
        from builder.wheels.inputs import chosen_method

        outcome = Outcome.of(version, self.settings.target)
        if outcome.source_id == version.source_id() and outcome.error.startswith(f"{_NO_WHEEL}:"):
            return "dockerfile"
        if last and is_of_source(last, version) and last["metadata"]["labels"].get(METHOD) == "dockerfile":
            return "dockerfile"
        return chosen_method("auto", version, [artifact.path for artifact in self.catalog.artifacts(version)])

    def template_of(self, method: Method) -> Object:
        """Return the template of a method.

        Raises:
            InvalidSettings: it is not in the namespace.
        """
        name = TEMPLATES[method]
        template = self.cluster.template(name)
        if template is None:
            message = f"The namespace {self.cluster.namespace} has no template {name}."
            remedy = "Install it: kubectl apply -k k8s/base. Outside of those Jobs: builder sweep --inline."
            if method == "dockerfile":
                remedy = "Install it: kubectl apply -k k8s/dockerfile. Or set BUILD_METHOD=wheels."
            raise InvalidSettings(message, remedy=remedy)
        return template

    def unrecorded(self, version: ModelVersion, job: Object) -> bool:
        """Return whether the version's tags do not tell yet how its Job ended."""
        outcome = Outcome.of(version, self.settings.target)
        if outcome.state in {"", "pending", "running"}:
            return True
        if outcome.is_of(uid(job)):
            # Of a Pod that was evicted, or ended with its Job, the last word is that it was asked to end.
            return outcome.interrupted
        return outcome.finished < created(job)

    def record_end(
        self,
        version: ModelVersion,
        job: Object,
        error: BuilderError,
        *,
        tell: Callable[[Cluster, Object, BuilderError], None] = tell_failed,
    ) -> bool:
        """Record how a Job ended, in place of its Pods; not if the version is gone, or another by now.

        Args:
            version: the version.
            job: its Job.
            error: what ended it.
            tell: makes the Event of it.

        Returns:
            False if MLflow did not take it, so that it is to be recorded later.
        """
        try:
            now = self.catalog.find(version.name, version.version)
        except VersionNotFound:
            return True
        if not is_of_source(job, now):
            return True
        recorded = self.record(now, attempt=uid(job)).not_recorded(error)
        if recorded:
            tell(self.cluster, job, error)
        return recorded

    def end(self, version: ModelVersion, job: Object, error: BuilderError) -> None:
        """Record why a Job does not go on, and delete it; if it cannot be recorded, the next sweep does both."""
        if self.record_end(version, job, error, tell=tell_hung):
            self.cluster.delete_job(job)
            _log.warning("ended a Job that does not go on", job=job["metadata"]["name"], error=error.one_line())

    def record(self, version: ModelVersion, attempt: str = "") -> Record:
        """Return the record of a version, for an attempt by its ATTEMPT_ID."""
        return Record(self.catalog, version, self.settings.target, version.source_id(), attempt=attempt)
