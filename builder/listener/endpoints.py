"""The listener's HTTP: signed requests in, an answer within a second; health and metrics on a port of their own."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from builder.cluster.job import MODEL_VERSION
from builder.errors import BuilderError, ExitCode, TryAgain
from builder.listener.deliveries import Event, Name, Number, Refused, Unsigned, Verifier, event_of, signature_of
from builder.listener.submissions import Full, Ticket
from builder.log import get_logger
from builder.masking import one_line

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from builder.batch import Result
    from builder.listener import Listener
    from builder.listener.metrics import Delivery as DeliveryOutcome


# What MLflow sends is smaller, but for versions with long tags. As many bodies as there may be connections fit into
# memory: nobody knows whose they are before they are read.
_MOST_BYTES = 128 << 10
# Seconds that a body may take, seconds for which an answer waits for its Job, and between looks at a Job.
_SLOWEST_BODY = 10.0
_PATIENCE = 0.6
_LOOK = 20.0
_LONGEST_WAIT = 25
# With so many versions that wait, nobody waits for the Job of one more.
_BUSY = 16
_THREADS = 8
_MOST_CALLERS = 64
_MOST_WAITERS = 500
_RETRY_AFTER = "5"
_STATUS = {
    ExitCode.USAGE: HTTPStatus.BAD_REQUEST,
    ExitCode.DATA: HTTPStatus.UNPROCESSABLE_ENTITY,
    ExitCode.NO_INPUT: HTTPStatus.NOT_FOUND,
    ExitCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    ExitCode.TEMPORARY: HTTPStatus.SERVICE_UNAVAILABLE,
    ExitCode.NO_PERMISSION: HTTPStatus.FORBIDDEN,
}
_log = get_logger("listener")


class _Named(BaseModel):
    # The path is not signed: a body of one is none of the other.
    model_config = ConfigDict(extra="forbid")

    model: Name


T = TypeVar("T", bound=_Named)


class _Wanted(_Named):
    version: Annotated[str, StringConstraints(pattern=r"^(?:[0-9]{1,10}|@[^\s/:@]{1,255})$")]


class _Watched(_Named):
    version: Number
    job: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,63}$")]
    uid: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{1,64}$")]
    wait: Annotated[int, Field(ge=0, le=_LONGEST_WAIT)] = 0


class Pulse:
    """Wakes tasks of an event loop from any thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._beat = asyncio.Event()

    def beat(self) -> None:
        """Wake all who wait."""
        loop = self._loop
        if loop:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._next)

    async def wait(self, seconds: float) -> None:
        """Wait for the next beat, or for some seconds."""
        self._loop = asyncio.get_running_loop()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._beat.wait(), seconds)

    def _next(self) -> None:
        beat, self._beat = self._beat, asyncio.Event()
        beat.set()


