"""The Kubernetes API as far as it is used: Jobs, their templates, Pods and their logs. Only this imports kubernetes.

Objects are the API's own JSON, as dictionaries: a template that is copied keeps every field, those included that the
client's classes do not know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
_TIMEOUT = (5, 30)
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
            if in_cluster(os.environ) and not context:
                config.load_incluster_config(client_configuration=configuration)
                own = (_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
                # The API server is inside; a proxy for the way out does not lead there.
                configuration.proxy = None
            else:
                config.load_kube_config(context=context or None, client_configuration=configuration)
                contexts, current = config.list_kube_config_contexts()
                chosen = next((each for each in contexts if each["name"] == context), current)
                own = chosen["context"].get("namespace", "")
        except (ConfigException, OSError) as error:
            message = f"No cluster can be reached: {one_line(str(error), 300)}."
            remedy = "Run this in a Pod with a service account, or set KUBECONFIG to a kubeconfig file."
            raise InvalidSettings(message, remedy=remedy) from error
        self.namespace = namespace or own or NAMESPACE
        # Typed as Any: bodies and answers are JSON here, and not the client's classes.
        self._client: Any = client.ApiClient(configuration)
        self._jobs: Any = client.BatchV1Api(self._client)
        self._pods: Any = client.CoreV1Api(self._client)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    @_attempts
    def template(self, name: str) -> Object | None:
        """Return a CronJob that serves as a template for Jobs; None if it does not exist."""
        with self._answering(f"read the template {name}"):
            return self._found(lambda: self._jobs.read_namespaced_cron_job(name, self.namespace, **_RAW))

    @_attempts
    def job(self, name: str) -> Object | None:
        """Return a Job; None if it does not exist."""
        with self._answering(f"read the Job {name}"):
            return self._found(lambda: self._jobs.read_namespaced_job(name, self.namespace, **_RAW))

    def jobs(self, selector: str) -> Iterator[Object]:
        """Yield the Jobs with some labels, page by page."""
        return self._pages("list Jobs", self._jobs.list_namespaced_job, label_selector=selector)

    def pods(self, selector: str) -> list[Object]:
        """Return the Pods with some labels, the oldest first."""
        found = self._pages("list Pods", self._pods.list_namespaced_pod, label_selector=selector)
        return sorted(found, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def events(self, uid: str) -> list[Object]:
        """Return the warnings about an object, the oldest first; none where the account may not read them."""
        selector = f"involvedObject.uid={uid},type=Warning"
        try:
            found = list(self._pages("list events", self._pods.list_namespaced_event, field_selector=selector))
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
                return _read(self._jobs.create_namespaced_job(self.namespace, body, **_RAW))
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
                self._jobs.delete_namespaced_job(metadata["name"], self.namespace, body=options, **_RAW)
            except ApiException as error:
                if error.status not in {HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT}:
                    raise

    def await_change(self, selector: str, *, seconds: int, of_jobs: bool = False) -> None:
        """Wait until a Pod, or a Job, with some labels changes, or some seconds have passed."""
        watch: Any = import_module("kubernetes.watch").Watch()
        listing = self._jobs.list_namespaced_job if of_jobs else self._pods.list_namespaced_pod
        with self._answering("watch Jobs"):
            # What is there already comes first: the watch begins after it.
            answer = _read(listing(self.namespace, label_selector=selector, limit=1, **_RAW))
            version = answer["metadata"]["resourceVersion"]
            for _ in watch.stream(
                listing,
                self.namespace,
                label_selector=selector,
                resource_version=version,
                timeout_seconds=max(seconds, 1),
                _request_timeout=seconds + 10,
            ):
                watch.stop()

    def log_lines(self, pod: str, container: str, *, follow: bool = False) -> Iterator[str]:
        """Yield the lines of a container's log; with `follow`, until the container ends."""
        from urllib3.exceptions import HTTPError

        with self._answering(f"read the log of {container} in {pod}"):
            answer = self._pods.read_namespaced_pod_log(
                pod, self.namespace, container=container, follow=follow, _preload_content=False
            )
        rest = b""
        try:
            for chunk in answer.stream(amt=None, decode_content=True):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
        except HTTPError:
            pass  # the Pod was deleted, or its node is gone: there is no more to read
        finally:
            answer.release_conn()
        if rest:
            yield rest.decode(errors="replace")

    def _pages(self, what: str, listing: Any, **selectors: str) -> Iterator[Object]:
        @_attempts
        def page(token: str) -> Object:
            with self._answering(what):
                return _read(listing(self.namespace, limit=_PAGE, _continue=token, **selectors, **_RAW))

        token = ""
        while True:
            answer = page(token)
            yield from answer["items"]
            token = answer["metadata"].get("continue", "")
            if not token:
                return

    def _found(self, read: Any) -> Object | None:
        from kubernetes.client import ApiException

        try:
            return _read(read())
        except ApiException as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

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


# The answer as it came, not turned into the client's classes.
_RAW: dict[str, Any] = {"_preload_content": False, "_request_timeout": _TIMEOUT}


def _read(answer: Any) -> Object:
    found: Object = json.loads(answer.data)
    return found


def _error(what: str, error: ApiException) -> BuilderError:
    """Return our error for the API server's refusal of something."""
    status = int(error.status or 0)
    said = one_line(_message(error), 500).rstrip(".")
    message = f"The Kubernetes API did not {what} ({status}): {said}."
    if status == HTTPStatus.FORBIDDEN and "exceeded quota" in said:
        return TryAgain(message, remedy="Raise the namespace's quota, or wait for other Jobs to end.")
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        return PermissionRefused(message, remedy="Check the account, its role, and the policies of the namespace.")
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
