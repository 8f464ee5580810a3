"""The queue: each version once, what was promised is done, and what was not is told."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from builder.batch import Result
from builder.errors import InvalidVersion, ServiceUnavailable, TryAgain
from builder.listener import submissions
from builder.listener.deliveries import Event
from builder.listener.submissions import Full, Submissions
from tests.waiting import HANG, until


def event(number: int = 1, kind: str = "publish", *, again: bool = False) -> Event:
    return Event(kind=kind, name="pump", version=str(number), again=again)


class Work:
    """Work that a test lets go on, and that fails where the test says so."""

    def __init__(self) -> None:
        self.done: list[Event] = []
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.failures: list[Exception] = []
        self._lock = threading.Lock()

    def __call__(self, asked: Event) -> Result:
        self.begun.release()
        assert self.gate.wait(HANG)
        with self._lock:
            self.done.append(asked)
            if self.failures:
                raise self.failures.pop()
        return Result(name=str(asked.version), state="submitted")


@pytest.fixture
def work():
    return Work()


def result(ticket):
    return ticket.outcome.result(HANG)


def test_a_version_waits_once_however_many_ask(work):
    queue = Submissions(work, threads=1)
    queue.start()
    first = queue.offer(event(0))
    assert work.begun.acquire(timeout=HANG)
    tickets = [queue.offer(event(number)) for number in (1, 2, 1, 2, 1)]
    # What is asked for while it is worked on is looked at again: it may have changed since.
    again = queue.offer(event(0))
    assert queue.waiting == 4
    work.gate.set()
    assert {result(ticket).state for ticket in (first, again, *tickets)} == {"submitted"}
    assert Counter(each.version for each in work.done) == {"0": 2, "1": 1, "2": 1}


def test_a_version_whose_job_has_ended_comes_before_those_that_have_had_none(work):
    queue = Submissions(work, threads=1)
    queue.start()
    queue.offer(event(0))
    assert work.begun.acquire(timeout=HANG)
    tickets = [queue.offer(each) for each in (event(1), event(2), event(3, "ended"))]
    work.gate.set()
    assert {result(ticket).state for ticket in tickets} == {"submitted"}
    assert [each.version for each in work.done] == ["0", "3", "1", "2"]


def test_two_threads_never_work_on_one_version(work):
    queue = Submissions(work, threads=4)
    queue.start()
    one = queue.offer(event())
    assert work.begun.acquire(timeout=HANG)
    other, third = queue.offer(event()), queue.offer(event(2))
    # The third begins beside the first; the second waits for the first.
    assert work.begun.acquire(timeout=HANG)
    assert queue.waiting == 3
    work.gate.set()
    result(one), result(other), result(third)
    assert sorted(each.version for each in work.done) == ["1", "1", "2"]


def test_what_was_asked_for_comes_before_what_is_made_ahead_of_time(work):
    queue = Submissions(work, threads=1)
    tickets = [queue.offer(event(1, "warm")), queue.offer(event(2, "warm")), queue.offer(event(3))]
    work.gate.set()
    queue.start()
    for ticket in tickets:
        result(ticket)
    assert [each.version for each in work.done] == ["3", "1", "2"]


def test_a_request_of_a_person_is_not_lost_in_one_of_a_machine(work):
    queue = Submissions(work, threads=1)
    ticket = queue.offer(event(again=True))
    queue.offer(event(kind="look"))
    work.gate.set()
    queue.start()
    result(ticket)
    assert [each.again for each in work.done] == [True]


def test_there_is_a_bound(work):
    queue = Submissions(work, threads=1, most=2)
    queue.offer(event(1))
    queue.offer(event(2))
    queue.offer(event(2))
    with pytest.raises(Full):
        queue.offer(event(3))


def test_who_waits_hears_of_the_failure_and_the_work_is_left(work, monkeypatch):
    monkeypatch.setattr(submissions, "_AWAY", HANG)
    queue = Submissions(work, threads=1)
    work.failures = [ServiceUnavailable("MLflow is away.")]
    work.gate.set()
    queue.start()
    ticket = queue.offer(event())
    with pytest.raises(ServiceUnavailable):
        result(ticket)
    assert isinstance(queue.away, ServiceUnavailable)
    assert queue.close(HANG) == 0
    assert len(work.done) == 1


def test_what_was_promised_is_tried_again(work):
    queue = Submissions(work, threads=1)
    work.failures = [ServiceUnavailable("MLflow is away.")]
    queue.start()
    promised = queue.offer(event())
    assert work.begun.acquire(timeout=HANG)
    assert queue.promise(promised)
    work.gate.set()
    assert result(promised).state == "submitted"
    assert len(work.done) == 2
    assert queue.away is None


def test_what_cannot_succeed_is_not_tried_again(work):
    queue = Submissions(work, threads=1)
    work.failures = [InvalidVersion("It has no model.")]
    work.gate.set()
    queue.start()
    ticket = queue.offer(event(), promised=True)
    with pytest.raises(InvalidVersion):
        result(ticket)
    assert queue.close(HANG) == 0
    assert len(work.done) == 1


def test_a_defect_of_one_version_stops_no_other(work):
    queue = Submissions(work, threads=1)
    work.failures = [KeyError("x")]
    work.gate.set()
    queue.start()
    with pytest.raises(Exception, match="KeyError"):
        result(queue.offer(event(1)))
    assert result(queue.offer(event(2))).state == "submitted"


def test_who_gave_up_before_it_began_leaves_nothing_behind(work):
    queue = Submissions(work, threads=1)
    alone, shared, other = queue.offer(event(1)), queue.offer(event(2)), queue.offer(event(2))
    queue.withdraw(alone)
    queue.withdraw(shared)
    assert queue.waiting == 1
    work.gate.set()
    queue.start()
    assert result(other).state == "submitted"
    assert [each.version for each in work.done] == ["2"]


def test_without_room_nothing_is_done_until_there_is(work):
    room = threading.Event()
    queue = Submissions(work, room=lambda _kind, _working: room.is_set(), threads=2)
    work.gate.set()
    queue.start()
    ticket = queue.offer(event())
    # What waits for room is no reason to go on.
    assert queue.close(0.0) == 1
    assert not ticket.outcome.done()
    room.set()
    queue.room_again()
    assert result(ticket).state == "submitted"


def test_room_counts_what_is_worked_on(work):
    queue = Submissions(work, room=lambda _kind, working: working < 2, threads=4)
    queue.start()
    tickets = [queue.offer(event(number)) for number in range(3)]
    assert work.begun.acquire(timeout=HANG)
    assert work.begun.acquire(timeout=HANG)
    assert not work.begun.acquire(timeout=0.2)
    work.gate.set()
    for ticket in tickets:
        result(ticket)


def test_the_end_waits_for_what_was_promised_and_takes_nothing_more(work):
    queue = Submissions(work, threads=1)
    queue.start()
    tickets = [queue.offer(event(number), promised=True) for number in range(3)]
    assert work.begun.acquire(timeout=HANG)
    work.gate.set()
    assert queue.close(HANG) == 0
    assert all(ticket.outcome.done() for ticket in tickets)
    with pytest.raises(Full):
        queue.offer(event(9))


def test_what_has_failed_already_is_not_promised(work):
    queue = Submissions(work, threads=1)
    work.failures = [TryAgain("The Job is deleted all the time.")]
    work.gate.set()
    queue.start()
    ticket = queue.offer(event())
    with pytest.raises(TryAgain):
        result(ticket)
    assert not queue.promise(ticket)
    until(lambda: queue.waiting == 0)


def test_asking_again_and_again_without_room_takes_no_memory(work):
    queue = Submissions(work, room=lambda _kind, _working: False)
    for _ in range(1000):
        assert queue.promise(queue.offer(event()))
    (entry,) = queue._waiting.values()
    assert len(entry.tickets) == 1


def test_what_is_made_ahead_of_time_leaves_places(work):
    queue = Submissions(work, most=4)
    for number in range(2):
        queue.offer(event(number, "warm"))
    with pytest.raises(Full):
        queue.offer(event(2, "warm"))
    queue.offer(event(3))


def test_room_is_asked_for_by_kind(work):
    queue = Submissions(work, room=lambda kind, _working: kind != "warm", threads=1)
    work.gate.set()
    queue.start()
    warm, asked = queue.offer(event(1, "warm")), queue.offer(event(2))
    assert result(asked).state == "submitted"
    assert not warm.outcome.done()


def test_a_service_that_was_away_long_ago_does_not_count(work, monkeypatch):
    monkeypatch.setattr(submissions, "_AWAY", HANG)
    queue = Submissions(work, threads=1)
    work.failures = [ServiceUnavailable("MLflow is away.")]
    work.gate.set()
    queue.start()
    with pytest.raises(ServiceUnavailable):
        result(queue.offer(event()))
    assert queue.away
    monkeypatch.setattr(submissions, "_AWAY", 0.0)
    assert queue.away is None


def test_a_wish_that_is_tried_again_stays_a_wish(work):
    queue = Submissions(work, threads=1)
    work.failures = [ServiceUnavailable("MLflow is away.")]
    queue.start()
    wish = queue.offer(event(again=True), promised=True)
    assert work.begun.acquire(timeout=HANG)
    noticed = queue.offer(event(kind="ended"), promised=True)
    work.gate.set()
    result(wish), result(noticed)
    assert [each.again for each in work.done] == [True, True]
