"""Servers as Pods see them: through proxies that hold a request, so that a Pod waits in a phase until a test has acted."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.servers.forwarding import Asked, Forwarding, Reply, Rule
from tests.waiting import LONG_HANG

# A path that no server has: what asks for it waits for the test and nothing else.
HELD = "/held/"


@dataclass
class Hold:
    """The first request that matches a pattern, which waits at the gate.

    Attributes:
        pattern: of the method and the path, `PUT /v2/…`.
    """

    pattern: re.Pattern[str]
    _taken: bool = False
    _arrived: threading.Event = field(default_factory=threading.Event)
    _decided: threading.Event = field(default_factory=threading.Event)
    _released: bool = False

    def wait(self) -> None:
        """Wait until the request is there."""
        assert self._arrived.wait(LONG_HANG), f"no request {self.pattern.pattern}"

    def release(self) -> None:
        """Hand the request on."""
        self._released = True
        self._decided.set()

    def drop(self) -> None:
        """Break the connection: the request is never handed on."""
        self._decided.set()

    def take(self, request: str) -> bool:
        """Take a request if it is the first one that matches."""
        if self._taken or self._decided.is_set() or not self.pattern.search(request):
            return False
        self._taken = True
        return True

    def pause(self, gone: Callable[[], bool]) -> None:
        """Wait in place of the request.

        Raises:
            ConnectionError: it was dropped, or its client has gone meanwhile.
        """
        self._arrived.set()
        if not self._decided.wait(LONG_HANG) or not self._released or gone():
            raise ConnectionError


@dataclass
class Gate:
    """What Pods pass on their way to MLflow and to the registry.

    Attributes:
        mlflow: the proxy before MLflow.
        registry: the proxy before the registry.
        rule: what else is to be done with a request that is not held.
    """

    mlflow: Forwarding
    registry: Forwarding
    rule: Rule = lambda _asked: None
    _holds: list[Hold] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.mlflow.rule = self.registry.rule = self._look

    @contextlib.contextmanager
    def hold(self, pattern: str) -> Iterator[Hold]:
        """Hold the first request whose `METHOD PATH` matches; it is dropped at the end if it still waits."""
        hold = Hold(re.compile(pattern))
        with self._lock:
            self._holds.append(hold)
        try:
            yield hold
        finally:
            with self._lock:
                self._holds.remove(hold)
            hold.drop()

    def held_url(self, name: str) -> str:
        """Return a URL that answers when `hold` lets it."""
        return f"http://{self.mlflow.host}{HELD}{name}"

    def tagged(self, path: str) -> int:
        """Return how often a tag was moved, by the end of its path, as `pump/manifests/v1`."""
        return sum(
            each.method == "PUT" and each.path.endswith(path) and each.status < 300 for each in self.registry.seen
        )

    def _look(self, asked: Asked) -> Reply | str | None:
        request = f"{asked.method} {asked.path}"
        with self._lock:
            hold = next((each for each in self._holds if each.take(request)), None)
        if hold:
            hold.pause(asked.gone)
        if asked.path.startswith(HELD):
            return 200, {}, b""
        return self.rule(asked)
