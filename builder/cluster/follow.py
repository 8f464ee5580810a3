"""A Job followed to its end: its logs, and why it does not go on."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from builder.cluster.events import tell_failed, tell_published
from builder.cluster.job import JOB_NAME, JOB_UID, created, seconds_since, state_of, uid
from builder.cluster.pods import (
    begun,
    containers,
    ending,
    exit_code,
    image_of,
    last_moment,
    not_started,
    stuck,
)
from builder.errors import BuilderError, ServiceUnavailable, StillRunning, TryAgain, VersionNotFound
from builder.log import get_logger, safe_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from builder.cluster import Jobs
    from builder.cluster.api_server import Cluster, Object
    from builder.models import ModelVersion
    from builder.settings import Settings

# Seconds until a Pod is looked at again while nothing is heard of it.
_LOOK = 2
# Seconds for which the API server may be away.
_AWAY = 120
# Seconds for the last lines of a log, once its Pod has ended.
_LAST_LINES = 30
# Fields of a line that our own line has, or that logging takes for something else.
_RESERVED = frozenset(
    {
        *("timestamp", "logger", "event", "level", "method_name", "exc_info", "exception", "stack_info", "stack"),
        *("stacklevel", "extra", "args", "self"),
    }
)
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_log = get_logger("cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a Job ended.

    Attributes:
        code: the publisher's exit code; 0 if it published, or had nothing to do.
        image: the digest reference that it printed; empty if there is none.
        error: what ended it; None where it succeeded.
    """

    code: int
    image: str = ""
    error: BuilderError | None = None


def follow(jobs: Jobs, version: ModelVersion, job: Object, *, seconds: float = math.inf) -> Ended:
    """Follow a Job to its end, and show its logs, and why its Pod does not start.

    A Job whose Pod does not start within JOB_START_TIMEOUT, or never will, is ended, and that is recorded.

    Args:
        jobs: the Jobs it is one of.
        version: the version.
        job: the Job.
        seconds: after which it is no longer followed.

    Raises:
        StillRunning: the time is over; the Job goes on.
        TryAgain: the Job was deleted by somebody else.
    """
    labels = f"{JOB_NAME}={job['metadata']['name']}"
    logs = Logs(jobs.cluster)
    heard = time.monotonic()
    until = heard + seconds
    while True:
        try:
            ended = _look(jobs, version, job, logs)
            heard = time.monotonic()
        except ServiceUnavailable as error:
            # A control plane that is upgraded is away for a while; the Job runs on.
            if time.monotonic() - heard > _AWAY:
                message = f"{error.what} The Job {job['metadata']['name']} goes on."
                raise TryAgain(message, remedy="Follow it again: builder submit NAME VERSION --wait.") from error
            ended = None
        if ended:
            logs.finish()
            _tell(jobs.cluster, job, ended)
            return ended
        if time.monotonic() >= until:
            raise StillRunning.after(job["metadata"]["name"], seconds)
        jobs.cluster.await_change(labels, seconds=_LOOK)


def _tell(cluster: Cluster, job: Object, ended: Ended) -> None:
    """Record as an Event how a Job ended; one that was ended here, or recorded as failed, has its Event."""
    if ended.image:
        tell_published(cluster, job, ended.image)
    elif ended.error:
        tell_failed(cluster, job, ended.error)


def _look(jobs: Jobs, version: ModelVersion, job: Object, logs: Logs) -> Ended | None:
    """Look at a Job once: show what is new, end it if it does not go on; return how it ended, None while it runs."""
    cluster, name = jobs.cluster, job["metadata"]["name"]
    # The Job first: what it tells of Pods is then there to be listed.
    now = cluster.job(name)
    if now is None or uid(now) != uid(job) or state_of(now) == "deleted":
        message = f"The Job {name} was deleted while it ran."
        raise TryAgain(message, remedy="Submit the version again.")
    pods = pods_of(cluster, job)
    for pod in pods:
        logs.show(pod)
    if ended := end_of(jobs, version, now, pods):
        return ended
    error = hindered(cluster, now, pods)
    logs.tell(error)
    if error and overdue(jobs.settings, now, pods, error):
        jobs.end(version, now, error)
        return Ended(code=int(error.exit_code), error=error)
    return None


def end_of(jobs: Jobs, version: ModelVersion, job: Object, pods: Sequence[Object]) -> Ended | None:
    """Return how a Job has ended; None while it runs. An end that its Pods could not record is recorded.

    Args:
        jobs: the Jobs it is one of.
        version: the version.
        job: the Job as it is now.
        pods: its Pods, the oldest first; the last one tells two seconds before the Job does.
    """
    last = pods[-1] if pods else None
    if last and exit_code(last) == 0:
        return Ended(code=0, image=image_of(last))
    if state_of(job) == "complete":
        return Ended(code=0)
    if state_of(job) == "active":
        return None
    error = ending(job, pods)
    # What cannot be recorded now, a sweep records.
    with suppress(BuilderError):
        if jobs.unrecorded(jobs.catalog.find(version.name, version.version), job):
            jobs.record_end(version, job, error)
    return Ended(code=int(error.exit_code), error=error)


