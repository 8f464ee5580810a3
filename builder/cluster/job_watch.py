"""The Jobs of a namespace, kept current in memory by a watch."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from builder.cluster.job import METHOD, TARGET, label, slim, state_of, uid
from builder.errors import BuilderError, Defect, ServiceUnavailable
from builder.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from builder.cluster.api_server import Cluster, Object

# Jobs that publish, sweep and warm alike.
SELECTOR = "app.kubernetes.io/name=builder"
# Seconds after which the API server ends a watch, and another one begins.
_WATCH = 240
# Seconds until the Jobs are listed again after a failure: at first, and at most. A watch that lasted for longer is no
# longer one that fails.
_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
_log = get_logger("watch")


class JobWatch:
    """The Jobs of the builder in one namespace. Thread-safe.

    Args:
        cluster: where they are.
        target: the target whose Jobs `active` counts.
        changed: called with each Job that was made, has changed or was deleted, from the watch's own thread; at the
            beginning, and after a gap, with every Job. It should return at once, and raise nothing.
    """

    def __init__(
        self, cluster: Cluster, target: str, *, changed: Callable[[Object, bool], None] | None = None
    ) -> None:  # fmt: skip
        self._cluster = cluster
        self._target = label(target)
        self._changed = changed or (lambda _job, _deleted: None)
        self._jobs: dict[str, Object] = {}
        # The names of the target's Jobs that have not ended: asked for whenever one more may be made.
        self._active: set[str] = set()
        self._condition = threading.Condition()
        self._stopped = threading.Event()
        self._synced = False
        self._error: BuilderError | None = None
        self._failing_since: float | None = None
        self._pause = _PAUSE
        # When the API server took the request to watch; how many watches in a row ended as soon as they had begun.
        self._opened: float | None = None
        self._cuts = 0

    def start(self) -> None:
        """Begin to watch, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="jobs", daemon=True).start()

    def close(self) -> None:
        """Stop watching; those who wait go on at once."""
        self._stopped.set()
        with self._condition:
            self._condition.notify_all()

    @property
    def synced(self) -> bool:
        """Whether the Jobs have been listed since the start."""
        return self._synced

    @property
    def error(self) -> BuilderError | None:
        """What keeps the watch from going on; None while it goes on."""
        return self._error

    @property
    def failing_since(self) -> float | None:
        """Since when the watch does not go on, in seconds since the epoch; None while it goes on."""
        return self._failing_since

    def jobs(self) -> list[Object]:
        """Return all Jobs, without their Pods' specs."""
        with self._condition:
            return list(self._jobs.values())

    def job(self, name: str) -> Object | None:
        """Return a Job by its name; None if there is no such Job, as far as it is known."""
        with self._condition:
            return self._jobs.get(name)

    def of_target(self, job: Object) -> bool:
        """Return whether a Job publishes a version for the target."""
        labels = job["metadata"].get("labels") or {}
        return labels.get(TARGET) == self._target and labels.get(METHOD, "") in {"wheels", "dockerfile"}

    def _is_active(self, job: Object) -> bool:
        return self.of_target(job) and state_of(job) == "active"

    def active(self) -> set[str]:
        """Return the names of the target's Jobs that have not ended."""
        with self._condition:
            return set(self._active)

    def active_warm(self) -> int:
        """Return how many Jobs that make layers ahead of time have not ended."""
        warm = (job for job in self.jobs() if (job["metadata"].get("labels") or {}).get(METHOD) == "warm")
        return sum(state_of(job) == "active" for job in warm)

    def wait_for(self, there: Callable[[], bool], seconds: float) -> bool:
        """Wait until something about the Jobs is so, or some seconds have passed; return whether it is so.

        Args:
            there: asked after each change.
            seconds: to wait at most.
        """
        deadline = time.monotonic() + seconds
        with self._condition:
            while not there():
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self._stopped.is_set():
                    return False
                self._condition.wait(remaining)
        return True

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._opened = None
            try:
                self._follow()
            except BuilderError as error:
                self._failed(error)
            except Exception as error:  # noqa: BLE001 - nobody would start this thread again
                _log.exception("defect")
                self._failed(Defect(f"Jobs cannot be watched: {type(error).__name__}."))

    def _failed(self, error: BuilderError) -> None:
        if self._error is None:
            _log.warning("Jobs cannot be watched", error=error.one_line())
            self._failing_since = time.time()
        self._error = error
        lasted = 0.0 if self._opened is None else time.monotonic() - self._opened
        self._cuts = self._cuts + 1 if self._opened is not None and lasted < _PAUSE else 0
        if lasted > _LONGEST_PAUSE:
            self._pause = _PAUSE
        self._stopped.wait(self._pause)
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    def _follow(self) -> None:
        """List the Jobs, then follow what changes until a watch fails."""
        listed, version = self._cluster.jobs_as_of(SELECTOR)
        jobs = {job["metadata"]["name"]: slim(job) for job in listed}
        with self._condition:
            # One that was made again under its name is another one.
            gone = [job for name, job in self._jobs.items() if name not in jobs or uid(jobs[name]) != uid(job)]
            self._jobs = jobs
            self._active = {name for name, job in jobs.items() if self._is_active(job)}
        for job in gone:
            self._tell(job, deleted=True)
        for job in jobs.values():
            self._tell(job, deleted=False)
        with self._condition:
            self._synced = True
            self._condition.notify_all()
        while not self._stopped.is_set():
            opened, heard = time.monotonic(), False
            for kind, found in self._cluster.job_changes(SELECTOR, version, seconds=_WATCH):
                if kind == "OPENED":
                    self._opened = self._opened or opened
                    if self._cuts <= 1:
                        self._recovered()
                    continue
                self._recovered()
                heard, version = True, found["metadata"]["resourceVersion"]
                if kind != "BOOKMARK":
                    self._apply(slim(found), deleted=kind == "DELETED")
            if not heard and time.monotonic() - opened < _PAUSE:
                message = "The watch of Jobs ends as soon as it has begun."
                raise ServiceUnavailable(message, remedy="See whether a proxy stands before the API server.")

    def _apply(self, job: Object, *, deleted: bool) -> None:
        name = job["metadata"]["name"]
        with self._condition:
            if deleted:
                self._jobs.pop(name, None)
            else:
                self._jobs[name] = job
            if not deleted and self._is_active(job):
                self._active.add(name)
            else:
                self._active.discard(name)
        self._tell(job, deleted=deleted)

    def _tell(self, job: Object, *, deleted: bool) -> None:
        self._changed(job, deleted)
        with self._condition:
            self._condition.notify_all()

    def _recovered(self) -> None:
        if self._error is not None:
            _log.info("Jobs are watched again")
        self._error, self._failing_since = None, None
