"""The listener's client: ask for one version, and wait for its outcome.

Requests are signed as Standard Webhooks are, with SUBMIT_SECRET as it stands. Each attempt at a request has an id of
its own, since the listener accepts an id once; asking twice for one version is one Job.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from builder.errors import (
    BuilderError,
    Defect,
    ExitCode,
    InvalidSettings,
    PermissionRefused,
    ServiceUnavailable,
    StillRunning,
    TryAgain,
    of_code,
)
from builder.http import Client, Closing, Retry, RetryPolicy, ServerKind, is_transient, retried
from builder.log import get_logger
from builder.masking import one_line
from builder.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from builder.http import Response
    from builder.settings import RemoteSettings

    Answer = TypeVar("Answer", bound=BaseModel)

LISTENER = ServerKind(
    name="listener",
    unreachable="Check LISTENER_URL, and whether a network policy lets this machine reach the listener.",
    unexpected="Check that LISTENER_URL is the address of 'builder listen', and no page of a proxy answers there.",
    plain="If it speaks plain HTTP on purpose, write LISTENER_URL as http://{host}.",
)
# Seconds that the listener holds a question for the outcome; its own bound is the same.
_WAIT = 25
_MOST_BYTES = 1 << 20
_FINAL = frozenset({"published", "failed", "foreign"})
# Of the first request, somebody waits for the answer; a Job that runs outlives a listener that is replaced.
_FIRST = RetryPolicy(attempts=5, longest=10, deadline=60)
_FOLLOWING = RetryPolicy(attempts=20, longest=15, deadline=240, unanswered=4)
_log = get_logger("remote")


class Accepted(BaseModel):
    """A version's Job, as the listener knows it.

    Attributes:
        model: the registered model.
        version: its version, a number.
        job: the Job's name.
        uid: the Job's UID.
        created: whether it was made now; else it was there, and runs.
    """

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True)

    model: str
    version: str
    job: str
    uid: str
    created: bool = True


class RemoteOutcome(BaseModel):
    """How far a Job is, or how it ended.

    Attributes:
        state: `pending`, `running`, `published`, `failed` or `foreign`; the last three are final.
        image: the digest reference of the image.
        platforms: what it runs on.
        error: what went wrong, or what a pending Job waits for.
        remedy: what to do about it.
        exit_code: the publisher's.
        seconds: that it took.
    """

    model_config = ConfigDict(frozen=True)

    state: Literal["pending", "running", "published", "failed", "foreign"]
    image: str = ""
    platforms: tuple[str, ...] = ()
    error: str = ""
    remedy: str = ""
    exit_code: int = 0
    seconds: float = 0.0

    @property
    def is_final(self) -> bool:
        """Whether the Job has ended."""
        return self.state in _FINAL

    def failure(self) -> BuilderError | None:
        """Return the error that ended the Job; None if it did not fail."""
        if self.state != "failed":
            return None
        return _error(self.exit_code or ExitCode.SOFTWARE, self.error or "The Job failed.", self.remedy)


@dataclass(frozen=True, kw_only=True)
class Listener(Closing):
    """A listener that takes requests for versions; a context manager that closes its connections.

    Attributes:
        url: its address, without a last slash.
        secret: what requests are signed with.
        client: sends them.
        policy: how often and how long a request is tried; None for what each request calls for.
    """

    url: str
    secret: bytes
    client: Client
    policy: RetryPolicy | None = None

    @classmethod
    def from_settings(cls, settings: RemoteSettings, *, url: str = "", policy: RetryPolicy | None = None) -> Self:
        """Return the listener that settings name.

        Args:
            settings: those of the environment.
            url: its address, in place of LISTENER_URL.
            policy: how often and how long a request is tried.

        Raises:
            InvalidSettings: LISTENER_URL or SUBMIT_SECRET is missing.
        """
        found = {"LISTENER_URL": url or settings.listener_url, "SUBMIT_SECRET": settings.submit_secret}
        problems = [f"{name} is missing" for name, value in found.items() if not value]
        if problems or settings.submit_secret is None:
            message = f"The listener cannot be asked: {'; '.join(problems)}."
            remedy = "Set both; SUBMIT_SECRET is the same as the listener's own."
            raise InvalidSettings(message, remedy=remedy, problems=problems)
        return cls(
            url=(url or settings.listener_url).rstrip("/"),
            secret=settings.submit_secret.get_secret_value().encode(),
            client=Client(LISTENER, ca_bundle=settings.ssl_cert_file, proxies=settings.proxies),
            policy=policy,
        )

    def publish(self, model: str, version: str) -> Accepted:
        """Ask for one version to be published, and return its Job.

        Args:
            model: the registered model.
            version: its version: a number, or an alias as `@champion`.

        Raises:
            BuilderError: the listener does not take it, or is away.
        """
        asked = {"model": model, "version": version}
        return self._ask(f"Publishing {model!r} version {version}", "publish", asked, Accepted, _FIRST)

    def outcome(self, job: Accepted, *, wait: int = _WAIT) -> RemoteOutcome:
        """Return how far a Job is, once it has ended or some seconds have passed.

        Args:
            job: the Job.
            wait: seconds to wait for its end, at most 25.

        Raises:
            BuilderError: there is no such Job any more, or the listener is away.
        """
        asked = {**job.model_dump(exclude={"created"}), "wait": wait}
        found = self._ask(f"Following the Job {job.job}", "outcome", asked, RemoteOutcome, _FOLLOWING)
        if found.state != "published":
            return found
        try:
            digest = Reference.parse(found.image).digest
        except BuilderError:
            digest = None
        if digest is None:
            detail = "with an image that is not a digest reference"
            raise self._unexpected(detail)
        return found

    def follow(self, job: Accepted, *, wait: int = _WAIT, seconds: float = math.inf) -> RemoteOutcome:
        """Return how a Job ended, as `outcome` does, however long it takes.

        Args:
            job: the Job.
            wait: seconds for each question, at most 25.
            seconds: after which it is no longer followed.

        Raises:
            StillRunning: the time is over; the Job goes on.
            TryAgain: the listener is away for minutes; the Job goes on.
            BuilderError: there is no such Job any more.
        """
        said = "", ""
        until = time.monotonic() + seconds
        while True:
            began = time.monotonic()
            try:
                found = self.outcome(job, wait=math.ceil(max(min(wait, until - began), 0)))
            except ServiceUnavailable as error:
                message = f"{error.what} The Job {job.job} goes on."
                raise TryAgain(message, remedy="Ask again when it answers.") from error
            if found.is_final:
                return found
            if (found.state, found.error) != said:
                why = {"why": one_line(found.error, 1000)} if found.error else {}
                (_log.warning if why else _log.info)("the Job goes on", job=job.job, state=found.state, **why)
                said = found.state, found.error
            if time.monotonic() >= until:
                raise StillRunning.after(job.job, seconds)
            # A listener that answers at once is not to be asked without a pause.
            time.sleep(max(min(wait, 1) - (time.monotonic() - began), 0))

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def _ask(
        self, what: str, path: str, asked: Mapping[str, object], kind: type[Answer], policy: RetryPolicy
    ) -> Answer:  # fmt: skip
        body = json.dumps(asked).encode()
        what = one_line(what, 300)

        def send(until: float) -> Answer:
            with self.client.send(
                "POST", f"{self.url}/{path}", until=until, headers=self._headers(body), body=body
            ) as answer:
                return self._read(answer, path, kind)

        return retried(what, send, policy=self.policy or policy)

    def _headers(self, body: bytes) -> dict[str, str]:
        from standardwebhooks.webhooks import Webhook

        now, identity = datetime.now(UTC).replace(microsecond=0), str(uuid.uuid4())
        return {
            "Content-Type": "application/json",
            "webhook-id": identity,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(self.secret).sign(identity, now, body.decode()),
        }

    def _read(self, answer: Response, path: str, kind: type[Answer]) -> Answer:
        if answer.is_redirect:
            message = f"The listener at {answer.host} redirects, which is refused: the request is signed for it alone."
            raise InvalidSettings(message, remedy="Write the address that it redirects to into LISTENER_URL.")
        found = _json(answer.content(_MOST_BYTES))
        if answer.status != HTTPStatus.OK:
            raise self._refused(answer, path, found)
        try:
            return kind.model_validate(found)
        except ValidationError as error:
            detail = "with JSON that is not the listener's"
            raise self._unexpected(detail) from error

    def _refused(self, answer: Response, path: str, found: Mapping[str, Any]) -> Exception:
        """Return the error, or another attempt, for an answer that is not 200."""
        status = answer.status
        told = _told(found)
        if is_transient(status):
            error = told or self.client.kind.unexpected_error(answer.host, f"with status {status}")
            return Retry(error, retry_after=answer.retry_after)
        if told:
            return told
        if status == HTTPStatus.CONFLICT:
            return Retry(self._unexpected("that it has had this request before"))
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            message = f"The listener at {answer.host} refuses the signature ({status})."
            remedy = "SUBMIT_SECRET has to be the listener's own, and this machine's clock right to five minutes."
            return PermissionRefused(message, remedy=remedy)
        if status in {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED}:
            message = f"The listener at {answer.host} takes no requests at /{path} ({status})."
            return InvalidSettings(message, remedy="Set SUBMIT_SECRET at the listener, or correct LISTENER_URL.")
        return self._unexpected(f"with status {status}")

    def _unexpected(self, detail: str) -> ServiceUnavailable:
        return self.client.kind.unexpected_error(self.url.partition("://")[2].partition("/")[0], detail)


def _json(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _told(found: Mapping[str, Any]) -> BuilderError | None:
    """Return the error that a listener tells, with its exit code; None if it tells none."""
    code, what = found.get("exit_code"), found.get("error")
    if not isinstance(code, int) or code not in set(ExitCode) - {ExitCode.OK} or not isinstance(what, str) or not what:
        return None
    return _error(code, what, str(found.get("remedy") or ""))


def _error(code: int, what: str, remedy: str) -> BuilderError:
    error = of_code(code, one_line(what, 1000)) if code in set(ExitCode) else Defect(one_line(what, 1000))
    error.remedy = one_line(remedy, 1000)
    return error
