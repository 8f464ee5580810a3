"""What is known of the tagged versions and their Jobs, kept current in the background."""

from __future__ import annotations

import heapq
import itertools
import re
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from builder.cluster import Jobs
from builder.cluster.follow import pods_of
from builder.cluster.job import MODEL_NAME, MODEL_VERSION, created, selector, state_of, uid
from builder.cluster.status import Status, by_tags, with_job
from builder.errors import BuilderError, VersionNotFound
from builder.log import get_logger
from builder.masking import one_line
from builder.publish.record import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from builder.cluster.api_server import Cluster, Object
    from builder.cluster.job_watch import JobWatch
    from builder.models import Catalog, ModelVersion
    from builder.settings import ListenSettings

Key = tuple[str, str]

STATES = ("new", "pending", "running", "published", "failed", "foreign")
# A version in one of these is selected, and nobody has its image yet.
WAITING = frozenset({"new", "pending", "running"})

# Of the time, a listing takes one part in so many at most.
_SHARE = 10
# Seconds for which the first listing waits for the Jobs; until MLflow is asked again after it did not answer.
_FIRST_JOBS, _AWAY = 10, 5
# Seconds after which the Pod of a Job that has not begun is looked at again: it may begin without a change of its Job.
_SOON, _LATE = 2.0, 30.0
# What is kept of each: of removed rows for those who read changes, of a row's texts, which are others'.
_MOST_REMOVED = 1000
_MOST_PLATFORMS = 20
_LONGEST, _LONGEST_NAME, _LONGEST_PLATFORM = 1000, 500, 60
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{5,20}(?:Z|[+-][0-9]{2}:[0-9]{2})")
_log = get_logger("overview")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is known of one version. Texts are bounded, and as safe as `one_line` makes them, but for the model's name.

    Attributes:
        status: as `builder status` shows it.
        image: digest reference of its image; empty if there is none.
        waiting_since: since when it has waited to be published, in seconds since the epoch, as far as this process
            knows; None where it does not wait.
        revision: of the overview when the row changed last.
    """

    status: Status
    image: str = ""
    waiting_since: float | None = None
    revision: int = field(default=0, compare=False)

    @property
    def key(self) -> Key:
        """The model's name and the version's number."""
        return self.status.model, self.status.version


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A server that the overview comes from, and whether it answers.

    Attributes:
        name: which.
        answered: when it last answered, in seconds since the epoch; None if it has not since the start.
        failing_since: since when it does not answer; None while it does.
        error: why it does not.
    """

    name: Literal["MLflow", "Kubernetes"]
    answered: float | None = None
    failing_since: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What has changed since a revision.

    Attributes:
        revision: of the overview now.
        rows: that are new or have changed.
        removed: keys of rows that are gone.
        complete: whether these are all rows, so that the reader drops what it has.
    """

    revision: int
    rows: list[Row]
    removed: list[Key]
    complete: bool


class Overview:
    """The tagged versions and their Jobs. Thread-safe.

    All versions are listed every OVERVIEW_INTERVAL seconds, or less often where that takes more than a tenth of the
    time. Between listings a version is read again when its Job changes, and when somebody says so. While MLflow or the
    API server is away, what is known stays.

    Args:
        settings: what the environment says.
        catalog: where the versions are.
        cluster: where their Jobs are; None where there is no cluster.
        watch: knows the Jobs; it calls `changed`.
    """

    def __init__(
        self, settings: ListenSettings, catalog: Catalog, cluster: Cluster | None = None, watch: JobWatch | None = None
    ) -> None:
        self._settings, self._catalog, self._cluster, self._watch = settings, catalog, cluster, watch
        self._jobs = Jobs(settings=settings, cluster=cluster, catalog=catalog) if cluster else None
        self._condition = threading.Condition()
        self._stopped = threading.Event()
        self._began = time.time()
        self._synced = False
        # In the order of their revisions.
        self._rows: dict[Key, Row] = {}
        self._removed: dict[Key, int] = {}
        self._revision = self._forgotten = 0
        # Keys that were read since the listing began: what the listing says of them may be older.
        self._fresh: set[Key] = set()
        self._mlflow = _Heard("MLflow")
        self._kubernetes = _Heard("Kubernetes")
        self._work = _Queue()
        # By their UIDs: the Jobs and their versions that were seen, and those whose end was.
        self._seen: dict[str, str] = {}
        self._ended: set[str] = set()
        self._on_end: list[Callable[[Object, list[Object]], None]] = []

    def start(self) -> None:
        """Begin to list and to read, in threads that end with the process."""
        for name, run in (("overview-listing", self._run_listings), ("overview-changes", self._run_changes)):
            threading.Thread(target=run, name=name, daemon=True).start()

    def close(self) -> None:
        """Stop; those who wait for changes go on at once."""
        self._stopped.set()
        self._work.close()
        with self._condition:
            self._condition.notify_all()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._stopped.is_set()

    @property
    def synced(self) -> bool:
        """Whether all versions have been listed since the start."""
        return self._synced

    @property
    def revision(self) -> int:
        """A number that grows with each change of a row."""
        return self._revision

    def rows(self) -> list[Row]:
        """Return all rows, those that changed last at the end."""
        with self._condition:
            return list(self._rows.values())

    def sources(self) -> list[Source]:
        """Return the servers that this comes from: MLflow, and Kubernetes where there is a cluster."""
        return [self._mlflow.source, self._of_watch(self._watch)] if self._watch else [self._mlflow.source]

    def changes_since(self, revision: int, *, wait: float = 0) -> Changes:
        """Return what has changed since a revision; all rows where that is unknown, such as for revision 0.

        Args:
            revision: that the reader has.
            wait: seconds to wait for a change, if there is none yet.
        """
        with self._condition:
            if wait > 0:
                self._condition.wait_for(lambda: self._revision != revision or self._stopped.is_set(), wait)
            complete = not self._forgotten <= revision <= self._revision or revision == 0
            if complete:
                return Changes(revision=self._revision, rows=list(self._rows.values()), removed=[], complete=True)
            rows = list(itertools.takewhile(lambda row: row.revision > revision, reversed(self._rows.values())))
            newest = reversed(self._removed.items())
            removed = [key for key, when in itertools.takewhile(lambda item: item[1] > revision, newest)]
            return Changes(revision=self._revision, rows=rows[::-1], removed=removed, complete=False)

    def on_end(self, call: Callable[[Object, list[Object]], None]) -> None:
        """Have a function called with each Job of the target that ends from now on, once, and with its Pods."""
        self._on_end.append(call)

    def look_again(self, name: str, version: str) -> None:
        """Have a version read again, soon, from a thread of the overview's."""
        self._work.put((name, version))

    def changed(self, job: Object, deleted: bool) -> None:
        """Take a Job that was made, has changed or was deleted: the `changed` of a JobWatch."""
        if self._watch is None or not self._watch.of_target(job):
            return
        identity, version = uid(job), str(job["metadata"]["resourceVersion"])
        ended = state_of(job) in {"complete", "failed"} and identity not in self._ended
        same = self._seen.get(identity) == version
        if deleted:
            self._seen.pop(identity, None)
            self._ended.discard(identity)
        else:
            self._seen[identity] = version
            if ended:
                self._ended.add(identity)
        # What had ended, or was there, when the watch began is in the first listing.
        if not self._watch.synced or (same and not deleted):
            return
        if ended:
            self._work.put(job)
        annotations = job["metadata"].get("annotations") or {}
        if annotations.get(MODEL_NAME):
            self.look_again(annotations[MODEL_NAME], annotations.get(MODEL_VERSION, ""))

    # ---- all versions

    def _run_listings(self) -> None:
        if self._watch:
            self._watch.wait_for(self._jobs_known, _FIRST_JOBS)
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                self._list()
                self._mlflow.answered()
                self._ask_for_pods()
                took = time.monotonic() - began
                pause = max(self._settings.overview_interval - took, (_SHARE - 1) * took)
            except BuilderError as error:
                self._mlflow.failed(error, "versions cannot be listed")
                pause = min(self._settings.overview_interval, _AWAY)
            except Exception:  # noqa: BLE001  # nobody would start this thread again
                _log.exception("versions cannot be listed")
                pause = self._settings.overview_interval
            if self._watch and not self._watch.synced:
                self._watch.wait_for(self._jobs_known, pause)
            else:
                self._stopped.wait(pause)

    def _jobs_known(self) -> bool:
        return self._stopped.is_set() or bool(self._watch and self._watch.synced)

    def _list(self) -> None:
        with self._condition:
            self._fresh = set()
        seen: set[Key] = set()
        for version in self._catalog.tagged(self._settings.target_tag):
            key = (version.name, version.version)
            seen.add(key)
            if key not in self._fresh:
                self._put(key, self._row(version), listed=True)
            if self._stopped.is_set():
                return
        with self._condition:
            for key in [key for key in self._rows if key not in seen and key not in self._fresh]:
                self._remove(key)
            self._synced = True
            self._condition.notify_all()

    # ---- one version

    def _run_changes(self) -> None:
        while (task := self._work.get()) is not None:
            try:
                if isinstance(task, tuple):
                    self._look(task)
                else:
                    self._tell_end(task)
            except Exception:  # noqa: BLE001  # one version that cannot be shown must not end what shows all others
                _log.exception("a change cannot be shown")

    def _look(self, key: Key) -> None:
        try:
            version = self._catalog.find(*key)
        except VersionNotFound:
            version = None
        except BuilderError as error:
            if error.retryable:
                self._mlflow.failed(error, "a version cannot be read")
                self._work.put(key, after=_AWAY)
                self._stopped.wait(_AWAY)
            # Else it is about this version, or a credential: what is known stays, and the next listing tells.
            return
        self._mlflow.answered()
        row = self._row(version) if version and version.selected_by(self._settings.target_tag) else None
        self._put(key, row)

    def _put(self, key: Key, row: Row | None, *, listed: bool = False) -> None:
        """Keep a row, or remove it; what a listing says does not replace what was read since it began."""
        with self._condition:
            if listed and key in self._fresh:
                return
            if not listed:
                self._fresh.add(key)
            if row is None:
                self._remove(key)
            elif self._rows.get(key) != row:
                self._revision += 1
                self._rows.pop(key, None)
                self._rows[key] = replace(row, revision=self._revision)
                self._removed.pop(key, None)
            self._condition.notify_all()

    def _remove(self, key: Key) -> None:
        if self._rows.pop(key, None) is None:
            return
        self._revision += 1
        self._removed[key] = self._revision
        if len(self._removed) > _MOST_REMOVED:
            self._forgotten = self._removed.pop(next(iter(self._removed)))

    def _row(self, version: ModelVersion) -> Row:
        key = (version.name, version.version)
        before = self._rows.get(key)
        job = self._watch.job(self._jobs.name_of(version)) if self._watch and self._jobs else None
        status = self._status(version, job, before)
        if job and status.state == "pending":
            age = time.time() - _seconds(created(job))
            self._work.put(key, after=min(max(age / 2, _SOON), _LATE))
        outcome = Outcome.of(version, self._settings.target)
        digest = _DIGEST.fullmatch(status.digest)
        return Row(
            status=_bounded(status),
            image=one_line(outcome.image, _LONGEST_NAME) if digest else "",
            waiting_since=self._waiting_since(version, job, before) if self._waits(status) else None,
        )

    def _status(self, version: ModelVersion, job: Object | None, before: Row | None) -> Status:
        if self._jobs is None or job is None:
            return by_tags(self._settings, version)
        if self._watch and self._watch.error:
            # What is known stays; asking for Pods would take its time to fail, too.
            return before.status if before else by_tags(self._settings, version)
        try:
            found = with_job(self._jobs, version, job)
        except BuilderError as error:
            self._kubernetes.failed(error, "Pods cannot be read")
            return before.status if before else by_tags(self._settings, version)
        if state_of(job) == "active":  # of most that have ended, nothing is asked
            self._kubernetes.answered()
        return found

    def _waits(self, status: Status) -> bool:
        # A process that was killed leaves `running`; tried too often, that waits for a hand.
        given_up = status.state == "running" and not status.job and status.attempts >= self._settings.sweep_attempts
        return status.state in WAITING and not given_up

    def _waiting_since(self, version: ModelVersion, job: Object | None, before: Row | None) -> float:
        """Return since when a version waits: MLflow does not tell when a tag was set."""
        if before and before.waiting_since is not None:
            since = before.waiting_since
        else:
            since = max(version.created_ms / 1000, time.time() if self._synced else self._began)
        return min(since, _seconds(created(job))) if job and state_of(job) == "active" else since

    # ---- Jobs

    def _tell_end(self, job: Object) -> None:
        pods: list[Object] = []
        if self._cluster:
            try:
                pods = pods_of(self._cluster, job)
            except BuilderError as error:
                self._kubernetes.failed(error, "Pods cannot be read")
                self._work.put(job, after=_AWAY)
                return
            self._kubernetes.answered()
        for call in self._on_end:
            try:
                call(job, pods)
            except Exception:  # noqa: BLE001  # one that fails must not keep the others from hearing of it
                _log.exception("the end of a Job cannot be told", job=job["metadata"]["name"])

    def _ask_for_pods(self) -> None:
        """See whether Pods can be read again; no version that is listed may have any, to be asked for anyway."""
        if not (self._kubernetes.source.error and self._cluster and self._watch and not self._watch.error):
            return
        try:
            self._cluster.pods(selector(self._settings.target), fields="status.phase=Pending")
        except BuilderError as error:
            self._kubernetes.failed(error, "Pods cannot be read")
        else:
            self._kubernetes.answered()

    def _of_watch(self, watch: JobWatch) -> Source:
        """Return whether Kubernetes answers: the watch, and what was asked of Pods."""
        now, pods = time.time(), self._kubernetes.source
        if (error := watch.error) is None:
            return pods if pods.error else replace(pods, answered=now)
        since = watch.failing_since or now
        return replace(pods, answered=since, failing_since=since, error=error.one_line())


