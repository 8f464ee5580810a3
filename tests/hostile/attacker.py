"""An attacker's server on loopback: it notes every request, and answers as an MLflow server would."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.servers.http_server import in_thread

_CONTENT = b"flavors: {}\n"


@dataclass(frozen=True, slots=True)
class Attacker:
    """A server that must never be asked anything.

    Attributes:
        host: `127.0.0.2:PORT`.
        seen: method, path and headers of each request, or what came in place of a request.
    """

    host: str
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)


@contextlib.contextmanager
def attacker_server() -> Iterator[Attacker]:
    """Run an attacker's server, on an address that no real server of the tests has."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            attacker.seen.append((f"{self.command} {self.path}", dict(self.headers)))
            listing = {"files": [{"path": "MLmodel", "is_dir": False, "file_size": len(_CONTENT)}]}
            body = json.dumps(listing).encode() if "?path=" in self.path else _CONTENT
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def process_request(self, request, client_address):
            attacker.seen.append(("connection", {}))
            super().process_request(request, client_address)

    server = Server(("127.0.0.2", 0), Handler)
    attacker = Attacker(f"127.0.0.2:{server.server_port}")
    with in_thread(server):
        yield attacker
