"""`builder listen`: what MLflow delivers, and what callers ask for, becomes a Job within a second.

`Listener` is what is done for a request, `endpoints` how requests come in, `submissions` the queue between them.
Whatever the listener misses, the sweep does.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from builder.batch import Result
from builder.cluster.events import tell_end
from builder.cluster.follow import end_of, hindered, pods_of
from builder.cluster.job import MODEL_NAME, MODEL_VERSION, created, finished, state_of, uid
from builder.cluster.job_watch import JobWatch
from builder.cluster.reconcile import reconcile_one
from builder.errors import BuilderError, ExitCode, VersionNotFound
from builder.listener.deliveries import Event
from builder.listener.submissions import Full, Submissions
from builder.log import get_logger
from builder.masking import one_line
from builder.publish.record import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from builder.cluster import Jobs, Submitted
    from builder.cluster.api_server import Object
    from builder.listener.deliveries import Kind
    from builder.models import ModelVersion
    from builder.settings import ListenSettings

# Seconds for which a Job that was made counts as running although the watch has not shown it yet.
_UNSEEN = 120.0
# Jobs that make layers ahead of time at once.
_MOST_WARM = 4
# Jobs whose end is remembered, in case another takes their name before a caller has asked.
_MOST_ENDS = 1000
_LONGEST_ERROR = 1000
_log = get_logger("listener")


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a caller hears of a Job.

    Attributes:
        state: `pending` or `running`, or how it ended: `published`, `failed`, `foreign`.
        image: the digest reference; empty if there is none.
        platforms: of the image.
        error: what failed; of one that has not begun, what it waits for, where that is known.
        remedy: what to do about it.
        exit_code: the publisher's.
        seconds: from the Job's creation to its end, or until now.
    """

    state: str
    image: str = ""
    platforms: tuple[str, ...] = ()
    error: str = ""
    remedy: str = ""
    exit_code: int = 0
    seconds: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether nothing else will be told of the Job."""
        return self.state not in {"pending", "running"}


@dataclass(kw_only=True)
class Listener:
    """What is done for requests. Thread-safe.

    Attributes:
        settings: what the environment says.
        jobs: the Jobs that are made.
        changed: called with each Job that has changed, and whether it was deleted.
        looked: called with the name and the number of each version that was looked at.
        watch: the Jobs as they are now.
        submissions: the versions that were asked for.
    """

    settings: ListenSettings
    jobs: Jobs
    changed: Callable[[Object, bool], None] = lambda _job, _deleted: None
    looked: Callable[[str, str], None] = lambda _name, _version: None
    watch: JobWatch = field(init=False)
    submissions: Submissions = field(init=False)
    _made: dict[str, float] = field(default_factory=dict)
    _ends: dict[str, Told] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Make what it works with; nothing begins before `start`."""
        self.watch = JobWatch(self.jobs.cluster, self.settings.target, changed=self._on_change)
        self.submissions = Submissions(self.work, room=self._has_room)

    def start(self) -> None:
        """Begin to watch and to work."""
        self.watch.start()
        self.submissions.start()

    def close(self, seconds: float) -> None:
        """Go on for some seconds with what was promised; what is left then is the sweep's."""
        left = self.submissions.close(seconds)
        if left:
            _log.warning("ends while versions wait; the next sweep makes their Jobs", versions=left)
        self.watch.close()

    def work(self, event: Event) -> Result:
        """Do what an event asks for, as far as MLflow still says so.

        Args:
            event: what was delivered, some time ago.

        Raises:
            BuilderError: it cannot be done, or not now.
        """
        try:
            version = self.jobs.catalog.find(event.name, event.version)
        except VersionNotFound as error:
            return Result(name=f"{event.name} {event.version}", state="gone", detail=error.what)
        if event.kind == "warm":
            made = "" if version.selected_by(self.settings.target_tag) else self.jobs.warm(version)
            return Result(name=str(version), state="submitted" if made else "current", detail=made)
        version = self._with_end(version)
        self._tell_end(version)
        result = reconcile_one(self.jobs, version, retry_failed=event.again, after_its_job=event.kind == "ended")
        if result.state == "submitted":
            with self._lock:
                self._made[self.jobs.name_of(version)] = time.monotonic()
        self.looked(version.name, version.version)
        return result

    def _tell_end(self, version: ModelVersion) -> None:
        """Leave an Event on a Job that has ended, for those who describe it."""
        job = self.watch.job(self.jobs.name_of(version))
        if job and state_of(job) in {"complete", "failed"} and not self.jobs.unrecorded(version, job):
            tell_end(self.jobs.cluster, job, Outcome.of(version, self.settings.target))

    def _with_end(self, version: ModelVersion) -> ModelVersion:
        """Keep how a version's Job has ended, which another one may be about to replace, for those who follow it.

        Returns:
            The version; as it is now, if that end has just been recorded on it.
        """
        name = self.jobs.name_of(version)
        job = self.watch.job(name)
        if job is None or state_of(job) not in {"complete", "failed"}:
            return version
        if uid(job) in self._ends:
            # Whoever heard of that end may have had it recorded since this version was read.
            missed = self.jobs.unrecorded(version, job)
            return self.jobs.catalog.find(version.name, version.version) if missed else version
        try:
            now = self.jobs.cluster.job(name)
            if now is None or uid(now) != uid(job):
                # Another process has replaced it, and the watch is behind.
                return version
            told = self._told(version, now)
        except BuilderError as error:
            _log.info("callers may not hear how a Job has ended", job=job["metadata"]["name"], why=error.one_line())
            return version
        self._keep(uid(job), told)
        return self.jobs.catalog.find(version.name, version.version)

    def _keep(self, identity: str, told: Told) -> None:
        """Remember how a Job has ended, by its UID."""
        with self._lock:
            self._ends[identity] = told
            if len(self._ends) > _MOST_ENDS:
                del self._ends[next(iter(self._ends))]

    def publish(self, name: str, version: str) -> Submitted:
        """Make the Job of a version because a caller asks for it, whatever was tried before.

        Args:
            name: the registered model.
            version: its number, or `@alias`.

        Raises:
            BuilderError: as `Jobs.submit`, or there is no such version.
        """
        return self.jobs.submit(self._with_end(self.jobs.catalog.find(name, version)))

    def ended(self, name: str, identity: str) -> bool:
        """Return whether a Job is known to have ended, by its name and UID."""
        job = self.watch.job(name)
        return job is not None and uid(job) == identity and state_of(job) != "active"

    def tell(self, name: str, version: str, job_name: str, identity: str) -> Told:
        """Return what became of a Job.

        Args:
            name: the registered model.
            version: its number.
            job_name: the Job's name.
            identity: its UID.

        Raises:
            BuilderError: MLflow or the API server is away, or there is no such version.
        """
        found = self.jobs.catalog.find(name, version)
        job = self.jobs.cluster.job(job_name)
        if job_name != self.jobs.name_of(found) or job is None or uid(job) != identity:
            outcome = Outcome.of(found, self.settings.target)
            return self._ends.get(identity) or _gone(outcome, job_name, identity)
        told = self._told(found, job)
        if told.ended:
            # Told by its Pod, some seconds before the watch has it.
            self._keep(identity, told)
        return told

    def _told(self, version: ModelVersion, job: Object) -> Told:
        """Return what is known of a version's Job that is there."""
        pods = pods_of(self.jobs.cluster, job)
        end = end_of(self.jobs, version, job, pods)
        seconds = _seconds(job)
        if end is None:
            return self._not_ended(version, job, pods)
        # The Pod has recorded it by now.
        outcome = Outcome.of(self.jobs.catalog.find(version.name, version.version), self.settings.target)
        if end.error:
            error, remedy = (one_line(text, _LONGEST_ERROR) for text in (end.error.what, end.error.remedy))
            return Told(state="failed", error=error, remedy=remedy, exit_code=end.code, seconds=seconds)
        state = "foreign" if outcome.state == "foreign" else "published"
        image = "" if state == "foreign" else end.image or outcome.image
        error = outcome.error if state == "foreign" else ""
        return Told(state=state, image=image, platforms=outcome.platforms, error=error, seconds=seconds)

    def _not_ended(self, version: ModelVersion, job: Object, pods: list[Object]) -> Told:
        outcome = Outcome.of(version, self.settings.target)
        if job.get("status", {}).get("ready") or outcome.is_of(uid(job)):
            return Told(state="running", seconds=_seconds(job))
        why = hindered(self.jobs.cluster, job, pods)
        error, remedy = (one_line(text, _LONGEST_ERROR) for text in (why.what, why.remedy)) if why else ("", "")
        return Told(state="pending", error=error, remedy=remedy, seconds=_seconds(job))

    def _on_change(self, job: Object, deleted: bool) -> None:
        if deleted or state_of(job) != "active":
            name = job["metadata"]["name"]
            now = self.watch.job(name)
            if now is None or uid(now) == uid(job):  # else another has its name by now
                with self._lock:
                    self._made.pop(name, None)
            self.submissions.room_again()
        self.changed(job, deleted)

    def look_again(self, job: Object) -> None:
        """Look at a version whose Job has ended: it may have changed meanwhile, or its Pod could not record the end.

        Args:
            job: the Job.
        """
        annotations = job["metadata"].get("annotations") or {}
        name, version = annotations.get(MODEL_NAME, ""), annotations.get(MODEL_VERSION, "")
        if name and version:
            try:
                self.submissions.offer(Event(kind="ended", name=name, version=version), promised=True)
            except Full:
                _log.info("a version whose Job has ended is left to the sweep", model=name, version=version)

    def _has_room(self, kind: Kind, working: int) -> bool:
        """Return whether one more Job may be made; those that callers and the sweep have made do not count."""
        if kind == "warm":
            return self.watch.active_warm() + working < _MOST_WARM
        active, limit = self.watch.active(), time.monotonic() - _UNSEEN
        with self._lock:
            self._made = {name: when for name, when in self._made.items() if name in active or when > limit}
            return len(self._made) + working < self.settings.listen_parallel


def _gone(outcome: Outcome, name: str, identity: str) -> Told:
    """Return what is known of a Job that is gone: what its own Pods recorded, if it has failed."""
    # The image of an earlier attempt may still be there: then the version stays published.
    if outcome.error and outcome.is_of(identity):
        return Told(state="failed", error=outcome.error, exit_code=int(ExitCode.TEMPORARY))
    error, remedy = f"The Job {name} was deleted while it ran.", "Ask for the version again."
    return Told(state="failed", error=error, remedy=remedy, exit_code=int(ExitCode.TEMPORARY))


def _seconds(job: Object) -> float:
    began, end = datetime.fromisoformat(created(job)), finished(job)
    return ((datetime.fromisoformat(end) if end else datetime.now(tz=began.tzinfo)) - began).total_seconds()
