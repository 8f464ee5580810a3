"""What Pods tell: why one does not start, what ended one that could not say so itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from builder.cluster.job import JOB_UID, created, failure, seconds_since, uid
from builder.errors import BuilderError, ExitCode, OverBudget, TryAgain, VersionCrashed, of_code
from builder.masking import one_line

if TYPE_CHECKING:
    from builder.cluster.api_server import Object

# Containers whose termination message is the publisher's own. A RUN step can write that of `build`.
_OURS = frozenset({"preflight", "fetch", "candidate", "push", "publish"})
# The first of these comes before the others where several containers wait.
_WAITS = frozenset(
    {
        "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
        "RegistryUnavailable", "CreateContainerConfigError", "CreateContainerError", "RunContainerError",
        "CreatePodSandboxError",
    }
)  # fmt: skip
_PHASES = frozenset({"preflight", "fetch", "build", "candidate", "push"})
_MOST_SECONDS = 10_000_000
_KILLED = 137
_CODES = frozenset(int(code) for code in ExitCode if code)
_KIND = re.compile(r"[A-Za-z]+: ")
# A kubelet that has not read a Secret yet says so in a warning, and mounts it a moment later; see kubernetes#99475.
_NOT_READ_YET = re.compile(r"failed to sync \w+ cache: timed out|object \S+ not registered")
_FEW, _SOON = 5, 60
# What a kubelet says after two minutes, beside the event that names the cause.
_SUMMARY = re.compile(r"Unable to attach or mount volumes|unmounted volumes=")
_LONGEST = 400
_REMEDY_MEMORY = "Raise the memory limit of that container in the template, or make the model smaller."


class PodNotStarted(TryAgain):
    """The Pod of a Job does not start; the reason is the cluster's, not the version's."""


class PodLost(TryAgain):
    """The Pod of a Job was ended from outside, and no other one followed."""


class MissedDeadline(OverBudget):
    """The Job of a version took longer than its template allows."""


def not_started(pods: Sequence[Object], events: Sequence[Object]) -> PodNotStarted | None:
    """Return why a Job that has not ended has no Pod that runs; None if nothing is known to hinder it.

    Args:
        pods: its Pods, the oldest first.
        events: the warnings about the Job if it has no Pod, else about its last Pod, the oldest first.
    """
    if not pods:
        return _not_created(events)
    pod = pods[-1]
    if pod["status"].get("phase") != "Pending":
        return None
    return _waiting(pod) or _unscheduled(pod) or (None if begun(pod) else _without_volume(events))


def _not_created(events: Sequence[Object]) -> PodNotStarted | None:
    found = [event.get("message", "") for event in events if event.get("reason") == "FailedCreate"]
    if not found:
        return None
    said = found[-1]
    if "exceeded quota" in said or "unknown for quota" in said:
        remedy = "Raise the namespace's quota, or wait for other Jobs to end."
    elif "PodSecurity" in said or "denied" in said:
        remedy = "The namespace does not admit this Pod: see docs/kubernetes.md for what each template needs."
    else:
        remedy = "Check the service account and the policies of the namespace."
    return _not_started("no Pod can be created", said, remedy)


def _waiting(pod: Object) -> PodNotStarted | None:
    for name, status in _statuses(pod):
        waiting = status.get("state", {}).get("waiting", {})
        reason = waiting.get("reason", "")
        if reason in _WAITS and not (_not_read_yet(waiting) and seconds_since(created(pod)) < _SOON):
            image = "Image" in reason or "Registry" in reason
            remedy = (
                "Check the image's name in the templates, and the pull Secret of the service account."
                if image
                else "Check the Secrets and ConfigMaps that the template names."
            )
            return _not_started(f"container {name}: {reason}", waiting.get("message", ""), remedy)
    return None


def _unscheduled(pod: Object) -> PodNotStarted | None:
    for condition in pod["status"].get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            remedy, reason = "Add nodes, or lower the requests in the template.", condition.get("reason", "")
            return _not_started(f"no node takes it: {reason}", condition.get("message", ""), remedy)
    return None


def _without_volume(events: Sequence[Object]) -> PodNotStarted | None:
    told = {"FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "FailedMapVolume"}
    found = [
        event
        for event in reversed(events)
        if event.get("reason") in told and not (_not_read_yet(event) and (event.get("count") or 1) < _FEW)
    ]
    if not found:
        return None
    event = next((each for each in found if not _SUMMARY.match(each.get("message") or "")), found[0])
    remedy = "Check the Secrets and ConfigMaps that the template names, and the node."
    return _not_started(str(event["reason"]), event.get("message", ""), remedy)


def _not_read_yet(told: Object) -> bool:
    """Return whether an event, or what a container waits for, is of a kubelet that is only late."""
    return bool(_NOT_READ_YET.search(told.get("message") or ""))


def _not_started(what: str, said: str, remedy: str) -> PodNotStarted:
    message = f"The Pod does not start: {what}{f' ({one_line(said, _LONGEST)})' if said else ''}."
    return PodNotStarted(message, remedy=remedy)


def begun(pod: Object) -> bool:
    """Return whether a container of a Pod has ever run."""
    return any(status.get("state", {}).keys() & {"running", "terminated"} for _, status in _statuses(pod))


def last_moment(pod: Object) -> str:
    """Return when something last happened to a Pod: a container ended, or it was created; RFC 3339 in UTC."""
    ends = (status.get("state", {}).get("terminated", {}).get("finishedAt") for _, status in _statuses(pod))
    return max([str(pod["metadata"]["creationTimestamp"]), *(str(moment) for moment in ends if moment)])


def is_of_job(pod: Object, job: Object) -> bool:
    """Return whether a Pod is one of a Job, and not of an earlier one that had its name."""
    return bool((pod["metadata"].get("labels") or {}).get(JOB_UID) == uid(job))


def stuck(pod: Object) -> OverBudget | None:
    """Return the error for a Pod that will never end by itself; None for any other.

    Where a process of an init container is killed for memory and the container's first process ends with 0, the
    kubelet takes that for a failure, and starts nothing more.
    """
    if pod["status"].get("phase") != "Pending":
        return None
    for name, status in _phases(pod):
        ended = status.get("state", {}).get("terminated", {})
        if ended.get("reason") == "OOMKilled" and not ended.get("exitCode"):
            message = (
                f"A process in the container {name} was killed, since it needed more memory than its limit allows."
            )
            return OverBudget(message, remedy=_REMEDY_MEMORY)
    return None


def ending(job: Object, pods: Sequence[Object]) -> BuilderError:
    """Return what ended a Job that has failed, as its Pods and the Job itself tell.

    Args:
        job: the Job.
        pods: those of its Pods that are still there, the oldest first.
    """
    reason, said = failure(job)
    if reason == "DeadlineExceeded":
        limit = job["spec"].get("activeDeadlineSeconds")
        message = f"The Job {job['metadata']['name']} was ended after {limit} seconds."
        return MissedDeadline(message, remedy="Make the build quicker, or raise activeDeadlineSeconds in the template.")
    for pod in reversed(pods):
        if error := _ending_of(pod):
            return error
    why = f"{reason or 'no reason given'}: {one_line(said, _LONGEST)}"
    message = f"The Job {job['metadata']['name']} has failed ({why})."
    return PodLost(message, remedy="See the events of the namespace; the next sweep tries again.")


def _ending_of(pod: Object) -> BuilderError | None:
    status = pod["status"]
    name, said = pod["metadata"]["name"], one_line(status.get("message", ""), _LONGEST)
    if status.get("reason") == "Evicted":
        message = f"The Pod {name} was evicted: {said.rstrip('.')}."
        # A node that runs short names what each container uses, too.
        if "exceed" in said and "low on resource" not in said:
            remedy = "Raise the limits of ephemeral storage and the volumes' sizeLimit in the template."
            return OverBudget(message, remedy=remedy)
        return PodLost(message, remedy="The node ran short; the next sweep tries again.")
    for container, state in _phases(pod):
        if error := _ending_of_container(container, state.get("state", {}).get("terminated") or {}):
            return error
    if status.get("phase") == "Failed":
        return PodLost(f"The Pod {name} has failed: {said}.", remedy="The next sweep tries again.")
    return None


def _ending_of_container(container: str, ended: Object) -> BuilderError | None:
    if ended.get("reason") == "OOMKilled":
        message = f"The container {container} was killed: it needed more memory than its limit allows."
        return OverBudget(message, remedy=_REMEDY_MEMORY)
    code, why = int(ended.get("exitCode") or 0), ended.get("reason", "no reason given")
    if code == ExitCode.TEMPORARY and container not in _OURS:
        # A RUN step is root there, and may kill what runs it: that must not be tried for ever.
        message = f"The engine was killed in the container {container}."
        return VersionCrashed(message, remedy="See `builder logs`.")
    if code in _CODES:
        # It begins with the error's kind, which the exit code tells as well.
        told = _KIND.sub("", str(_told(container, ended).get("error") or ""), count=1)
        return of_code(code, told or f"The container {container} ended with exit code {code}. See `builder logs`.")
    message = f"The container {container} ended with exit code {code} ({why})."
    if code == _KILLED:
        return PodLost(message, remedy="It was killed from outside; the next sweep tries again.")
    return VersionCrashed(message, remedy="See `builder logs`.") if code else None


def exit_code(pod: Object) -> int | None:
    """Return the publisher's exit code in a Pod that has ended: the first that is not 0, or 0; None while it runs."""
    phase = pod["status"].get("phase")
    if phase == "Succeeded":
        return 0
    if phase != "Failed":
        return None
    codes = (state.get("state", {}).get("terminated", {}).get("exitCode") for _, state in _phases(pod))
    return next((int(code) for code in codes if code in _CODES), None)


