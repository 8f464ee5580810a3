"""A server for what no real registry can be made to do. It answers what the test says, and keeps what it was asked."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.servers.http_server import HttpServer, in_thread

JSON = "application/json"


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def authorization(self) -> str | None:
        return self.headers.get("Authorization")


@dataclass
class Reply:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    slowly: bool = False
    cut: int | None = None  # the connection ends after so many bytes of the content

    @classmethod
    def error(cls, status: int, code: str, message: str = "said the registry", **headers: str) -> Reply:
        content = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        return cls(status, {"Content-Type": JSON, **headers}, content)

    @classmethod
    def json(cls, value: Any, **headers: str) -> Reply:
        return cls(200, {"Content-Type": JSON, **headers}, json.dumps(value).encode())


class Reset:
    """Instead of a reply: the connection is reset."""


Answer = Callable[[Asked], Reply | Reset]


@dataclass
class Fake:
    """A running server. `asked` leaves out what finds out whether it speaks TLS."""

    host: str
    asked: list[Asked] = field(default_factory=list)
    answers: list[Reply | Reset] = field(default_factory=list)
    answer: Answer | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def reply(self, asked: Asked) -> Reply | Reset:
        self.asked.append(asked)
        if self.answer:
            return self.answer(asked)
        return self.answers.pop(0)


@contextlib.contextmanager
def serve() -> Iterator[Fake]:
    """Run a server in a thread of this process."""
    server = HttpServer(("127.0.0.1", 0), _Handler)
    fake = Fake(f"127.0.0.1:{server.server_address[1]}")
    server.fake = fake  # type: ignore[attr-defined]
    with in_thread(server):
        try:
            yield fake
        finally:
            fake.over.set()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        fake: Fake = self.server.fake  # type: ignore[attr-defined]
        if self.path == "/v2/":
            self._send(Reply(200))
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        reply = fake.reply(Asked(self.command, self.path, dict(self.headers), body))
        if isinstance(reply, Reset):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        self._send(reply)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._any
        raise AttributeError(name)

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if reply.slowly:
            fake: Fake = self.server.fake  # type: ignore[attr-defined]
            with contextlib.suppress(OSError):
                for byte in reply.content:
                    if fake.over.wait(0.02):
                        break
                    self.wfile.write(bytes([byte]))
            return
        self.wfile.write(reply.content[: reply.cut])
        self.close_connection = self.close_connection or reply.cut is not None

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass
