"""The Kubernetes API as far as it is used: Jobs, their templates, Pods and their logs. Only this imports kubernetes.

Objects are the API's own JSON, as dictionaries: a template that is copied keeps every field, those included that the
client's classes do not know.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

import yaml
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from builder.errors import BuilderError, Defect, InvalidSettings, PermissionRefused, ServiceUnavailable, TryAgain
from builder.masking import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kubernetes.client import ApiException

Object: TypeAlias = dict[str, Any]

NAMESPACE = "builder"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_PAGE = 500
_LONGEST_LINE = 1 << 16
_TIMEOUT = (5, 30)
# A token or a client's certificate, as the account or the kubeconfig says.
_AUTH = ["BearerToken"]
_attempts = retry(
    retry=retry_if_exception_type(ServiceUnavailable),
    stop=stop_after_attempt(4),
    wait=wait_random_exponential(multiplier=0.3, max=5),
    reraise=True,
)


def in_cluster(environ: Mapping[str, str]) -> bool:
    """Return whether this process is in a Pod that may use the Kubernetes API."""
    return bool(environ.get("KUBERNETES_SERVICE_HOST")) and (_ACCOUNT / "token").is_file()


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
            message = f"No cluster can be reached: {type(error).__name__}: {one_line(str(error), 300)}."
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

    def _pages(self, what: str, kind: str, **selectors: str) -> Iterator[Object]:
        @_attempts
        def page(token: str) -> Object:
            asked = {name: value for name, value in {**selectors, "continue": token}.items() if value}
            query: dict[str, str | int] = {"limit": _PAGE, **asked}
            with self._answering(what):
                return _read(self._send("GET", self._path(kind), query=query))

        token = ""
        while True:
            answer = page(token)
            yield from answer["items"]
            token = answer["metadata"].get("continue", "")
            if not token:
                return

    def _found(self, kind: str, name: str) -> Object | None:
        from kubernetes.client import ApiException

        try:
            return _read(self._send("GET", self._path(kind, name)))
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


def lines_of(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a log; a line of more than 64 KiB comes in pieces, since nothing bounds a log."""
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
        if held > _LONGEST_LINE:
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