class _Queue:
    """What is to be done, each at its time: keys of versions, each once at a time, and Jobs."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._heap: list[tuple[float, int, Key]] = []
        self._due: dict[Key, float] = {}
        self._jobs: deque[tuple[float, Object]] = deque()
        self._number = itertools.count()
        self._closed = False

    def put(self, task: Key | Object, *, after: float = 0) -> None:
        """Add a task, unless it is there for as soon.

        Args:
            task: a key, or a Job.
            after: seconds until it is due.
        """
        due = time.monotonic() + after
        with self._condition:
            if isinstance(task, dict):
                self._jobs.append((due, task))
            elif due < self._due.get(task, float("inf")):
                self._due[task] = due
                heapq.heappush(self._heap, (due, next(self._number), task))
            self._condition.notify()

    def get(self) -> Key | Object | None:
        """Return the next task that is due, when it is; None once the queue is closed."""
        with self._condition:
            while not self._closed:
                now = time.monotonic()
                if self._jobs and self._jobs[0][0] <= now:
                    return self._jobs.popleft()[1]
                while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
                    heapq.heappop(self._heap)  # it was wanted earlier, and that was done
                if self._heap and self._heap[0][0] <= now:
                    key = heapq.heappop(self._heap)[2]
                    del self._due[key]
                    return key
                self._condition.wait(self._until_next(now))
        return None

    def close(self) -> None:
        """Let `get` return None from now on."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def _until_next(self, now: float) -> float | None:
        heads: Iterable[float] = [each[0][0] for each in (self._heap, self._jobs) if each]
        return max(min(heads) - now, 0) if heads else None


