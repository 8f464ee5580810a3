"""The Kubernetes API as far as it is used: Jobs, their templates, Pods and their logs. Only this imports kubernetes.

Objects are the API's own JSON, as dictionaries: a template that is copied keeps every field, those included that the
client's classes do not know.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

import yaml
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from builder.errors import BuilderError, Defect, InvalidSettings, PermissionRefused, ServiceUnavailable, TryAgain
from builder.log import get_logger
from builder.masking import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kubernetes.client import ApiException

Object: TypeAlias = dict[str, Any]

NAMESPACE = "builder"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_PAGE = 500
_LONGEST_LINE = 1 << 16
# etcd takes objects of 1.5 MiB.
_LONGEST_OBJECT = 4 << 20
_TIMEOUT = (5, 30)
# Characters of an Event's message; the API server takes 1,024 bytes. Nobody waits for an Event for long.
_LONGEST_MESSAGE = 500
_EVENT_TIMEOUT = (5, 10)
_log = get_logger("cluster")
# A token or a client's certificate, as the account or the kubeconfig says.
_AUTH = ["BearerToken"]
_attempts, _two_attempts = (
    retry(
        retry=retry_if_exception_type(ServiceUnavailable),
        stop=stop_after_attempt(most),
        wait=wait_random_exponential(multiplier=0.3, max=5),
        reraise=True,
    )
    for most in (4, 2)
)


def in_cluster(environ: Mapping[str, str]) -> bool:
    """Return whether this process is in a Pod that may use the Kubernetes API."""
    return bool(environ.get("KUBERNETES_SERVICE_HOST")) and (_ACCOUNT / "token").is_file()


def import_client() -> None:
    """Import the client: for a process that makes its `Cluster` in one of several threads."""
    import_module("kubernetes.config")


class Cluster:
    """One namespace of a Kubernetes cluster. Thread-safe.

    Args:
        namespace: where Jobs are made; empty for the account's own in a Pod, the context's with a kubeconfig, or else
            `builder`.
        context: of the kubeconfig; empty for its current one.

    Raises:
        InvalidSettings: there is neither an account nor a usable kubeconfig.
    """

    def __init__(self, namespace: str = "", *, context: str = "") -> None:
        from kubernetes import client
        from kubernetes.config.config_exception import ConfigException

        config: Any = import_module("kubernetes.config")

        configuration = client.Configuration()
        own = ""
        try:
            # As kubectl does, a kubeconfig that is named comes before the Pod's own account.
            if in_cluster(os.environ) and not context and not os.environ.get("KUBECONFIG"):
                config.load_incluster_config(client_configuration=configuration)
                own = (_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
                # The API server is inside; a proxy for the way out does not lead there.
                configuration.proxy = None
            else:
                config.load_kube_config(context=context or None, client_configuration=configuration)
                contexts, current = config.list_kube_config_contexts()
                chosen = next((each for each in contexts if each["name"] == context), current)
                own = chosen["context"].get("namespace", "")
        except (ConfigException, OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
            # The client checks little of what a kubeconfig holds.
            message = f"No cluster can be reached: {type(error).__name__}: {one_line(str(error), 300).rstrip('.')}."
            remedy = "Run this in a Pod with a service account, or set KUBECONFIG to a file that kubectl takes."
            raise InvalidSettings(message, remedy=remedy) from error
        self.namespace = namespace or own or NAMESPACE
        # Typed as Any: bodies and answers are JSON here, and not the client's classes.
        self._client: Any = client.ApiClient(configuration)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    @_attempts
    def template(self, name: str) -> Object | None:
        """Return a CronJob that serves as a template for Jobs; None if it does not exist."""
        with self._answering(f"read the template {name}"):
            return self._found("cronjobs", name)

    @_attempts
    def job(self, name: str) -> Object | None:
        """Return a Job; None if it does not exist."""
        with self._answering(f"read the Job {name}"):
            return self._found("jobs", name)

    def jobs(self, selector: str, *, fields: str = "") -> Iterator[Object]:
        """Yield the Jobs with some labels, and some values of fields, page by page."""
        return self._pages("list Jobs", "jobs", labelSelector=selector, fieldSelector=fields)

    def jobs_as_of(self, selector: str) -> tuple[list[Object], str]:
        """Return the Jobs with some labels, and the version of that listing, from which `job_changes` goes on."""
        versions: list[str] = []
        found = list(self._pages("list Jobs", "jobs", versions, labelSelector=selector))
        return found, versions[0]

    def job_changes(self, selector: str, version: str, *, seconds: int) -> Iterator[tuple[str, Object]]:
        """Yield what happens to Jobs with some labels, until the API server ends the watch.

        Args:
            selector: the labels.
            version: of the listing, or of the last change, to go on from.
            seconds: after which the API server ends it.

        Yields:
            `OPENED` and an empty object once the API server has taken the request; then `ADDED`, `MODIFIED` or
            `DELETED`, and the Job; `BOOKMARK` and an object with nothing but its version.

        Raises:
            ServiceUnavailable: the API server is away, or no longer knows that version: list again.
        """
        from urllib3.exceptions import HTTPError

        watch: dict[str, str | int] = {
            "watch": "true",
            "labelSelector": selector,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": seconds,
        }
        with self._answering("watch Jobs"):
            answer = self._send("GET", self._path("jobs"), query=watch, timeout=(_TIMEOUT[0], seconds + 10))
        try:
            yield "OPENED", {}
            for line in lines_of(answer.stream(amt=None, decode_content=True), longest=_LONGEST_OBJECT):
                change = json.loads(line)
                if change["type"] == "ERROR":
                    message = f"The watch of Jobs has ended: {one_line(str(change['object'].get('message')), 300)}."
                    raise ServiceUnavailable(message, remedy="Try again.")
                yield change["type"], change["object"]
        except (HTTPError, ValueError) as error:
            message = f"The watch of Jobs was cut off: {one_line(str(error), 300)}."
            raise ServiceUnavailable(message, remedy="Try again.") from error
        finally:
            # There may be more to come, so the connection cannot be used again.
            answer.close()

    def pods(self, selector: str, *, fields: str = "") -> list[Object]:
        """Return the Pods with some labels, and some values of fields, the oldest first."""
        found = self._pages("list Pods", "pods", labelSelector=selector, fieldSelector=fields)
        return sorted(found, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def events(self, uid: str) -> list[Object]:
        """Return the warnings about an object, the oldest first; none where the account may not read them."""
        selector = f"involvedObject.uid={uid},type=Warning"
        try:
            found = list(self._pages("list events", "events", fieldSelector=selector))
        except PermissionRefused:
            return []
        return sorted(found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    @_attempts
    def create_job(self, body: Object) -> Object | None:
        """Create a Job, and return it; None if there is one of that name.

        Raises:
            PermissionRefused: the API server does not let the account create it, and says why.
        """
        from kubernetes.client import ApiException

        with self._answering(f"create the Job {body['metadata']['name']}"):
            try:
                return _read(self._send("POST", self._path("jobs"), body=body))
            except ApiException as error:
                if error.status == HTTPStatus.CONFLICT:
                    return None
                raise

    @_attempts
    def delete_job(self, job: Object) -> None:
        """Delete a Job and its Pods; another one that has its name by now is left alone."""
        from kubernetes.client import ApiException

        metadata = job["metadata"]
        options = {"propagationPolicy": "Background", "preconditions": {"uid": metadata["uid"]}}
        with self._answering(f"delete the Job {metadata['name']}"):
            try:
                _read(self._send("DELETE", self._path("jobs", metadata["name"]), body=options))
            except ApiException as error:
                if error.status not in {HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT}:
                    raise

    def record_event(self, job: Object, reason: str, message: str, *, warning: bool = False) -> None:
        """Record something that happened to a Job as an Event of it, once: its name is made of UID and reason.

        Nothing is raised: an Event is for people who look, and an account that may not create one works all the same.

        Args:
            job: the Job.
            reason: what happened, in one word.
            message: a sentence; it is cut to 500 characters.
            warning: whether it is of the type `Warning`.
        """
        body = _event(job, reason, message, namespace=self.namespace, warning=warning)
        try:
            self._record(body)
        except BuilderError as error:
            _log.debug("an event is not recorded", event_name=body["metadata"]["name"], why=error.what)

    @_two_attempts
    def _record(self, event: Object) -> None:
        with self._answering(f"create the event {event['metadata']['name']}"):
            _read(self._send("POST", self._path("events"), body=event, timeout=_EVENT_TIMEOUT))

    @_attempts
    def account(self) -> str:
        """Return as whom the API server knows this client."""
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        with self._answering("say who asks"):
            found = _read(self._send("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", body=body))
        return one_line(str(found["status"]["userInfo"].get("username", "")), 200)

    @_attempts
    def may(self, verb: str, kind: str, *, group: str = "", name: str = "") -> bool:
        """Return whether the account may do something in the namespace.

        Args:
            verb: `get`, `create` and so on.
            kind: the resource, perhaps with its part: `pods/log`.
            group: the API's group; empty for the core's.
            name: of the one object; empty for all.
        """
        kind, _, part = kind.partition("/")
        asked = {"namespace": self.namespace, "verb": verb, "group": group, "resource": kind, "subresource": part}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {**asked, "name": name}},
        }
        with self._answering("say what the account may do"):
            path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
            return bool(_read(self._send("POST", path, body=body))["status"].get("allowed"))

    @_attempts
    def policy(self, kind: str, name: str) -> Object | None:
        """Return an object of admission registration, such as a policy; None if it does not exist.

        Args:
            kind: `validatingadmissionpolicies` or `validatingadmissionpolicybindings`.
            name: its name.

        Raises:
            PermissionRefused: the account may not see what belongs to the whole cluster.
        """
        with self._answering(f"read {name} of {kind}"):
            return self._found_at(f"/apis/admissionregistration.k8s.io/v1/{kind}/{quote(name, safe='')}")

    def await_change(self, selector: str, *, seconds: int, of_jobs: bool = False) -> None:
        """Wait until a Pod, or a Job, with some labels changes, or some seconds have passed.

        An API server that is away, or cuts the watch, ends the wait early: what is asked next says so.
        """
        began = time.monotonic()
        try:
            self._watched(selector, seconds=seconds, of_jobs=of_jobs)
        except ServiceUnavailable:
            time.sleep(max(min(seconds, 1) - (time.monotonic() - began), 0))

    def _watched(self, selector: str, *, seconds: int, of_jobs: bool) -> None:
        path = self._path("jobs" if of_jobs else "pods")
        with self._answering("watch Jobs"):
            # What is there already comes first: the watch begins after it.
            listed = _read(self._send("GET", path, query={"labelSelector": selector, "limit": 1}))
            watch = {
                "watch": "true",
                "labelSelector": selector,
                "resourceVersion": listed["metadata"]["resourceVersion"],
                "timeoutSeconds": max(seconds, 1),
            }
            answer = self._send("GET", path, query=watch, timeout=(_TIMEOUT[0], seconds + 10))
            try:
                next(answer.stream(amt=None, decode_content=True), None)
            finally:
                # There is more to come, so the connection cannot be used again.
                answer.close()

    def log_lines(self, pod: str, container: str, *, follow: bool = False) -> Iterator[str]:
        """Yield the lines of a container's log; with `follow`, until the container ends."""
        from urllib3.exceptions import HTTPError

        with self._answering(f"read the log of {container} in {pod}"):
            query = {"container": container, "follow": str(follow).lower()}
            answer = self._send("GET", self._path("pods", pod, "log"), query=query, timeout=None)
        try:
            yield from lines_of(answer.stream(amt=None, decode_content=True))
        except HTTPError:
            pass  # the Pod was deleted, or its node is gone: there is no more to read
        finally:
            answer.release_conn()

    def _pages(self, what: str, kind: str, versions: list[str] | None = None, **selectors: str) -> Iterator[Object]:
        """Yield objects page by page; `versions` receives the version of each page, which are the same."""

        @_attempts
        def page(token: str) -> Object:
            asked = {name: value for name, value in {**selectors, "continue": token}.items() if value}
            query: dict[str, str | int] = {"limit": _PAGE, **asked}
            with self._answering(what):
                return _read(self._send("GET", self._path(kind), query=query))

        token = ""
        while True:
            answer = page(token)
            if versions is not None:
                versions.append(answer["metadata"]["resourceVersion"])
            yield from answer["items"]
            token = answer["metadata"].get("continue", "")
            if not token:
                return

    def _found(self, kind: str, name: str) -> Object | None:
        return self._found_at(self._path(kind, name))

    def _found_at(self, path: str) -> Object | None:
        from kubernetes.client import ApiException

        try:
            return _read(self._send("GET", path))
        except ApiException as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    def _path(self, kind: str, *names: str) -> str:
        """Return the path of objects of a kind in the namespace, of one of them, or of a part of it."""
        group = "/apis/batch/v1" if kind in {"jobs", "cronjobs"} else "/api/v1"
        return "/".join([group, "namespaces", *(quote(part, safe="") for part in (self.namespace, kind, *names))])

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int] | None = None,
        body: Object | None = None,
        timeout: tuple[int, int] | None = _TIMEOUT,
    ) -> Any:
        """Send a request, and return the answer, which is not read yet.

        The client's methods for Jobs and for Pods would import the classes of all that these may hold: three hundred
        modules, which take longer than an idle sweep's other imports beside MLflow.

        Raises:
            ApiException: the status is not 2xx.
        """
        from kubernetes.client import ApiException

        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        parameters = list((query or {}).items())
        request = self._client.param_serialize(
            method, path, query_params=parameters, header_params=headers, body=body, auth_settings=_AUTH
        )
        answer = self._client.call_api(*request, _request_timeout=timeout)
        if not HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES:
            answer.read()
            raise ApiException(http_resp=answer)
        return answer.response

    @contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        """Raise our errors for those of the client."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        what = f"{what} in the namespace {self.namespace}"
        try:
            yield
        except ApiException as error:
            raise _error(what, error) from error
        except HTTPError as error:
            message = f"The Kubernetes API is away, and did not {what}: {one_line(str(error), 300)}."
            raise ServiceUnavailable(message, remedy="Try again when it answers.") from error


def _event(job: Object, reason: str, message: str, *, namespace: str, warning: bool) -> Object:
    """Return the Event of a Job; a Job made again has another UID, and so Events of its own."""
    metadata = job["metadata"]
    digest = hashlib.sha256(f"{metadata['uid']} {reason}".encode()).hexdigest()[:16]
    now = datetime.now(tz=UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.{digest}", "namespace": namespace},
        "involvedObject": {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": metadata["name"],
            "namespace": namespace,
            "uid": metadata["uid"],
        },
        "reason": reason,
        "message": one_line(message, _LONGEST_MESSAGE),
        "type": "Warning" if warning else "Normal",
        "source": {"component": "builder"},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }


def lines_of(chunks: Iterable[bytes], *, longest: int = _LONGEST_LINE) -> Iterator[str]:
    """Yield the lines of a log; a longer one than 64 KiB, or `longest`, comes in pieces: nothing bounds a log."""
    pieces: list[bytes] = []
    held = 0
    for chunk in chunks:
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield b"".join([*pieces, line]).decode(errors="replace")
            pieces, held = [], 0
        if rest:
            pieces.append(rest)
            held += len(rest)
        if held > longest:
            yield b"".join(pieces).decode(errors="replace")
            pieces, held = [], 0
    if pieces:
        yield b"".join(pieces).decode(errors="replace")


def _read(answer: Any) -> Object:
    found: Object = json.loads(answer.data)
    return found


_REFUSED = (
    "Check the account, its role, and the policies of the namespace. A sweep that is to publish without Jobs: --inline."
)


def _error(what: str, error: ApiException) -> BuilderError:
    """Return our error for the API server's refusal of something."""
    status = int(error.status or 0)
    said = one_line(_message(error), 500).rstrip(".")
    message = f"The Kubernetes API did not {what} ({status}): {said}."
    if status == HTTPStatus.FORBIDDEN and "exceeded quota" in said:
        return TryAgain(message, remedy="Raise the namespace's quota, or wait for other Jobs to end.")
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        return PermissionRefused(message, remedy=_REFUSED)
    if status in {HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY}:
        return InvalidSettings(message, remedy="Check the namespace and the templates (k8s/).")
    if status in {0, HTTPStatus.GONE, HTTPStatus.TOO_MANY_REQUESTS} or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return ServiceUnavailable(message, remedy="Try again when it answers.")
    return Defect(message)


def _message(error: ApiException) -> str:
    """Return what the API server says of a refusal."""
    try:
        return str(json.loads(error.body or "")["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
