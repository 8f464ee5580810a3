"""The listener's sockets, its event loop in a thread, and its end."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from builder.cluster import Jobs
from builder.errors import Defect, InvalidSettings, ServiceUnavailable, Terminated
from builder.listener import Listener, page
from builder.listener.endpoints import App, operations
from builder.listener.metrics import Metrics
from builder.listener.overview import Overview
from builder.log import get_logger
from builder.models.catalog import MlflowCatalog
from builder.settings import several

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp

    from builder.cluster.api_server import Cluster, Object
    from builder.settings import ListenSettings

_BACKLOG = 2048
_MOST_CONNECTIONS = 1000
# Seconds in which a connection has to send a request's head, and for which an idle one is kept.
_SLOWEST_HEAD = 10.0
_KEEP_ALIVE = 30
_STARTS_WITHIN = 30.0
# Seconds for open requests, and for what was promised, when it ends: less than a Pod has for that.
GRACE = 20
_LOOK = 3600.0
_log = get_logger("listener")


class _Protocol(H11Protocol):
    """HTTP/1.1 that does not wait for ever for the head of a request, the first or a later one."""

    _slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # uvicorn's own timer, for idle connections, ends with a request's first byte.
        if self._is_served():
            self._go_on()
        else:
            self._wait()

    def connection_lost(self, error: Exception | None) -> None:
        self._go_on()
        super().connection_lost(error)

    def _is_served(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        if self._slow is None:
            self._slow = self.loop.call_later(_SLOWEST_HEAD, self._give_up)

    def _go_on(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _give_up(self) -> None:
        self._slow = None
        if not self._is_served() and not self.transport.is_closing():
            self.transport.close()


def listen(settings: ListenSettings, cluster: Cluster) -> None:
    """Serve until the process is asked to end, then end in order.

    Open requests are answered, what was promised is done for a while, and what is left is the next sweep's.

    Args:
        settings: what the environment says.
        cluster: where Jobs are made.

    Raises:
        InvalidSettings: an address or a certificate cannot be used.
        BuilderError: MLflow's client cannot be opened.
    """
    _check_certificate(settings)
    catalog = MlflowCatalog.from_settings(settings)
    # Half a second of imports, which the first delivery should not wait for.
    _ = catalog.client
    listener = Listener(settings=settings, jobs=Jobs(settings=settings, cluster=cluster, catalog=catalog))
    overview = Overview(settings, catalog, cluster, listener.watch)
    metrics = Metrics(settings, overview, listener.watch)
    webhook, submit = several(settings.webhook_secret), several(settings.submit_secret)
    app = App(listener, webhook_secrets=webhook, submit_secrets=submit, observe=metrics.delivery)

    def changed(job: Object, deleted: bool) -> None:
        app.pulse.beat()
        overview.changed(job, deleted)

    listener.changed = changed
    # What got no Job, such as another publisher's image, is shown at once as well.
    listener.looked = overview.look_again
    overview.on_end(lambda job, _pods: listener.look_again(job))
    sockets = [bound(settings.listen_host, port) for port in (settings.listen_port, settings.metrics_port)]
    public = Starlette(routes=[*app.routes(), *page.routes(settings, overview)])
    servers = Servers(settings, [public, operations(app, listener, metrics.render)], sockets, grace=GRACE)
    listener.start()
    overview.start()
    servers.start()
    _log.info(
        "listening",
        port=sockets[0].getsockname()[1],
        metrics_port=sockets[1].getsockname()[1],
        namespace=cluster.namespace,
        deliveries=bool(webhook),
        requests=bool(submit),
    )
    try:
        servers.wait()
    except Terminated:
        _log.info("ending")
        app.end()
        # Those who watch the page go on to the other listener.
        overview.close()
        servers.end(0)
        listener.close(GRACE)
        servers.end(1)
        servers.join(GRACE)


def bound(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Args:
        host: an address; empty for all, of both families where the machine has both.
        port: 0 for any that is free.

    Raises:
        InvalidSettings: the address cannot be used.
    """
    try:
        if host:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, port), family=family, backlog=_BACKLOG)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=_BACKLOG)
    except OSError as error:
        message = f"The listener cannot use {host or 'any address'} port {port}: {error.strerror}."
        raise InvalidSettings(message, remedy="Correct LISTEN_HOST, LISTEN_PORT or METRICS_PORT.") from error


class Servers:
    """HTTP servers that share an event loop in a thread of its own: the main thread is left to signals.

    Args:
        settings: the certificate of the first one.
        apps: the applications, the first of which may speak TLS.
        sockets: one for each.
        grace: seconds that open requests have when the servers end.
    """

    def __init__(
        self, settings: ListenSettings, apps: Sequence[ASGIApp], sockets: Sequence[socket.socket], *, grace: int
    ) -> None:  # fmt: skip
        self._sockets = sockets
        self._servers = [
            uvicorn.Server(_config(settings, app, tls=not number, grace=grace)) for number, app in enumerate(apps)
        ]
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Begin to serve, and return when requests are taken.

        Raises:
            ServiceUnavailable: a server does not start.
        """
        self._thread.start()
        wait = threading.Event()
        for _ in range(int(_STARTS_WITHIN / 0.05)):
            if all(server.started for server in self._servers):
                return
            if self._failed or not self._thread.is_alive():
                break
            wait.wait(0.05)
        why = str(self._failed[0]) if self._failed else "it took too long"
        message = f"The listener's HTTP server does not start: {why}."
        raise ServiceUnavailable(message, remedy="Start it again.")

    def end(self, number: int) -> None:
        """Have a server take no more connections, and end when its requests are served."""
        self._servers[number].should_exit = True

    def wait(self) -> None:
        """Wait for the end of the servers, which is not expected.

        Raises:
            Defect: they have ended by themselves.
        """
        while self._thread.is_alive():
            self._thread.join(_LOOK)
        message = f"The HTTP server has ended: {self._failed[0] if self._failed else 'no reason given'}."
        raise Defect(message)

    def join(self, seconds: float) -> None:
        """Wait for the end of all servers."""
        self._thread.join(seconds)

    def _run(self) -> None:
        async def serve() -> None:
            pairs = zip(self._servers, self._sockets, strict=True)
            await asyncio.gather(*(server.serve(sockets=[each]) for server, each in pairs))

        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            self._failed.append(error)
            _log.error("the HTTP server has ended", error=f"{type(error).__name__}: {error}")


def _check_certificate(settings: ListenSettings) -> None:
    if settings.listen_certificate is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.listen_certificate, settings.listen_key)
    except (OSError, ValueError) as error:
        message = f"LISTEN_CERTIFICATE and LISTEN_KEY cannot be used: {error}."
        raise InvalidSettings(message, remedy="Give the PEM files of a certificate and of its key.") from error


def _config(settings: ListenSettings, app: ASGIApp, *, tls: bool, grace: int) -> uvicorn.Config:
    certificate = settings.listen_certificate if tls else None
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=grace,
        ssl_certfile=str(certificate) if certificate else None,
        ssl_keyfile=str(settings.listen_key) if certificate else None,
    )
