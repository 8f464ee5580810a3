"""A Kubernetes API of Jobs that end by themselves, over TLS: what a real one does not do at a given moment.

The real one is in tests/cluster/; this shows races, refusals and Pods that do not start.
"""

from __future__ import annotations

import contextlib
import json
import re
import ssl
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from scripts.certificates import for_loopback, self_signed
from tests.hook.responder import IMAGE
from tests.servers.http_server import in_thread

TOKEN = "account-token-of-the-tests"
MESSAGE = {"state": "published", "image": IMAGE, "platforms": ["linux/amd64"], "changed": True}


@dataclass
class Api:
    """An API server that runs.

    Attributes:
        templates: CronJobs by their names.
        environ: what a client needs.
        jobs: by their names, as the API has them.
        created: the bodies of Jobs that were created.
        deleted: UIDs of Jobs that were deleted.
        races: how often somebody else creates the Job first.
        message: the termination message of a Job's container, and `code` its exit code, as of when the Job ends.
        waiting: why its container waits; it never ends then.
        refuses: what a request for Jobs is refused with.
    """

    namespace: ClassVar[str] = "builder-test"
    templates: dict[str, Any]
    environ: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    races: int = 0
    message: dict[str, Any] = field(default_factory=lambda: dict(MESSAGE))
    code: int = 0
    waiting: dict[str, str] | None = None
    refuses: str = ""
    looks: dict[str, int] = field(default_factory=dict)
    holds: dict[str, int] = field(default_factory=dict)
    left: dict[str, tuple[int, str]] = field(default_factory=dict)

    def kubeconfig(self, folder: Path) -> Path:
        """Write a kubeconfig that leads here, and return its path."""
        cluster = {"server": self.environ["KUBE_API_URL"], "certificate-authority": self.environ["KUBE_CA"]}
        context = {"cluster": "it", "user": "it", "namespace": self.namespace}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "it", "cluster": cluster}],
            "users": [{"name": "it", "user": {"token": TOKEN}}],
            "contexts": [{"name": "it", "context": context}],
            "current-context": "it",
        }
        path = folder / "kubeconfig"
        path.write_text(json.dumps(document))
        return path

    def add(self, name: str, *, ended: str = "", looks: int = 0, holds: int = 0, **body: Any) -> str:
        """Add a Job, and return its UID.

        Args:
            name: the Job's.
            ended: the condition it has ended with.
            looks: how often it is looked at before it ends.
            holds: how often it is looked at before it is gone, once it was deleted.
            body: the rest of the Job.
        """
        uid = str(uuid.uuid4())
        metadata = {**body.pop("metadata", {}), "name": name, "uid": uid, "creationTimestamp": "2026-01-01T00:00:00Z"}
        job = {**body, "metadata": metadata, "status": {}}
        if ended:
            job["status"] = {"conditions": [_condition(ended)]}
        self.jobs[name] = job
        self.looks[uid], self.holds[uid] = looks, holds
        return uid

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        """Return status and JSON of an answer."""
        found = re.fullmatch(rf"/(?:apis/batch/v1|api/v1)/namespaces/{self.namespace}/(\w+)(?:/(.+))?", path)
        if not found:
            return 404, {"message": f"no {path}"}
        kind, name = found.groups()
        if kind == "jobs" and self.refuses:
            return 403, {"message": self.refuses}
        if kind == "cronjobs":
            return (200, self.templates[name]) if name in self.templates else (404, {"message": "no such template"})
        if kind == "events":
            return 200, {"metadata": {}, "items": []}
        if kind == "pods":
            return self._pods(query)
        if method == "POST":
            return self._create(body)
        if name is None:
            return self._listed(watch="watch" in query)
        if name not in self.jobs:
            return 404, {"message": "no such Job"}
        if method == "DELETE":
            return self._delete(name, body)
        return 200, self._look(name)

    def _pods(self, query: dict[str, list[str]]) -> tuple[int, Any]:
        if "watch" in query:
            return self._listed(watch=True)
        uid = query["labelSelector"][0].partition("=")[2]
        found = [self.pod(job) for job in self.jobs.values() if job["metadata"]["uid"] == uid]
        return 200, {"metadata": {"resourceVersion": "1"}, "items": found}

    def _listed(self, *, watch: bool) -> tuple[int, Any]:
        if watch:
            time.sleep(0.2)
            return 200, None  # nothing has changed until the watch's end
        return 200, {"metadata": {"resourceVersion": "1"}, "items": list(self.jobs.values())}

    def _create(self, body: Any) -> tuple[int, Any]:
        name = body["metadata"]["name"]
        if self.races:
            self.races -= 1
            self.add(name)
        if name in self.jobs:
            self._look(name)
            return 409, {"message": f"{name} already exists"}
        self.created.append(body)
        self.add(name, **body)
        return 201, self.jobs[name]

    def _delete(self, name: str, body: Any) -> tuple[int, Any]:
        job = self.jobs[name]
        if body["preconditions"]["uid"] != job["metadata"]["uid"] or body["propagationPolicy"] != "Background":
            return 409, {"message": "another Job has this name"}
        self.deleted.append(job["metadata"]["uid"])
        job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:01Z"
        return 200, {}

    def _look(self, name: str) -> dict[str, Any]:
        job = self.jobs[name]
        uid = job["metadata"]["uid"]
        if "deletionTimestamp" in job["metadata"]:
            self.holds[uid] -= 1
            if self.holds[uid] <= 0:
                del self.jobs[name]
        elif not job["status"] and self.waiting is None:
            self.looks[uid] -= 1
            if self.looks[uid] < 0:
                self.left[uid] = self.code, json.dumps(self.message)
                job["status"] = {"conditions": [_condition("Failed" if self.code else "Complete")]}
        return job

    def pod(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the Pod of a Job."""
        code, message = self.left.get(job["metadata"]["uid"], (self.code, json.dumps(self.message)))
        terminated = {"exitCode": code, "message": message}
        state = {"terminated": terminated} if job["status"] else {"waiting": self.waiting} if self.waiting else {}
        phase = ("Failed" if code else "Succeeded") if job["status"] else "Pending"
        status = {"phase": phase, "containerStatuses": [{"name": "publish", "state": state}]}
        metadata = {"name": "pod", "uid": "u-pod", "creationTimestamp": "2026-01-01T00:00:00Z"}
        return {"metadata": metadata, "spec": {"containers": [{"name": "publish"}]}, "status": status}


def _condition(kind: str) -> dict[str, str]:
    """Return the condition with which a Job ends."""
    reason = "BackoffLimitExceeded" if kind == "Failed" else "CompletionsReached"
    return {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": "2026-01-01T00:00:09Z"}


@contextlib.contextmanager
def serving(templates: Sequence[dict[str, Any]], folder: Path) -> Iterator[Api]:
    """Run such a server on loopback, with a certificate of its own."""
    api = Api(templates={each["metadata"]["name"]: each for each in templates})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            split = urlsplit(self.path)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, found = 401, {"message": "Unauthorized"}
            else:
                asked = json.loads(body) if body else None
                status, found = api.answer(self.command, split.path, parse_qs(split.query), asked)
            content = b"" if found is None else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a client that does not trust the certificate

    server = Server(("127.0.0.1", 0), Handler)
    certificate = for_loopback(folder / "kubernetes", authority := self_signed(folder / "kubernetes", "kubernetes"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.path, certificate.key_path)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    api.environ = {
        "KUBE_API_URL": f"https://127.0.0.1:{server.server_port}",
        "KUBE_TOKEN": TOKEN,
        "KUBE_CA": str(authority.path),
        "KUBE_NAMESPACE": api.namespace,
    }
    with in_thread(server):
        yield api