class Logs:
    """Shows the logs of Pods, as lines of our own log, each container by itself.

    Args:
        cluster: where the Pods are.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._threads: dict[tuple[str, str], threading.Thread] = {}
        self._said = ""

    def tell(self, error: BuilderError | None) -> None:
        """Say why the Job does not go on, if that is new."""
        if error and error.what != self._said:
            _log.warning("the Job does not go on", why=error.what, remedy=error.remedy)
        self._said = error.what if error else ""

    def show(self, pod: Object) -> None:
        """Begin to show the log of each container that has begun, if that was not done."""
        for container, state in containers(pod):
            key = (pod["metadata"]["name"], container)
            if state != "waiting" and key not in self._threads:
                self._threads[key] = threading.Thread(target=self._read, args=key, daemon=True)
                self._threads[key].start()

    def finish(self) -> None:
        """Wait for the last lines."""
        deadline = time.monotonic() + _LAST_LINES
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def _read(self, pod: str, container: str) -> None:
        try:
            for line in self._cluster.log_lines(pod, container, follow=True):
                show_line(line, container=container)
        except BuilderError as error:
            _log.warning("a log cannot be read", container=container, error=error.one_line())


def show_line(line: str, **about: str) -> None:
    """Show one line of a publisher's log in our own; what is no such line is shown as it is.

    Args:
        line: of a container's log: others may have written it.
        about: fields that name where it comes from; nothing in the line overrules them.
    """
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        _log.info(safe_line(line), **about)
        return
    level = _LEVELS.get(str(event.get("level", "info")), logging.INFO)
    fields = {name: value for name, value in event.items() if name not in _RESERVED}
    _log.log(level, safe_line(event["event"]), **{**fields, **about})


def pods_of(cluster: Cluster, job: Object) -> list[Object]:
    """Return the Pods of a Job, the oldest first."""
    return cluster.pods(f"{JOB_UID}={uid(job)}")


def hindered(cluster: Cluster, job: Object, pods: Sequence[Object]) -> BuilderError | None:
    """Return why a Job does not go on; None where nothing is known to hinder it.

    Args:
        cluster: where its events are.
        job: the Job.
        pods: its Pods, the oldest first.
    """
    if state_of(job) != "active":
        return None
    if pods and (error := stuck(pods[-1])):
        return error
    if pods and begun(pods[-1]):
        return not_started(pods, ())
    return not_started(pods, cluster.events(str(pods[-1]["metadata"]["uid"]) if pods else uid(job)))


def overdue(settings: Settings, job: Object, pods: Sequence[Object], error: BuilderError) -> bool:
    """Return whether a Job that does not go on is to be ended: one that never will is ended at once."""
    # A queue may have held the Job back until its start.
    began = job.get("status", {}).get("startTime") or created(job)
    since = max([began, *(last_moment(pod) for pod in pods)])
    return not error.retryable or seconds_since(since) > settings.job_start_timeout


def log_of(jobs: Jobs, version: ModelVersion, *, follow: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the lines of the last Pod of a version's Job, each with its container's name, in the order they run.

    Args:
        jobs: the Jobs.
        version: the version.
        follow: go on until the Job ends.

    Raises:
        VersionNotFound: the version has no Job, or its Pods are gone.
    """
    cluster, name = jobs.cluster, jobs.name_of(version)
    labels = f"{JOB_NAME}={name}"
    read: set[tuple[str, str]] = set()
    while True:
        job = cluster.job(name)
        if job is None:
            message = f"{version} has no Job in the namespace {cluster.namespace}."
            raise VersionNotFound(message, remedy="Submit it: builder submit NAME VERSION.")
        pods = pods_of(cluster, job)
        if not pods and (state_of(job) != "active" or not follow):
            raise _no_logs(cluster, job)
        for pod in pods if follow else pods[-1:]:
            for container, state in containers(pod):
                key = (str(pod["metadata"]["name"]), container)
                if state == "waiting":
                    break
                if key not in read:
                    read.add(key)
                    yield from ((container, line) for line in cluster.log_lines(*key, follow=follow))
        if not follow or state_of(job) != "active" or (pods and exit_code(pods[-1]) == 0):
            return
        cluster.await_change(labels, seconds=_LOOK)


def _no_logs(cluster: Cluster, job: Object) -> VersionNotFound:
    name = job["metadata"]["name"]
    error = ending(job, ()) if state_of(job) == "failed" else hindered(cluster, job, ())
    if error:
        return VersionNotFound(f"The Job {name} has no Pod, and so no logs: {error.what}", remedy=error.remedy)
    return VersionNotFound(f"The Job {name} has no Pod, and so no logs.", remedy="builder status tells how it stands.")
