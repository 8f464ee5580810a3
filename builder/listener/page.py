"""The status page: read only, live, and nothing but files of its own.

The page keeps one stream of server-sent events open, `/status/changes`: at first all rows, then what changes. A thread
for each reader would be one less for deliveries, so the stream looks at the overview's revision twice a second.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from builder.log import get_logger
from builder.masking import masked, one_line, url_credentials
from builder.settings import several

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from builder.listener.overview import Key, Overview, Row
    from builder.settings import ListenSettings

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_STATIC = Path(__file__).with_name("static")
_FILES = {"page.css": "text/css", "page.js": "text/javascript"}
# Seconds until the overview is looked at again, and until a stream says something, so that no proxy ends it.
_LOOK, _BEAT = 0.5, 15
# A stream has room for so many readers, and an event for so many rows.
_MOST_READERS = 100
_MOST_ROWS = 500
# Of an address: passwords that are wrong at a time, each of which is answered after some seconds.
_MOST_WRONG, _SLOW = 5, 1.0
_LONGEST_NAME = 300
_REVISION = re.compile(r"[0-9]{1,18}")
_log = get_logger("page")


def routes(settings: ListenSettings, overview: Overview) -> list[Route]:
    """Return the routes of the status page; none where STATUS_ACCESS is `off`.

    Args:
        settings: who may see it, and where MLflow's own pages are.
        overview: what it shows. Streams end when it is closed.
    """
    from starlette.routing import Route

    if settings.status_access == "off":
        return []
    page = _Page(settings, overview)
    return [
        Route("/status", page.guarded(page.html)),
        Route("/status/changes", page.guarded(page.changes)),
        Route("/status/{name}", page.guarded(page.file)),
    ]


class _Page:
    def __init__(self, settings: ListenSettings, overview: Overview) -> None:
        self._overview = overview
        self._target = settings.target
        self._models = _pages_of_mlflow(settings)
        self._tokens = _tokens(settings)
        # Revisions are of one process; a reader may come from another replica.
        self._process = secrets.token_hex(4)
        self._readers = 0
        self._wrong: Counter[str] = Counter()
        self._html = (_STATIC / "page.html").read_bytes()
        self._files = {name: (_STATIC / name).read_bytes() for name in _FILES}

    def guarded(self, answer: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that answers those alone who may see the page."""

        async def endpoint(request: Request) -> Response:
            response = await self._refusal(request) or answer(request)
            response.headers.update(HEADERS)
            return response

        return endpoint

    async def _refusal(self, request: Request) -> Response | None:
        """Return the answer for somebody without a right password, after a while; None where it is right."""
        if self._tokens is None:
            return None
        given, address = request.headers.get("Authorization", ""), request.client.host if request.client else ""
        # The right one first: behind an ingress, all readers have one address.
        if _right(given, self._tokens):
            return None
        if self._wrong[address] >= _MOST_WRONG:
            return _plain("Too many wrong passwords. Try again later.", HTTPStatus.TOO_MANY_REQUESTS)
        if given:
            _log.warning("wrong password for the status page", address=address)
            self._wrong[address] += 1
            try:
                await asyncio.sleep(_SLOW)
            finally:
                self._wrong[address] -= 1
                self._wrong += Counter()  # drops what is 0
        refused = _plain("The password is STATUS_TOKEN; any user name will do.", HTTPStatus.UNAUTHORIZED)
        refused.headers["WWW-Authenticate"] = 'Basic realm="Status of published models", charset="UTF-8"'
        return refused

    def html(self, _request: Request) -> Response:
        """Answer with the page."""
        from starlette.responses import HTMLResponse

        return HTMLResponse(self._html)

    def file(self, request: Request) -> Response:
        """Answer with a file of the page's."""
        from starlette.responses import Response

        name = request.path_params["name"]
        if name not in self._files:
            return _plain("Not Found", HTTPStatus.NOT_FOUND)
        return Response(self._files[name], media_type=_FILES[name])

    def changes(self, request: Request) -> Response:
        """Answer with the stream of rows."""
        from starlette.responses import StreamingResponse

        if self._readers >= _MOST_READERS:
            return _plain("Too many readers. Try again later.", HTTPStatus.SERVICE_UNAVAILABLE)
        after = request.headers.get("Last-Event-ID") or request.query_params.get("after", "")
        process, _, revision = after.partition(".")
        known = int(revision) if process == self._process and _REVISION.fullmatch(revision) else 0
        stream = StreamingResponse(self._events(known), media_type="text/event-stream")
        stream.headers["X-Accel-Buffering"] = "no"  # nginx would keep events back
        return stream

    async def _events(self, revision: int) -> AsyncIterator[str]:
        self._readers += 1
        try:
            beat, told, first = 0.0, "", True
            while not self._overview.closed:
                now = asyncio.get_running_loop().time()
                state = self._state()
                if state != told or now >= beat:
                    yield _event("state", state)
                    told, beat = state, now + _BEAT
                if first or self._overview.revision != revision:
                    changes = self._overview.changes_since(revision)
                    revision, first = changes.revision, False
                    for event in self._rows(changes.rows, changes.removed, complete=changes.complete):
                        yield event
                        await asyncio.sleep(0)
                    yield f"id: {self._process}.{revision}\n\n"
                await asyncio.sleep(_LOOK)
        finally:
            self._readers -= 1

    def _rows(self, rows: list[Row], removed: list[Key], *, complete: bool) -> Iterator[str]:
        """Yield events for rows, no more than some rows each: others are served in between."""
        for at in range(0, max(len(rows), 1), _MOST_ROWS):
            part = [self._row(row) for row in rows[at : at + _MOST_ROWS]]
            gone = [] if at else [_key(key) for key in removed]
            yield _event("rows", _json({"rows": part, "removed": gone, "first": complete and at == 0}))

    def _row(self, row: Row) -> dict[str, Any]:
        """Return a row as the page takes it; what is empty is left out."""
        status = row.status
        since = status.since
        if not since and row.waiting_since is not None:
            since = datetime.fromtimestamp(row.waiting_since, tz=UTC).isoformat(timespec="seconds")
        found = {
            "key": _key(row.key),
            "model": one_line(status.model, _LONGEST_NAME),
            "version": one_line(status.version, _LONGEST_NAME),
            "state": status.state,
            "since": since,
            "method": status.method,
            "platforms": status.platforms,
            "digest": status.digest,
            "image": row.image,
            "attempts": status.attempts,
            "next": status.next_try,
            "error": status.error,
            "job": status.job,
            "log": status.log,
            "link": self._link(status.model, status.version),
        }
        return {name: value for name, value in found.items() if value}

    def _link(self, model: str, version: str) -> str:
        """Return the address of a version's page of MLflow's; empty where there is none that may be shown."""
        if not self._models or masked(model) != model:
            return ""
        name = quote(model.encode("utf-8", "surrogatepass"), safe="")
        return f"{self._models}/#/models/{name}/versions/{quote(version, safe='')}"

    def _state(self) -> str:
        sources = [
            {name: value for name, value in asdict(source).items() if name != "answered"}
            for source in self._overview.sources()
        ]
        return _json({"target": self._target, "synced": self._overview.synced, "sources": sources})


