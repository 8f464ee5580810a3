"""A token server for a registry, as the distribution project specifies it.

https://distribution.github.io/distribution/spec/auth/jwt/ and …/spec/auth/oauth/: a client that was answered 401 asks
the realm for a token for the scopes it was told, with its credential as basic authentication, and gets a signed JWT
that names what of them it may do.
"""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import jwt

from scripts.certificates import Certificate

SERVICE = "registry.test"
ISSUER = "tokens.test"


@dataclass(kw_only=True)
class TokenServer:
    """A token server in a thread of this process.

    Attributes:
        signer: the key and certificate that sign tokens; the registry trusts the certificate.
        users: password and permitted actions by user name.
        lifetime: seconds that a token is said to hold.
        asked: for every token given: the user ("" is anonymous) and the scopes asked for.
    """

    signer: Certificate
    users: Mapping[str, tuple[str, frozenset[str]]]
    lifetime: int = 300
    asked: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        handler = type("Handler", (_Handler,), {"tokens": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="tokens", daemon=True)

    @property
    def realm(self) -> str:
        """The URL that tokens are asked at."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/token"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def token(self, user: str, password: str, scopes: tuple[str, ...]) -> str | None:
        """Return a token for what `user` may do of `scopes`; None where the credential is wrong."""
        expected, allowed = self.users.get(user, ("", frozenset()))
        if not secrets.compare_digest(expected, password):
            return None
        self.asked.append((user, scopes))
        access = []
        for scope in scopes:
            kind, rest = scope.split(":", 1)
            name, actions = rest.rsplit(":", 1)
            granted = sorted(set(actions.split(",")) & allowed)
            access.append({"type": kind, "name": name, "actions": granted})
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "sub": user,
            "aud": SERVICE,
            "iat": now,
            "nbf": now - 10,
            "exp": now + self.lifetime,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        chain = [base64.b64encode(self.signer.der).decode()]
        return jwt.encode(claims, self.signer.key, algorithm="ES256", headers={"x5c": chain})


class _Handler(BaseHTTPRequestHandler):
    tokens: TokenServer

    def do_GET(self) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        user, password = "", ""
        method, _, value = self.headers.get("Authorization", "").partition(" ")
        if method.lower() == "basic":
            user, _, password = base64.b64decode(value).decode().partition(":")
        self._answer(user, password, query.get("scope", []))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
        form = {name: values[0] for name, values in urllib.parse.parse_qs(body).items()}
        self._answer(form.get("username", ""), form.get("password", ""), [form.get("scope", "")])

    def _answer(self, user: str, password: str, scopes: list[str]) -> None:
        token = self.tokens.token(user, password, tuple(" ".join(scopes).split()))
        if token is None:
            self._send(HTTPStatus.UNAUTHORIZED, {"errors": [{"code": "UNAUTHORIZED", "message": "wrong credential"}]})
        else:
            self._send(HTTPStatus.OK, {"token": token, "access_token": token, "expires_in": self.tokens.lifetime})

    def _send(self, status: HTTPStatus, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
