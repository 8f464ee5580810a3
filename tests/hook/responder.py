"""A listener that answers what it is told to, and takes only what is signed: what the real one never does on demand."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from tests.servers.http_server import in_thread

SECRET = "submit-secret-of-the-tests"
IMAGE = "registry.example.com/models/pump@sha256:" + "a1" * 32
PUBLISHED = {
    "state": "published",
    "image": IMAGE,
    "platforms": ["linux/amd64", "linux/arm64"],
    "error": "",
    "remedy": "",
    "exit_code": 0,
    "seconds": 12.3,
}


@dataclass
class Responder:
    """A listener that runs.

    Attributes:
        url: for LISTENER_URL.
        outcomes: what /outcome answers, one after the other; the last one for ever.
        special: asked before; answers with status, JSON and headers, or None.
        taken: the requests that were signed, as (path, JSON).
        ids: of all requests.
    """

    url: str = ""
    outcomes: list[dict[str, Any]] = field(default_factory=lambda: [PUBLISHED])
    special: Callable[[str, int], tuple[int, Any, dict[str, str]] | None] = lambda _path, _number: None
    taken: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Return status, JSON and headers of an answer."""
        try:
            Webhook(SECRET.encode()).verify(body, headers)
        except WebhookVerificationError:
            return 401, None, {}
        identity = headers["webhook-id"]
        self.ids.append(identity)
        if (special := self.special(path, len(self.ids))) is not None:
            return special
        if self.ids.count(identity) > 1:
            return 409, None, {}
        asked = json.loads(body)
        self.taken.append((path, asked))
        if path == "/publish":
            number = 3 if str(asked["version"]).startswith("@") else int(asked["version"])
            job = {"job": f"publish-pump-v{number}-0123456789", "uid": "u-1", "created": True}
            return 200, {"model": asked["model"], "version": number, **job}, {}
        if path == "/outcome":
            return 200, self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0], {}
        return 404, None, {}


@contextlib.contextmanager
def responding() -> Iterator[Responder]:
    """Run such a listener."""
    responder = Responder()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, found, more = responder.answer(self.path, headers, body)
            content = b"" if found is None else json.dumps(found).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), "Connection": "close", **more}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    responder.url = f"http://127.0.0.1:{server.server_port}"
    with in_thread(server):
        yield responder