class App:
    """The routes of the listener.

    Args:
        listener: what is done for requests.
        webhook_secrets: of MLflow's deliveries; empty where none are taken.
        submit_secrets: of callers' requests; empty where none are taken.
        observe: called with the outcome of each delivery, and the seconds until its answer.
    """

    def __init__(
        self,
        listener: Listener,
        *,
        webhook_secrets: Sequence[str],
        submit_secrets: Sequence[str],
        observe: Callable[[DeliveryOutcome, float], None] = lambda _outcome, _seconds: None,
    ) -> None:
        self._listener = listener
        self._deliveries = Verifier(webhook_secrets)
        self._callers = Verifier(submit_secrets)
        self._observe = observe
        self._threads = CapacityLimiter(_THREADS)
        # Of each kind of request, those that are being served.
        self._open: Counter[str] = Counter()
        self.pulse = Pulse()
        self.ending = False

    def routes(self) -> list[BaseRoute]:
        """Return the routes for deliveries and requests."""
        return [
            Route("/webhook", self._webhook, methods=["POST"]),
            Route("/publish", self._publish, methods=["POST"]),
            Route("/outcome", self._outcome, methods=["POST"]),
        ]

    def end(self) -> None:
        """Answer those who wait for an outcome; others are served until the server ends."""
        self.ending = True
        self.pulse.beat()

    # ---- MLflow's deliveries

    async def _webhook(self, request: Request) -> Response:
        began = time.monotonic()
        outcome, response = await self._delivered(request)
        self._observe(outcome, time.monotonic() - began)
        return response

    async def _delivered(self, request: Request) -> tuple[DeliveryOutcome, Response]:
        try:
            body, identity = await _signed(self._deliveries, request)
            event = event_of(self._listener.settings, body)
        except Refused as error:
            _log_refusal(error, "a delivery is refused")
            return _refusal(error), Response(status_code=error.status)
        if event is None:
            return "ignored", Response(status_code=HTTPStatus.NO_CONTENT)
        try:
            return "taken", Response(status_code=await self._submitted(event))
        except (Full, BuilderError) as error:
            why = error.one_line() if isinstance(error, BuilderError) else "too many versions wait"
            _log.warning("a delivery is to be sent again", model=event.name, version=event.version, why=why)
            self._deliveries.release(identity)
            return "unavailable", _again()

    async def _submitted(self, event: Event) -> HTTPStatus:
        """Have an event served, and wait a moment for that; a promise is as good while services answer.

        Raises:
            BuilderError: a service is away.
            Full: too many versions wait.
        """
        submissions = self._listener.submissions
        ticket = submissions.offer(event)
        patience = 0.0 if submissions.waiting > _BUSY and submissions.away is None else _PATIENCE
        try:
            await _result(ticket, patience)
        except TimeoutError:
            if away := submissions.away:
                submissions.withdraw(ticket)
                raise away from None
            if submissions.promise(ticket):
                return HTTPStatus.ACCEPTED
            message = "The Job could not be made now."
            raise TryAgain(message) from None
        except BuilderError as error:
            if error.retryable:
                raise
            # It is in the log, and on the version where it is the version's own; sending it again changes nothing.
        return HTTPStatus.NO_CONTENT

    # ---- requests of callers

    async def _publish(self, request: Request) -> Response:
        async def serve(wanted: _Wanted) -> dict[str, object]:
            made = await run_sync(self._listener.publish, wanted.model, wanted.version, limiter=self._threads)
            version = (made.job["metadata"].get("annotations") or {}).get(MODEL_VERSION, wanted.version)
            uid = made.job["metadata"]["uid"]
            return {"model": wanted.model, "version": version, "job": made.name, "uid": uid, "created": made.created}

        return await self._called(request, _Wanted, serve, most=_MOST_CALLERS)

    async def _outcome(self, request: Request) -> Response:
        async def serve(watched: _Watched) -> dict[str, object]:
            deadline = time.monotonic() + watched.wait
            while True:
                look = partial(self._listener.tell, watched.model, watched.version, watched.job, watched.uid)
                told = await run_sync(look, limiter=self._threads)
                if told.ended:
                    break
                await self._until_ended(watched, deadline)
                if self.ending or time.monotonic() >= deadline:
                    break
            return asdict(told)

        return await self._called(request, _Watched, serve, most=_MOST_WAITERS)

    async def _until_ended(self, watched: _Watched, deadline: float) -> None:
        """Wait until the watch shows the end of a Job; it is looked at from time to time all the same."""
        look = min(deadline, time.monotonic() + _LOOK)
        while not self.ending and (remaining := look - time.monotonic()) > 0:
            # It may have ended between the last look and now.
            if self._listener.ended(watched.job, watched.uid):
                return
            await self.pulse.wait(remaining)

    async def _called(
        self, request: Request, kind: type[T], serve: Callable[[T], Awaitable[dict[str, object]]], *, most: int
    ) -> Response:
        try:
            body, identity = await _signed(self._callers, request)
            wanted = kind.model_validate_json(body)
        except Refused as error:
            _log_refusal(error, "a request is refused")
            return Response(status_code=error.status)
        except ValidationError as error:
            names = ", ".join(sorted({str(each["loc"][0]) if each["loc"] else "body" for each in error.errors()}))
            facts = {"error": f"The request is malformed: {names}.", "remedy": "See docs/domino.md.", "exit_code": 64}
            return JSONResponse(facts, status_code=HTTPStatus.BAD_REQUEST)
        path = request.url.path
        if self._open[path] >= most:
            self._callers.release(identity)
            return _again("Too many requests wait.", "Try again.", ExitCode.TEMPORARY)
        self._open[path] += 1
        try:
            return JSONResponse(await serve(wanted))
        except BuilderError as error:
            _log.warning("a request failed", path=path, model=one_line(wanted.model), error=error.one_line())
            # Not a server's error: asking again changes nothing.
            status = _STATUS.get(error.exit_code, HTTPStatus.UNPROCESSABLE_ENTITY)
            if error.retryable:
                self._callers.release(identity)
                return _again(one_line(error.what), one_line(error.remedy), error.exit_code)
            facts = {"error": one_line(error.what), "remedy": one_line(error.remedy), "exit_code": int(error.exit_code)}
            return JSONResponse(facts, status_code=status)
        finally:
            self._open[path] -= 1


