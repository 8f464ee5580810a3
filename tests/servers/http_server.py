"""HTTP servers of this process, each in a thread."""

from __future__ import annotations

import contextlib
import socketserver
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer


class HttpServer(ThreadingHTTPServer):
    """Takes many connections at once, and does not wait for them at its end."""

    daemon_threads = True
    request_queue_size = 128


class QuietServer(HttpServer):
    """Says nothing of a client that goes away in the middle, which is what some tests are about."""

    def handle_error(self, request, client_address):
        pass


@contextlib.contextmanager
def in_thread(server: socketserver.BaseServer) -> Iterator[None]:
    """Serve in a thread, and close the server at the end."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
