"""Metrics of the listener, for Prometheus.

Replicas watch the same cluster, so that each shows all of it: queries take `max without (instance, pod)`. Counters are
of one replica, from its start; a Job that ended before is in none of them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from builder import __version__
from builder.cluster.job import METHOD, TEMPLATES, created, failure, finished, state_of
from builder.cluster.pods import ending, phase_seconds, result_of
from builder.errors import ExitCode
from builder.listener.overview import STATES
from builder.masking import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client.core import Metric

    from builder.cluster.api_server import Object
    from builder.cluster.job_watch import JobWatch
    from builder.listener.overview import Overview
    from builder.settings import ListenSettings

Delivery = Literal["taken", "ignored", "refused", "unsigned", "replayed", "unavailable"]

DELIVERIES: tuple[Delivery, ...] = ("taken", "ignored", "refused", "unsigned", "replayed", "unavailable")
_PHASES = ("start", "preflight", "fetch", "build", "candidate", "push")
_SWEEP = "sweep"
_COMPONENT = "app.kubernetes.io/component"
_LONGEST_NAME = 200
_SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
_ANSWER_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """All metrics of one listener, in a registry of their own. Thread-safe.

    Args:
        settings: what the environment says.
        overview: knows the versions; it tells of Jobs that end.
        watch: knows the Jobs; None where there is no cluster.
    """

    def __init__(self, settings: ListenSettings, overview: Overview, watch: JobWatch | None = None) -> None:
        from prometheus_client import CollectorRegistry, Histogram
        from prometheus_client import Counter as Count

        self._target = settings.target
        self._registry = CollectorRegistry()
        self._deliveries = Count(
            "builder_deliveries",
            "Webhook deliveries by what was done with them: taken, ignored as of no interest, refused (signature, age, "
            "form), unsigned (a stranger's, or of a webhook without a secret), replayed, or answered with unavailable "
            "so that MLflow tries again.",
            ["outcome"],
            registry=self._registry,
        )
        self._answers = Histogram(
            "builder_delivery_seconds",
            "Seconds until a delivery was answered.",
            buckets=_ANSWER_SECONDS,
            registry=self._registry,
        )
        self._publishes = Count(
            "builder_publishes",
            "Jobs of versions that ended, by outcome (published, unchanged, foreign, failed), method and exit code.",
            ["target", "outcome", "method", "exit_code"],
            registry=self._registry,
        )
        self._phases = Histogram(
            "builder_publish_phase_seconds",
            "Seconds that a phase of a publish took; start is the time until the Pod's first container began.",
            ["target", "phase", "method"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._durations = Histogram(
            "builder_publish_seconds",
            "Seconds from the creation of a Job to its end.",
            ["target", "method", "outcome"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._sent = Count(
            "builder_publish_sent_bytes",
            "Bytes of image layers that publishes sent to the registry.",
            ["target", "method"],
            registry=self._registry,
        )
        self._saved = Count(
            "builder_publish_saved_bytes",
            "Bytes of image layers that publishes did not send, since the registry had them.",
            ["target", "method"],
            registry=self._registry,
        )
        for outcome in DELIVERIES:
            self._deliveries.labels(outcome)
        for method in TEMPLATES:
            self._sent.labels(self._target, method)
            self._saved.labels(self._target, method)
            # From 0, so that the first of its kind is an increase.
            self._publishes.labels(self._target, "published", method, "0")
            for code in set(ExitCode) - {ExitCode.OK}:
                self._publishes.labels(self._target, "failed", method, str(int(code)))
        self._registry.register(_State(settings, overview, watch))
        overview.on_end(self.ended)

    def delivery(self, outcome: Delivery, seconds: float | None = None) -> None:
        """Count a delivery.

        Args:
            outcome: what was done with it.
            seconds: until it was answered.
        """
        self._deliveries.labels(outcome).inc()
        if seconds is not None:
            self._answers.observe(seconds)

    def ended(self, job: Object, pods: list[Object]) -> None:
        """Count a Job of a version that has ended.

        Args:
            job: the Job.
            pods: those of its Pods that are still there, the oldest first.
        """
        end = _End.of(job, pods)
        self._durations.labels(self._target, end.method, end.outcome).observe(end.seconds)
        for phase, seconds in end.phases.items():
            if phase in _PHASES:
                self._phases.labels(self._target, phase, end.method).observe(seconds)
        self._sent.labels(self._target, end.method).inc(end.sent)
        self._saved.labels(self._target, end.method).inc(end.saved)
        # The last: whoever sees it counted finds all else of it too.
        self._publishes.labels(self._target, end.outcome, end.method, end.exit_code).inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics, and their content type, in a form that a client accepts.

        Args:
            accept: its Accept header.
        """
        from prometheus_client.exposition import choose_encoder

        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """How a Job ended, as labels and numbers that are bounded, whatever its Pods left."""

    outcome: str
    method: str
    exit_code: str
    seconds: float
    phases: dict[str, float] = field(default_factory=dict)
    sent: int = 0
    saved: int = 0

    @classmethod
    def of(cls, job: Object, pods: list[Object]) -> _End:
        last = pods[-1] if pods else None
        told = result_of(last) if last else {}
        if state_of(job) == "failed":
            outcome, code = "failed", int(ending(job, pods).exit_code)
        elif told.get("state") == "foreign":
            outcome, code = "foreign", 0
        else:
            outcome, code = "published" if told.get("changed", True) else "unchanged", 0
        return cls(
            outcome=outcome,
            method=str(job["metadata"]["labels"].get(METHOD, "")),
            exit_code=str(code if code in set(ExitCode) else int(ExitCode.SOFTWARE)),
            seconds=max(_finished(job) - _moment(created(job)), 0),
            phases=phase_seconds(last) if last else {},
            sent=_bytes(told.get("sent")),
            saved=_bytes(told.get("saved")),
        )


