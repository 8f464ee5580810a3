"""A registry seen through a reverse proxy, which counts what goes through, and may answer in the registry's place."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from tests.servers.http_server import QuietServer, in_thread
from tests.waiting import HANG

_HOP = frozenset({"connection", "transfer-encoding", "keep-alive"})
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A request that went through.

    Attributes:
        method: HTTP's.
        path: with the query.
        sent: bytes of its body.
        status: of the answer.
    """

    method: str
    path: str
    sent: int
    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as a rule sees it.

    Attributes:
        number: counts from 1.
        method: HTTP's.
        path: with the query.
        content_type: of the body.
        body: what was read of it: manifests whole, blobs not at all.
        authorization: the header of that name; empty without one.
        gone: whether the client has closed its connection, as one does that has waited for too long; known of requests
            whose body was read or that have none.
    """

    number: int
    method: str
    path: str
    content_type: str
    body: bytes
    authorization: str = ""
    gone: Callable[[], bool] = lambda: False


Reply = tuple[int, dict[str, str], bytes]
# Returns an answer in the registry's place, another path to send there, or None for the request as it is.
Rule = Callable[[Asked], "Reply | str | None"]


@dataclass
class Forwarding:
    """A proxy that runs.

    Attributes:
        host: `ADDRESS:PORT`.
        rule: may be changed while it runs.
        seen: what went through, in the order of the answers.
        adds: headers that answers get.
    """

    host: str
    rule: Rule = lambda _asked: None
    seen: list[Seen] = field(default_factory=list)
    adds: dict[str, str] = field(default_factory=dict)

    @property
    def sent(self) -> int:
        """Bytes of all blobs and manifests that were sent to the registry."""
        return sum(each.sent for each in self.seen)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_arguments):
        pass

    def do_GET(self):
        server = self.server
        length = int(self.headers.get("Content-Length") or 0)
        small = "/manifests/" in self.path
        body = self.rfile.read(length) if small else b""
        with server.lock:
            server.number += 1
            number = server.number
        answered = server.forwarding.rule(
            Asked(
                number=number,
                method=self.command,
                path=self.path,
                content_type=self.headers.get("Content-Type", ""),
                body=body,
                authorization=self.headers.get("Authorization", ""),
                gone=self._gone,
            )
        )
        if isinstance(answered, tuple):
            if not small:
                self._drain(length)
            status, headers, content = answered
            self._note(status, 0)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            return
        self._forward(answered or self.path, body if small else self._body(length), length)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def _gone(self):
        with contextlib.suppress(BlockingIOError):
            try:
                return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except ConnectionError:
                return True
        return False

    def _body(self, length):
        while length > 0:
            chunk = self.rfile.read(min(_CHUNK, length))
            if not chunk:
                raise ConnectionError
            length -= len(chunk)
            yield chunk

    def _drain(self, length):
        for _ in self._body(length):
            pass

    def _note(self, status, sent):
        self.server.forwarding.seen.append(Seen(method=self.command, path=self.path, sent=sent, status=status))

    def _forward(self, path, body, length):
        connection = http.client.HTTPConnection(self.server.upstream, timeout=HANG)
        try:
            connection.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    connection.putheader(name, value)
            connection.endheaders()
            for chunk in [body] if isinstance(body, bytes) else body:
                connection.send(chunk)
            answer = connection.getresponse()
            self._note(answer.status, length)
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            for name, value in self.server.forwarding.adds.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", "0")
            self.end_headers()
            if self.command != "HEAD":
                while chunk := answer.read(_CHUNK):
                    self.wfile.write(chunk)
        finally:
            connection.close()


@contextlib.contextmanager
def forwarding(
    host: str, rule: Rule | None = None, adds: dict[str, str] | None = None, address: str = "127.0.0.1"
) -> Iterator[Forwarding]:
    """Run a proxy on a free port of `address` before the registry at `host`.

    It hands on the name it was asked under, so that the registry's own addresses lead back to it.
    """
    server = QuietServer((address, 0), _Handler)
    server.upstream, server.number, server.lock = host, 0, threading.Lock()
    server.forwarding = Forwarding(host=f"{address}:{server.server_address[1]}", adds=adds or {})
    if rule:
        server.forwarding.rule = rule
    with in_thread(server):
        yield server.forwarding