def image_of(pod: Object) -> str:
    """Return the digest reference that a Pod's publisher left in its termination message; empty if there is none."""
    return str(result_of(pod).get("image") or "")


def result_of(pod: Object) -> Object:
    """Return what a Pod's publisher left in its termination message when it had published; empty if it has not."""
    for container, state in _statuses(pod):
        if container in {"push", "publish"}:
            return _told(container, state.get("state", {}).get("terminated") or {})
    return {}


def phase_seconds(pod: Object) -> dict[str, float]:
    """Return how long each phase of a Pod that has ended took: those of its containers, or what `publish` told.

    `start` is the time until its first container began: scheduling, and the pull of the builder image.
    """
    found: dict[str, float] = {}
    began = ""
    for container, state in _phases(pod):
        ended = state.get("state", {}).get("terminated") or {}
        moments = str(ended.get("startedAt") or ""), str(ended.get("finishedAt") or "")
        began = began or moments[0]
        if container in _PHASES and all(moments):
            found[container] = _between(*moments)
    told = result_of(pod).get("seconds")
    for phase, seconds in (told if isinstance(told, dict) else {}).items():
        if phase in _PHASES and isinstance(seconds, (int, float)) and 0 <= seconds < _MOST_SECONDS:
            found.setdefault(phase, float(seconds))
    return {"start": _between(str(pod["metadata"]["creationTimestamp"]), began), **found} if began else found