class _Heard:
    """What is known of a source, from several threads.

    Args:
        name: of the source.
    """

    def __init__(self, name: Literal["MLflow", "Kubernetes"]) -> None:
        self._lock = threading.Lock()
        self.source = Source(name=name)

    def answered(self) -> None:
        """Note that it has answered just now."""
        with self._lock:
            if self.source.error:
                _log.info("answers again", source=self.source.name)
            self.source = replace(self.source, answered=time.time(), failing_since=None, error="")

    def failed(self, error: BuilderError, what: str) -> None:
        """Note that it has failed just now.

        Args:
            error: why.
            what: could not be done, for the log.
        """
        with self._lock:
            if not self.source.error:
                _log.warning(what, source=self.source.name, error=error.one_line())
            since = self.source.failing_since or time.time()
            self.source = replace(self.source, failing_since=since, error=error.one_line())


def _bounded(status: Status) -> Status:
    """Return a status whose texts, which anybody may have written as tags, are short and safe to show."""
    return replace(
        status,
        platforms=tuple(one_line(name, _LONGEST_PLATFORM) for name in status.platforms[:_MOST_PLATFORMS]),
        digest=status.digest if _DIGEST.fullmatch(status.digest) else "",
        since=status.since if _MOMENT.fullmatch(status.since) else "",
        error=one_line(status.error, _LONGEST),
        log=status.log if one_line(status.log, _LONGEST) == status.log else "",
    )


def _seconds(moment: str) -> float:
    """Return an RFC 3339 time in seconds since the epoch."""
    return datetime.fromisoformat(moment).timestamp()