async def _result(ticket: Ticket, seconds: float) -> Result:
    outcome = asyncio.wrap_future(ticket.outcome)
    # An error that comes after the wait has been logged by then.
    outcome.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.wait_for(asyncio.shield(outcome), seconds)


async def _signed(verifier: Verifier, request: Request) -> tuple[bytes, str]:
    """Return the body and the id of a signed request.

    Raises:
        Refused: it is not signed, too large, too slow, or was sent before.
    """
    if not verifier:
        raise Refused(HTTPStatus.NOT_FOUND, "no secret is configured")
    signature_of(request.headers)
    body = await _body(request)
    return body, verifier.verify(request.headers, body)


async def _body(request: Request) -> bytes:
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > _MOST_BYTES:
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "its body is too large")
    body = bytearray()
    try:
        async with asyncio.timeout(_SLOWEST_BODY):
            async for part in request.stream():
                body += part
                if len(body) > _MOST_BYTES:
                    raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "its body is too large")
    except TimeoutError as error:
        raise Refused(HTTPStatus.REQUEST_TIMEOUT, "its body took too long") from error
    except ClientDisconnect as error:
        raise Refused(HTTPStatus.BAD_REQUEST, "its body was cut off") from error
    return bytes(body)


def _log_refusal(error: Refused, event: str) -> None:
    # What is not signed at all is a passer-by's, who should not fill the log.
    (_log.debug if isinstance(error, Unsigned) else _log.warning)(event, why=error.why, status=error.status)


def _refusal(error: Refused) -> DeliveryOutcome:
    if isinstance(error, Unsigned):
        return "unsigned"
    return "replayed" if error.status == HTTPStatus.CONFLICT else "refused"


def _again(what: str = "", remedy: str = "", code: int = 0) -> Response:
    headers = {"Retry-After": _RETRY_AFTER}
    if not what:
        return Response(status_code=HTTPStatus.SERVICE_UNAVAILABLE, headers=headers)
    facts = {"error": what, "remedy": remedy, "exit_code": int(code)}
    return JSONResponse(facts, status_code=HTTPStatus.SERVICE_UNAVAILABLE, headers=headers)


def operations(app: App, listener: Listener, metrics: Callable[[str], tuple[bytes, str]] | None = None) -> Starlette:
    """Return the application of METRICS_PORT: `/healthz`, `/readyz`, `/metrics`.

    Args:
        app: the other one, whose end makes this one not ready.
        listener: whose watch makes it ready.
        metrics: from an Accept header to a body and its type; None if there are none.
    """

    async def alive(_request: Request) -> Response:
        return Response("ok\n", media_type="text/plain")

    async def ready(_request: Request) -> Response:
        if app.ending or not listener.watch.synced:
            why = "ending" if app.ending else "the Jobs have not been listed yet"
            return Response(f"{why}\n", status_code=HTTPStatus.SERVICE_UNAVAILABLE, media_type="text/plain")
        return Response("ok\n", media_type="text/plain")

    async def measured(request: Request) -> Response:
        if metrics is None:
            return Response(status_code=HTTPStatus.NOT_FOUND)
        body, kind = await run_sync(metrics, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": kind})

    return Starlette(routes=[Route("/healthz", alive), Route("/readyz", ready), Route("/metrics", measured)])
