"""Trying again: what is worth it, how long to wait, and when it is enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TypeVar

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

from builder.errors import BuilderError
from builder.images.answers import Answer, refusal, told
from builder.log import get_logger

_log = get_logger("registry")
# A server that does not know what it was asked will not know it later either.
_FINAL = frozenset({HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.HTTP_VERSION_NOT_SUPPORTED})

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
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


class Again(Exception):
    """An attempt failed in a way that may pass; it never leaves this package.

    Args:
        failure: the answer that says so, or the error where there was no answer.
        unanswered: whether the request was accepted, and an answer did not begin in time.
    """

    def __init__(self, failure: Answer | BuilderError, *, unanswered: bool = False) -> None:
        super().__init__("an attempt failed")
        self.failure = failure
        self.unanswered = unanswered

    @property
    def retry_after(self) -> float | None:
        """The seconds that the server asks to wait; None where it does not say."""
        return retry_after(self.failure.headers.get("Retry-After", "")) if isinstance(self.failure, Answer) else None

    def error(self, what: str) -> BuilderError:
        """Return the error for when it did not pass; `what` is the beginning of a sentence."""
        return refusal(what, self.failure) if isinstance(self.failure, Answer) else self.failure


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


def patiently(what: str, act: Callable[[float], Result], *, patience: Patience, seconds: float | None = None) -> Result:
    """Return what `act` returns, trying again while it raises `Again`.

    Args:
        what: what is done and on what, the beginning of a sentence for the log and the error.
        act: does it; is given the time, as of `time.monotonic`, at which it has to be over.
        patience: how long to go on.
        seconds: for all attempts together, where it is not `patience.deadline`.

    Raises:
        BuilderError: it did not pass.
    """
    budget = patience.deadline if seconds is None else seconds
    backoff = wait_exponential(multiplier=patience.first, max=patience.longest) + wait_random(0, patience.first)

    def wait(state: RetryCallState) -> float:
        again = _failure(state)
        asked = again.retry_after if again else None
        return backoff(state) if asked is None else min(asked, patience.longest)

    def log(state: RetryCallState) -> None:
        again = _failure(state)
        why = told(again.failure) if again and isinstance(again.failure, Answer) else again and str(again.failure)
        seconds = state.next_action.sleep if state.next_action else 0
        _log.warning("trying again", what=what, why=why, attempt=state.attempt_number, seconds=round(seconds, 1))

    retrying = Retrying(
        sleep=patience.sleep,
        retry=retry_if_exception_type(Again),
        stop=stop_after_attempt(patience.attempts) | stop_before_delay(budget) | _Unanswered(patience.unanswered),
        wait=wait,
        before_sleep=log,
        reraise=True,
    )
    try:
        return retrying(act, time.monotonic() + budget)
    except Again as again:
        raise again.error(what) from again.__cause__


class _Unanswered(stop_base):
    """Stops when so many attempts had no answer at all."""

    def __init__(self, most: int) -> None:
        self._left = most

    def __call__(self, retry_state: RetryCallState) -> bool:
        again = _failure(retry_state)
        self._left -= bool(again and again.unanswered)
        return self._left <= 0


def _failure(state: RetryCallState) -> Again | None:
    error = state.outcome.exception() if state.outcome else None
    return error if isinstance(error, Again) else None
