"""Domino's job APIs: start a job, follow it, and tell how it ended.

A job is started by `POST /api/jobs/v1/jobs`, or by the older `POST /v4/jobs/start`, and looked at by
`GET /v4/jobs/{id}`, or by `GET /api/jobs/beta/jobs/{id}`: which of them a deployment answers depends on its release and
on the address. In a run the API proxy adds the identity; elsewhere a token, or a legacy API key, is sent.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self

from builder.errors import (
    BuilderError,
    BuildFailed,
    InvalidSettings,
    PermissionRefused,
    ServiceUnavailable,
    TryAgain,
    VersionNotFound,
)
from builder.http import Client, Closing, Retry, RetryPolicy, ServerKind, is_transient, retried
from builder.log import get_logger
from builder.masking import mask, one_line

if TYPE_CHECKING:
    from pathlib import Path

    from builder.http import Response
    from builder.settings import HookSettings

DOMINO = ServerKind(
    name="Domino API",
    unreachable="Check DOMINO_API_HOST, and whether this machine may reach it.",
    unexpected="Check that DOMINO_API_HOST is Domino's address, and no page of a proxy answers there.",
    plain="If it speaks plain HTTP on purpose, write DOMINO_API_HOST as http://{host}.",
)
# Where a run's proxy is if DOMINO_API_PROXY does not tell.
LOCAL_PROXY = "http://localhost:8899"
_ENDED = frozenset({"succeeded", "failed", "error", "stopped", "archived"})
_JOB_ID = re.compile(r"[0-9A-Za-z_-]{1,100}")
_MOST_BYTES = 4 << 20
_ABSENT = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED})
# Seconds of a token's life that are left when another is fetched, and its life where the token does not tell.
_SPARE = 60
_LIFE = 240
# Seconds for which a file with a token may be away while it is replaced.
_REPLACED = 2
_log = get_logger("domino")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A job to be started.

    Attributes:
        project: the project's id.
        command: what the job runs.
        environment: the id of its environment; empty for the project's own.
        hardware_tier: the id of its hardware tier; empty for the project's own.
        title: as people see it.
    """

    project: str
    command: str
    environment: str = ""
    hardware_tier: str = ""
    title: str = ""

    def bodies(self) -> dict[str, dict[str, str]]:
        """Return the bodies of the request by its path, the newer API first."""
        v1 = {
            "projectId": self.project,
            "runCommand": self.command,
            "environmentId": self.environment,
            "hardwareTierId": self.hardware_tier,
            "title": self.title,
        }
        v4 = {
            "projectId": self.project,
            "commandToRun": self.command,
            "environmentId": self.environment,
            "overrideHardwareTierId": self.hardware_tier,
            "title": self.title,
        }
        bodies = {"/api/jobs/v1/jobs": v1, "/v4/jobs/start": v4}
        return {path: {name: value for name, value in body.items() if value} for path, body in bodies.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What Domino tells of a job.

    Attributes:
        status: in Domino's words: `Pending`, `Running`, `Succeeded`, `Failed`, `Stopped`, `Error`, ….
        has_ended: whether it has ended.
    """

    status: str
    has_ended: bool

    def failure(self, job: str) -> BuilderError | None:
        """Return the error that a job has ended with; None if it succeeded.

        Domino does not tell the exit code of a job's command.

        Args:
            job: its id.
        """
        if self.status.lower() == "succeeded":
            return None
        if self.status.lower() in {"stopped", "archived"}:
            return TryAgain(f"The Domino job {job} was stopped.", remedy="Start it again.")
        message = f"The Domino job {job} ended as {one_line(self.status, 60)!r}."
        remedy = "Its log, and the columns state and error of the Jobs dashboard, tell why. Domino tells no exit code."
        return BuildFailed(message, remedy=remedy)


class Identity:
    """What a request to Domino is sent with: nothing through the proxy of a run, else a token or a key.

    Args:
        settings: of the environment.
        client: fetches tokens from the proxy.
    """

    def __init__(self, settings: HookSettings, client: Client) -> None:
        self._settings, self._client = settings, client
        self._token = ""
        self._until = 0.0

    def headers(self) -> dict[str, str]:
        """Return the headers of a request; a token that is about to expire is replaced before.

        Raises:
            InvalidSettings: there is no identity, or DOMINO_TOKEN_FILE cannot be read.
        """
        settings = self._settings
        if settings.domino_token_file:
            return self._bearer(_token_in(settings.domino_token_file))
        if settings.domino_token:
            return self._bearer(settings.domino_token.get_secret_value())
        if settings.domino_api_proxy or settings.domino_run_id:
            return self._bearer(self._from_proxy())
        if settings.domino_user_api_key:
            return {"X-Domino-Api-Key": settings.domino_user_api_key.get_secret_value()}
        message = (
            "There is no identity for Domino: DOMINO_TOKEN, DOMINO_TOKEN_FILE and DOMINO_USER_API_KEY are not set."
        )
        remedy = "Set DOMINO_TOKEN to a Personal Access Token, or to a service account's token."
        raise InvalidSettings(message, remedy=remedy)

    def renew(self) -> None:
        """Fetch another token for the next request: the last one was refused."""
        self._until = 0

    @staticmethod
    def _bearer(token: str) -> dict[str, str]:
        token = token.removeprefix("Bearer ").strip()
        mask([token])
        return {"Authorization": f"Bearer {token}"}

    def _from_proxy(self) -> str:
        if time.time() > self._until - _SPARE:
            url = f"{self._settings.domino_api_proxy or LOCAL_PROXY}/access-token"
            answer = _answered(self._client, "Fetching a token of Domino's", "GET", url)
            token = answer[1].decode("utf-8", "replace").strip()
            if answer[0] != HTTPStatus.OK or not re.fullmatch(r"(?:Bearer )?[!-~]+", token):
                raise DOMINO.unexpected_error(url.split("/")[2], f"with status {answer[0]} in place of a token")
            self._token, self._until = token, _expires(token)
        return self._token


def _token_in(path: Path) -> str:
    """Return the token in a file; one that is being replaced may be away, or empty, for a moment.

    Raises:
        InvalidSettings: it still cannot be read after that.
    """
    until = time.monotonic() + _REPLACED
    while True:
        try:
            if token := path.read_text(encoding="utf-8").strip():
                return token
            why = "it is empty"
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8"
        if time.monotonic() > until:
            message = f"DOMINO_TOKEN_FILE is {str(path)!r}, which cannot be read: {why}."
            raise InvalidSettings(message, remedy="Write a token into it, or set DOMINO_TOKEN.")
        time.sleep(_REPLACED / 20)


def _expires(token: str) -> float:
    """Return when a token expires: a JWT tells, without being verified; of others some minutes are assumed."""
    parts = token.split(".")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        return float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError, binascii.Error):
        return time.time() + _LIFE


class DominoApi(Closing):
    """Domino's job APIs; a context manager that closes its connections.

    Args:
        settings: of the environment.
        client: sends requests.
        policy: how often and how long a request is tried that changes nothing.
    """

    def __init__(self, settings: HookSettings, client: Client, policy: RetryPolicy | None = None) -> None:
        self.settings, self.client = settings, client
        self._policy = policy or RetryPolicy(attempts=6, longest=15, deadline=120)
        self._identity = Identity(settings, client)
        # The address and the path that have answered.
        self._base = ""
        self._look = ""

    @classmethod
    def from_settings(cls, settings: HookSettings) -> Self:
        """Return the API that settings name.

        Raises:
            InvalidSettings: neither DOMINO_API_HOST nor DOMINO_API_PROXY is set.
        """
        if not (settings.domino_api_host or settings.domino_api_proxy):
            message = "DOMINO_API_HOST is missing: it should be Domino's address."
            raise InvalidSettings(message, remedy="Set it to the address that people open in a browser.")
        client = Client(DOMINO, ca_bundle=settings.ssl_cert_file, proxies=settings.proxies)
        return cls(settings, client)

    def start(self, order: Order) -> str:
        """Start a job, and return its id.

        It is not tried again after it may have arrived: a job may then have been started twice.

        Raises:
            InvalidSettings: the project, the environment or the tier does not exist, or no job API answers.
            PermissionRefused: the identity may not start jobs in the project.
            ServiceUnavailable: Domino is away.
        """
        for base in self._bases():
            for path, body in order.bodies().items():
                status, content = self._sent("Starting a Domino job", "POST", base, path, json.dumps(body).encode())
                if status in _ABSENT and not _is_told(content):
                    continue
                if status >= HTTPStatus.BAD_REQUEST:
                    what = "start the job"
                    raise _refused(what, status, content)
                job = _job(content).get("id")
                if not isinstance(job, str) or not _JOB_ID.fullmatch(job):
                    raise DOMINO.unexpected_error(_host(base), "without the id of the job that it was to start")
                self._base = base
                return job
        message = f"No job API answers at {' or '.join(_host(base) for base in self._bases())}."
        raise InvalidSettings(message, remedy="Set DOMINO_API_HOST to the address that people open in a browser.")

    def state(self, job: str) -> JobState:
        """Return what Domino tells of a job.

        Raises:
            VersionNotFound: there is no such job.
            BuilderError: Domino is away, or refuses.
        """
        paths = [self._look] if self._look else ["/v4/jobs/{}", "/api/jobs/beta/jobs/{}", "/api/jobs/v1/jobs/{}"]
        for base in [self._base] if self._base else self._bases():
            for path in paths:
                status, content = self._sent("Following a Domino job", "GET", base, path.format(job))
                if status in _ABSENT:
                    continue
                if status >= HTTPStatus.BAD_REQUEST:
                    what = "tell of the job"
                    raise _refused(what, status, content)
                self._base, self._look = base, path
                return _state(content, _host(base))
        message = f"Domino knows no job {job}."
        raise VersionNotFound(message, remedy="Check its id in the Jobs dashboard.")

    def follow(self, job: str, *, seconds: float, every: float = 3) -> JobState:
        """Return how a job ended.

        Args:
            job: its id.
            seconds: to wait for that.
            every: seconds between two looks.

        Raises:
            TryAgain: it has not ended by then, or Domino is away for minutes; the job goes on.
        """
        until, said = time.monotonic() + seconds, ""
        while True:
            try:
                found = self.state(job)
            except ServiceUnavailable as error:
                message = f"{error.what} The Domino job {job} goes on."
                raise TryAgain(message, remedy="Look at the Jobs dashboard.") from error
            if found.has_ended:
                return found
            if found.status != said:
                _log.info("the Domino job goes on", job=job, status=one_line(found.status, 60))
                said = found.status
            if time.monotonic() > until:
                message = f"The Domino job {job} has not ended after {seconds:.0f} s, and goes on."
                raise TryAgain(message, remedy="Look at the Jobs dashboard; --timeout sets how long to wait.")
            time.sleep(every)

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def _bases(self) -> list[str]:
        """Return the addresses to ask, in this order: a run's proxy does not lead to every path."""
        named = bool(self.settings.domino_token or self.settings.domino_token_file)
        proxy = "" if named else self.settings.domino_api_proxy
        return [base for base in (proxy, self.settings.domino_api_host) if base]

    def _sent(self, what: str, method: str, base: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Return status and body of the answer to a request; one that changes something is sent once."""
        by_proxy = base == self.settings.domino_api_proxy
        status, content = 0, b""
        for _ in range(2):
            headers = {"Accept": "application/json", **({} if by_proxy else self._identity.headers())}
            if body is not None:
                headers["Content-Type"] = "application/json"
            policy = self._policy if method == "GET" else RetryPolicy(attempts=1)
            status, content = _answered(
                self.client, what, method, base + path, headers=headers, body=body, policy=policy
            )  # fmt: skip
            if status != HTTPStatus.UNAUTHORIZED or by_proxy:
                break
            self._identity.renew()
        return status, content


def _answered(
    client: Client,
    what: str,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    policy: RetryPolicy | None = None,
) -> tuple[int, bytes]:
    """Return status and body of an answer that is no redirect."""

    def send(until: float) -> tuple[int, bytes]:
        with client.send(method, url, until=until, headers=headers, body=body) as answer:
            if is_transient(answer.status):
                error = DOMINO.unexpected_error(answer.host, f"with status {answer.status}")
                raise Retry(error, retry_after=answer.retry_after)
            _check_stays(answer)
            return answer.status, answer.content(_MOST_BYTES)

    return retried(what, send, policy=policy or RetryPolicy(attempts=4, longest=5, deadline=30))


def _check_stays(answer: Response) -> None:
    if answer.is_redirect:
        message = f"Domino at {answer.host} redirects, which is refused: the credential is sent there alone."
        remedy = "Set DOMINO_API_HOST to the address that it redirects to. A sign-in page means the token is not taken."
        raise InvalidSettings(message, remedy=remedy)


def _host(base: str) -> str:
    return base.partition("://")[2].partition("/")[0]


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _job(content: bytes) -> dict[str, Any]:
    """Return the job of an answer; the newer API wraps it."""
    found = _parsed(content)
    inner = found.get("job")
    return inner if isinstance(inner, dict) else found


def _state(content: bytes, host: str) -> JobState:
    job = _job(content)
    told = next((each for each in (job.get("statuses"), job.get("status")) if each), None)
    if isinstance(told, dict):
        status, completed = told.get("executionStatus"), told.get("isCompleted")
    else:
        status, completed = told, None
    if not isinstance(status, str) or not status:
        detail = "without the status of a job"
        raise DOMINO.unexpected_error(host, detail)
    return JobState(status=status, has_ended=status.lower() in _ENDED or completed is True)


def _is_told(content: bytes) -> bool:
    """Return whether a refusal names a reason: then it is about what was asked, and not about the path."""
    found = _parsed(content)
    return any(isinstance(found.get(name), (str, list)) and found[name] for name in ("message", "errors"))


def _refused(what: str, status: int, content: bytes) -> BuilderError:
    found = _parsed(content)
    said = found.get("message") or found.get("errors") or ""
    message = f"Domino does not {what} ({status}): {one_line(str(said), 500) or 'it says nothing more'}"
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        remedy = "The token has to be valid, and its user a contributor of the project who may start runs."
        return PermissionRefused(message, remedy=remedy)
    return InvalidSettings(message, remedy="Check the ids of project, environment and hardware tier.")
