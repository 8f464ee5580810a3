"""HTTP, whatever the server: hosts, proxies, and retries with their bounds."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Protocol, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
    wait_random,
)
from tenacity.stop import stop_base

from builder import reference
from builder.errors import BuilderError
from builder.log import get_logger

DOCKER_HUB = reference.DOCKER_HUB
# The host that serves Docker Hub's API, and the name under which Docker keeps its credential.
_DOCKER_HUB_API = "registry-1.docker.io"
DOCKER_HUB_KEY = "https://index.docker.io/v1/"
canonical = reference.canonical_host


def api_host(host: str) -> str:
    """Return the host, with its port, that serves a registry's API."""
    return _DOCKER_HUB_API if canonical(host) == DOCKER_HUB else host


def split(host: str) -> tuple[str, str]:
    """Return a host's name and its port ("" where it has none); an IPv6 address loses its brackets."""
    name, colon, port = host.rpartition(":")
    if not colon or "]" in port:
        name, port = host, ""
    return name.strip("[]").lower(), port


def is_loopback(host: str) -> bool:
    """Return whether `host` (perhaps with a port) is this machine by its name alone, without asking a name server."""
    name, _ = split(host)
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_named(host: str, names: Iterable[str]) -> bool:
    """Return whether `names` holds `host`, with its port or without."""
    name, _ = split(host)
    return any(host.lower() == entry.lower() or entry.lower() == name for entry in names)


def proxy_for(scheme: str, name: str, port: int, proxies: Mapping[str, str]) -> str:
    """Return the URL of the proxy to reach a host through; empty for none.

    NO_PROXY's entries are hosts, domains (with or without a leading dot, and all below them), addresses and networks,
    each perhaps with a port, or `*` for everything. This machine is never reached through a proxy.

    Args:
        scheme: `http` or `https`.
        name: the host's name or address, without brackets.
        port: the port.
        proxies: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, those that are set.
    """
    if is_loopback(f"[{name}]" if ":" in name else name):
        return ""
    if any(_excepts(entry.strip().lower(), name.lower(), port) for entry in proxies.get("NO_PROXY", "").split(",")):
        return ""
    return proxies.get("HTTPS_PROXY" if scheme == "https" else "HTTP_PROXY", "")


def _excepts(entry: str, name: str, port: int) -> bool:
    if not entry:
        return False
    if entry == "*":
        return True
    try:
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        pass
    else:
        try:
            return ipaddress.ip_address(name) in network
        except ValueError:
            return False
    domain, entry_port = split(entry)
    if entry_port and entry_port != str(port):
        return False
    domain = domain.removeprefix("*").lstrip(".")
    return name == domain or name.endswith(f".{domain}")


_log = get_logger("registry")
# A server that does not know what it was asked will not know it later either.
_FINAL = frozenset({HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.HTTP_VERSION_NOT_SUPPORTED})

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long a registry is waited for.

    Attributes:
        attempts: how often a request is made at most.
        first: seconds before the second attempt; they double with each further one, and some chance is added.
        longest: seconds between two attempts at most; a registry's Retry-After is heard up to this.
        deadline: seconds for an operation with all its attempts, unless it is of a large blob.
        unanswered: how often a request is made at most that is accepted and not answered at all.
        slowest: bytes per second below which a large blob's upload is given up.
        sleep: waits for some seconds.
    """

    attempts: int = 6
    first: float = 0.5
    longest: float = 60
    deadline: float = 300
    unanswered: int = 2
    slowest: float = 100_000
    sleep: Callable[[float], None] = time.sleep

    def seconds_for(self, size: int) -> float:
        """Return the seconds that an operation on `size` bytes may take, with all its attempts."""
        return self.deadline + size / self.slowest


class Refusal(Protocol):
    """An answer that is not what was hoped for; what it means is known where the protocol is."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The answer's headers."""
        ...

    @property
    def reason(self) -> str:
        """What the server says, on one line that people may see."""
        ...

    def error(self, what: str) -> BuilderError:
        """Return the error it stands for; `what` is the beginning of a sentence."""
        ...


class Retry(Exception):
    """An attempt failed in a way that may pass; it never reaches a caller of `retried`.

    Args:
        failure: the answer that says so, or the error where there was no answer.
        unanswered: whether the request was accepted, and an answer did not begin in time.
    """

    def __init__(self, failure: Refusal | BuilderError, *, unanswered: bool = False) -> None:
        super().__init__("an attempt failed")
        self.failure = failure
        self.unanswered = unanswered

    @property
    def retry_after(self) -> float | None:
        """The seconds that the server asks to wait; None where it does not say."""
        if isinstance(self.failure, BuilderError):
            return None
        return retry_after(self.failure.headers.get("Retry-After", ""))

    @property
    def reason(self) -> str:
        """Why it failed, on one line that people may see."""
        return str(self.failure) if isinstance(self.failure, BuilderError) else self.failure.reason

    def error(self, what: str) -> BuilderError:
        """Return the error for when it did not pass; `what` is the beginning of a sentence."""
        return self.failure if isinstance(self.failure, BuilderError) else self.failure.error(what)


def passes(status: int) -> bool:
    """Return whether a request that was answered with `status` may be answered otherwise later."""
    server_error = status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _FINAL
    return server_error or status == HTTPStatus.TOO_MANY_REQUESTS


def retry_after(value: str) -> float | None:
    """Return the seconds that a Retry-After header (RFC 9110, section 10.2.3) asks to wait; None where it says none."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        moment = parsedate_to_datetime(value)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None


def retried(what: str, act: Callable[[float], Result], *, policy: RetryPolicy, seconds: float | None = None) -> Result:
    """Return what `act` returns, trying again while it raises `Retry`.

    Args:
        what: what is done and on what, the beginning of a sentence for the log and the error.
        act: does it; is given the time, as of `time.monotonic`, at which it has to be over.
        policy: how long to go on.
        seconds: for all attempts together, where it is not `patience.deadline`.

    Raises:
        BuilderError: it did not pass.
    """
    budget = policy.deadline if seconds is None else seconds
    backoff = wait_exponential(multiplier=policy.first, max=policy.longest) + wait_random(0, policy.first)

    def wait(state: RetryCallState) -> float:
        again = _failure(state)
        asked = again.retry_after if again else None
        return backoff(state) if asked is None else min(asked, policy.longest)

    def log(state: RetryCallState) -> None:
        again = _failure(state)
        why = again.reason if again else None
        seconds = state.next_action.sleep if state.next_action else 0
        _log.warning("trying again", what=what, why=why, attempt=state.attempt_number, seconds=round(seconds, 1))

    retrying = Retrying(
        sleep=policy.sleep,
        retry=retry_if_exception_type(Retry),
        stop=stop_after_attempt(policy.attempts) | stop_before_delay(budget) | _Unanswered(policy.unanswered),
        wait=wait,
        before_sleep=log,
        reraise=True,
    )
    try:
        return retrying(act, time.monotonic() + budget)
    except Retry as again:
        raise again.error(what) from again.__cause__


class _Unanswered(stop_base):
    """Stops when so many attempts had no answer at all."""

    def __init__(self, most: int) -> None:
        self._left = most

    def __call__(self, retry_state: RetryCallState) -> bool:
        again = _failure(retry_state)
        self._left -= bool(again and again.unanswered)
        return self._left <= 0


def _failure(state: RetryCallState) -> Retry | None:
    error = state.outcome.exception() if state.outcome else None
    return error if isinstance(error, Retry) else None
