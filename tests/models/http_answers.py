"""A server that answers what it is told to: what MLflow's own never does on demand."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.servers.http_server import in_thread


@dataclass
class Answers:
    """What is answered to every request: status, content type, body; `headers` are those of the requests seen.

    `forward`, where it is set, is asked first, and answers what it returns.
    """

    status: int = 200
    content_type: str = "application/json"
    body: bytes = b"{}"
    location: str = ""
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    forward: Callable[[str], tuple[int, bytes] | None] | None = None
    cut: int = 0


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


@contextlib.contextmanager
def answering_server(answers: Answers, certificate: Path | None = None, key: Path | None = None) -> Iterator[str]:
    """Serve `answers` on loopback, over TLS where a certificate is given; yield the server's URL."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            answers.headers.append(dict(self.headers))
            answers.paths.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = answers.status, answers.body
            if answers.forward and (special := answers.forward(self.path)):
                status, body = special
            self.send_response(status)
            self.send_header("Content-Type", answers.content_type)
            self.send_header("Content-Length", str(len(body) + answers.cut))
            self.send_header("Connection", "close")
            if answers.location:
                self.send_header("Location", answers.location)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    if certificate and key:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    with in_thread(server):
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}"
