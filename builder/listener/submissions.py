"""Versions that were asked for: each waits once, and a few threads work them off."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from builder.errors import BuilderError, Defect, ServiceUnavailable
from builder.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from builder.batch import Result
    from builder.listener.deliveries import Event, Kind

_THREADS = 4
_MOST_WAITING = 10_000
# How often something that was promised is tried while a service is away, and the longest pause between, in seconds.
_MOST_TRIES = 12
_LONGEST_PAUSE = 60.0
# Seconds for which a service that was away counts as away, and after which it is looked again whether there is room.
_AWAY = 10.0
_LOOK = 10.0
_log = get_logger("listener")


class Full(Exception):
    """Too many versions wait already."""


Key = tuple[bool, str, str]


@dataclass(kw_only=True, eq=False)
class Ticket:
    """What one request hears of its version.

    Attributes:
        key: of its event.
        outcome: the result of the work, or its error.
        promised: whether the caller was told that the work will be done.
        left: whether the work has failed, and is not tried again for this ticket.
    """

    key: Key
    promised: bool
    left: bool = False
    outcome: Future[Result] = field(default_factory=Future)


@dataclass(kw_only=True)
class _Entry:
    event: Event
    tickets: list[Ticket]
    tries: int = 0
    not_before: float = 0.0


class Submissions:
    """A queue in which each version is at most once. Thread-safe.

    Args:
        work: what is done for an event; it raises what our errors are.
        room: whether an event may be served now, by its kind and the number of those that are being served.
        threads: that work.
        most: the number of versions that may wait.
    """

    def __init__(
        self,
        work: Callable[[Event], Result],
        *,
        room: Callable[[Kind, int], bool] = lambda _kind, _working: True,
        threads: int = _THREADS,
        most: int = _MOST_WAITING,
    ) -> None:
        self._work = work
        self._room = room
        self._threads = threads
        self._most = most
        self._waiting: OrderedDict[Key, _Entry] = OrderedDict()
        self._working: set[Key] = set()
        self._condition = threading.Condition()
        self._ending = False
        self._away: tuple[float, BuilderError] | None = None

    def start(self) -> None:
        """Begin to work, in threads that end with the process."""
        for number in range(self._threads):
            threading.Thread(target=self._run, name=f"submit-{number}", daemon=True).start()

    @property
    def away(self) -> BuilderError | None:
        """The error of the last work, if a service was away a moment ago; None if it answered, or nobody has asked."""
        away = self._away
        return away[1] if away and time.monotonic() - away[0] < _AWAY else None

    @property
    def waiting(self) -> int:
        """How many versions wait or are worked on."""
        with self._condition:
            return len(self._waiting) + len(self._working)

    def offer(self, event: Event, *, promised: bool = False) -> Ticket:
        """Have something done for a version, and return where its outcome will be.

        Args:
            event: what; a version that waits already waits once.
            promised: nobody waits for the outcome.

        Raises:
            Full: too many versions wait.
        """
        ticket = Ticket(key=event.key, promised=promised)
        with self._condition:
            entry = self._waiting.get(event.key)
            if entry is None:
                # What is made ahead of time leaves places for what was asked for.
                most = self._most // 2 if event.kind == "warm" else self._most
                if len(self._waiting) >= most or self._ending:
                    raise Full
                entry = self._waiting[event.key] = _Entry(event=event, tickets=[])
                if event.kind == "ended":
                    # It has waited for its turn once.
                    self._waiting.move_to_end(event.key, last=False)
            else:
                entry.event = _both(entry.event, event)
            if not (promised and any(each.promised for each in entry.tickets)):
                entry.tickets.append(ticket)
            entry.not_before = 0.0
            self._condition.notify()
        return ticket

    def promise(self, ticket: Ticket) -> bool:
        """Return whether the work of a ticket will be done, which its caller may be told then."""
        with self._condition:
            if ticket.left:
                return False
            entry = self._waiting.get(ticket.key)
            if entry and ticket in entry.tickets and any(each.promised for each in entry.tickets):
                # One is enough, however often somebody asks while there is no room.
                entry.tickets.remove(ticket)
            ticket.promised = True
            return True

    def withdraw(self, ticket: Ticket) -> None:
        """Leave the work of a ticket whose caller is told to try again, unless others wait for it, too."""
        with self._condition:
            entry = self._waiting.get(ticket.key)
            if entry and ticket in entry.tickets:
                entry.tickets.remove(ticket)
                if not entry.tickets:
                    del self._waiting[ticket.key]

    def room_again(self) -> None:
        """Look again whether there is room: a Job has ended."""
        with self._condition:
            self._condition.notify_all()

    def close(self, seconds: float) -> int:
        """Take nothing more, go on for some seconds with what waits, and return how many versions are left."""
        deadline = time.monotonic() + seconds
        with self._condition:
            self._ending = True
            self._condition.notify_all()
            while (remaining := deadline - time.monotonic()) > 0 and (self._working or self._ready() is not None):
                self._condition.wait(min(remaining, 1.0))
            return len(self._waiting) + len(self._working)

    def _run(self) -> None:
        while True:
            with self._condition:
                while (entry := self._ready()) is None:
                    self._condition.wait(self._pause())
                key = entry.event.key
                del self._waiting[key]
                self._working.add(key)
            try:
                self._serve(entry)
            finally:
                with self._condition:
                    self._working.discard(key)
                    self._condition.notify_all()

    def _ready(self) -> _Entry | None:
        """Return the entry that is worked on next: what was asked for comes before what is made ahead of time."""
        if not self._waiting:
            return None
        now, working = time.monotonic(), len(self._working)
        room = {kind: self._room(kind, working) for kind in ("publish", "warm")}
        later = None
        for key, entry in self._waiting.items():
            warm = entry.event.kind == "warm"
            if entry.not_before > now or key in self._working or not room["warm" if warm else "publish"]:
                continue
            if not warm:
                return entry
            later = later or entry
            if not room["publish"]:
                break
        return later

    def _pause(self) -> float | None:
        """Return the seconds until it is looked again whether something can be done; None while nothing waits."""
        if not self._waiting:
            return None
        now = time.monotonic()
        later = (entry.not_before - now for entry in self._waiting.values() if entry.not_before > now)
        return min(*later, _LOOK, _LOOK)

    def _serve(self, entry: _Entry) -> None:
        event = entry.event
        facts = {"model": event.name, "version": event.version}
        try:
            result = self._work(event)
        except BuilderError as error:
            self._away = (time.monotonic(), error) if isinstance(error, ServiceUnavailable) else None
            _log.warning("nothing was submitted", **facts, error=error.one_line())
            for ticket in self._left(entry, again=error.retryable):
                ticket.outcome.set_exception(error)
        except Exception as error:  # noqa: BLE001 - a defect of one version's work stops no other
            _log.exception("defect", **facts)
            for ticket in self._left(entry, again=False):
                ticket.outcome.set_exception(Defect(type(error).__name__))
        else:
            self._away = None
            _log.info(result.state, **facts, detail=result.detail)
            for ticket in entry.tickets:
                ticket.outcome.set_result(result)

    def _left(self, entry: _Entry, *, again: bool) -> list[Ticket]:
        """Have promised work tried again, if it may be; return the tickets for which it has failed."""
        with self._condition:
            tries = entry.tries + 1
            again = again and tries < _MOST_TRIES and not self._ending
            promised = [ticket for ticket in entry.tickets if again and ticket.promised]
            left = [ticket for ticket in entry.tickets if ticket not in promised]
            for ticket in left:
                ticket.left = True
            newer = self._waiting.get(entry.event.key)
            if promised and newer:
                newer.event = _both(entry.event, newer.event)
                newer.tickets += promised
            elif promised:
                pause = time.monotonic() + min(2.0 ** (tries - 1), _LONGEST_PAUSE)
                waits = _Entry(event=entry.event, tickets=promised, tries=tries, not_before=pause)
                self._waiting[entry.event.key] = waits
        return left


def _both(earlier: Event, later: Event) -> Event:
    """Return one event for two of a version: what somebody asked for is not lost in what a machine noticed."""
    return earlier if earlier.again and not later.again else later
