"""The Job of one version: its name, which is the lock, and its body, which is a copy of a template."""

from __future__ import annotations

import copy
import hashlib
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from builder.reference import ascii_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from builder.cluster.api_server import Object
    from builder.models import ModelVersion

# What a Job is: still to run or running, or how it ended. `deleted` waits for its finalizers.
State = Literal["active", "complete", "failed", "deleted"]

TEMPLATES = {"wheels": "builder-publish-wheels", "dockerfile": "builder-publish-dockerfile"}
WARM_TEMPLATE = "builder-warm"
MODEL_NAME = "builder/model-name"
MODEL_VERSION = "builder/model-version"
SOURCE_ID = "builder/source-id"
METHOD = "builder/method"
TARGET = "builder/target"
# An annotation of a sweep's Jobs, which it counts; those of a listener and of people are not its own.
MADE_BY, SWEEP = "builder/made-by", "sweep"
FORCE = "builder/force"
REBUILD = "builder/rebuild"
# Labels that the Job controller gives to Pods. A UID is never that of an earlier Job of the same name.
JOB_NAME = "batch.kubernetes.io/job-name"
JOB_UID = "batch.kubernetes.io/controller-uid"

_LONGEST_SLUG = 24
_LONGEST_LABEL = 63


def job_name(target: str, version: ModelVersion, *, kind: Literal["publish", "warm"] = "publish") -> str:
    """Return the name of a version's Job for a target, always the same; at most 57 characters.

    Two versions never share one: it ends in 40 bits of a hash of target, model and version.

    Args:
        target: the target's name.
        version: the version.
        kind: what the Job does.
    """
    whole = f"{target}\0{version.name}\0{version.version}".encode("utf-8", "surrogatepass")
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_of(version.name).lower())[:_LONGEST_SLUG].strip("-") or "model"
    return f"{kind}-{slug}-v{version.version}-{hashlib.sha256(whole).hexdigest()[:10]}"


def label(text: str) -> str:
    """Return a text as the value of a label: what is not allowed there becomes a hyphen."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", ascii_of(text))[:_LONGEST_LABEL].strip("-._") or "model"


def selector(target: str) -> str:
    """Return the selector of all Jobs, and all Pods, of a target."""
    return f"{TARGET}={label(target)}"


def job_of(
    template: Object, version: ModelVersion, *, target: str, force: bool = False, rebuild: bool = False, by: str = ""
) -> Object:  # fmt: skip
    """Return the Job of a version: the template's, with names, labels and annotations of the version's.

    The Pod's spec is the template's as it stands; a policy of the API server admits nothing else from the sweep.

    Args:
        template: the suspended CronJob.
        version: the version.
        target: the target's name.
        force: as for a publish.
        rebuild: as for a publish.
        by: `SWEEP` for a Job that a sweep makes.
    """
    asked = {name: "true" for name, wanted in ((FORCE, force), (REBUILD, rebuild)) if wanted}
    found = _copy(template, version, {TARGET: label(target)}, asked)
    found["metadata"]["name"] = job_name(target, version)
    found["metadata"]["annotations"] |= {TARGET: target, SOURCE_ID: version.source_id()}
    if by:
        found["metadata"]["annotations"][MADE_BY] = by
    return found


def warm_job_of(template: Object, version: ModelVersion, *, target: str) -> Object:
    """Return the Job that makes the wheel layers of a version; it has no label of a target, since it publishes nothing.

    Args:
        template: the suspended CronJob.
        version: the version.
        target: the target's name.
    """
    found = _copy(template, version, {}, {})
    found["metadata"]["name"] = job_name(target, version, kind="warm")
    return found


def _copy(template: Object, version: ModelVersion, labels: Mapping[str, str], asked: Mapping[str, str]) -> Object:
    """Return a Job, without a name, that is a template's and names a version; `asked` is for its Pod alone."""
    found = copy.deepcopy(template["spec"]["jobTemplate"])
    labels = {**labels, "builder/model": label(version.name), "builder/version": version.version}
    named = {MODEL_NAME: version.name, MODEL_VERSION: version.version}
    own = found.get("metadata") or {}
    pod = found["spec"]["template"].setdefault("metadata", {})
    pod.pop("creationTimestamp", None)
    pod["labels"] = {**(pod.get("labels") or {}), **labels}
    pod["annotations"] = {**(pod.get("annotations") or {}), **named, **asked}
    metadata = {
        "labels": {**(own.get("labels") or {}), **labels},
        "annotations": {**(own.get("annotations") or {}), **named},
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": found["spec"]}


def state_of(job: Object) -> State:
    """Return what a Job is."""
    if job["metadata"].get("deletionTimestamp"):
        return "deleted"
    conditions = {each["type"] for each in _conditions(job) if each["status"] == "True"}
    if "Complete" in conditions:
        return "complete"
    return "failed" if "Failed" in conditions else "active"


def failure(job: Object) -> tuple[str, str]:
    """Return reason and message of a Job that has failed; empty where it has not."""
    for each in _conditions(job):
        if each["type"] == "Failed" and each["status"] == "True":
            return each.get("reason", ""), each.get("message", "")
    return "", ""


def _conditions(job: Object) -> list[Object]:
    found: list[Object] = job.get("status", {}).get("conditions") or []
    return found


def uid(job: Object) -> str:
    """Return the UID of a Job, by which an attempt is known."""
    return str(job["metadata"]["uid"])


def created(job: Object) -> str:
    """Return when a Job was created, RFC 3339 in UTC."""
    return str(job["metadata"]["creationTimestamp"])


def finished(job: Object) -> str:
    """Return when a Job ended, RFC 3339 in UTC; empty where it has not."""
    ends = [each.get("lastTransitionTime", "") for each in _conditions(job) if each["type"] in {"Complete", "Failed"}]
    return str(job.get("status", {}).get("completionTime") or next(filter(None, ends), ""))


def seconds_since(moment: str) -> float:
    """Return the seconds since a moment, RFC 3339 in UTC; 0 where it cannot be read."""
    try:
        return (datetime.now(tz=UTC) - datetime.fromisoformat(moment)).total_seconds()
    except (ValueError, TypeError):
        return 0


def is_of_source(job: Object, version: ModelVersion) -> bool:
    """Return whether a Job was made for what the version is now."""
    annotations = job["metadata"].get("annotations") or {}
    return annotations.get(SOURCE_ID) == version.source_id()


def slim(found: Object) -> Object:
    """Return a Job or a Pod without what is not looked at: most of the Pod, and the record of who set which field."""
    metadata = {name: value for name, value in found["metadata"].items() if name != "managedFields"}
    spec = {name: value for name, value in found["spec"].items() if name not in {"template", "volumes"}}
    for kind in ("initContainers", "containers"):
        if kind in spec:
            spec[kind] = [{key: each[key] for key in ("name", "restartPolicy") if key in each} for each in spec[kind]]
    return {**found, "metadata": metadata, "spec": spec}
