"""The sweep in a cluster: a Job for each tagged version that is to be published, and the record of those that ended."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from builder.batch import Batch, Result
from builder.batch.sweep import in_vain, log_near_misses, settled
from builder.cluster import Jobs
from builder.cluster.follow import hindered, overdue, pods_of
from builder.cluster.job import (
    MADE_BY,
    MODEL_NAME,
    MODEL_VERSION,
    SWEEP,
    is_of_source,
    job_of,
    seconds_since,
    selector,
    slim,
    state_of,
)
from builder.cluster.pods import ending, is_of_job
from builder.errors import BuilderError, InvalidSettings, InvalidVersion, PermissionRefused
from builder.log import get_logger
from builder.models import wanted_platforms
from builder.models.catalog import MlflowCatalog
from builder.publish.inspect import reference_of
from builder.publish.record import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from builder.cluster.api_server import Cluster, Object
    from builder.models import ModelVersion
    from builder.plan import Method
    from builder.settings import Settings

_LONGEST_PAUSE = timedelta(days=1)
_DESELECTED = "no longer carries the target tag"
_SWEEP = Batch(kind=Result, logger="sweep", modules=())
_log = get_logger("sweep")


def reconcile(settings: Settings, cluster: Cluster, *, retry_failed: bool = False) -> Iterator[Result]:
    """Make a Job for every tagged version that is to be published, SWEEP_PARALLEL at once; yield what is done of each.

    What a version's own tags settle costs no request beyond the listing. Versions are taken in the order they were
    registered, those that have failed before after all others. What a Job's Pods could not record is recorded.

    Args:
        settings: what the environment says; MODEL_NAME and MODEL_VERSION are not used.
        cluster: where Jobs are made.
        retry_failed: try versions again that have failed SWEEP_ATTEMPTS times.

    Raises:
        BuilderError: a listing failed. What fails of one version is yielded, not raised.
    """
    catalog = MlflowCatalog.from_settings(settings)
    jobs = cluster.jobs(selector(settings.target))
    sweep = _Sweep(
        Jobs(settings=settings, cluster=cluster, catalog=catalog),
        retry_failed=retry_failed,
        by_name={job["metadata"]["name"]: slim(job) for job in jobs},
        by=SWEEP,
    )
    seen = False
    for version in catalog.tagged(settings.target_tag):
        seen = True
        found = _SWEEP.result(version, partial(sweep.look, version))
        if found.state != "queued":
            yield found
    sweep.look_at_others()
    if not seen:
        log_near_misses(catalog, settings.target_tag)
    yield from sweep.submit_all()


def reconcile_one(
    jobs: Jobs, version: ModelVersion, *, retry_failed: bool = False, after_its_job: bool = False
) -> Result:  # fmt: skip
    """Make the Job of one tagged version, if a sweep would; return what was done.

    Args:
        jobs: the Jobs it would be one of.
        version: the version, as it was found just now.
        retry_failed: make it although the version has failed before, without a pause.
        after_its_job: its Job has just ended. One that has published this source is not followed by another, whatever
            the settings here say, which may be older than its own; but for platforms that the author has added.

    Raises:
        BuilderError: the Job cannot be made.
    """
    if not version.selected_by(jobs.settings.target_tag):
        return Result(name=str(version), state="gone", detail=_DESELECTED)
    name = jobs.name_of(version)
    job = jobs.cluster.job(name)
    if job and state_of(job) == "active":
        return Result(name=str(version), state="running", detail=f"Job {name}")
    done = after_its_job and job and state_of(job) == "complete" and is_of_source(job, version)
    if done and not _asks_for_more(version, jobs.settings.target):
        return Result(name=str(version), state="current", detail=f"Job {name} has ended")
    if job and state_of(job) == "failed" and is_of_source(job, version) and jobs.unrecorded(version, job):
        jobs.record_end(version, job, ending(job, pods_of(jobs.cluster, job)))
        version = jobs.catalog.find(version.name, version.version)
    sweep = _Sweep(jobs, retry_failed=retry_failed, by_name={name: job} if job else {})
    found = sweep.look(version)
    return found if found.state != "queued" else sweep.submit(version)


def _asks_for_more(version: ModelVersion, target: str) -> bool:
    """Return whether a version names platforms that are not published: its tag has changed while its Job ran."""
    outcome = Outcome.of(version, target)
    try:
        wanted = wanted_platforms(version, ())
    except InvalidVersion:
        return False
    return outcome.state == "published" and not set(map(str, wanted)) <= set(outcome.platforms)


@dataclass
class _Sweep:
    """One sweep: what it has found so far.

    Attributes:
        jobs: the Jobs of its target.
        retry_failed: whether versions are tried again that have failed.
        by_name: the target's Jobs, as of the beginning, less what is large and not looked at.
        by: what its Jobs say of who made them; empty for none.
        queue: the versions that need a Job, without their tags, each with what decides its turn.
        active: the names of Jobs that run and that sweeps have made: whatever others ask for holds no sweep back, but
            where all Jobs share one candidate (SMOKE_TEST_CANDIDATE).
    """

    jobs: Jobs
    retry_failed: bool
    by_name: dict[str, Object]
    by: str = ""
    queue: list[tuple[tuple[int, bool, int], ModelVersion]] = field(default_factory=list)
    active: set[str] = field(default_factory=set)
    _templates: dict[Method, Object] = field(default_factory=dict)
    _pods: list[Object] | None = None
    _seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.settings, self.cluster = self.jobs.settings, self.jobs.cluster
        self.active = self._running(self.by_name.values())

    def _running(self, jobs: Iterable[Object]) -> set[str]:
        """Return the names of the Jobs that run and count: those of sweeps, or all where they share a candidate."""
        running = [job["metadata"] for job in jobs if state_of(job) == "active"]
        if self.settings.smoke_test_candidate is None:
            running = [each for each in running if (each.get("annotations") or {}).get(MADE_BY) == SWEEP]
        return {each["name"] for each in running}

    def look(self, version: ModelVersion) -> Result:
        """Return what is to be done about a version; `queued` where it needs a Job, and is now in the queue."""
        name = self.jobs.name_of(version)
        self._seen.add(name)
        job = self.by_name.get(name)
        if job and state_of(job) == "active":
            return self._look_at(version, job)
        outcome = Outcome.of(version, self.settings.target)
        found = settled(self.settings, version, retry=self.retry_failed)
        if job and state_of(job) == "failed" and is_of_source(job, version) and self.jobs.unrecorded(version, job):
            error = ending(job, self._pods_of(job))
            self.jobs.record_end(version, job, error)
            raise error
        if found is None and outcome.source_id == version.source_id():
            found = self._foreign(version, outcome) or self._paused(version, outcome)
        if found:
            return found
        self.queue.append(((*in_vain(self.settings, version), version.created_ms), version.untagged()))
        return Result(name=str(version), state="queued")

    def look_at_others(self) -> None:
        """Look at Jobs whose version is not listed: deselected or deleted. They are left to end, but not to hang."""
        for name, job in self.by_name.items():
            if name in self._seen or state_of(job) not in {"active", "failed"}:
                continue
            annotations = job["metadata"].get("annotations") or {}
            try:
                version = self.jobs.catalog.find(annotations.get(MODEL_NAME, ""), annotations.get(MODEL_VERSION, ""))
                if state_of(job) == "active":
                    self._look_at(version, job)
                elif is_of_source(job, version) and self.jobs.unrecorded(version, job):
                    self.jobs.record_end(version, job, ending(job, self._pods_of(job)))
            except BuilderError as error:
                _log.info("a Job whose version is not listed", job=name, why=error.one_line())

    def _look_at(self, version: ModelVersion, job: Object) -> Result:
        """Return what is known of a Job that runs; one that does not go on for too long is ended."""
        name = str(job["metadata"]["name"])
        pods = self._pods_of(job)
        error = hindered(self.cluster, job, pods)
        if error and overdue(self.settings, job, pods, error):
            self.jobs.end(version, job, error)
            self.active.discard(name)
            raise error
        detail = f"Job {name}{f': {error.what}' if error else ''}"
        return Result(name=str(version), state="running", detail=detail)

    def _pods_of(self, job: Object) -> list[Object]:
        """Return the Pods of a Job; those of all Jobs are listed once."""
        if self._pods is None:
            found = self.cluster.pods(selector(self.settings.target), fields="status.phase!=Succeeded")
            self._pods = [slim(pod) for pod in found]
        return [pod for pod in self._pods if is_of_job(pod, job)]

    def _foreign(self, version: ModelVersion, outcome: Outcome) -> Result | None:
        """Return that the tag holds somebody else's image: only a hand changes that."""
        if outcome.state != "foreign" or self.retry_failed or outcome.tag != str(reference_of(self.settings, version)):
            return None
        return Result(name=str(version), state="foreign", detail=f"{outcome.tag} was not made by this publisher")

    def _paused(self, version: ModelVersion, outcome: Outcome) -> Result | None:
        """Return that a version is not tried again yet."""
        when = next_try(self.settings, outcome)
        if self.retry_failed or not when or seconds_since(when) >= 0:
            return None
        return Result(name=str(version), state="waiting", detail=f"tried again at {when}: {outcome.error}")

    def submit_all(self) -> Iterator[Result]:
        """Make the Jobs of the queue as there is room, for SWEEP_WAIT at most; yield what was done of each version."""
        self.queue.sort(key=lambda entry: entry[0])
        left = deque(version for _, version in self.queue)
        deadline = time.monotonic() + self.settings.sweep_wait
        refused = 0
        while left:
            while left and len(self.active) < self.settings.sweep_parallel and refused < _MOST_REFUSED:
                version = left.popleft()
                found = _SWEEP.result(version, partial(self._submit_listed, version))
                refused = refused + 1 if isinstance(found.error, _REFUSALS) and not found.own_fault else 0
                yield found
            if refused >= _MOST_REFUSED:
                break
            remaining = deadline - time.monotonic()
            if not left or remaining <= 0:
                break
            labels = selector(self.settings.target)
            self.cluster.await_change(labels, seconds=int(min(remaining, _LOOK)) + 1, of_jobs=True)
            unfinished = self.cluster.jobs(labels, fields="status.successful=0")
            self.active = self._running(unfinished)
        for version in left:
            why = "the last Jobs were refused" if refused >= _MOST_REFUSED else "waits for other Jobs to end"
            yield Result(name=str(version), version=version, state="queued", detail=why)

    def _submit_listed(self, version: ModelVersion) -> Result:
        # The listing may be hours old by now.
        version = self.jobs.catalog.find(version.name, version.version)
        if not version.selected_by(self.settings.target_tag):
            return Result(name=str(version), state="gone", detail=_DESELECTED)
        return settled(self.settings, version, retry=self.retry_failed) or self.submit(version)

    def submit(self, version: ModelVersion) -> Result:
        """Make the Job of a version that was found just now."""
        last = self.by_name.get(self.jobs.name_of(version))
        with self.jobs.record(version).failures():
            method = self.jobs.method_of(version, last)
            if method not in self._templates:
                self._templates[method] = self.jobs.template_of(method)
            body = job_of(self._templates[method], version, target=self.settings.target, by=self.by)
            made = self.jobs.replace(last, body, version)
        if made.created:
            self.active.add(made.name)
        return Result(name=str(version), state="submitted" if made.created else "running", detail=f"Job {made.name}")


# Seconds until Jobs are looked at again, if nothing is heard of them.
_LOOK = 10
# After so many refusals in a row that are no version's fault, the next version would be refused, too.
_MOST_REFUSED = 3
_REFUSALS = (PermissionRefused, InvalidSettings)


def next_try(settings: Settings, outcome: Outcome) -> str:
    """Return when a sweep tries a version again that has failed, RFC 3339 in UTC; empty where it does not.

    The pause is SWEEP_BACKOFF, and twice as long after each further attempt that counts, at most a day. What
    was ended by a signal, as by somebody who deleted its Job, needs no pause.
    """
    if not outcome.error or not outcome.finished or outcome.attempts >= settings.sweep_attempts:
        return ""
    if outcome.interrupted:
        return outcome.finished
    try:
        ended = datetime.fromisoformat(outcome.finished)
    except ValueError:
        return ""
    doublings = min(max(outcome.attempts - 1, 0), 20)
    pause = min(timedelta(seconds=settings.sweep_backoff * 2**doublings), _LONGEST_PAUSE)
    try:
        return (ended + pause).isoformat(timespec="seconds").replace("+00:00", "Z")
    except OverflowError:
        return ""