def _pages_of_mlflow(settings: ListenSettings) -> str:
    """Return where MLflow's pages are, without a slash at the end; empty where that is no address of the web."""
    address = settings.mlflow_ui_url or settings.mlflow_tracking_uri
    is_page = address.lower().startswith(("https://", "http://")) and not any(url_credentials(address))
    return address.rstrip("/") if is_page and masked(address) == address else ""


def _tokens(settings: ListenSettings) -> list[bytes] | None:
    """Return the passwords, each of which will do; None where everybody may see the page."""
    if settings.status_access == "open":
        return None
    return [token.encode() for token in several(settings.status_token)]


def _right(authorization: str, tokens: list[bytes]) -> bool:
    """Return whether an Authorization header has one of some passwords, in a time that tells nothing of them."""
    scheme, _, given = authorization.partition(" ")
    try:
        password = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return False
    return scheme.lower() == "basic" and any([hmac.compare_digest(password, token) for token in tokens])  # noqa: C419  # all, always


def _plain(text: str, status: HTTPStatus) -> Response:
    from starlette.responses import PlainTextResponse

    later = {"Retry-After": "5"} if status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE} else {}
    return PlainTextResponse(text + "\n", status_code=status, headers=later)


def _key(key: Key) -> str:
    """Return a name for a row that holds nothing of an author's."""
    return hashlib.blake2s(json.dumps(key).encode(), digest_size=10).hexdigest()


def _json(value: Mapping[str, Any]) -> str:
    # In ASCII, and so without a line break that would end the event.
    return json.dumps(value, separators=(",", ":"))


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"
