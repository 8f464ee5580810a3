"""The listener of an install, and an address for it: this cluster has no kube-proxy, so a Service has none."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import selectors
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.cluster.site import Site
from tests.servers.http_server import in_thread
from tests.signed import post, signed
from tests.waiting import HANG, LONG_HANG, until

WEBHOOK_SECRET = "deliveries-of-the-tests-0123456789"
SUBMIT_SECRET = "callers-of-the-tests-0123456789"
STATUS_TOKEN = "readers-of-the-tests-0123456789"
DEPLOYMENT = "deployment/builder-listener"
_CHUNK = 1 << 16


class Service(socketserver.ThreadingTCPServer):
    """Hands each connection on to a Pod that is ready, as kube-proxy would."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, get: Callable[..., Any], address: str) -> None:
        super().__init__((address, 0), _Connection)
        self._get = get
        self._turn = itertools.count()
        self._known: tuple[float, list[str]] = (0.0, [])
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The address that a webhook delivers to."""
        host, port = self.server_address[:2]
        return f"http://{host}:{port}"

    def addresses(self) -> list[str]:
        """Return the Pods that are ready, the next one first; asked twice a second at most."""
        with self._lock:
            when, found = self._known
            if time.monotonic() - when > 0.5:
                found = [pod["status"]["podIP"] for pod in _pods(self._get) if _is_ready(pod)]
                self._known = time.monotonic(), found
        turn = next(self._turn) % len(found) if found else 0
        return found[turn:] + found[:turn]


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        deadline = time.monotonic() + HANG
        # Between two Pods there may be none.
        while time.monotonic() < deadline:
            for address in self.server.addresses():  # type: ignore[attr-defined] # a Service
                try:
                    pod = socket.create_connection((address, 8080), timeout=2)
                except OSError:
                    continue
                with pod:
                    _pump(self.request, pod)
                return
            time.sleep(0.1)


def _pump(one: socket.socket, other: socket.socket) -> None:
    """Hand on bytes both ways until one side ends."""
    other.settimeout(None)
    with selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
        selector.register(one, selectors.EVENT_READ, other)
        selector.register(other, selectors.EVENT_READ, one)
        while True:
            for key, _ in selector.select():
                chunk = key.fileobj.recv(_CHUNK)  # type: ignore[union-attr] # sockets
                if not chunk:
                    return
                key.data.sendall(chunk)


def _pods(get: Callable[..., Any]) -> list[dict[str, Any]]:
    """Return the listener's Pods that are not about to end."""
    found = get("pods", "-l", "app.kubernetes.io/component=listener")
    return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]


def _is_ready(pod: Mapping[str, Any]) -> bool:
    conditions = {each["type"]: each["status"] for each in pod["status"].get("conditions") or ()}
    return conditions.get("Ready") == "True"


def ready(get: Callable[..., Any]) -> list[str]:
    """Return the addresses of the listener's Pods that are ready, as the Service's endpoints have them."""
    slices = get("endpointslices", "-l", "kubernetes.io/service-name=builder-listener")
    return [
        address
        for each in slices
        for endpoint in each.get("endpoints") or ()
        if endpoint["conditions"].get("ready")
        for address in endpoint["addresses"]
    ]


def insist(send: Callable[[], tuple[int, str]]) -> tuple[int, str]:
    """Return an answer's status and text; what is lost, came too slowly, or is to be sent again is sent again."""

    def answered() -> tuple[int, str] | None:
        with contextlib.suppress(OSError, http.client.HTTPException, httpx2.TransportError):
            answer = send()
            return None if answer[0] in {408, 503} else answer
        return None

    found: tuple[int, str] = until(answered)
    return found


def fetched(url: str, **options: Any) -> tuple[int, str]:
    """Return the status and the text of the answer to a GET, which is sent again as in `insist`."""

    def send() -> tuple[int, str]:
        answer = httpx2.get(url, trust_env=False, timeout=HANG, **options)
        return answer.status_code, answer.text

    return insist(send)


@dataclass(kw_only=True)
class Listening:
    """A listener that runs.

    Attributes:
        site: the install.
        service: its address.
    """

    site: Site
    service: Service
    _ids: Iterator[int] = field(default_factory=itertools.count)

    @property
    def url(self) -> str:
        """The listener's address."""
        return self.service.url

    def post(
        self, path: str, body: object, *, secret: str = WEBHOOK_SECRET, headers: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Send a signed request, and return the status and the text of the answer.

        Raises:
            OSError, HTTPException: the connection was lost.
        """
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        host, port = self.service.server_address[:2]
        return post(f"{host}:{port}", path, raw, {**signed(raw, secret), **(headers or {})})

    def pods(self) -> list[dict[str, Any]]:
        """Return the listener's Pods that are not about to end."""
        return _pods(self.site.get)

    def ask(self, path: str, body: object, *, secret: str = WEBHOOK_SECRET) -> tuple[int, str]:
        """Send a signed request as MLflow and callers do: again while it is lost, or is to be sent again."""
        return insist(lambda: self.post(path, body, secret=secret))

    def log(self) -> str:
        """Return what the listener's Pods have logged."""
        names = [pod["metadata"]["name"] for pod in self.pods()]
        return "".join(self.site.kubectl("logs", name) for name in names)

    def scale(self, replicas: int) -> None:
        """Have so many Pods, and wait until they are ready."""
        self.site.kubectl("scale", DEPLOYMENT, f"--replicas={replicas}")
        self.site.kubectl("rollout", "status", DEPLOYMENT, f"--timeout={LONG_HANG:.0f}s")
        # Another controller tells of them in the slices.
        until(lambda: len(ready(self.site.get)) == replicas)


@contextlib.contextmanager
def listening(site: Site, *, replicas: int = 1, webhook: bool = True) -> Iterator[Listening]:
    """Run the listener of an install, and have MLflow deliver to it if `webhook`."""
    secrets = {"WEBHOOK_SECRET": WEBHOOK_SECRET, "SUBMIT_SECRET": SUBMIT_SECRET, "STATUS_TOKEN": STATUS_TOKEN}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "builder-listener"}, "stringData": secrets}
    site.cluster.create(secret, namespace=site.namespace)
    service = Service(site.get, site.cluster.address)
    with in_thread(service):
        running = Listening(site=site, service=service)
        running.scale(replicas)
        environ = {"WEBHOOK_SECRET": WEBHOOK_SECRET}
        identity = ""
        if webhook:
            made = site.builder("webhook", "create", service.url, "--name", site.namespace, **environ)
            assert made.code == 0, made.stderr
            identity = made.stdout.strip()
        try:
            yield running
        finally:
            if identity:
                site.builder("webhook", "delete", identity, **environ)
