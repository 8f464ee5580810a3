"""What the tests of this folder need: versions on a real MLflow, and a cluster's Jobs without a cluster.

Jobs, Pods and a watch of Jobs are those of a real API server in tests/cluster/.
"""

from __future__ import annotations

import itertools
import json
import queue
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx2
from mlflow import MlflowClient

from builder.cluster.job import JOB_UID, METHOD, MODEL_NAME, MODEL_VERSION, SOURCE_ID, TARGET, job_name
from builder.errors import ServiceUnavailable
from builder.models import ModelVersion
from builder.models.catalog import MlflowCatalog
from builder.publish.record import Outcome
from builder.settings import ListenSettings
from tests.waiting import HANG

DIGEST = "sha256:" + "ab" * 32
_number = itertools.count(1)
# What a Pod and its containers tell are moments from this one, so that there is no second more or less between them.
_POD_NOW = time.time()


@dataclass(kw_only=True)
class Versions:
    """Versions of a target of its own on an MLflow server.

    Attributes:
        uri: of the server.
        tag: the target tag.
        environ: what settings are made from, beside the server and the tag.
    """

    uri: str
    tag: str = field(default_factory=lambda: f"EXTERNAL_TARGET_T{uuid.uuid4().hex[:8].upper()}")
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.client = MlflowClient(tracking_uri=self.uri)
        self.settings = ListenSettings.from_environ(
            {"MLFLOW_TRACKING_URI": self.uri, "REGISTRY_URL": "registry.example.com/models", "TARGET_TAG": self.tag}
            | {"OVERVIEW_INTERVAL": "1", **self.environ}
        )
        self.catalog = MlflowCatalog.from_settings(self.settings)
        self._models: set[str] = set()

    def name(self, short: str = "model") -> str:
        """Return the name of a model of the test's own: the server is other tests', too."""
        return f"{short}-{self.tag[-8:].lower()}"

    def register(self, name: str = "model", *, selected: bool = True, **outcome: Any) -> ModelVersion:
        """Register a version, with an outcome if there is one: fields of `Outcome`."""
        name = self.name(name)
        if name not in self._models:
            self.client.create_registered_model(name)
            self._models.add(name)
        tags = {self.tag: "true"} if selected else {}
        made = self.client.create_model_version(name, source="s3://bucket/model", tags=tags, await_creation_for=None)
        version = self.catalog.find(name, str(made.version))
        return self.record(version, **outcome) if outcome else version

    def record(self, version: ModelVersion, **outcome: Any) -> ModelVersion:
        """Write an outcome, as a publisher does."""
        source = outcome.pop("source_id", version.source_id())
        self.catalog.set_tags(version, Outcome(target=self.settings.target, source_id=source, **outcome).tags())
        return self.catalog.find(version.name, version.version)

    def published(self, name: str = "model", **outcome: Any) -> ModelVersion:
        """Register a version that is published."""
        image = f"registry.example.com/models/model@{DIGEST}"
        facts = {"state": "published", "image": image, "platforms": ("linux/amd64",), "finished": moment()}
        return self.register(name, **{**facts, **outcome})

    def failed(self, name: str = "model", error: str = "InvalidVersion: no.", **outcome: Any) -> ModelVersion:
        """Register a version that has failed."""
        return self.register(name, state="failed", error=error, attempts=1, finished=moment(), **outcome)