def _bytes(found: object) -> int:
    return found if isinstance(found, int) and 0 <= found < 1 << 60 else 0


def _finished(job: Object) -> float:
    """Return when a Job ended, in seconds since the epoch; now, where it does not tell."""
    end = finished(job)
    return _moment(end) if end else time.time()


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


class _State:
    """What is so now, computed from the overview and the Jobs whenever somebody asks."""

    def __init__(self, settings: ListenSettings, overview: Overview, watch: JobWatch | None) -> None:
        self._target, self._by_model = settings.target, settings.metrics_by_model
        self._overview, self._watch = overview, watch
        self._lock = threading.Lock()
        # Ends of sweeps; their Jobs are deleted sooner or later.
        self._swept: dict[str, float] = {}

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the registry need not ask for values when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        from prometheus_client.core import GaugeMetricFamily

        yield _gauge("builder_info", "The publisher's version.", {"version": __version__}, 1)
        labels = ["target", "state", *(["model"] if self._by_model else [])]
        versions = GaugeMetricFamily("builder_versions", "Tagged model versions by their state.", labels=labels)
        for values, count in self._versions().items():
            versions.add_metric([self._target, *values], count)
        yield versions
        target = {"target": self._target}
        yield _gauge("builder_waiting_age_seconds", _OLDEST, target, self._oldest())
        yield _gauge("builder_overview_synced", _SYNCED, target, float(self._overview.synced))
        yield from self._sources()
        if self._watch:
            jobs = GaugeMetricFamily("builder_jobs", _JOBS, labels=["target", "state"])
            for state, count in self._jobs(self._watch).items():
                jobs.add_metric([self._target, state], count)
            yield jobs
            yield from self._sweeps(self._watch)

    def _versions(self) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter()
        if not self._by_model:
            found.update({(state,): 0 for state in STATES})
        for row in self._overview.rows():
            model = (one_line(row.status.model, _LONGEST_NAME),) if self._by_model else ()
            found[row.status.state, *model] += 1
        return found

    def _oldest(self) -> float:
        since = [row.waiting_since for row in self._overview.rows() if row.waiting_since is not None]
        return max(time.time() - min(since), 0) if since else 0

    def _sources(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        up = GaugeMetricFamily("builder_source_up", _UP, labels=["source"])
        answered = GaugeMetricFamily("builder_source_answered_timestamp_seconds", _ANSWERED, labels=["source"])
        for source in self._overview.sources():
            up.add_metric([source.name.lower()], float(source.failing_since is None and source.answered is not None))
            answered.add_metric([source.name.lower()], source.answered or 0)
        yield up
        yield answered

    def _jobs(self, watch: JobWatch) -> dict[str, int]:
        # A version without the tag has no row: its Job runs once it has a Pod that is ready.
        began = {row.status.job for row in self._overview.rows() if row.status.state == "running"}
        active = watch.active()
        ready = {job["metadata"]["name"] for job in watch.jobs() if job.get("status", {}).get("ready")}
        running = active & (began | ready)
        return {"waiting": len(active - running), "running": len(running)}

    def _sweeps(self, watch: JobWatch) -> Iterator[Metric]:
        sweeps = [job for job in watch.jobs() if (job["metadata"].get("labels") or {}).get(_COMPONENT) == _SWEEP]
        with self._lock:
            for job in sweeps:
                state = "failed" if failure(job)[0] else state_of(job)
                if state in {"complete", "failed"}:
                    self._swept[state] = max(self._swept.get(state, 0), _finished(job))
            succeeded, failed = self._swept.get("complete", 0), self._swept.get("failed", 0)
        # 0 where none is known, as of a time long ago: an alert sees that, too.
        yield _gauge("builder_sweep_last_success_timestamp_seconds", _SWEPT, {}, succeeded)
        yield _gauge("builder_sweep_last_end_timestamp_seconds", _SWEEP_END, {}, max(succeeded, failed))
        yield _gauge("builder_sweep_last_succeeded", _SUCCEEDED, {}, float(succeeded > 0 and succeeded >= failed))


_OLDEST = (
    "Seconds for which the oldest version waits that is selected and not yet published, failed or foreign, as far as "
    "this replica knows; 0 where none waits."
)
_SYNCED = "Whether all tagged versions were listed since the start; until then all counts are too low."
_JOBS = "Jobs of versions that have not ended: waiting for a Pod to run, or running."
_UP = "Whether a server answered when it was last asked."
_ANSWERED = "When a server last answered, in seconds since the epoch; 0 where it has not."
_SWEPT = "When a sweep last succeeded, in seconds since the epoch; 0 where that is not known."
_SWEEP_END = "When a sweep last ended, in seconds since the epoch; 0 where that is not known."
_SUCCEEDED = "Whether the last sweep succeeded."


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    found = GaugeMetricFamily(name, text, labels=list(labels))
    found.add_metric(list(labels.values()), value)
    return found