def _between(start: str, end: str) -> float:
    """Return the seconds between two moments, RFC 3339; 0 where the clocks of two machines disagree."""
    return max((datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds(), 0.0)


def containers(pod: Object) -> list[tuple[str, str]]:
    """Return the containers of a Pod in the order they run, each with its state: waiting, running or terminated."""
    found = {name: next(iter(status.get("state", {})), "waiting") for name, status in _statuses(pod)}
    spec = pod["spec"]
    names = [each["name"] for each in (*(spec.get("initContainers") or ()), *spec["containers"])]
    return [(name, found.get(name, "waiting")) for name in names]


def _told(container: str, ended: Object) -> Object:
    if container not in _OURS:
        return {}
    try:
        found = json.loads(ended.get("message") or "")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _phases(pod: Object) -> Iterator[tuple[str, Object]]:
    """Yield the containers of ours as `_statuses` does: not a sidecar, which ends as an image of an author's likes."""
    sidecars = {
        each["name"] for each in pod["spec"].get("initContainers") or () if each.get("restartPolicy") == "Always"
    }
    return ((name, status) for name, status in _statuses(pod) if name not in sidecars)


def _statuses(pod: Object) -> Iterator[tuple[str, Object]]:
    """Yield the name and the status of each container of a Pod, in the order they run."""
    status = pod.get("status", {})
    order = {each["name"]: place for place, each in enumerate(pod["spec"].get("initContainers") or ())}
    for key in ("initContainerStatuses", "containerStatuses"):
        found = status.get(key) or []
        for each in sorted(found, key=lambda one: order.get(one["name"], len(order))):
            yield each["name"], each