def moment(seconds: float = 0, *, now: float | None = None) -> str:
    """Return a time from now, RFC 3339 in UTC."""
    when = (time.time() if now is None else now) + seconds
    return datetime.fromtimestamp(when, tz=UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Away:
    """A catalog whose server can be away."""

    def __init__(self, catalog):
        self.catalog, self.away, self.asked = catalog, False, 0

    def _check(self):
        self.asked += 1
        if self.away:
            message = "MLflow is away."
            raise ServiceUnavailable(message, remedy="Try again.")

    def tagged(self, tag):
        self._check()
        yield from self.catalog.tagged(tag)

    def find(self, name, version):
        self._check()
        return self.catalog.find(name, version)


class Cluster:
    """Stands in for `builder.cluster.api_server.Cluster`: Jobs, a watch of them, and Pods."""

    def __init__(self, settings: ListenSettings) -> None:
        self.namespace = "builder"
        self.settings = settings
        self.away = False
        self._jobs: dict[str, dict[str, Any]] = {}
        self._pods: dict[str, list[dict[str, Any]]] = {}
        self._changes: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.listings = 0

    # ---- as the real one

    def jobs_as_of(self, _selector: str) -> tuple[list[dict[str, Any]], str]:
        self._check()
        self.listings += 1
        with self._lock:
            return list(self._jobs.values()), "1"

    def job_changes(self, _selector: str, _version: str, *, seconds: int) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "OPENED", {}
        while (change := self._changes.get()) is not None:
            yield change
        message = "The watch of Jobs has ended."
        raise ServiceUnavailable(message)

    def pods(self, selector: str, *, fields: str = "") -> list[dict[str, Any]]:
        self._check()
        return self._pods.get(selector.removeprefix(f"{JOB_UID}="), [])

    def job(self, name: str) -> dict[str, Any] | None:
        return self._jobs.get(name)

    def template(self, _name: str) -> None:
        """None is installed: what gets this far would have made a Job."""

    def events(self, _uid: str) -> list[dict[str, Any]]:
        return []

    def _check(self) -> None:
        if self.away:
            message = "The Kubernetes API is away."
            raise ServiceUnavailable(message)

    # ---- what tests do

    def cut(self) -> None:
        """End the watch, as an API server does; the Jobs are listed again."""
        self._changes.put(None)

    def start(self, version: ModelVersion, method: str = "wheels", *, pod: dict[str, Any] | None = None) -> str:
        """Make the Job of a version; return its name."""
        name = job_name(self.settings.target, version)
        labels = {"app.kubernetes.io/name": "builder", TARGET: self.settings.target, METHOD: method}
        named = {MODEL_NAME: version.name, MODEL_VERSION: version.version, SOURCE_ID: version.source_id()}
        uid = str(uuid.uuid4())
        self._put(name, uid, labels, named, {"active": 1})
        if pod:
            self._pods[uid] = [pod]
        self._changes.put(("ADDED", self._jobs[name]))
        return name

    def sweep(self, ended: str = "", *, when: str = "") -> None:
        """Make the Job of a sweep, which has ended as `Complete` or `Failed`, or runs."""
        labels = {"app.kubernetes.io/name": "builder", "app.kubernetes.io/component": "sweep"}
        name = f"sweep-{next(_number)}"
        self._put(name, str(uuid.uuid4()), labels, {}, _ended(ended, when) if ended else {})
        self._changes.put(("ADDED", self._jobs[name]))

    def end(self, name: str, ended: str = "Complete", *, pod: dict[str, Any] | None = None) -> None:
        """End a Job as `Complete` or `Failed`."""
        job = self._jobs[name]
        metadata = {**job["metadata"], "resourceVersion": str(next(_number))}
        self._jobs[name] = {**job, "metadata": metadata, "status": _ended(ended)}
        if pod:
            self._pods[metadata["uid"]] = [pod]
        self._changes.put(("MODIFIED", self._jobs[name]))

    def replace(self, name: str) -> None:
        """Put another Job that runs in the place of one, of which no watch has told yet."""
        metadata = {**self._jobs[name]["metadata"], "uid": str(uuid.uuid4()), "resourceVersion": str(next(_number))}
        self._jobs[name] = {**self._jobs[name], "metadata": metadata, "status": {"active": 1}}

    def delete(self, name: str) -> None:
        """Delete a Job."""
        job = self._jobs.pop(name)
        self._changes.put(("DELETED", job))

    def _put(self, name: str, uid: str, labels: dict[str, str], notes: dict[str, str], status: dict[str, Any]) -> None:
        metadata = {"name": name, "uid": uid, "resourceVersion": str(next(_number)), "labels": labels}
        metadata |= {"annotations": notes, "creationTimestamp": moment()}
        with self._lock:
            self._jobs[name] = {"metadata": metadata, "spec": {"activeDeadlineSeconds": 7800}, "status": status}


def _ended(kind: str, when: str = "") -> dict[str, Any]:
    at = when or moment()
    found: dict[str, Any] = {"conditions": [{"type": kind, "status": "True", "lastTransitionTime": at}]}
    return found | ({"completionTime": at, "succeeded": 1} if kind == "Complete" else {"failed": 1})


def pod(phase: str, **containers: dict[str, Any]) -> dict[str, Any]:
    """Return a Pod as its kubelet would, with the states of its containers in their order; the last is no init."""
    *init, last = containers
    statuses = [{"name": name, "state": state} for name, state in containers.items()]
    return {
        "metadata": {"name": "pod", "uid": "pod", "creationTimestamp": moment(-60, now=_POD_NOW), "labels": {}},
        "spec": {"initContainers": [{"name": name} for name in init], "containers": [{"name": last}]},
        "status": {"phase": phase, "initContainerStatuses": statuses[:-1], "containerStatuses": statuses[-1:]},
    }


def terminated(message: str = "", code: int = 0, *, began: float = -50, ended: float = -40) -> dict[str, Any]:
    """Return the state of a container that has ended."""
    facts = {"exitCode": code, "message": message, "reason": "Error" if code else "Completed"}
    moments = {"startedAt": moment(began, now=_POD_NOW), "finishedAt": moment(ended, now=_POD_NOW)}
    return {"terminated": {**facts, **moments}}


def running() -> dict[str, Any]:
    """Return the state of a container that runs."""
    return {"running": {"startedAt": moment(-5, now=_POD_NOW)}}


def events(address: str, after: str = "", *, password: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Return the first events of the status page's stream, each with its data; the last is the id after all rows."""
    found: list[tuple[str, dict[str, Any]]] = []
    name, auth = "", ("anybody", password) if password else None
    url = f"{address}/status/changes"
    with httpx2.stream("GET", url, params={"after": after}, auth=auth, timeout=HANG, trust_env=False) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                found.append((name, json.loads(value)))
            elif field == "id":
                return [*found, ("id", {"id": value})]
    return found
